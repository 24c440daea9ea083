"""What crosses a process border, and how it is written down: frames, pickles, functions."""
