"""How workers operate what their driver has lent them, a lock or a queue's pipe: the calls, and the way up to the node.

Writes calls and reads answers; knows neither locks nor pipes. Used by borrowed.py in a worker, by the node that carries
calls, and by a driver that is a worker itself and passes them on. Imports little: every worker has it.

A call goes over the socket on which workers ask for modules, with one end of a pair of sockets of its own: the answer
comes over that, and who hangs up does not wait any longer.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct

from dpool.cluster.wire.frames import INLINE_CALL_BYTES
from dpool.errors import ClusterError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# Operations. Of semaphores:
ACQUIRE, RELEASE, VALUE = 1, 2, 3
# of connections:
SEND, RECEIVE, POLL = 4, 5, 6
# of memory:
READ, WRITE = 7, 8
# A connection to a manager of the driver's machine, by its address; and the end of it.
CONNECT, CLOSE = 9, 10
# What RECEIVE has given, and nobody has: the next one gets it.
PUT_BACK = 11
OPERATIONS = range(ACQUIRE, PUT_BACK + 1)
# Those that take something away: what they took goes back if the answer reaches nobody.
TAKING = (ACQUIRE, RECEIVE, CONNECT)

# Outcomes. NO: not within the time that was given.
DONE, NO = 0, 1
# The errors: released too often; the other end is closed, when receiving and when sending; the operation failed, and
# the content says how; it is none of what was lent.
TOO_OFTEN, END, BROKEN, FAILED, UNKNOWN = 2, 3, 4, 5, 6

FOR_EVER = float("inf")
TOKEN_BYTES = 16
NO_TOKEN = bytes(TOKEN_BYTES)  # of CONNECT

# No question about a module begins so.
CALL = b"\0\1"
# A call: CALL, token, operation, seconds, start, size. Its content comes behind, or in a memfd.
HEADER = struct.Struct("<2s16sBdQQ")
# Its answer: outcome, number. Its content likewise.
ANSWER = struct.Struct("<Bq")
# What a socket must be read with.
MESSAGE_BYTES = HEADER.size + INLINE_CALL_BYTES


class Gone(ClusterError):
    """Nobody answers: the driver that has lent this has ended, or the node has."""


def pack(content: bytes | memoryview) -> tuple[bytes | memoryview, int]:
    """(what goes along, the memfd with all of it, -1 if it goes along). The caller closes that."""
    if len(content) <= INLINE_CALL_BYTES:
        return content, -1
    descriptor = os.memfd_create("dpool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(content).cast("B")
        while rest.nbytes:
            rest = rest[os.write(descriptor, rest):]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    except BaseException:
        os.close(descriptor)
        raise
    return b"", descriptor


def is_sealed(descriptor: int) -> bool:
    """Whether it stays as long as it is, so that it can be mapped."""
    try:
        return bool(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False


def unpack(along: bytes, descriptor: int) -> bytes:
    """The content; the descriptor is closed."""
    if descriptor < 0:
        return along
    with open(descriptor, "rb") as file:
        file.seek(0)
        return file.read()


class Channel:
    """The way from a worker, or a process forked from it, to its node. Any thread may call."""

    def __init__(self, asks: socket.socket) -> None:
        self._asks = asks

    def begin(self, token: bytes, operation: int, seconds: float = 0.0, start: int = 0, size: int = 0,
              content: bytes | memoryview = b"") -> socket.socket:
        """Make a call; answer() reads what comes back on this socket. Raises Gone."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            along, descriptor = pack(content)
        except BaseException:  # no descriptor is left for it, or no memory
            ours.close()
            theirs.close()
            raise
        try:
            ours.setblocking(True)  # whatever the default for new sockets is
            with theirs:
                descriptors = [theirs.fileno()] if descriptor < 0 else [theirs.fileno(), descriptor]
                header = HEADER.pack(CALL, token, operation, seconds, start, size)
                socket.send_fds(self._asks, [header, along], descriptors)
        except OSError as error:
            ours.close()
            raise Gone(f"the node of this worker is gone: {error}") from None
        except BaseException:
            ours.close()
            raise
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return ours

    def call(self, token: bytes, operation: int, seconds: float = 0.0, start: int = 0, size: int = 0,
             content: bytes | memoryview = b"") -> tuple[int, int, bytes]:
        """(outcome, number, content); waits as long as it takes. Raises Gone, and what signal handlers raise."""
        ours = self.begin(token, operation, seconds, start, size, content)
        with ours:
            try:
                return answer(ours)
            except Gone:
                raise
            except BaseException:
                # The handler of a signal has raised.
                taken = withdraw(ours)
                if taken is not None:
                    undo(self, token, operation, taken)
                raise


def withdraw(ours: socket.socket) -> bytes | None:
    """Wait no longer: the content of the answer if the call has succeeded all the same. Otherwise the node cannot
    answer any more. Not by close() alone: a process that was forked meanwhile has this socket, too."""
    with ours:
        try:
            ours.shutdown(socket.SHUT_RDWR)
            outcome, _, content = answer(ours)
        except (OSError, Gone):
            return None
    return content if outcome == DONE else None


def undo(channel: Channel, token: bytes, operation: int, content: bytes) -> None:
    """Give back what a call has taken, without waiting for the answer."""
    if operation == ACQUIRE:
        channel.begin(token, RELEASE).close()
    elif operation == RECEIVE:
        channel.begin(token, PUT_BACK, content=content).close()
    elif operation == CONNECT:
        channel.begin(content, CLOSE).close()


def answer(ours: socket.socket) -> tuple[int, int, bytes]:
    """The answer to a call: (outcome, number, content). Raises Gone if none will come, OSError if no descriptor is left
    for its content."""
    data: Any
    try:
        data, descriptors, flags, _ = socket.recv_fds(ours, ANSWER.size + INLINE_CALL_BYTES, 1)
    except ConnectionError as error:
        raise Gone(str(error)) from None
    if flags & socket.MSG_CTRUNC:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    if not data:
        raise Gone("the driver that has lent this, or the node of this worker, is gone")
    outcome, number = ANSWER.unpack_from(data)
    return outcome, number, unpack(data[ANSWER.size:], descriptors[0] if descriptors else -1)


def tell(asker: socket.socket, outcome: int, number: int, along: bytes, descriptor: int) -> None:
    """Answer a call; the content goes along, or is in the memfd. Raises OSError if nobody waits any longer."""
    asker.setblocking(False)
    socket.send_fds(asker, [ANSWER.pack(outcome, number), along], [descriptor] if descriptor >= 0 else [])


_channel: Channel | None = None


def install(asks: socket.socket) -> None:
    """From now on this process, a worker, can operate what is lent to it."""
    global _channel
    _channel = Channel(asks)


def up() -> Callable[..., socket.socket] | None:
    """Makes calls to the driver of this process, if it is a worker."""
    return None if _channel is None else _channel.begin


def channel() -> Channel:
    """That of this worker, or of the worker that this process was forked from. Raises Gone in any other process."""
    if _channel is None:
        raise Gone("this was lent to workers of a cluster, and this process is none of them")
    return _channel
