"""Owns what the tests make workers do: plain functions, importable in any worker, most of them harmful.

It imports no pytest and no dpool at the top, so that spawned workers start fast. Used by the tests of real processes.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import util
from typing import Any, NoReturn


def double(value: Any) -> Any:
    return value * 2


def add(*values: int) -> int:
    return sum(values)


def multiply(first: int, second: int) -> int:
    return first * second


class Doubler:
    """A callable, and the kinds of methods."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, value: int) -> int:
        return value * self.factor

    def times(self, value: int) -> int:
        return value * self.factor

    @staticmethod
    def static_double(value: int) -> int:
        return value * 2

    @classmethod
    def class_double(cls, value: int) -> int:
        return value * 2


class Counts:
    """Changes with each call; `room` bytes are changed, too."""

    def __init__(self, room: int = 0) -> None:
        self.calls = 0
        self.bytes = bytearray(room)

    def __call__(self, _: object = None) -> tuple[int, int]:
        self.calls += 1
        if self.bytes:
            self.bytes[-1] += 1
        return self.calls, self.bytes[-1] if self.bytes else 0


def add_to(numbers: list[int], value: int) -> int:
    numbers.append(value)
    return len(numbers)


# What write() returns each time, by its length.
_written: dict[int, list[Any]] = {}


def write(value: int, size: int) -> list[Any]:
    """The same object each time, with a new content."""
    written = _written.setdefault(size, [0, bytearray(size)])
    written[0] = value
    written[1][-1] = value % 256
    return written


def outer(factor: int) -> Callable[[int], int]:
    def inner(value: int) -> int:
        return value * factor

    return inner


def raise_if_odd(value: int) -> int:
    if value % 2:
        raise ValueError(f"{value} is odd")
    return value


def note_and_raise_if_odd(item: tuple[str, int]) -> int:
    append(item[0], ".")
    return raise_if_odd(item[1])


def name_of_process(_: object = None) -> str:
    from multiprocessing import current_process

    return current_process().name


_kept: tuple[Any, ...] = ()


def keep(*values: Any) -> None:
    """An initializer: keep what it is given."""
    global _kept
    _kept = values


def count_up(number: int) -> None:
    value, lock, queue = _kept
    with lock:
        value.value += 1
    queue.put(number)


def put(queue: Any, value: object) -> None:
    queue.put(value)


def send_hello(end: socket.socket) -> None:
    end.send(b"hello")


def make_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def identity(value: Any) -> Any:
    return value


def append(path: str, text: str) -> None:
    """Add to a file, in one step."""
    with open(path, "ab", buffering=0) as file:
        file.write(text.encode())


def read(path: str) -> str:
    with open(path) as file:
        return file.read()


def pid_of_worker(_: object = None) -> int:
    return os.getpid()


# -- ends of a worker


