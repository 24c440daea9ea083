"""Programs that take a Pool or an Executor, each run with the standard library's and with dpool's, and compared."""
