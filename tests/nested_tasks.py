"""Owns what the tests of nested pools make workers do: tasks that open a door, and what those run.

It imports no pytest, and doors only in those who open one. Used by name, by the tests of clusters.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any


def where(_: object = None) -> tuple[int, int]:
    """Whose child this worker is, its node's, and its pid."""
    return os.getppid(), os.getpid()


def meet(directory: str, count: int) -> tuple[int, int]:
    """Return when so many processes run this, or have."""
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, str(os.getpid())), "w"):
        pass
    while len(os.listdir(directory)) < count:
        time.sleep(0.01)
    return where()


def nested_meeting(directory: str, count: int) -> list[tuple[int, int]]:
    """Where the workers of a pool are that this task opens."""
    from dpool.multiprocessing import Pool

    with Pool(count) as pool:
        return pool.starmap(meet, [(os.path.join(directory, str(os.getpid())), count)] * count, chunksize=1)


def tree(directory: str, widths: list[int]) -> int:
    """How many workers a tree of pools has: `widths` by level. A level goes on when all of its workers are at it."""
    from dpool.multiprocessing import Pool

    if not widths:
        return 0
    here = os.path.join(directory, f"{len(widths)}-{os.getpid()}")
    with Pool(widths[0]) as pool:
        return widths[0] + sum(pool.starmap(_branch, [(here, widths)] * widths[0], chunksize=1))


def _branch(directory: str, widths: list[int]) -> int:
    meet(directory, widths[0])
    return tree(os.path.join(directory, "below"), widths[1:])


def in_a_pool(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a call returns in a pool that this task opens."""
    from dpool.multiprocessing import Pool

    with Pool(1, **options) as pool:
        return pool.apply(function, args)


def map_in_a_pool(function: Callable[..., Any], items: Any) -> Any:
    from dpool.multiprocessing import Pool

    with Pool(2) as pool:
        return pool.map(function, items, chunksize=1)


def processes_of_a_pool() -> int:
    from dpool.multiprocessing import Pool

    pool: Any = Pool()
    with pool:
        deadline = time.monotonic() + 30
        while len(pool._pool) < pool._processes and time.monotonic() < deadline:
            time.sleep(0.01)
        return len(pool._pool)


def driver_of_two_pools() -> set[bytes]:
    """Who drives one pool, and then another."""
    from dpool import session

    found = set()
    for _ in range(2):
        in_a_pool(abs, -1)
        found.add(session.current()._client.id)  # type: ignore[attr-defined]
    return found


def an_executor(count: int) -> list[tuple[int, int]]:
    from dpool.concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(2) as executor:
        return list(executor.map(where, range(count)))


def with_asyncio(count: int) -> list[tuple[int, int]]:
    import asyncio

    from dpool import asyncio as dpool_asyncio

    async def main() -> list[tuple[int, int]]:
        async with dpool_asyncio.Pool(2) as pool:
            return list(await asyncio.gather(*(pool.run(where, value) for value in range(count))))

    return asyncio.run(main())


def with_joblib(count: int) -> tuple[list[tuple[int, int]], int]:
    """Where calls of a Parallel ran, and how many workers it is given for n_jobs=-1."""
    import joblib

    import dpool.joblib
    from dpool.joblib.backend import DpoolBackend

    dpool.joblib.register()
    found = joblib.Parallel(2, backend="dpool")(joblib.delayed(where)(value) for value in range(count))
    return found, DpoolBackend().effective_n_jobs(-1)


def in_a_forked_process(how: str) -> tuple[int, list[tuple[int, int]]]:
    """A process that a task forks opens a pool, after the task itself has had one: its pid, and where its workers
    are."""
    in_a_pool(abs, -1)
    if how == "fork":
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.write(write, repr(map_in_a_pool(where, range(4))).encode())
            finally:
                os._exit(0)
        os.close(write)
        with open(read) as file:
            found = eval(file.read())
        os.waitpid(pid, 0)
        return pid, found
    import multiprocessing

    queue: Any = multiprocessing.get_context("fork").SimpleQueue()
    process = multiprocessing.get_context("fork").Process(target=_put_into, args=(queue,))
    process.start()
    found = queue.get()
    process.join()
    assert process.pid is not None and process.exitcode == 0
    return process.pid, found


def _put_into(queue: Any) -> None:
    queue.put(map_in_a_pool(where, range(4)))


def modules() -> set[str]:
    return set(sys.modules)


def with_variable(address: str, init: bool) -> tuple[int, int]:
    """In a pool of a task whose environment names a cluster that is not there."""
    import dpool

    os.environ["DPOOL_ADDRESS"] = address
    if init:
        dpool.init()
    found: tuple[int, int] = in_a_pool(where)
    return found


def after_init(address: str, key: str) -> tuple[int, int]:
    """In a pool of a task that has named another cluster."""
    import dpool

    dpool.init(address, key)
    found: tuple[int, int] = in_a_pool(where)
    return found


def drive_unless(directory: str, pid: int) -> int:
    """Leave a pool of two open, unless this is that worker."""
    if os.getpid() != pid:
        keep_a_pool(directory, 2, False)
    return os.getpid()


_kept: list[Any] = []


def keep_a_pool(directory: str, count: int, wait: bool) -> int:
    """Open a pool and leave it open, its workers in a task that does not end; and this one too if it is to wait."""
    from dpool.multiprocessing import Pool

    pool = Pool(count)
    result = pool.starmap_async(meet, [(directory, count + 1)] * count, chunksize=1)
    _kept.append((pool, result))
    while len(os.listdir(directory)) < count if os.path.isdir(directory) else True:
        time.sleep(0.01)
    while wait:
        time.sleep(1)
    return os.getpid()


def forget_a_pool() -> list[int]:
    """The workers of a pool that nobody has any more."""
    import gc

    from dpool.multiprocessing import Pool

    pool: Any = Pool(2)
    pids = [process.pid for process in pool._pool]
    del pool
    gc.collect()
    return pids


def lacks(needs: dict[str, float]) -> str:
    """What is said of a nested pool that needs what is taken."""
    from dpool.cluster.driver import connections
    from dpool.errors import ClusterError

    connections.OPEN_TIMEOUT_S = 1.0
    try:
        in_a_pool(abs, -1, resources=needs)
    except ClusterError as error:
        return str(error)
    return ""


def first_of(array: Any) -> float:
    return float(array[0])


def pass_on(refs: list[Any]) -> list[float]:
    """A ref goes on to the workers of a nested pool, and one of an object that the task itself puts."""
    import dpool

    found: list[float] = map_in_a_pool(first_of, [*refs, dpool.put(dpool.get(refs[0]) + 1)])
    return found
