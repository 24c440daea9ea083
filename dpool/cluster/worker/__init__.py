"""The worker: runs batches of tasks in a process of its own. Starts fast, imports little."""
