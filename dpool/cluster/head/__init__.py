"""The head: knows which nodes exist and where groups are placed. Not on the path of tasks or objects."""
