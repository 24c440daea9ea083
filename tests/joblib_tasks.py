"""Owns what the tests of joblib's backend make workers do.

Imports neither pytest nor dpool, and NumPy only where a task has an array, so that workers start fast. Used by
test_joblib*.py, with executor_tasks.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import dpool


def double(value: int) -> int:
    return value * 2


def worker(_: object = None) -> int:
    return os.getpid()


def environment(name: str) -> str | None:
    return os.environ.get(name)


def effective(n_jobs: int, backend: str | None = None) -> int:
    """How many jobs a call inside a task has."""
    import joblib

    parallel = joblib.Parallel(n_jobs, backend=backend)
    with parallel:
        count: int = parallel._effective_n_jobs()
    return count


def nested(count: int, backend: str | None, depth: int = 1) -> int:
    """The sum of the doubles of range(count), by a Parallel inside the task, `depth` levels deep."""
    import joblib

    if depth > 1:
        results = joblib.Parallel(2, backend=backend)(joblib.delayed(nested)(i, backend, depth - 1)
                                                      for i in range(count))
    else:
        results = joblib.Parallel(2, backend=backend)(joblib.delayed(double)(i) for i in range(count))
    return sum(results)


def nested_by_config(count: int) -> int:
    import joblib

    with joblib.parallel_config(backend="dpool", n_jobs=2):
        return sum(joblib.Parallel()(joblib.delayed(double)(i) for i in range(count)))


def in_a_pool_worker(count: int) -> list[int]:
    """A Parallel in a worker that has nothing to do with joblib."""
    import joblib

    results: list[int] = joblib.Parallel(2, backend="dpool")(joblib.delayed(double)(i) for i in range(count))
    return results


# -- arrays


def file_of(array: Any) -> str | None:
    """The file that an array is mapped from, if it is one of numpy.memmap's."""
    name = getattr(array, "filename", None)
    return None if name is None else str(name)


def file_in(holder: Any) -> str | None:
    """The same for an array in an object's attribute."""
    return file_of(holder.array)


class Holder:
    def __init__(self, array: Any) -> None:
        self.array = array


def is_writable(array: Any) -> bool:
    if not array.flags.writeable:
        return False
    array.flat[0] = -1
    return bool(array.flat[0] == -1)


def first(array: Any) -> float:
    return float(array.flat[0])


def describe(array: Any) -> tuple[Any, ...]:
    return type(array).__name__, array.dtype.str, array.shape, array.flags.f_contiguous, array.tolist()


def as_it_is(value: Any) -> Any:
    return value


def write_at(array: Any, index: int) -> list[float]:
    """Write into one place, and say what is in all."""
    array[index] = index + 1
    return [float(value) for value in array[:4]]


def blas_threads(array: Any) -> list[int]:
    """How many threads each BLAS of this worker has."""
    from threadpoolctl import threadpool_info

    assert array.size
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


# -- no tasks: checks that hold on one machine and on a cluster


def check_that_changes_are_seen(array: Any) -> None:
    """A task gets a large array as it was when it was made, or later, whatever was stored before."""
    from joblib import Parallel, delayed

    with Parallel(2, backend="dpool") as parallel:
        for value in range(5):
            array[0] = value
            assert parallel(delayed(first)(array) for _ in range(3)) == [value] * 3

    def changing() -> Iterator[Any]:
        for value in range(10):
            array[0] = value
            yield delayed(first)(array)

    # joblib reads some of the input ahead; what a task gets is never older than what it was made with.
    results = Parallel(2, backend="dpool", batch_size=1)(changing())
    assert all(result >= value for value, result in enumerate(results))
    assert results[-1] == 9


# -- initializers

_initialized: list[Any] = []


def initialize(value: Any) -> None:
    _initialized.append(value)


def initialized(_: object = None) -> list[Any]:
    return list(_initialized)


def values_initialized(_: object = None) -> list[Any]:
    return [value for ref in _initialized for value in dpool.get(ref)]


def call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
