"""Owns the cases with large values: 8 arguments and 8 results of 64 MB, as NumPy arrays and as bytes.

It never lets two tasks share one value: each is an object of its own. Loaded by the registry.
"""

from __future__ import annotations

from typing import Any

from benchmarks import tasks
from benchmarks.clock import expect, seconds
from benchmarks.registry import Bar, Metric, Sample, case
from benchmarks.targets import POOLS, module, open_pool

COUNT = 8
IN_ALL = Metric("s", "in all", "s")
BARS = (Bar("s", 0.15), Bar("s", 0.5, against="ray"))


def size(quick: bool) -> int:
    return (16 if quick else 64) * tasks.MEGABYTE


def arrays(quick: bool) -> list[Any]:
    numpy = module("numpy")
    return [numpy.full(size(quick), i, dtype="u1") for i in range(COUNT)]


@case("large.arguments", "8 arguments of 64 MB, NumPy arrays", IN_ALL, targets=POOLS, bars=BARS)
def array_arguments(target: str, quick: bool) -> Sample:
    values = arrays(quick)
    with open_pool(target) as pool:
        expect(list(range(COUNT)), pool.map(tasks.last_byte, values, 1))
        return {"s": seconds(lambda: pool.map(tasks.last_byte, values, 1), quick)}


@case("large.arguments_read", "8 arrays of 64 MB, each read in full", IN_ALL, targets=POOLS)
def array_arguments_read(target: str, quick: bool) -> Sample:
    values = arrays(quick)
    with open_pool(target) as pool:
        expect([tasks.add_up(v) for v in values], pool.map(tasks.add_up, values, 1))
        return {"s": seconds(lambda: pool.map(tasks.add_up, values, 1), quick)}


@case("large.arguments_bytes", "8 arguments of 64 MB, bytes", IN_ALL, targets=POOLS, bars=BARS)
def bytes_arguments(target: str, quick: bool) -> Sample:
    values = [bytes([i]) * size(quick) for i in range(COUNT)]
    with open_pool(target) as pool:
        expect(list(range(COUNT)), pool.map(tasks.last_byte, values, 1))
        return {"s": seconds(lambda: pool.map(tasks.last_byte, values, 1), quick)}


@case("large.results", "8 results of 64 MB, NumPy arrays", IN_ALL, targets=POOLS, bars=BARS)
def array_results(target: str, quick: bool) -> Sample:
    return results(target, quick, tasks.big_array)


@case("large.results_bytes", "8 results of 64 MB, bytes", IN_ALL, targets=POOLS, bars=BARS)
def bytes_results(target: str, quick: bool) -> Sample:
    return results(target, quick, tasks.big_bytes)


def results(target: str, quick: bool, task: Any) -> Sample:
    sizes = [size(quick)] * COUNT
    with open_pool(target) as pool:

        def once() -> list[int]:
            return [int(value[-1]) for value in pool.map(task, sizes, 1)]

        expect([7] * COUNT, once())
        return {"s": seconds(once, quick)}
