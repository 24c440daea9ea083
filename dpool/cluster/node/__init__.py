"""The node: starts workers, sees them end, and replaces them. The supervisor decides; the workers room acts."""
