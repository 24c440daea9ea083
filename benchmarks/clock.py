"""Owns how one sample is taken inside a process: warm-up, repetition within a bound, medians, memory.

It never knows what it times. Called by the cases.
"""

from __future__ import annotations

import gc
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any


def round_trip_us(call: Callable[[], Any], quick: bool) -> float:
    """The median time of one call, in µs: of up to 2,000 calls, or as many as two seconds allow."""
    most, enough_s = (300, 1.0) if quick else (2000, 2.0)
    for _ in range(20):
        call()
    times: list[float] = []
    end = time.perf_counter() + enough_s
    while len(times) < most and (now := time.perf_counter()) < end:
        call()
        times.append(time.perf_counter() - now)
    return statistics.median(times) * 1e6


def seconds(call: Callable[[], Any], quick: bool = False) -> float:
    """The median time of one call, in s: of three, or of as many as are begun within three seconds."""
    most, enough_s = (1, 0.0) if quick else (3, 3.0)
    times: list[float] = []
    while len(times) < most and (not times or sum(times) < enough_s):
        start = time.perf_counter()
        kept = call()
        times.append(time.perf_counter() - start)
        del kept  # freeing what came back is not what is measured, and two results at once may not fit
    return statistics.median(times)


def expect(wanted: Any, got: Any) -> None:
    """A fast wrong answer is not a figure."""
    if wanted != got:
        raise AssertionError(f"wrong result: wanted {str(wanted)[:60]}, got {str(got)[:60]}")


def resident_mb() -> float:
    """This process's resident memory, in MB, after a collection."""
    gc.collect()
    with open("/proc/self/statm", "rb") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Growth:
    """How much more memory the machine has in use, at most, than when the `with` block was entered: what processes have
    of their own, and what is shared. `mb` is true after the block."""

    def __init__(self, every_s: float = 0.01) -> None:
        self.mb = 0.0
        self._every_s = every_s
        self._over = threading.Event()

    def _watch(self, before: float) -> None:
        while not self._over.wait(self._every_s):
            self.mb = max(self.mb, _used_mb() - before)

    def __enter__(self) -> Growth:
        gc.collect()
        self._thread = threading.Thread(target=self._watch, args=(_used_mb(),))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _used_mb() -> float:
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    return sum(int(fields[name].split()[0]) for name in ("AnonPages", "Shmem")) * 1024 / 1e6


def peak_mb() -> float:
    """The most this process ever had resident, in MB."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0
