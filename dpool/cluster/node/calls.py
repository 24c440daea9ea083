"""The calls of one group's workers to what their driver has lent them: passed on, and the answers handed back.

Knows who asks, and sees when nobody waits any longer and when a process that has called has ended; what a call does is
the driver's. Called by node/part.py, which reads calls from the socket of its workers and watches descriptors for it.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import struct
from collections.abc import Callable

from dpool.cluster.wire import lent
from dpool.cluster.wire.messages import Answer, Call, Dropped, Ended, Message, Returned

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class _Asked:
    """A call without an answer: who has made it, and the socket on which the answer is waited for, if it still is."""

    __slots__ = ("asker", "process", "token", "operation")

    def __init__(self, asker: socket.socket | None, process: int, token: bytes, operation: int) -> None:
        self.asker = asker
        self.process = process
        self.token = token
        self.operation = operation


class Calls:
    """`send` takes messages for the driver, each with the descriptor of its content, or -1; `watch` and `unwatch`
    descriptors: when one is readable, on_ready() is to be called."""

    def __init__(self, send: Callable[[Message, int], None], watch: Callable[[int], None],
                 unwatch: Callable[[int], None]) -> None:
        self._send = send
        self._watch = watch
        self._unwatch = unwatch
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._watched: dict[int, int] = {}  # the descriptor of an asker -> its request
        # Processes that have made a call, each with a descriptor that is readable when it has ended: the worker's own
        # end would not tell of processes that a task has forked.
        self._processes: dict[int, int] = {}
        self._pids: dict[int, int] = {}

    def on_call(self, data: bytes, descriptors: list[int]) -> None:
        """What a process has sent. It is not waited for longer than its socket is open."""
        content = (descriptors[1:] or [-1])[0]
        try:
            asker, process = _introduced(descriptors[0])
        except OSError:  # it is no socket
            for descriptor in descriptors:
                os.close(descriptor)
            return
        try:
            _, token, operation, seconds, start, size = lent.HEADER.unpack_from(data)
            if (operation not in lent.OPERATIONS or not seconds >= 0 or max(start, size) >> 63
                    or content >= 0 and not lent.is_sealed(content) or not self._meet(process)):
                asker.close()
                return
            request = next(self._numbers)
            self._asked[request] = _Asked(asker, process, token, operation)
            if seconds:
                self._watched[asker.fileno()] = request
                self._watch(asker.fileno())
            self._send(Call(request, process, token, operation, None if seconds == lent.FOR_EVER else seconds, start,
                            size, data[lent.HEADER.size:]), content)
        except struct.error:
            asker.close()
        finally:
            if content >= 0:
                os.close(content)

    def _meet(self, process: int) -> bool:
        """From now on the end of this process is seen. False if it has ended."""
        known = self._processes.get(process)
        if known is not None:
            if not _is_readable(known):
                return True
            self._on_end(known)  # this one has the number of one that has ended
        try:
            descriptor = os.pidfd_open(process)
        except (OSError, OverflowError):
            return False
        if _is_readable(descriptor):  # it has ended, and was not waited for; what it held the driver has released
            os.close(descriptor)
            return False
        self._processes[process] = descriptor
        self._pids[descriptor] = process
        self._watch(descriptor)
        return True

    def on_ready(self, descriptor: int) -> bool:
        """A descriptor that is watched is readable. False if it is none of these."""
        if descriptor in self._pids:
            if _is_readable(descriptor):  # else it is another that has got the number since
                self._on_end(descriptor)
        elif descriptor in self._watched:
            if not _is_readable(descriptor):
                return True
            request = self._watched[descriptor]
            self._give_up(request)
            self._send(Dropped(request), -1)
        else:
            return False
        return True

    def _on_end(self, descriptor: int) -> None:
        process = self._pids.pop(descriptor)
        del self._processes[process]
        self._unwatch(descriptor)
        os.close(descriptor)
        for request, asked in self._asked.items():
            if asked.process == process:
                self._give_up(request)
        self._send(Ended(process), -1)

    def _give_up(self, request: int) -> None:
        """Nobody waits for this one; its answer comes all the same."""
        asked = self._asked[request]
        if asked.asker is not None:
            self._let_go(asked.asker)
            asked.asker = None

    def _let_go(self, asker: socket.socket) -> None:
        if self._watched.pop(asker.fileno(), None) is not None:
            self._unwatch(asker.fileno())
        asker.close()

    def on_answer(self, message: Answer, segments: list[int]) -> None:
        """What the driver says. The segment is given back, if there is one."""
        content = (segments or [-1])[0]
        try:
            asked = self._asked.pop(message.request, None)
            if asked is None:
                return
            if asked.asker is not None:
                try:
                    lent.tell(asked.asker, message.outcome, message.number, message.content, content)
                    return
                except OSError:
                    pass  # it has hung up
                finally:
                    self._let_go(asked.asker)
            if message.outcome == lent.DONE and asked.operation in lent.TAKING:
                self._send(Returned(asked.process, asked.token, asked.operation, message.content), content)
        finally:
            for segment in segments:
                os.close(segment)

    def close(self) -> None:
        """Who still waits sees that no answer will come."""
        for asked in self._asked.values():
            if asked.asker is not None:
                asked.asker.close()
        for descriptor in self._pids:
            os.close(descriptor)
        self._asked.clear()
        self._watched.clear()
        self._pids.clear()
        self._processes.clear()


def _introduced(descriptor: int) -> tuple[socket.socket, int]:
    """A socket, and the pid of the process that has made it, by the kernel's word. Raises OSError if it is none."""
    asker = socket.socket(fileno=descriptor)
    credentials = asker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return asker, _CREDENTIALS.unpack(credentials)[0]


def _is_readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
