"""What workers have of a thing that their driver has lent: what stands behind multiprocessing's own classes there.

A lock is multiprocessing's Lock with a semaphore of ours behind it, a queue its Queue with connections of ours, an
array its SynchronizedArray with memory of ours: whatever those classes do, they do. Unpickled in workers;
driver/handing.py writes the pickles. Each operation is a call to the driver (lent.py), and nothing is kept here but who
owns a lock.
"""

from __future__ import annotations

import ctypes
import errno
import io
import os
import threading
from multiprocessing import connection

from dpool.cluster.wire import lent
from dpool.cluster.wire.lent import DONE, FOR_EVER

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

# What SemLock of _multiprocessing calls the kinds.
RECURSIVE, SEMAPHORE = 0, 1


class Borrowed:
    """One thing of the driver's, by its token."""

    def __init__(self, token: bytes) -> None:
        self.token = token
        self.channel = lent.channel()

    def begin(self, operation: int, seconds: float = 0.0, start: int = 0, size: int = 0,
              content: bytes | memoryview = b"") -> socket.socket:
        """Make a call whose answer somebody else waits for."""
        return self.channel.begin(self.token, operation, seconds, start, size, content)

    def call(self, operation: int, seconds: float = 0.0, start: int = 0, size: int = 0,
             content: bytes | memoryview = b"") -> tuple[int, int, bytes]:
        """(whether it was done in time, number, content). Raises what multiprocessing would."""
        outcome, number, data = self.channel.call(self.token, operation, seconds, start, size, content)
        if outcome in (lent.DONE, lent.NO):
            return outcome, number, data
        if outcome == lent.TOO_OFTEN:
            raise ValueError("semaphore or lock released too many times")
        if outcome == lent.END:
            raise EOFError
        if outcome == lent.BROKEN:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        if outcome == lent.UNKNOWN:
            raise lent.Gone("the driver has not lent this, or has taken it back")
        raise OSError(data.decode("utf-8", "replace"))


# -- semaphores


class SemLock(Borrowed):
    """Has what _multiprocessing.SemLock has. Who owns an RLock, and how often, is known here alone."""

    def __init__(self, token: bytes, kind: int, maxvalue: int) -> None:
        super().__init__(token)
        self.kind = kind
        self.maxvalue = maxvalue
        self.handle = 0
        self.name = None
        self._pid = os.getpid()
        self._held = 0
        self._thread = 0

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        if self.kind == RECURSIVE and self._is_mine():
            self._held += 1
            return True
        seconds = 0.0 if not block else FOR_EVER if timeout is None else max(float(timeout), 0.0)
        if self.call(lent.ACQUIRE, seconds)[0] != DONE:
            return False
        self._after_fork()
        self._held += 1
        self._thread = threading.get_ident()
        return True

    def release(self) -> None:
        if self.kind == RECURSIVE:
            if not self._is_mine():
                raise AssertionError("attempt to release recursive lock not owned by thread")
            if self._held > 1:
                self._held -= 1
                return
        self._after_fork()
        # Before the call: as soon as it is free, another thread of this process may have it.
        self._held -= 1
        try:
            self.call(lent.RELEASE)
        except ValueError:  # it was free. When the handler of a signal raises, it is released all the same
            self._held += 1
            raise

    def _after_fork(self) -> None:
        """What this process's parent holds is not this process's."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._held = 0

    def _count(self) -> int:
        self._after_fork()
        return self._held

    def _is_mine(self) -> bool:
        return self._count() > 0 and self._thread == threading.get_ident()

    def _get_value(self) -> int:
        return self.call(lent.VALUE)[1]

    def _is_zero(self) -> bool:
        return self._get_value() == 0

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def rebuild_lock(cls: Any, token: bytes, kind: int, maxvalue: int) -> Any:
    """A Lock, RLock, Semaphore or BoundedSemaphore of multiprocessing."""
    lock: Any = cls.__new__(cls)
    lock._semlock = SemLock(token, kind, maxvalue)
    lock._is_fork_ctx = True  # forked processes may have it, those started by spawn are told that they may not
    lock._make_methods()
    return lock


# -- connections


class Connection(connection.Connection):
    """An end of a pipe of the driver's. It has no descriptor here."""

    def __init__(self, token: bytes, readable: bool, writable: bool, own: bool = False) -> None:
        super().__init__(0, readable, writable)
        self.borrowed = Borrowed(token)
        self._own = own  # made for this process, and closed with it
        self._pid = os.getpid()

    def fileno(self) -> int:
        """Raises OSError: what waits for descriptors, connection.wait() among it, cannot wait for this one."""
        self._check_closed()  # type: ignore[attr-defined]
        raise OSError("this connection is to a pipe on another machine and has no descriptor here: use poll()")

    def _close(self, *_: object) -> None:
        if getattr(self, "_own", False) and self._pid == os.getpid():
            try:
                self.borrowed.begin(lent.CLOSE).close()
            except lent.Gone:
                pass  # and so is the connection

    def _send_bytes(self, buf: memoryview) -> None:
        self.borrowed.call(lent.SEND, FOR_EVER, content=buf)

    def _recv_bytes(self, maxsize: int | None = None) -> io.BytesIO | None:
        _, _, data = self.borrowed.call(lent.RECEIVE, FOR_EVER)
        if maxsize is not None and len(data) > maxsize:
            return None
        buffer = io.BytesIO()
        buffer.write(data)
        return buffer

    def _poll(self, timeout: float | None) -> bool:
        return self.borrowed.call(lent.POLL, FOR_EVER if timeout is None else max(timeout, 0.0))[0] == DONE

    def __reduce__(self) -> Any:
        raise RuntimeError("a connection that was lent to workers of a cluster is shared with others by inheritance, "
                           "or as an argument of the initializer of a pool on that cluster")


