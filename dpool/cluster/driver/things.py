"""What a driver lends to its workers, each with what may be done to it: semaphores, connections, memory.

No operation here waits: what would have to is told so, and tried again by lending.py, which owns them and calls them in
the I/O thread of a group. Only Semaphore.wait() waits, in a thread of lending.py's.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
import time
from array import array
from collections import deque
from functools import cache

from dpool.cluster.wire import lent
from dpool.cluster.wire.handles import reopen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# Outcome, number, content.
Outcome = tuple[int, int, bytes]

# A struct timespec.
_TIMESPEC = struct.Struct("@ll")
_SHORT, _LONG = struct.Struct("!i"), struct.Struct("!Q")
# A plain number: what `|` of the enum's members costs is a microsecond.
_SEND = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
# What is read from a pipe at once.
_READ_BYTES = 1 << 20


@cache
def _libc() -> Any:
    """The C library. Loaded when a semaphore is lent: most drivers lend none."""
    import ctypes

    libc: Any = ctypes.CDLL(None, use_errno=True)
    libc.sem_trywait.argtypes = libc.sem_post.argtypes = [ctypes.c_void_p]
    libc.sem_getvalue.argtypes = libc.sem_timedwait.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return libc


class Semaphore:
    """The POSIX semaphore behind a lock of multiprocessing's. It is operated as such: the lock itself keeps in each
    process which thread owns it, and the threads that ask are others'."""

    def __init__(self, semlock: Any, is_lock: bool) -> None:
        self._semlock = semlock  # as long as this is referred to, there is the semaphore
        self._handle = semlock.handle
        self._libc = _libc()
        self._maxvalue = semlock.maxvalue
        self.is_lock = is_lock  # who dies with it holds up everybody

    def take(self) -> bool:
        """Take one, if there is one."""
        return self._libc.sem_trywait(self._handle) == 0  # type: ignore[no-any-return]

    def wait(self, seconds: float) -> bool:
        """Take one; False if there is none for so long. The only one that waits."""
        until = time.time() + seconds
        limit = _TIMESPEC.pack(int(until), int(until % 1 * 1e9))
        return self._libc.sem_timedwait(self._handle, limit) == 0  # type: ignore[no-any-return]

    def give(self) -> None:
        self._libc.sem_post(self._handle)

    def value(self) -> int:
        found = array("i", [0])
        self._libc.sem_getvalue(self._handle, found.buffer_info()[0])
        return found[0]

    def release(self) -> Outcome:
        if self.value() >= self._maxvalue:
            return lent.TOO_OFTEN, 0, b""
        self.give()
        return lent.DONE, 0, b""

    def close(self) -> None:
        """Nothing: it is the program's."""


class Memory:
    """A block of multiprocessing's shared memory."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper  # as long as this is referred to, the block is not used for another
        self._view = wrapper.create_memoryview().cast("B")

    def read(self, start: int, size: int) -> Outcome:
        if start + size > len(self._view):
            return lent.FAILED, 0, b"there is not so much of it"
        return lent.DONE, 0, bytes(self._view[start:start + size])

    def write(self, start: int, content: bytes) -> Outcome:
        if start + len(content) > len(self._view):
            return lent.FAILED, 0, b"there is not so much of it"
        self._view[start:start + len(content)] = content
        return lent.DONE, 0, b""

    def close(self) -> None:
        """Nothing: it is the program's."""


