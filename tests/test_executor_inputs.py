"""Owns the bad arguments of ProcessPoolExecutor: each is refused at the call, with a clear text.

Starts no worker. Run by pytest.
"""

from __future__ import annotations

import multiprocessing
import threading
from typing import Any

import pytest
from test_executor import executor_of

from dpool.concurrent.futures import ProcessPoolExecutor

FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize("options, kind, text", [
    (dict(max_workers=0), ValueError, "max_workers must be greater than 0"),
    (dict(max_workers=-1), ValueError, "max_workers must be greater than 0"),
    (dict(max_workers=2.5), TypeError, "max_workers must be an int or None, not float"),
    (dict(max_workers="4"), TypeError, "max_workers must be an int or None, not str"),
    (dict(max_workers=True), TypeError, "max_workers must be an int or None, not bool"),
    (dict(max_workers=10_000_000), ValueError, "more than this machine allows"),
    (dict(initializer=1), TypeError, "initializer must be a callable"),
    (dict(initargs=5), TypeError, "not iterable"),
    (dict(max_tasks_per_child="1"), TypeError, "max_tasks_per_child must be an integer"),
    (dict(max_tasks_per_child=1.5), TypeError, "max_tasks_per_child must be an integer"),
    (dict(max_tasks_per_child=0), ValueError, "max_tasks_per_child must be >= 1"),
    (dict(max_tasks_per_child=3, mp_context=FORK), ValueError, "incompatible with the 'fork'"),
    (dict(mp_context="banana"), ValueError, "'fork', 'spawn', 'forkserver'.* not 'banana'"),
    (dict(mp_context=3), TypeError, "'fork', 'spawn', 'forkserver'.* not 3"),
    (dict(on_worker_death="ignore"), ValueError, '"break" or "fail", not \'ignore\''),
    (dict(retries=2), ValueError, 'retries need on_worker_death="fail"'),
    (dict(retries=-1, on_worker_death="fail"), ValueError, "retries must be at least 0, got -1"),
    (dict(retries=1.5, on_worker_death="fail"), TypeError, "retries must be an int, not float"),
    (dict(retry=1), TypeError, "retry"),
])
def test_constructor_refuses(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    threads = threading.active_count()
    with pytest.raises(kind, match=text):
        ProcessPoolExecutor(**options)
    assert threading.active_count() == threads


def test_max_workers_may_be_any_integer() -> None:
    class Two:
        def __index__(self) -> int:
            return 2

        def __int__(self) -> int:
            return 2

    assert ProcessPoolExecutor(Two())._max_workers == 2  # type: ignore[arg-type]
    assert ProcessPoolExecutor()._max_workers >= 1


@pytest.mark.parametrize("options, kind, text", [
    (dict(chunksize=0), ValueError, r"chunksize must be >= 1\."),
    (dict(chunksize=-1), ValueError, r"chunksize must be >= 1\."),
    (dict(chunksize="a"), TypeError, "not supported between"),
    (dict(chunksize=2.0), TypeError, "'float' object cannot be interpreted as an integer"),
    (dict(buffersize=0), ValueError, "buffersize must be None or > 0"),
    (dict(buffersize=2.0), TypeError, "buffersize must be an integer or None"),
    (dict(timeout="5"), TypeError, "str"),
    (dict(timeout=float("nan")), ValueError, "nan"),
    (dict(buffer=1), TypeError, "buffer"),
])
def test_map_refuses(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    executor = executor_of(1)
    with pytest.raises(kind, match=text):
        executor.map(abs, [1], **options)
    assert not executor._processes


def test_what_is_not_callable_is_a_type_error_on_the_future() -> None:
    with executor_of(1) as executor:
        with pytest.raises(TypeError, match="'int' object is not callable"):
            executor.submit(5, 1).result(60)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="'int' object is not callable"):
            next(executor.map(5, [1]))  # type: ignore[arg-type]