# -- memory


class Memory(Borrowed):
    """A block of the driver's shared memory; has of multiprocessing.heap.BufferWrapper what is used of it."""

    def __init__(self, token: bytes, size: int) -> None:
        super().__init__(token)
        self.size = size

    def read(self, start: int, size: int) -> bytes:
        return self.call(lent.READ, start=start, size=size)[2] if size else b""

    def write(self, start: int, data: bytes | memoryview) -> None:
        if len(data):
            self.call(lent.WRITE, start=start, content=data)

    def create_memoryview(self) -> Memory:
        return self

    def cast(self, kind: str) -> Array:
        """For the state of a Barrier."""
        assert kind == "i"
        return Array(self, 0, ctypes.c_int, self.size // ctypes.sizeof(ctypes.c_int))


class Value:
    """Stands for a simple ctypes object."""

    def __init__(self, memory: Memory, start: int, kind: Any) -> None:
        self.memory = memory
        self._start = start
        self.kind = kind

    @property
    def value(self) -> Any:
        size = ctypes.sizeof(self.kind)
        return self.kind.from_buffer_copy(self.memory.read(self._start, size)).value

    @value.setter
    def value(self, value: Any) -> None:
        self.memory.write(self._start, bytes(self.kind(value)))

    def __repr__(self) -> str:
        return repr(self.kind(self.value))


class Struct:
    """Stands for a ctypes.Structure or Union; a field that is one itself, or an array, is written through, too."""

    def __init__(self, memory: Memory, start: int, kind: Any) -> None:
        self.__dict__.update(memory=memory, _start=start, kind=kind)

    def _fetch(self) -> Any:
        return self.kind.from_buffer_copy(self.memory.read(self._start, ctypes.sizeof(self.kind)))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        here = self._fetch()
        found = getattr(here, name)
        if isinstance(found, (ctypes.Array, ctypes.Structure, ctypes.Union)):
            return behind(self.memory, self._start + getattr(self.kind, name).offset, type(found))
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        here = self._fetch()
        setattr(here, name, value)
        field = getattr(self.kind, name)
        data = bytes(here)
        # A bit field's size holds more than its bytes.
        end = field.offset + field.size if field.size <= len(data) - field.offset else len(data)
        self.memory.write(self._start + field.offset, data[field.offset:end])


class Array:
    """Stands for a ctypes array: what is read is fetched, what is assigned is sent."""

    def __init__(self, memory: Memory, start: int, of: Any, length: int) -> None:
        self.__dict__.update(memory=memory, _start=start, of=of, length=length, kind=of * length)

    memory: Memory
    of: Any
    length: int
    kind: Any
    _start: int

    def __len__(self) -> int:
        return self.length

    def _place(self, index: Any) -> tuple[int, int, Any]:
        """The first element that `index` speaks of, how many there are up to the last one, and the index in those."""
        if isinstance(index, slice):
            places = range(self.length)[index]
            if not places:
                return 0, 0, slice(0, 0)
            first, last = min(places[0], places[-1]), max(places[0], places[-1])
            if places.step > 0:
                return first, last - first + 1, slice(0, None, places.step)
            return first, last - first + 1, slice(None, None, places.step)
        place = index.__index__()
        place += self.length if place < 0 else 0
        if not 0 <= place < self.length:
            raise IndexError("invalid index")
        return place, 1, 0

    def _fetch(self, first: int, count: int) -> Any:
        size = ctypes.sizeof(self.of)
        return (self.of * count).from_buffer_copy(self.memory.read(self._start + first * size, count * size))

    def _send(self, first: int, here: Any) -> None:
        self.memory.write(self._start + first * ctypes.sizeof(self.of), bytes(here))

    def __getitem__(self, index: Any) -> Any:
        first, count, inner = self._place(index)
        if not issubclass(self.of, ctypes._SimpleCData):
            if not isinstance(index, slice):
                return behind(self.memory, self._start + first * ctypes.sizeof(self.of), self.of)
            return [self[place] for place in range(self.length)[index]]
        return self._fetch(first, count)[inner]

    def __setitem__(self, index: Any, value: Any) -> None:
        first, count, inner = self._place(index)
        whole = not isinstance(inner, slice) or inner.step == 1
        here = (self.of * count)() if whole else self._fetch(first, count)
        here[inner] = value
        self._send(first, here)

    def __iter__(self) -> Any:
        return iter(self[:])

    def __getattr__(self, name: str) -> Any:
        if name not in ("value", "raw"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._fetch(0, self.length), name)  # of characters alone

    def __setattr__(self, name: str, value: Any) -> None:
        here = self._fetch(0, self.length)
        setattr(here, name, value)
        self._send(0, here)

    def __repr__(self) -> str:
        return repr(self._fetch(0, self.length))


# What stands for a ctypes object.
BEHIND = (Value, Struct, Array)


def behind(memory: Memory, start: int, kind: Any) -> Value | Struct | Array:
    """What stands for a ctypes object of this type, at this place of the memory."""
    if issubclass(kind, ctypes.Array):
        return Array(memory, start, kind._type_, kind._length_)
    if issubclass(kind, ctypes._SimpleCData):
        return Value(memory, start, kind)
    return Struct(memory, start, kind)


def rebuild_synchronized(of: Any, length: int | None, memory: Memory, lock: Any) -> Any:
    """A Value or Array of multiprocessing, with its lock."""
    from multiprocessing import sharedctypes

    obj = behind(memory, 0, of if length is None else of * length)
    if isinstance(obj, Value):
        return sharedctypes.Synchronized(obj, lock)
    if isinstance(obj, Array):
        return (sharedctypes.SynchronizedString if of is ctypes.c_char else sharedctypes.SynchronizedArray)(
            obj, lock)
    names = [field[0] for base in reversed(of.__mro__) for field in base.__dict__.get("_fields_", ())]
    make: Any = sharedctypes.make_property  # type: ignore[attr-defined]
    fields = {name: make(name) for name in names}
    cls: Any = type("Synchronized" + of.__name__, (sharedctypes.SynchronizedBase,), fields)
    return cls(obj, lock)


# -- managers


def connects(client: Callable[..., Any]) -> Callable[..., Any]:
    """`client`, which is multiprocessing.connection.Client, for a worker: where there is nothing at a Unix socket's
    path on this machine, it may be on the driver's, which connects to it if it is a manager that it has a proxy of."""
    def connect(address: Any, family: str | None = None, authkey: bytes | None = None) -> Any:
        try:
            return client(address, family, authkey)
        except (FileNotFoundError, ConnectionRefusedError):
            if not isinstance(address, str) or family not in (None, "AF_UNIX"):
                raise
            tunnel = _tunnel(address)
            if tunnel is None:
                raise
        if authkey is not None:
            try:
                connection.answer_challenge(tunnel, authkey)
                connection.deliver_challenge(tunnel, authkey)
            except BaseException:
                tunnel.close()
                raise
        return tunnel

    return connect


def _tunnel(address: str) -> Connection | None:
    try:
        outcome, _, token = lent.channel().call(lent.NO_TOKEN, lent.CONNECT, FOR_EVER, content=os.fsencode(address))
    except lent.Gone:
        return None
    return Connection(token, True, True, own=True) if outcome == DONE else None


def install(asks: socket.socket) -> None:
    """Make this process, a worker, one that can operate what is lent to it."""
    lent.install(asks)
    client: Any = connection.Client
    connection.Client = connects(client)
