"""Owns what the tests of the executor and of asyncio make workers do, and the gate at which a task waits for its test.

It imports neither pytest nor dpool, so that spawned workers start fast. Used by test_executor*.py and test_asyncio*.py.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


class Gate:
    """Two FIFOs. A task that passes through it (see hold()) is known to run, and goes on when the test says so."""

    def __init__(self, folder: Path, name: str = "gate") -> None:
        self.started = str(folder / f"{name}.started")
        self.opened = str(folder / f"{name}.opened")
        os.mkfifo(self.started)
        os.mkfifo(self.opened)

    def wait(self) -> int:
        """Wait until a task stands at the gate; its process."""
        with open(self.started) as file:
            return int(file.read())

    def open(self) -> None:
        """Let that task go on."""
        with open(self.opened, "w"):
            pass

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        """A test that has failed must not leave its task at the gate: this never waits."""
        for path in (self.started, self.opened):
            os.close(os.open(path, os.O_RDWR))


@contextmanager
def nothing_left(patience_s: float = 60.0) -> Iterator[None]:
    """No worker and no thread of a group that is started inside outlives this."""
    gc.collect()
    processes, threads = set(multiprocessing.active_children()), set(threading.enumerate())
    yield
    gc.collect()
    for thread in set(threading.enumerate()) - threads:
        if thread.name.startswith("dpool"):
            thread.join(patience_s)
            assert not thread.is_alive(), "a group goes on"
    assert set(multiprocessing.active_children()) <= processes, "workers are left"


def hold(started: str, opened: str, value: Any = None) -> Any:
    with open(started, "w") as file:
        file.write(str(os.getpid()))
    with open(opened) as file:
        file.read()
    return value


def hold_and_call(started: str, opened: str, function: Callable[..., Any], *args: Any) -> Any:
    hold(started, opened)
    return function(*args)


def hold_and_handle_sigterm(started: str, opened: str, note: str) -> None:
    def handle(*_: object) -> NoReturn:
        mark(note)
        os._exit(7)

    signal.signal(signal.SIGTERM, handle)
    hold(started, opened)


def mark(path: str, value: Any = None) -> Any:
    """Leave a byte in a file: one for each call that ran."""
    with open(path, "ab", buffering=0) as file:
        file.write(b".")
    return value


def marks(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def double(value: Any) -> Any:
    return value * 2


def capture(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


def worker_pid(_: object = None) -> int:
    return os.getpid()


def fail_at(value: int, bad: int) -> int:
    if value == bad:
        raise ValueError(value)
    return value


def raise_error(kind: type[BaseException], *args: object) -> NoReturn:
    raise kind(*args)  # the source line


def exit_process(code: int) -> NoReturn:
    os._exit(code)


def exit_python(code: int) -> NoReturn:
    sys.exit(code)


def kill_self(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def die_until(path: str, deaths: int) -> int:
    """Die as long as fewer than `deaths` processes have died here."""
    if os.path.getsize(path) >= deaths if os.path.exists(path) else deaths == 0:
        return deaths
    mark(path)
    kill_self()
    return -1


def make_lock(_: object = None) -> Any:
    return threading.Lock()


_status = "not initialized"


def initialize(status: str) -> None:
    global _status
    _status = status


def status() -> str:
    return _status


def fail_to_initialize() -> NoReturn:
    raise ValueError("no initializer today")


class Thing:
    """Something that can be referred to weakly."""

    def method(self) -> str:
        return "called"


def make_thing(_: object = None) -> Thing:
    return Thing()


def _refuse(message: str) -> NoReturn:
    raise pickle.UnpicklingError(message)


class BrokenWhenRebuilt:
    """Pickles well; rebuilding it raises."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _refuse, ("not to be rebuilt",)


class ExitsWhenRebuilt:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exit_python, (1,)


class DiesWhenRebuilt:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exit_process, (6,)


class BrokenWhenPickled:
    def __reduce__(self) -> NoReturn:
        raise pickle.PicklingError("not to be pickled")


class ExitsWhenPickled:
    def __reduce__(self) -> NoReturn:
        sys.exit(1)


class PickyError(Exception):
    """Cannot be rebuilt: it wants two arguments."""

    def __init__(self, one: object, two: object) -> None:
        super().__init__(f"{one} and {two}")


def raise_picky() -> NoReturn:
    raise PickyError("this", "that")


def make(kind: type) -> Any:
    return kind()


def nested_map(values: list[int]) -> list[int]:
    """Open an executor inside a worker."""
    from dpool.concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1) as executor:
        return list(executor.map(double, values))


def countdown(start: int) -> Iterator[int]:
    yield from range(start, 0, -1)


# -- async functions


async def double_async(value: Any) -> Any:
    await asyncio.sleep(0)
    return value * 2


class AsyncCallable:
    async def __call__(self, value: Any) -> Any:
        return ("called", value)


_loops: list[int] = []


async def loop_id() -> int:
    return id(asyncio.get_running_loop())


_left_behind: list[asyncio.Task[None]] = []


async def leave_a_task_behind() -> None:
    async def for_ever() -> None:
        await asyncio.Event().wait()

    _left_behind.append(asyncio.create_task(for_ever()))
    await asyncio.sleep(0)


def was_cancelled() -> bool:
    return _left_behind.pop().cancelled()
