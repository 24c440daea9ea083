"""Owns the functions that the pools run: plain, importable, doing as little as the case needs.

It never imports dpool or a peer, and nothing heavy at its top: every worker of every target imports this file.
"""

from __future__ import annotations

import time
from typing import Any

MEGABYTE = 1 << 20

_kept: dict[tuple[str, int], Any] = {}


def noop(x: Any) -> Any:
    return x


def listed(x: Any) -> list[Any]:
    return [x]


def sleep_1ms(x: int) -> int:
    time.sleep(0.001)
    return x


def busy_1ms(x: int) -> int:
    """Use one millisecond of this thread's CPU time. Time spent preempted does not count, as with real work."""
    end = time.thread_time_ns() + 1_000_000
    while time.thread_time_ns() < end:
        pass
    return x


def last_byte(data: Any) -> int:
    """Look at one byte only: what is measured is the arrival of the argument."""
    return int(data[-1])


def add_up(data: Any) -> int:
    """Read every byte of a NumPy array."""
    return int(data.view("u8").sum())


def big_array(size: int) -> Any:
    """A NumPy array of `size` bytes. Made once a worker, so that the making is not what is measured."""
    key = ("array", size)
    if key not in _kept:
        import numpy

        _kept[key] = numpy.full(size, 7, dtype="u1")
    return _kept[key]


def big_bytes(size: int) -> bytes:
    """The same as bytes."""
    key = ("bytes", size)
    if key not in _kept:
        _kept[key] = b"\7" * size
    made: bytes = _kept[key]
    return made
