"""Descriptors that a worker inherits: passed as arguments of multiprocessing's Process under every start method.

Owns nothing: who made a descriptor closes it. Used by the node to set a worker up, and by the worker to unpack it.
"""

from __future__ import annotations

import os
import socket
from multiprocessing import context, reduction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# What a worker shares with its node, one slot each of these 64-bit words:
SLOT_WORDS = 8
BATCH = 0  # number of the batch it is in, 0 between batches
TASK = 1  # number within the batch of the task it runs or will run next
READY = 2  # 1 once the initializer has returned
# Behind the slots: room for the trace that faulthandler writes when a worker crashes, as text.
TRACE_BYTES = 4096


def page_bytes(slots: int) -> int:
    """The size of the page that a node shares with `slots` workers."""
    return slots * (SLOT_WORDS * 8 + TRACE_BYTES)


def trace_offset(slots: int, slot: int) -> int:
    """Where in the page the crash trace of a worker starts."""
    return slots * SLOT_WORDS * 8 + slot * TRACE_BYTES


class Handle:
    """A descriptor on its way into a new worker: inherited by fork, duplicated by spawn and forkserver."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        context.assert_spawning(self)
        return _rebuild, (reduction.DupFd(self.descriptor),)


def _rebuild(duplicate: Any) -> Handle:
    return Handle(duplicate.detach())


def blocking_socket(descriptor: int) -> socket.socket:
    """A socket object for a descriptor, whatever the program's default timeout for new ones is: that would have it not
    block, and so with every process that shares it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(None)
    try:
        return socket.socket(fileno=descriptor)
    finally:
        socket.setdefaulttimeout(before)


def reopen(descriptor: int, flags: int) -> int:
    """A new open file description of the same pipe or memfd: own offset, own owner for signals. Raises OSError where
    /proc is not mounted."""
    return os.open(f"/proc/self/fd/{descriptor}", flags | os.O_CLOEXEC)