def kill_self(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def segfault() -> None:
    ctypes.string_at(0)


def exit_process(code: int) -> NoReturn:
    os._exit(code)


def exit_python(code: object) -> NoReturn:
    sys.exit(code)  # type: ignore[arg-type]


def raise_error(kind: type[BaseException], *args: object) -> NoReturn:
    raise kind(*args)


def kill_self_if(value: int, bad: int) -> int:
    if value == bad:
        kill_self()
    return value


def kill_self_until(path: str, deaths: int) -> int:
    """Die as long as fewer than `deaths` processes have died here; each leaves a byte in the file."""
    with open(path, "ab", buffering=0) as file:
        if file.tell() >= deaths:
            return deaths
        file.write(b".")
    kill_self()
    return -1


# -- tasks that wait for the test, or hold up a worker


def tell_and_wait(fifo: str, answer: str) -> str:
    """Write the pid of this worker to one FIFO, then wait until the other one has a line, and return it."""
    tell(fifo)
    with open(answer) as file:
        return file.readline()


class Gate:
    """Holds tasks up until the test opens it: `args` are those of pass_gate. Used by the test alone."""

    def __init__(self, directory: os.PathLike[str]) -> None:
        paths = [os.path.join(directory, name) for name in ("gate-told", "gate-answer")]
        for path in paths:
            os.mkfifo(path)
        self.args = (paths[0], paths[1])
        self._ends = [os.open(path, os.O_RDWR) for path in paths]
        self.told = self._ends[0]  # a line for each task that has come to it
        self._opened = False

    def open(self, count: int = 1) -> None:
        """Let so many tasks go on."""
        self._opened = True
        os.write(self._ends[1], b"." * count)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._opened:
            self.open()
        for end in self._ends:
            os.close(end)


def pass_gate(told: str, answer: str) -> str:
    tell(told)
    with open(answer, "rb", buffering=0) as file:
        assert file.read(1) == b"."  # and no more: others wait for theirs
    return "open"


def pass_gate_star(args: tuple[str, str]) -> str:
    return pass_gate(*args)


def short_or_wait(args: tuple[str, str] | None) -> str:
    return "short" if args is None else pass_gate(*args)


def wait_for_ever(_: object = None) -> None:
    threading.Event().wait()


def tell_and_wait_for_ever(fifo: str) -> None:
    tell(fifo)
    threading.Event().wait()


def tell(fifo: str) -> None:
    with open(fifo, "w") as file:
        file.write(f"{os.getpid()}\n")


def tell_and_hold_gil(fifo: str) -> None:
    """Spend ages in C code that never lets go of the GIL."""
    tell(fifo)
    re.match(r"(a|a)*$", "a" * 64 + "b")


def tell_and_start_children(fifo: str) -> None:
    """Leave a child behind that would live for ages; never return."""
    child = subprocess.Popen(["sleep", "600"])
    with open(fifo, "w") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    threading.Event().wait()


def start_daemon() -> int:
    """Start a process in a session of its own, and return its pid while it lives on."""
    return subprocess.Popen(["sleep", "600"], start_new_session=True).pid


def ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def exit_at_sigterm(path: str) -> None:
    """As programs do that want their finalizers run."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    util.Finalize(None, append, args=(path, f"{os.getpid()}\n"), exitpriority=0)


# -- resources


def allocate_beyond_limit() -> None:
    """Raise MemoryError by a limit of this process's own, and leave the limit as it was."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, before[1]))
    try:
        bytearray(8 << 30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def close_descriptors() -> None:
    os.closerange(3, 1024)


def upset_process(directory: str) -> None:
    """Change what a process shares between its tasks."""
    os.chdir(directory)
    os.umask(0o077)
    os.environ.clear()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.stdout = sys.stderr = open(os.devnull, "w")


def print_much(count: int) -> int:
    line = "x" * 1023
    for _ in range(count):
        print(line)
    return count


# -- values that make trouble on their way


class Loads:
    """Does something when it is unpickled: calls `function(*args)`."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.function = function
        self.args = args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.args


class Dumps:
    """Does something when it is pickled."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.function = function
        self.args = args

    def __reduce__(self) -> tuple[Any, ...]:
        self.function(*self.args)
        return int, ()


def make_loads(function: Callable[..., Any], *args: object) -> Loads:
    """A result that does something when the driver unpickles it."""
    return Loads(function, *args)


def make_dumps(function: Callable[..., Any], *args: object) -> Dumps:
    """A result that does something when the worker pickles it."""
    return Dumps(function, *args)


def make_lock() -> object:
    return threading.Lock()


class NeedsTwo(Exception):
    """An exception that its own pickle cannot rebuild."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class HoldsLock(Exception):
    """An exception that cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class ExitsOnLoad(Exception):
    """An exception that does harm where it is unpickled; in the process `harmless` it is an ordinary one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, ("from an exception",)


def make_bytes(size: int) -> bytearray:
    return bytearray(size)


def echo_length(data: bytes) -> bytes:
    return data


# -- pools in pools


def nested(method: str, depth: int) -> int:
    """The sum of the leaves of a tree of pools."""
    from multiprocessing import get_context

    from dpool.multiprocessing.pool import Pool

    if not depth:
        return 1
    with Pool(2, context=get_context(method)) as pool:
        return sum(pool.starmap(nested, [(method, depth - 1)] * 2))


def fork_in_task() -> int:
    """A child of a worker, by a bare fork; returns its exit code."""
    pid = os.fork()
    if not pid:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
