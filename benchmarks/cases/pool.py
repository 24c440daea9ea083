"""Owns the cases of the Pool door with small tasks: round trips, many tasks, maps, one-millisecond tasks, a million.

It never measures start-up or large values (start.py, large.py). Loaded by the registry.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable

from benchmarks import tasks
from benchmarks.clock import expect, peak_mb, resident_mb, round_trip_us, seconds
from benchmarks.registry import Bar, Metric, Sample, case
from benchmarks.targets import POOLS, WORKERS, CannotDo, open_pool

A_TASK = Metric("us", "a task", "µs")


@case(
    "pool.apply",
    "apply, one round trip",
    Metric("us", "a call", "µs"),
    Metric("of_bare", "of a byte there and back", "times", ratio=False),
    targets=POOLS,
    bars=(Bar("us", 0.5),),
)
def apply_round_trip(target: str, quick: bool) -> Sample:
    bare_us = bare_round_trip_us(quick)  # with no thread here yet
    with open_pool(target) as pool:
        took_us = round_trip_us(lambda: pool.apply(tasks.noop, 1), quick)
        return {"us": took_us, "of_bare": took_us / bare_us}


def bare_round_trip_us(quick: bool) -> float:
    """What two processes take that send each other a byte: what waking a process costs this machine, now."""
    near, far = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            near.close()
            while byte := far.recv(1):
                far.send(byte)
        finally:
            os._exit(0)
    far.close()

    def there_and_back() -> bytes:
        near.send(b"1")
        return near.recv(1)

    try:
        return round_trip_us(there_and_back, quick)
    finally:
        near.close()
        os.waitpid(pid, 0)


@case("pool.apply_async", "10k apply_async, then every get", A_TASK, targets=POOLS, bars=(Bar("us", 0.2),))
def apply_async_many(target: str, quick: bool) -> Sample:
    count = 2_000 if quick else 10_000
    with open_pool(target) as pool:
        expect(list(range(200)), pool.apply_many(tasks.noop, range(200)))
        return {"us": seconds(lambda: pool.apply_many(tasks.noop, range(count)), quick) / count * 1e6}


@case("pool.map_one", "map of 20k, chunksize=1", A_TASK, targets=POOLS, bars=(Bar("us", 0.2),))
def map_one_by_one(target: str, quick: bool) -> Sample:
    count = 4_000 if quick else 20_000
    with open_pool(target) as pool:
        expect(list(range(200)), pool.map(tasks.noop, range(200), 1))
        return {"us": seconds(lambda: pool.map(tasks.noop, range(count), 1), quick) / count * 1e6}


@case("pool.map_lists", "the same, and each gives a list", A_TASK, targets=POOLS, bars=(Bar("us", 0.2),))
def map_lists_one_by_one(target: str, quick: bool) -> Sample:
    """A result that can change is pickled before the next task begins."""
    count = 4_000 if quick else 20_000
    with open_pool(target) as pool:
        expect([[i] for i in range(200)], pool.map(tasks.listed, range(200), 1))
        return {"us": seconds(lambda: pool.map(tasks.listed, range(count), 1), quick) / count * 1e6}


@case("pool.unordered", "imap_unordered of 20k, chunksize=1", A_TASK, targets=POOLS, bars=(Bar("us", 0.25),))
def unordered_one_by_one(target: str, quick: bool) -> Sample:
    count = 4_000 if quick else 20_000
    with open_pool(target) as pool:
        expect(list(range(200)), sorted(pool.unordered(tasks.noop, range(200))))
        return {"us": seconds(lambda: list(pool.unordered(tasks.noop, range(count))), quick) / count * 1e6}


@case("pool.map_default", "map of 100k, default chunksize", A_TASK, targets=POOLS, bars=(Bar("us", 1.0),))
def map_default(target: str, quick: bool) -> Sample:
    count = 20_000 if quick else 100_000
    if target in ("loky", "dask"):
        raise CannotDo("its map has no default chunk but 1")
    with open_pool(target) as pool:
        expect(list(range(200)), pool.map(tasks.noop, range(200), None))
        return {"us": seconds(lambda: pool.map(tasks.noop, range(count), None), quick) / count * 1e6}


def ideal_s(task: Callable[[int], int], count: int) -> float:
    """The time of `count` tasks on WORKERS bare processes that talk to nobody: no pool can be faster."""
    start = time.perf_counter()
    pids = []
    for _ in range(WORKERS):
        pid = os.fork()
        if pid == 0:
            try:
                for i in range(count // WORKERS):
                    task(i)
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    return time.perf_counter() - start


def millisecond_tasks(target: str, quick: bool, task: Callable[[int], int]) -> Sample:
    count = 500 if quick else 2_000
    # Bare processes and the pool by turns, so that both meet the same weather.
    bare, pooled = [], []
    for _ in range(1 if quick else 3):
        bare.append(ideal_s(task, count))
        with open_pool(target) as pool:
            pool.map(task, range(20), 1)
            pooled.append(seconds(lambda: pool.map(task, range(count), 1), quick=True))  # noqa: B023 - called at once
        bare.append(ideal_s(task, count))
        if sum(pooled) > 10:
            break
    return {
        "s": statistics.median(pooled),
        "of_ideal": statistics.median(pooled) / statistics.median(bare),
    }


MILLISECOND = (Metric("s", "in all", "s"), Metric("of_ideal", "of two bare processes", "times", ratio=False))
MILLISECOND_BARS = (Bar("s", 1.0), Bar("of_ideal", 1.05, against=""))
# Ray and Dask cannot be opened again and again within the time, and forking a driver with their threads is not safe.
MILLISECOND_TARGETS = ("dpool", "stdlib", "stdlib-spawn", "loky", "mpire")


@case(
    "pool.sleep_1ms",
    "2,000 tasks that sleep 1 ms, chunksize=1",
    *MILLISECOND,
    targets=MILLISECOND_TARGETS,
    bars=MILLISECOND_BARS,
)
def sleeping(target: str, quick: bool) -> Sample:
    return millisecond_tasks(target, quick, tasks.sleep_1ms)


@case(
    "pool.busy_1ms",
    "2,000 tasks that compute 1 ms, chunksize=1",
    *MILLISECOND,
    targets=MILLISECOND_TARGETS,
    bars=MILLISECOND_BARS,
)
def computing(target: str, quick: bool) -> Sample:
    return millisecond_tasks(target, quick, tasks.busy_1ms)


@case(
    "pool.million",
    "a million tasks, map with chunksize=1",
    A_TASK,
    Metric("of_20k", "time a task, of that at 20k", "times", ratio=False),
    Metric("left_mb", "driver's memory kept afterwards", "MB", ratio=False),
    Metric("peak_mb", "driver's memory at its peak", "MB"),
    targets=("dpool", "stdlib"),
    bars=(Bar("of_20k", 1.2, against=""), Bar("left_mb", 20.0, against="")),
    limit_s=300,
    rounds=2,
)
def million(target: str, quick: bool) -> Sample:
    count = 100_000 if quick else 1_000_000
    with open_pool(target) as pool:
        pool.map(tasks.noop, range(20_000), 1)
        small_us = seconds(lambda: pool.map(tasks.noop, range(20_000), 1)) / 20_000 * 1e6
        before = resident_mb()
        start = time.perf_counter()
        result = pool.map(tasks.noop, range(count), 1)
        us = (time.perf_counter() - start) / count * 1e6
        expect(count * (count - 1) // 2, sum(result))
        del result
        return {"us": us, "of_20k": us / small_us, "left_mb": resident_mb() - before, "peak_mb": peak_mb()}
