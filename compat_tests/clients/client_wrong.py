"""The negative control: workloads each of which must be found to be wrong. Not in the registry; for test_clients.py."""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from compat_tests.clients.doors import Doors, foreign, worked, workload


def own_pid(_: int) -> int:
    worked()
    return os.getpid()


def half(x: int) -> float:
    worked()
    return x / 2


def refuse(x: int) -> None:
    raise ValueError(f"{x} is refused")


@workload
def differs(doors: Doors) -> Any:
    with doors.Pool() as pool:
        return pool.map(own_pid, [1])


@workload
def differs_in_type(doors: Doors) -> Any:
    with doors.Pool() as pool:
        return pool.map(half, [2]) if doors.name == "stdlib" else [int(half) for half in pool.map(half, [2])]


@workload
def works_at_home(doors: Doors) -> Any:
    with doors.Pool():
        return list(map(half, [1, 2]))


@foreign
def uses_another_door(doors: Doors) -> Any:
    with ProcessPoolExecutor(1) as executor:
        return executor.submit(abs, -1).result()


@foreign
def starts_nothing(doors: Doors) -> Any:
    return 1


@foreign
def raises(doors: Doors) -> Any:
    with doors.Pool() as pool:
        return pool.map(refuse, [1])


@foreign
def swaps_nothing(doors: Doors) -> Any:
    with doors.imported("json"), doors.Pool() as pool:
        return pool.map(abs, [1])


@foreign
def kills_the_process(doors: Doors) -> Any:
    multiprocessing.Process(target=time.sleep, args=(600,)).start()
    os._exit(3)
