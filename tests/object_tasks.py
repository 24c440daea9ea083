"""Owns what the tests of the object store make workers do, and how they look at memory from outside.

It imports no pytest, and NumPy and dpool only where they are needed, so that spawned workers start fast.
"""

from __future__ import annotations

import mmap
import os
import signal
import threading
from collections.abc import Callable, Iterable
from typing import Any

MB = 1 << 20


def kind(value: Any) -> str:
    return type(value).__name__


def kinds(*values: Any, **named: Any) -> list[str]:
    return [type(value).__name__ for value in (*values, *named.values())]


def identity(value: Any) -> Any:
    return value


def total(value: Any) -> int:
    import numpy

    return int(numpy.asarray(value).sum())


def totals(*values: Any) -> list[int]:
    return [total(value) for value in values]


def last(value: Any) -> int:
    return int(value[-1])


def call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def get(ref: Any) -> Any:
    import dpool

    return dpool.get(ref)


def get_first(refs: list[Any]) -> Any:
    import dpool

    return dpool.get(refs[0])


def total_of_refs(refs: Any) -> int:
    import dpool

    return sum(total(dpool.get(ref)) for ref in refs)


def total_of_values(values: Any) -> int:
    return sum(total(value) for value in values)


def put(value: Any) -> Any:
    import dpool

    return dpool.put(value)


def put_array(nbytes: int, number: int) -> Any:
    import numpy

    return put(numpy.full(nbytes, number, "u1"))


def put_many(count: int, nbytes: int) -> list[Any]:
    return [put_array(nbytes, 1) for _ in range(count)]


def make_array(nbytes: int, number: int = 1) -> Any:
    import numpy

    return numpy.full(nbytes, number, "u1")


def overwrite(array: Any) -> tuple[bool, int]:
    """Write to an argument: whether it could be, and what it adds up to then."""
    before = bool(array.flags.writeable)
    array[:] = 9
    return before, total(array)


def overwritten(array: Any) -> Any:
    array[:1000] = 9
    return array


_kept: list[Any] = []


def keep(*values: Any) -> int:
    """Hold values in this worker from now on."""
    _kept.extend(values)
    return len(_kept)


def kept_total(_: object = None) -> int:
    return sum(total(value) for value in _kept)


def forget(_: object = None) -> None:
    _kept.clear()


def keep_and_die(array: Any) -> None:
    _kept.append(array)
    os.kill(os.getpid(), signal.SIGKILL)


def remember(array: Any) -> None:
    """An initializer."""
    _kept.append(array)


def remembered_page(_: object = None) -> tuple[str, int, int]:
    return page_of(_kept[0])


def tell_and_block(fifo: str, *_: Any) -> None:
    """Write a line to a FIFO, then wait for ever with the arguments in hand."""
    with open(fifo, "w") as file:
        file.write(f"{os.getpid()}\n")
    threading.Event().wait()


class Holder:
    """An object with a buffer inside."""

    def __init__(self, array: Any, name: str = "") -> None:
        self.array = array
        self.name = name

    def page(self, _: object = None) -> tuple[str, int, int]:
        return page_of(self.array)


def page_of(array: Any, _: object = None) -> tuple[str, int, int]:
    """Where an array lies, once all of it has been read: the name of its mapping, the number of the file behind it,
    and how many bytes there are private copies of."""
    total(array)
    address = array.__array_interface__["data"][0]
    found = False
    name, inode, copied = "", 0, 0
    with open("/proc/self/smaps") as file:
        for line in file:
            fields = line.split()
            if not fields[0].endswith(":"):
                start, end = (int(part, 16) for part in fields[0].split("-"))
                found = start <= address < end
                if found:
                    name, inode = " ".join(fields[5:]), int(fields[4])
            elif found and fields[0] == "Anonymous:":
                copied = int(fields[1]) * 1024
    return name, inode, copied


def alignments(arrays: Iterable[Any]) -> list[int]:
    return [array.__array_interface__["data"][0] % 64 for array in arrays]


# -- a result that ends its worker while it is written


def vanishing(path: str, nbytes: int) -> Any:
    """An array whose second half can no longer be read: the file behind it is too short by then."""
    import numpy

    with open(path, "w+b") as file:
        file.truncate(nbytes)
        mapping = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ)
        file.truncate(nbytes // 2)
    return numpy.frombuffer(mapping, "u1")


# -- memory, seen from outside


def segments_of(pids: Iterable[int]) -> dict[int, int]:
    """Every segment that one of these processes has open or mapped: the number of its file, and bytes in memory."""
    found: dict[int, int] = {}
    for pid in pids:
        for folder in ("fd", "map_files"):
            try:
                names = os.listdir(f"/proc/{pid}/{folder}")
            except OSError:  # gone, or not ours to look at
                continue
            for name in names:
                path = f"/proc/{pid}/{folder}/{name}"
                try:
                    if os.readlink(path).startswith("/memfd:dpool"):
                        status = os.stat(path)
                        found[status.st_ino] = status.st_blocks * 512
                except OSError:
                    continue
    return found


def memory_of(pids: Iterable[int]) -> int:
    """The bytes of memory in all segments that these processes have."""
    return sum(segments_of(pids).values())
