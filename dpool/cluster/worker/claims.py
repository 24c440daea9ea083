"""A counter of unbegun tasks on a descriptor, for workers that are not forked by the process that counts.

Each step is one system call and atomic; there is nothing to unlink and no lock that the dead could hold. Made by the
node, used by the worker and, to take tasks back, by the node.
"""

from __future__ import annotations

import os


class Claims:
    """Has the two methods of a semaphore that workers use. Owns its descriptor."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)

    def release(self, count: int = 1) -> None:
        """`count` more tasks may be claimed."""
        os.eventfd_write(self.descriptor, count)

    def acquire(self, block: bool = False) -> bool:
        """Claim one; False if none is left. Never blocks."""
        try:
            os.eventfd_read(self.descriptor)
        except BlockingIOError:
            return False
        return True
