"""Owns the cases of the Executor and asyncio doors: submit, map, and awaits through an event loop.

It never uses anything of an executor that concurrent.futures does not promise. Loaded by the registry.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import Any

from benchmarks import tasks
from benchmarks.clock import expect, round_trip_us, seconds
from benchmarks.registry import Bar, Metric, Sample, case
from benchmarks.targets import ASYNCIO, EXECUTORS, WORKERS, attribute, module, open_executor

A_TASK = Metric("us", "a task", "µs")


def many(quick: bool) -> int:
    return 2_000 if quick else 10_000


@case(
    "executor.submit",
    "submit().result(), one round trip",
    Metric("us", "a call", "µs"),
    targets=EXECUTORS,
    bars=(Bar("us", 0.5),),
)
def submit_round_trip(target: str, quick: bool) -> Sample:
    with open_executor(target) as executor:
        return {"us": round_trip_us(lambda: executor.submit(tasks.noop, 1).result(), quick)}


@case("executor.submit_many", "10k submit, then every result", A_TASK, targets=EXECUTORS, bars=(Bar("us", 0.15),))
def submit_many(target: str, quick: bool) -> Sample:
    with open_executor(target) as executor:

        def once(count: int) -> list[int]:
            return [f.result() for f in [executor.submit(tasks.noop, i) for i in range(count)]]

        expect(list(range(200)), once(200))
        return {"us": seconds(lambda: once(many(quick)), quick) / many(quick) * 1e6}


@case("executor.map", "Executor.map of 10k", A_TASK, targets=EXECUTORS, bars=(Bar("us", 0.15),))
def executor_map(target: str, quick: bool) -> Sample:
    with open_executor(target) as executor:
        expect(list(range(200)), list(executor.map(tasks.noop, range(200))))
        return {"us": seconds(lambda: list(executor.map(tasks.noop, range(many(quick)))), quick) / many(quick) * 1e6}


async def awaits(executor: Executor, count: int) -> list[Any]:
    loop = asyncio.get_running_loop()
    return await asyncio.gather(*(loop.run_in_executor(executor, tasks.noop, i) for i in range(count)))


@case("asyncio.executor", "10k awaits of run_in_executor", A_TASK, targets=ASYNCIO, bars=(Bar("us", 0.3),))
def run_in_executor(target: str, quick: bool) -> Sample:
    with open_executor(target) as executor:
        expect(list(range(200)), asyncio.run(awaits(executor, 200)))
        return {"us": seconds(lambda: asyncio.run(awaits(executor, many(quick))), quick) / many(quick) * 1e6}


@case(
    "asyncio.native",
    "10k awaits of dpool.asyncio's own Pool",
    A_TASK,
    targets=("dpool", "stdlib"),
    bars=(Bar("us", 0.3),),
)
def native(target: str, quick: bool) -> Sample:
    if target != "dpool":
        return run_in_executor(target, quick)
    opened = attribute("Pool", module("dpool.asyncio"))

    async def measured() -> float:
        async with opened(WORKERS) as pool:

            async def once(count: int) -> list[Any]:
                return await asyncio.gather(*(pool.run(tasks.noop, i) for i in range(count)))

            expect(list(range(200)), await once(200))
            loop = asyncio.get_running_loop()
            times = []
            for _ in range(1 if quick else 3):
                start = loop.time()
                await once(many(quick))
                times.append(loop.time() - start)
            return sorted(times)[len(times) // 2]

    return {"us": asyncio.run(measured()) / many(quick) * 1e6}
