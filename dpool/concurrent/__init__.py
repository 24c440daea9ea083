"""The package of dpool.concurrent.futures, as `concurrent` is that of the standard library's. Holds nothing else."""
