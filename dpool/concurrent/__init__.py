"""The package of dpool.concurrent.futures, as the standard library's `concurrent` is that of its own. Holds nothing else."""
