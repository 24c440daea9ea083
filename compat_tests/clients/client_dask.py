"""dask: arrays, bags and delayed functions with `scheduler=executor`, and its multiprocessing scheduler's `pool`."""

from typing import Any

import dask
import dask.array
import dask.bag
import numpy as np
from toolz.sandbox.parallel import fold

from compat_tests.clients.doors import WORKERS, Doors, worked, workload


def double(x: Any) -> Any:
    worked()
    return x * 2


def add(x: Any, y: Any) -> Any:
    worked()
    return x + y


def refuse(x: Any) -> Any:
    raise ZeroDivisionError(f"{x} is refused")


def _array() -> Any:
    values = dask.array.from_array(np.arange(40_000.0).reshape(200, 200), chunks=(50, 50))
    return ((values @ values.T).map_blocks(double).sum(axis=0) / 7).std()


@workload
def array(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor:
        return _array().compute(scheduler=executor)


@workload
def bag(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor, dask.config.set(scheduler="processes", pool=executor):
        numbers = dask.bag.from_sequence(range(200), npartitions=8).map(double)
        counts = numbers.filter(lambda number: number % 3 == 0).map(str).map(len).frequencies()
        return sorted(counts.compute()), numbers.fold(add).compute()


@workload
def delayed(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor:
        leaves = [dask.delayed(double)(number) for number in range(32)]
        while len(leaves) > 1:
            leaves = [dask.delayed(add)(*pair) for pair in zip(leaves[::2], leaves[1::2], strict=True)]
        return leaves[0].compute(scheduler=executor)


@workload
def error(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor:
        one = dask.delayed(double)(3)
        try:
            dask.delayed(refuse)(one).compute(scheduler=executor)
        except ZeroDivisionError as problem:
            return str(problem)


@workload
def its_own_pool(doors: Doors) -> Any:
    with doors.imported("dask.multiprocessing"), dask.config.set({"multiprocessing.context": "fork"}):
        return _array().compute(scheduler="processes", num_workers=WORKERS)


@workload
def toolz_fold(doors: Doors) -> Any:
    with doors.Pool() as pool:
        return fold(add, range(1000), 0, map=pool.map, chunksize=50)