class Connection:
    """An end of a pipe, with a descriptor of its own: the program may close its end. Messages are whole: nobody gets
    or sends a part of one."""

    def __init__(self, descriptor: int, readable: bool, writable: bool) -> None:
        """The descriptor is duplicated. Raises OSError if it is none of a pipe or socket."""
        kind = os.fstat(descriptor).st_mode
        self._socket: socket.socket | None = None
        if stat.S_ISSOCK(kind):
            self._socket = socket.socket(fileno=os.dup(descriptor))
            self._socket.setblocking(True)  # as the program has it, whatever its default for new sockets is
            self.descriptor = self._socket.fileno()
        elif stat.S_ISFIFO(kind):
            # One that does not block. The flag belongs to the open file, which the program shares.
            self.descriptor = reopen(descriptor, (os.O_RDONLY if readable else os.O_WRONLY) | os.O_NONBLOCK)
        else:
            raise OSError(errno.EINVAL, "neither a pipe nor a socket")
        self._readable, self._writable = readable, writable
        self._come = bytearray()  # of the next message, as far as it has come
        self._ready: deque[bytes] = deque()  # messages that nobody has got
        self._ended = False
        self._closed = False

    def _read(self, size: int) -> bool:
        """Get up to so much more of the next message, never of the one after it, which others may read; False if there
        is nothing now."""
        try:
            if self._socket is not None:
                data = self._socket.recv(min(size, _READ_BYTES), socket.MSG_DONTWAIT)
            else:
                data = os.read(self.descriptor, min(size, _READ_BYTES))
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._ended = True
        self._come += data
        return bool(data)

    def _bounds(self) -> tuple[int, int]:
        """Where the content of the next message begins and ends; (n, -1) if it takes n bytes to know that."""
        come = self._come
        if len(come) < _SHORT.size:
            return _SHORT.size, -1
        size = _SHORT.unpack_from(come)[0]
        if size >= 0:
            return _SHORT.size, _SHORT.size + size
        head = _SHORT.size + _LONG.size
        return head, -1 if len(come) < head else head + _LONG.unpack_from(come, _SHORT.size)[0]

    def receive(self) -> Outcome | None:
        """A message; None if there is none yet."""
        if not self._readable:
            return lent.FAILED, 0, b"connection is write-only"
        if self._ready:
            return lent.DONE, 0, self._ready.popleft()
        while not self._ended:
            start, end = self._bounds()
            if len(self._come) == end:
                data, self._come = bytes(memoryview(self._come)[start:]), bytearray()
                return lent.DONE, 0, data
            if not self._read((start if end < 0 else end) - len(self._come)):
                break
        if not self._ended:
            return None
        return (lent.FAILED, 0, b"got end of file during message") if self._come else (lent.END, 0, b"")

    @property
    def is_in_message(self) -> bool:
        """Whether a part of one has come, which nobody else can read any more."""
        return bool(self._come)

    def poll(self) -> Outcome | None:
        """Whether receive() has something to say; None if not yet."""
        if not self._readable:
            return lent.FAILED, 0, b"connection is write-only"
        if self._ready or self._come or self._ended or _is_ready(self.descriptor, select.POLLIN):
            return lent.DONE, 0, b""
        return None

    def put_back(self, content: bytes) -> None:
        """What receive() has given: it is the next message again."""
        self._ready.appendleft(content)

    def send(self, rest: memoryview) -> tuple[memoryview, Outcome | None]:
        """Send what can be sent: (what is left, the outcome; None if something is)."""
        if not self._writable:
            return rest, (lent.FAILED, 0, b"connection is read-only")
        try:
            while rest.nbytes:
                if self._socket is not None:
                    rest = rest[self._socket.send(rest, _SEND):]
                else:
                    rest = rest[os.write(self.descriptor, rest):]
        except BlockingIOError:
            return rest, None
        except BrokenPipeError:
            return rest, (lent.BROKEN, 0, b"")
        except OSError as error:
            return rest, (lent.FAILED, 0, str(error).encode())
        return rest, (lent.DONE, 0, b"")

    @staticmethod
    def framed(content: bytes) -> memoryview:
        """As it goes over the pipe."""
        if len(content) > 0x7FFFFFFF:
            return memoryview(b"".join((_SHORT.pack(-1), _LONG.pack(len(content)), content)))
        return memoryview(_SHORT.pack(len(content)) + content)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._socket is not None:
            self._socket.close()
        else:
            os.close(self.descriptor)


class Relay:
    """What this process, a worker, was lent itself, and lends on to its own workers: calls are passed on, and their
    answers back. `begin` makes a call of Borrowed's (wire/borrowed.py)."""

    def __init__(self, begin: Callable[..., socket.socket], is_lock: bool = False) -> None:
        self.begin = begin
        self.is_lock = is_lock

    def close(self) -> None:
        """Nothing: it is its driver's."""


def connected(address: str) -> Connection | None:
    """A connection to what listens at a Unix socket's path; None if it has no room for one just now. Raises OSError if
    nothing does."""
    with socket.socket(socket.AF_UNIX) as made:
        made.setblocking(False)
        try:
            made.connect(address)
        except BlockingIOError:
            return None
        made.setblocking(True)
        return Connection(made.fileno(), True, True)


def _is_ready(descriptor: int, event: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(0))
