"""Owns the cases of a pool on two nodes: the same work as pool.py's and large.py's, beside the stdlib's local pool.

All processes are on this machine, and so share its processors: a cluster's own machines would have more. Loaded by the
registry.
"""

from __future__ import annotations

from typing import Any

from benchmarks import tasks
from benchmarks.cases.large import COUNT, arrays
from benchmarks.cases.pool import ideal_s
from benchmarks.clock import expect, round_trip_us, seconds
from benchmarks.registry import Bar, Metric, Sample, case
from benchmarks.targets import CLUSTERS, open_cluster_pool

A_TASK = Metric("us", "a task", "µs")


@case("cluster.apply", "apply, one round trip", Metric("us", "a call", "µs"), targets=CLUSTERS, bars=(Bar("us", 3.0),))
def apply_round_trip(target: str, quick: bool) -> Sample:
    with open_cluster_pool(target) as pool:
        return {"us": round_trip_us(lambda: pool.apply(tasks.noop, 1), quick)}


@case("cluster.apply_async", "10k apply_async, then every get", A_TASK, targets=CLUSTERS,
      bars=(Bar("us", 1.0), Bar("us", 10.0, against=""), Bar("us", 0.02, against="ray"),
            Bar("us", 0.02, against="dask")))
def apply_async_many(target: str, quick: bool) -> Sample:
    count = 2_000 if quick else 10_000
    with open_cluster_pool(target) as pool:
        expect(list(range(200)), pool.apply_many(tasks.noop, range(200)))
        return {"us": seconds(lambda: pool.apply_many(tasks.noop, range(count)), quick) / count * 1e6}


@case("cluster.map_one", "map of 20k, chunksize=1", A_TASK, targets=("dpool", "stdlib"), bars=(Bar("us", 1.0),))
def map_one_by_one(target: str, quick: bool) -> Sample:
    count = 4_000 if quick else 20_000
    with open_cluster_pool(target) as pool:
        expect(list(range(200)), pool.map(tasks.noop, range(200), 1))
        return {"us": seconds(lambda: pool.map(tasks.noop, range(count), 1), quick) / count * 1e6}


@case("cluster.sleep_1ms", "2,000 tasks that sleep 1 ms, chunksize=1", Metric("s", "in all", "s"),
      Metric("of_ideal", "of the ideal", "times", ratio=False), targets=("dpool", "stdlib"),
      bars=(Bar("of_ideal", 1.05, against=""),))
def sleep_1ms(target: str, quick: bool) -> Sample:
    count = 500 if quick else 2_000
    ideal = ideal_s(tasks.sleep_1ms, count)
    with open_cluster_pool(target) as pool:
        pool.map(tasks.sleep_1ms, range(20), 1)
        took = seconds(lambda: pool.map(tasks.sleep_1ms, range(count), 1), quick)
    return {"s": took, "of_ideal": took / ideal}


@case("cluster.arguments", "8 arguments of 64 MB, NumPy arrays", Metric("s", "in all", "s"), targets=CLUSTERS)
def array_arguments(target: str, quick: bool) -> Sample:
    values: list[Any] = arrays(quick)
    with open_cluster_pool(target) as pool:
        expect(list(range(COUNT)), pool.map(tasks.last_byte, values, 1))
        return {"s": seconds(lambda: pool.map(tasks.last_byte, values, 1), quick)}
