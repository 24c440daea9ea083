"""The cluster under a seeded clock and network: one thread, one random, and every history replays exactly.

Runs the code that runs in production; only links, the clock, the workers and new names are its own. Started by
tests/test_simulation.py and by `python -m tests.simulation`.
"""
