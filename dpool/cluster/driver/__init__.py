"""The driver: owns the tasks of a group until each has one outcome. Dispatch decides; the group acts."""
