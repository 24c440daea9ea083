"""An initializer's large arguments: stored once for all workers that are not forked, each has its own view of them."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from dpool.multiprocessing import get_context
from dpool.multiprocessing.pool import Pool

SIZE = 1 << 22
kept: Any = None


def keep(array: Any, lock: Any, *_: Any) -> None:
    global kept
    with lock:
        kept = array


def inode_and_sum(_task: int) -> tuple[int, int, int]:
    """The worker, the inode of the segment that the array lies in, and what the array holds."""
    address = kept.__array_interface__["data"][0]
    with open("/proc/self/maps") as file:
        for line in file:
            span, *_, inode = line.split()[:5]
            start, stop = (int(end, 16) for end in span.split("-"))
            if start <= address < stop:
                return os.getpid(), int(inode), int(kept.sum())
    raise AssertionError("not mapped")


def change(_: int) -> int:
    kept[0] = 200
    return int(kept[0])


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_all_workers_map_the_same_segment_and_each_may_write(method: str) -> None:
    context = get_context(method)
    array = np.ones(SIZE, np.uint8)
    with Pool(2, keep, (array, context.Lock(), b"x" * SIZE), maxtasksperchild=1, context=context) as pool:
        found = pool.map(inode_and_sum, range(4), chunksize=1)
        assert len({pid for pid, _, _ in found}) == 4
        assert {inode for _, inode, _ in found} == {found[0][1]} != {0}
        assert {total for _, _, total in found} == {SIZE}
        assert pool.apply(change, (0,)) == 200
        assert pool.apply(inode_and_sum, (0,))[2] == SIZE
    assert array[0] == 1
