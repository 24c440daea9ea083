"""The command line: `dpool head`, `dpool node` and what goes with them."""
