"""Owns the cases of starting: Pool(2) to its first result under each start method, and what the import costs.

It never warms anything up: each sample is the first of its process. Loaded by the registry.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks import tasks
from benchmarks.clock import expect
from benchmarks.registry import Bar, Metric, Sample, case
from benchmarks.targets import CannotDo, NotHere, module, start_pool

TO_FIRST = Metric("ms", "to the first result", "ms")
TARGETS = ("dpool", "stdlib")
PACKAGES = {"dpool": "dpool.multiprocessing", "stdlib": "multiprocessing"}


def first_result_ms(target: str, method: str) -> float:
    package = PACKAGES[target]
    module(f"{package}.pool")
    start = time.perf_counter()
    pool = start_pool(package, method)
    got = pool.apply(tasks.noop, (1,))
    took = time.perf_counter() - start
    expect(1, got)
    pool.terminate()
    pool.join()
    return took * 1e3


@case("start.fork", "Pool(2) to its first result, fork", TO_FIRST, targets=TARGETS, bars=(Bar("ms", 1.2),))
def fork(target: str, quick: bool) -> Sample:
    return {"ms": first_result_ms(target, "fork")}


@case("start.forkserver", "Pool(2) to its first result, forkserver", TO_FIRST, targets=TARGETS, bars=(Bar("ms", 1.2),))
def forkserver(target: str, quick: bool) -> Sample:
    return {"ms": first_result_ms(target, "forkserver")}


@case("start.spawn", "Pool(2) to its first result, spawn", TO_FIRST, targets=TARGETS, bars=(Bar("ms", 1.2),))
def spawn(target: str, quick: bool) -> Sample:
    return {"ms": first_result_ms(target, "spawn")}


IMPORTED = {
    "dpool": "dpool.multiprocessing.pool",
    "stdlib": "multiprocessing.pool",
    "loky": "loky",
    "mpire": "mpire",
    "ray": "ray.util.multiprocessing",
    "dask": "distributed",
}


@case(
    "start.import",
    "import of the module that has the Pool",
    Metric("ms", "the import", "ms"),
    targets=tuple(IMPORTED),
    bars=(Bar("ms", 1.5),),
)
def import_time(target: str, quick: bool) -> Sample:
    name = IMPORTED.get(target)
    if name is None:
        raise CannotDo(f"{target} has no module of its own")
    program = f"import time; start = time.perf_counter(); import {name}; print(time.perf_counter() - start)"
    times = []
    # The first is not counted: it may compile, and reads the files from disk.
    for _ in range(4 if quick else 10):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1]
            raise NotHere(last) if f"No module named '{name.partition('.')[0]}" in last else RuntimeError(last)
        times.append(float(done.stdout.split()[-1]))
    return {"ms": statistics.median(times[1:]) * 1e3}
