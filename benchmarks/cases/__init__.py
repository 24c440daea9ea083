"""Owns the cases, one file a family. Each declares its cases with @case, each with the bar dpool has to reach.

They never start processes of their own or print: the runner does. Loaded by registry.load_cases().
"""

FILES = ("pool", "large", "start", "executor", "joblib", "store", "cluster")
"""In the order in which they are run and shown."""
