"""The pickle of a group's initializer and its arguments, with what cannot leave this machine lent instead of sent.

Knows what multiprocessing's classes are made of: semaphores, connections, memory. Those go as tokens of lending.py's
and are rebuilt in workers by wire/borrowed.py; all else of those classes is pickled by themselves, as for a process
that is being started. Called by driver/remote.py, when a group is opened.
"""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, context, heap, resource_sharer, shared_memory, sharedctypes, synchronize
from typing import Any

from dpool.cluster.driver.lending import Lending
from dpool.cluster.driver.things import Connection, Memory, Relay, Semaphore
from dpool.cluster.wire import borrowed, pickling
from dpool.cluster.wire.functions import by_value_pickler

# In the pickle of whatever is an object of multiprocessing's, or refers to one.
_MULTIPROCESSING = b"multiprocessing"
# What a simple ctypes object of these kinds holds is an address.
_POINTERS = frozenset("zZPO")


class CannotBeLent(RuntimeError):
    """An argument that exists on one machine only, and what to use instead."""


def pickled(function: Callable[..., object], arguments: tuple[Any, ...], lending: Lending) -> bytes:
    """For workers elsewhere. Raises what pickling raises, CannotBeLent among it."""
    value = (function, arguments)
    first: Exception | None = None
    data = b""
    with _spawning(_Spawning()):
        try:
            data = pickling.dumps(value, by_value=True, elsewhere=True)
        except Exception as error:
            first = error
    if first is None and _MULTIPROCESSING not in data:
        return data
    out = io.BytesIO()
    try:
        with _spawning(_Sharing()):
            _lending_pickler()(out, lending).dump(value)
    except CannotBeLent:
        raise
    except Exception:
        if first is not None and not lending.lends:
            raise first from None  # as if nobody had tried to lend anything
        raise
    finally:
        first = None  # its traceback refers to this frame, and so to the arguments
    return out.getvalue()


class _Spawning:
    """Stands for the process that is being started, for reductions that are allowed for one alone."""

    def duplicate_for_child(self, descriptor: int) -> int:
        raise RuntimeError("a descriptor cannot be sent to another machine")


class _Sharing(_Spawning):
    """Once all that is multiprocessing's is lent: reductions of others, which share a descriptor on one machine."""

    DupFd = resource_sharer.DupFd

    def duplicate_for_child(self, descriptor: int) -> int:
        return descriptor


@contextmanager
def _spawning(process: Any) -> Iterator[None]:
    before = context.get_spawning_popen()
    context.set_spawning_popen(process)
    try:
        yield
    finally:
        context.set_spawning_popen(before)


_pickler: Any = None


def _lending_pickler() -> Any:
    """The class of a pickler that lends."""
    global _pickler
    if _pickler is None:
        class Pickler(by_value_pickler()):  # type: ignore[misc]
            def __init__(self, file: io.BytesIO, lending: Lending) -> None:
                super().__init__(file, protocol=pickling.PROTOCOL)
                self._lending = lending

            def reducer_override(self, obj: Any) -> Any:
                reduced = None if isinstance(obj, type) else _reduced(obj, self._lending)
                return super().reducer_override(obj) if reduced is None else reduced

        _pickler = Pickler
    return _pickler


def _reduced(obj: Any, lending: Lending) -> tuple[Any, ...] | None:
    """How an object is rebuilt that is lent; None if it is none of those. Raises CannotBeLent."""
    if isinstance(obj, synchronize.SemLock):
        semlock = obj._semlock  # type: ignore[attr-defined]
        is_lock = isinstance(obj, synchronize.Lock | synchronize.RLock)
        if isinstance(semlock, borrowed.SemLock):
            token = lending.lend(Relay(semlock.begin, is_lock))
        else:
            token = lending.lend(Semaphore(semlock, is_lock))
        return borrowed.rebuild_lock, (type(obj), token, semlock.kind, semlock.maxvalue)
    if isinstance(obj, connection.Connection):
        if isinstance(obj, borrowed.Connection):
            token = lending.lend(Relay(obj.borrowed.begin))
        else:
            token = lending.lend(Connection(obj.fileno(), obj.readable, obj.writable))
        return borrowed.Connection, (token, obj.readable, obj.writable)
    if isinstance(obj, sharedctypes.SynchronizedBase):
        found = obj.get_obj()
        kind = found.kind if isinstance(found, borrowed.BEHIND) else type(found)
        memory = found.memory if isinstance(found, borrowed.BEHIND) else found._wrapper
        if getattr(kind, "_type_", None) in _POINTERS:
            raise CannotBeLent(f"shared memory that holds addresses ({kind.__name__}) means nothing on another machine")
        of, length = (kind._type_, kind._length_) if issubclass(kind, ctypes.Array) else (kind, None)
        return borrowed.rebuild_synchronized, (of, length, memory, obj.get_lock())
    if isinstance(obj, heap.BufferWrapper):
        return borrowed.Memory, (lending.lend(Memory(obj)), obj._state[1])  # type: ignore[attr-defined]
    if isinstance(obj, borrowed.Memory):
        return borrowed.Memory, (lending.lend(Relay(obj.begin)), obj.size)
    if hasattr(obj, "_wrapper") and isinstance(obj, ctypes.Array | ctypes.Structure | ctypes.Union
                                               | ctypes._SimpleCData):
        raise CannotBeLent("RawValue and RawArray cannot be shared with workers on other machines: use Value or Array, "
                           "with their lock, or dpool.put() for what is only read")
    if isinstance(obj, shared_memory.SharedMemory | shared_memory.ShareableList):
        raise CannotBeLent("the memory of multiprocessing.shared_memory cannot be shared with workers on other "
                           "machines: use multiprocessing.Array, or dpool.put() for what is only read")
    return None
