"""Owns the cases of the object store: dpool.put, get and wait beside Ray's, and beside a warm memcpy.

It never counts the start of an engine. Loaded by the registry.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import tasks
from benchmarks.clock import Growth, expect, seconds
from benchmarks.registry import Bar, Metric, Sample, case
from benchmarks.targets import attribute, module, open_pool, open_ray

STORES = ("dpool", "ray")


@contextmanager
def open_store(target: str) -> Iterator[Any]:
    """Yields the module whose put, get and wait are measured."""
    if target == "ray":
        with open_ray() as ray:
            yield ray
    else:
        dpool = module("dpool")
        for name in ("put", "get", "wait"):
            attribute(name, dpool)
        yield dpool


def big(megabytes: int) -> Any:
    return module("numpy").full(megabytes * tasks.MEGABYTE, 7, dtype="u1")


def each_s(call: Callable[[], Any], count: int) -> float:
    """The median of `count` calls, each result dropped before the next: what it takes once the store is warm."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        kept = call()
        times.append(time.perf_counter() - start)
        del kept
    return statistics.median(times)


@case(
    "store.put",
    "put of a 64 MB array",
    Metric("ms", "a put", "ms"),
    Metric("of_memcpy", "of a warm memcpy", "times", ratio=False),
    targets=STORES,
    reference="ray",
    bars=(Bar("of_memcpy", 1.25, against=""), Bar("ms", 1.0, against="ray")),
)
def put(target: str, quick: bool) -> Sample:
    value = big(64)
    copy = value.copy()
    with open_store(target) as store:
        for _ in range(3):
            store.put(value)
        memcpy = each_s(lambda: copy.__setitem__(slice(None), value), 20)
        took = each_s(lambda: store.put(value), 20)
    return {"ms": took * 1e3, "of_memcpy": took / memcpy}


@case(
    "store.get",
    "get of a 64 MB array",
    Metric("us", "a get", "µs"),
    targets=STORES,
    reference="ray",
    bars=(Bar("us", 0.2, against="ray"), Bar("us", 100.0, against="")),
)
def get(target: str, quick: bool) -> Sample:
    with open_store(target) as store:
        ref = store.put(big(64))
        expect(7, int(store.get(ref)[-1]))
        return {"us": each_s(lambda: store.get(ref), 200) * 1e6}


@case(
    "store.small",
    "10k puts of a small value, then 10k gets",
    Metric("put_us", "a put", "µs"),
    Metric("get_us", "a get", "µs"),
    targets=STORES,
    reference="ray",
    bars=(Bar("put_us", 0.2, against="ray"), Bar("get_us", 0.2, against="ray")),
)
def small(target: str, quick: bool) -> Sample:
    count = 2_000 if quick else 10_000
    with open_store(target) as store:
        [store.put(i) for i in range(100)]
        start = time.perf_counter()
        refs = [store.put(i) for i in range(count)]
        between = time.perf_counter()
        values = [store.get(ref) for ref in refs]
        end = time.perf_counter()
    expect(list(range(count)), values)
    return {"put_us": (between - start) / count * 1e6, "get_us": (end - between) / count * 1e6}


@case(
    "store.shared",
    "one array of 256 MB to 1,000 tasks",
    Metric("s", "in all", "s"),
    targets=STORES,
    reference="ray",
    bars=(Bar("s", 0.5, against="ray"),),
)
def shared(target: str, quick: bool) -> Sample:
    with shared_by_tasks(target, quick) as (_, once):
        once()
        return {"s": seconds(once, quick)}


@case(
    "store.memory",
    "memory for that, in arrays",
    Metric("copies", "at most", "copies", ratio=False),
    targets=STORES,
    reference="ray",
    bars=(Bar("copies", 1.1, against=""),),
)
def memory(target: str, quick: bool) -> Sample:
    """The array of the program's own was there before, and does not count."""
    with shared_by_tasks(target, quick) as (value, once), Growth() as growth:
        once()
    return {"copies": growth.mb * 1e6 / value.nbytes}


@contextmanager
def shared_by_tasks(target: str, quick: bool) -> Iterator[tuple[Any, Callable[[], None]]]:
    """The array, and what puts it once and gives it to each of many tasks."""
    count = 100 if quick else 1_000
    value = big(64 if quick else 256)
    with open_store(target) as store:
        if target == "ray":
            last_byte = store.remote(tasks.last_byte)
            store.get([last_byte.remote(store.put(value[:9])) for _ in range(9)])  # its workers are there

            def once() -> None:
                ref = store.put(value)
                expect([7] * count, store.get([last_byte.remote(ref) for _ in range(count)]))

            yield value, once
            return
        with open_pool(target) as pool:

            def mapped() -> None:
                expect([7] * count, pool.map(tasks.last_byte, [store.put(value)] * count, 1))

            pool.map(tasks.last_byte, [value[:9]] * 9, 1)
            yield value, mapped
