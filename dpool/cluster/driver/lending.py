"""What a group has lent to its workers, by token, and who waits for what: every call to it is answered here, once.

A call is tried at once; one that would have to wait stands in line, first come first served. Nothing here waits but one
thread for each semaphore that somebody waits for. Owned by a group's port (driver/remote.py); handing.py fills the
table, everything else is called in the group's I/O thread.

A lock is not held by the dead: when a process ends that has one, or the node of such a process is lost, it is released.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import os
import select
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable

from dpool.cluster.driver.things import Connection, Memory, Outcome, Relay, Semaphore, connected
from dpool.cluster.wire import lent
from dpool.cluster.wire.messages import Call, Returned

# A thread that waits for a semaphore looks so often whether anybody still wants it. Longer: it ends later. Shorter:
# more of them turn idly.
SLICE_S = 0.1
# When a manager that has no room for a connection is asked again.
AGAIN_S = 0.02

Thing = Semaphore | Connection | Memory | Relay
# Who calls: a session, and the pid of a process there.
Caller = tuple[bytes, int]


class _Waiting:
    """A call that stands in line, or was passed on."""

    __slots__ = ("session", "call", "thing", "line", "rest", "unwanted", "socket", "answered")

    def __init__(self, session: bytes, call: Call, thing: Thing | None) -> None:
        self.session = session
        self.call = call
        self.thing = thing
        self.line: _Line | None = None
        self.rest: memoryview | None = None  # of a message that is being sent
        self.unwanted = False  # a message has come in part, and goes to the next one
        self.socket: socket.socket | None = None  # on which the answer comes
        self.answered = False

    @property
    def caller(self) -> Caller:
        return self.session, self.call.process


class _Line:
    """Those who wait for one thing, or for one direction of a connection."""

    __slots__ = ("waiting", "wanted", "runs")

    def __init__(self) -> None:
        self.waiting: deque[_Waiting] = deque()
        # Guarded by the lending's lock: how many more units of a semaphore its thread is to get, and whether it runs.
        self.wanted = 0
        self.runs = False


class Lending:
    """`answer` sends an answer to a session: (session, request, outcome, number, content). turn() is to be called when
    `wake` was, and when the descriptor is readable that `watch` was told. `up`, in a driver that is a worker, makes a
    call to the driver of that worker."""

    def __init__(self, answer: Callable[[bytes, int, int, int, bytes], None], wake: Callable[[], None],
                 watch: Callable[[int], None], now: Callable[[], float],
                 up: Callable[..., socket.socket] | None = None) -> None:
        self._answer = answer
        self._wake = wake
        self._watch_this = watch
        self._now = now
        self._up = up
        self._things: dict[bytes, Thing] = {}
        self._own: dict[bytes, Caller] = {}  # connections that were made for one process -> which
        self._holders: dict[bytes, Caller] = {}  # locks -> who has them
        self._ending: dict[Caller, None] = {}  # processes that have ended in the midst of sending
        self._waiting: dict[tuple[bytes, int], _Waiting] = {}  # by session and request
        self._lines: dict[tuple[Thing, int], _Line] = {}
        self._deadlines: list[tuple[float, int, _Waiting]] = []
        self._count = itertools.count()
        # Guards _got, and wanted and runs of lines, against the threads that wait for semaphores.
        self._lock = threading.Lock()
        self._got: deque[tuple[Semaphore, _Line]] = deque()
        self._poll: select.epoll | None = None  # made when it is first needed
        self._watched: dict[int, int] = {}  # descriptor -> events
        self._of_descriptor: dict[int, Connection | _Waiting] = {}
        self._closed = False
        self.in_use = False  # whether any call has come

    # -- the table

    def lend(self, thing: Thing) -> bytes:
        """Its token. Not later than the first poll() of the group."""
        token = os.urandom(lent.TOKEN_BYTES)
        self._things[token] = thing
        return token

    @property
    def lends(self) -> bool:
        """Whether anything is lent."""
        return bool(self._things)

    @property
    def waits(self) -> int:
        """How many calls wait for a semaphore, for a message, or for this process's own driver."""
        return sum(one.call.operation != lent.SEND and not one.unwanted
                   and (one.line is not None or one.socket is not None)
                   for one in list(self._waiting.values()))

    @property
    def owned(self) -> int:
        """How many connections there are to managers."""
        return len(self._own)

    @property
    def deadline(self) -> float | None:
        """When turn() has something to do."""
        while self._deadlines and self._deadlines[0][2].answered:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    # -- what nodes say

    def call(self, session: bytes, call: Call) -> None:
        """A process calls."""
        self.in_use = True
        one = _Waiting(session, call, self._things.get(call.token))
        self._waiting[session, call.request] = one
        operation, thing = call.operation, one.thing
        if operation == lent.RELEASE:
            # Not with the answer: of what is passed on that may come after the next holder's.
            self._holders.pop(call.token, None)
        if operation == lent.CONNECT:
            self._connect(one)
        elif thing is None or call.token in self._own and self._own[call.token] != one.caller:
            self._done(one, (lent.UNKNOWN, 0, b""))
        elif operation == lent.CLOSE:
            self._done(one, (lent.DONE, 0, b""))
            if call.token in self._own:
                self._close(call.token)
        elif isinstance(thing, Relay):
            self._pass_on(one, thing.begin)
        elif isinstance(thing, Semaphore):
            self._on_semaphore(one, thing)
        elif isinstance(thing, Connection):
            self._on_connection(one, thing)
        elif operation == lent.READ:
            self._done(one, thing.read(call.start, call.size))
        elif operation == lent.WRITE:
            self._done(one, thing.write(call.start, call.content))
        else:
            self._done(one, (lent.UNKNOWN, 0, b""))

    def dropped(self, session: bytes, request: int) -> None:
        """Nobody waits for this answer any longer."""
        one = self._waiting.get((session, request))
        if one is not None:
            self._drop(one)

    def returned(self, session: bytes, message: Returned) -> None:
        """What a call has taken reached nobody."""
        self._undo((session, message.process), message.token, message.operation, message.content)

    def ended(self, session: bytes, process: int) -> None:
        """A process has ended."""
        self._end((session, process))

    def lost(self, session: bytes) -> None:
        """A node has, or has left."""
        callers = {one.caller for one in self._waiting.values() if one.session == session}
        callers.update(caller for caller in (*self._holders.values(), *self._own.values()) if caller[0] == session)
        for caller in callers:
            self._end(caller)

    def turn(self) -> None:
        """See to what has become possible, and to what has waited long enough."""
        while self._got:
            thing, line = self._got.popleft()
            if line.waiting:
                one = line.waiting.popleft()
                self._done(one, (lent.DONE, 0, b""))
            else:
                thing.give()  # who waited has gone meanwhile
        if self._poll is not None:
            for descriptor, _ in self._poll.poll(0):
                found = self._of_descriptor.get(descriptor)
                if isinstance(found, Connection):
                    self._try(found)
                elif found is not None:
                    self._on_answer(found)
        now = self._now()
        while (deadline := self.deadline) is not None and deadline <= now:
            one = heapq.heappop(self._deadlines)[2]
            if one.call.operation == lent.CONNECT:
                self._connect(one)
            else:
                self._drop(one)

    def close(self) -> None:
        """Take everything back: nobody is answered any more."""
        self._closed = True
        for one in self._waiting.values():
            one.answered = True
            if one.socket is not None:
                one.socket.close()
        with self._lock:
            for line in self._lines.values():
                line.wanted = 0
        while self._got:
            self._got.popleft()[0].give()
        for token, _ in list(self._holders.items()):
            self._release_of_the_dead(token)
        for thing in self._things.values():
            thing.close()
        self._waiting.clear()
        self._lines.clear()
        self._things.clear()
        if self._poll is not None:
            self._poll.close()

    # -- answers

    def _done(self, one: _Waiting, outcome: Outcome) -> None:
        if one.answered:
            return
        one.answered = True
        call = one.call
        self._waiting.pop((one.session, call.request), None)
        thing = one.thing
        if (call.operation == lent.ACQUIRE and outcome[0] == lent.DONE and isinstance(thing, Semaphore | Relay)
                and thing.is_lock):
            self._holders[call.token] = one.caller
        self._answer(one.session, call.request, *outcome)
        if one.caller in self._ending:
            self._end(one.caller)

    def _wait(self, one: _Waiting, thing: Thing, direction: int) -> _Line:
        """Put a call in line."""
        line = self._lines.get((thing, direction))
        if line is None:
            line = self._lines[thing, direction] = _Line()
        one.line = line
        line.waiting.append(one)
        self._expire(one)
        return line

    def _expire(self, one: _Waiting) -> None:
        if one.call.seconds is not None:
            if len(self._deadlines) > 2 * len(self._waiting) + 64:  # most are answered
                self._deadlines = [entry for entry in self._deadlines if not entry[2].answered]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (self._now() + one.call.seconds, next(self._count), one))

    def _drop(self, one: _Waiting) -> None:
        """End the waiting. A message that is on the way goes on, in either direction: a half of it would spoil the
        pipe."""
        if one.rest is not None or one.call.operation == lent.SEND and one.socket is not None:
            return
        if (isinstance(one.thing, Connection) and one.thing.is_in_message and one.call.operation == lent.RECEIVE
                and one.line is not None and one.line.waiting[0] is one):
            one.unwanted = True
            return
        if one.line is not None and one in one.line.waiting:
            one.line.waiting.remove(one)
            if isinstance(one.thing, Semaphore):
                with self._lock:
                    one.line.wanted -= 1 if one.line.wanted else 0  # else it has been got, and is given back
            elif isinstance(one.thing, Connection):
                self._watch(one.thing)
        if one.socket is not None:
            ours, one.socket = one.socket, None
            self._forget(ours.fileno())
            content = lent.withdraw(ours)  # which says the same to this process's own node
            if content is not None:
                self._undo_up(one, content)
        self._done(one, (lent.NO, 0, b""))

    def _end(self, caller: Caller) -> None:
        """A process has ended: it waits for nothing, and holds nothing up."""
        self._ending.pop(caller, None)
        for one in [one for one in self._waiting.values() if one.caller == caller]:
            self._drop(one)
        for token in [token for token, owner in self._own.items() if owner == caller]:
            self._close(token)
        if any(one.caller == caller for one in self._waiting.values()):
            self._ending[caller] = None  # its message is under way; till then nobody else may write
            return
        for token in [token for token, holder in self._holders.items() if holder == caller]:
            self._release_of_the_dead(token)

    def _release_of_the_dead(self, token: bytes) -> None:
        del self._holders[token]
        thing = self._things[token]
        if isinstance(thing, Relay):
            self._say_up(thing.begin, lent.RELEASE)
        elif isinstance(thing, Semaphore):
            thing.release()  # if it is free, a process of this machine has released it

    def _undo(self, caller: Caller, token: bytes, operation: int, content: bytes) -> None:
        thing = self._things.get(token)
        if operation == lent.CONNECT:
            if self._own.get(content) == caller:
                self._close(content)
        elif isinstance(thing, Connection):
            thing.put_back(content)
            self._try(thing)
        elif isinstance(thing, Semaphore | Relay) and operation == lent.ACQUIRE:
            if thing.is_lock and self._holders.get(token) != caller:
                return  # it has been released since
            self._holders.pop(token, None)
            if isinstance(thing, Semaphore):
                thing.release()
            else:
                self._say_up(thing.begin, lent.RELEASE)
        elif isinstance(thing, Relay) and operation == lent.RECEIVE:
            self._say_up(thing.begin, lent.PUT_BACK, content)

    def _undo_up(self, one: _Waiting, content: bytes) -> None:
        """What the driver of this process has given for a call that nobody waits for."""
        if one.call.operation == lent.CONNECT and self._up is not None:
            self._say_up(functools.partial(self._up, content), lent.CLOSE)
        elif isinstance(one.thing, Relay) and one.call.operation == lent.ACQUIRE:
            self._say_up(one.thing.begin, lent.RELEASE)
        elif isinstance(one.thing, Relay) and one.call.operation == lent.RECEIVE:
            self._say_up(one.thing.begin, lent.PUT_BACK, content)

    # -- semaphores

    def _on_semaphore(self, one: _Waiting, thing: Semaphore) -> None:
        operation = one.call.operation
        if operation == lent.VALUE:
            self._done(one, (lent.DONE, thing.value(), b""))
        elif operation == lent.RELEASE:
            self._done(one, thing.release())
        elif operation != lent.ACQUIRE:
            self._done(one, (lent.UNKNOWN, 0, b""))
        else:
            line = self._lines.get((thing, lent.ACQUIRE))
            waits = one.call.seconds != 0
            if not (waits and line is not None and line.waiting) and thing.take():
                self._done(one, (lent.DONE, 0, b""))
            elif not waits:
                self._done(one, (lent.NO, 0, b""))
            else:
                line = self._wait(one, thing, lent.ACQUIRE)
                with self._lock:
                    line.wanted += 1
                    if not line.runs:
                        line.runs = True
                        threading.Thread(target=self._get, args=(thing, line), name="dpool-lock", daemon=True).start()

    def _get(self, thing: Semaphore, line: _Line) -> None:
        """A thread: get units of a semaphore, as long as somebody wants them."""
        while True:
            got = thing.wait(SLICE_S)
            with self._lock:
                if got and not line.wanted:
                    thing.give()
                elif got:
                    line.wanted -= 1
                    self._got.append((thing, line))
                if not line.wanted:
                    line.runs = False
                if got and not self._closed:
                    self._wake()
                if not line.runs:
                    return

    # -- connections

    def _on_connection(self, one: _Waiting, thing: Connection) -> None:
        operation, seconds = one.call.operation, one.call.seconds
        if operation == lent.PUT_BACK:
            thing.put_back(one.call.content)
            self._done(one, (lent.DONE, 0, b""))
        elif operation == lent.SEND:
            self._wait(one, thing, lent.SEND)
        elif operation == lent.POLL and seconds == 0:
            self._done(one, thing.poll() or (lent.NO, 0, b""))
        elif operation in (lent.POLL, lent.RECEIVE):
            self._wait(one, thing, lent.RECEIVE)
        else:
            self._done(one, (lent.UNKNOWN, 0, b""))
        self._try(thing)

    def _try(self, thing: Connection) -> None:
        """Do what can be done for those who wait for a connection."""
        reading, writing = self._lines.get((thing, lent.RECEIVE)), self._lines.get((thing, lent.SEND))
        while reading is not None and reading.waiting:
            one = reading.waiting[0]
            outcome = thing.poll() if one.call.operation == lent.POLL else thing.receive()
            if outcome is None:
                break
            reading.waiting.popleft()
            if one.unwanted and outcome[0] == lent.DONE:
                thing.put_back(outcome[2])
                outcome = lent.NO, 0, b""
            self._done(one, outcome)
        while writing is not None and writing.waiting:
            one = writing.waiting[0]
            whole = one.rest if one.rest is not None else thing.framed(one.call.content)
            rest, outcome = thing.send(whole)
            if outcome is None:
                # Begun only if something of it is on the way.
                one.rest = rest if one.rest is not None or rest.nbytes < whole.nbytes else None
                break
            writing.waiting.popleft()
            one.rest = None
            self._done(one, outcome)
        self._watch(thing)

    def _watch(self, thing: Connection) -> None:
        """Watch the descriptor of a connection for what it is waited for."""
        events = 0
        for direction, event in ((lent.RECEIVE, select.EPOLLIN), (lent.SEND, select.EPOLLOUT)):
            line = self._lines.get((thing, direction))
            events |= event if line is not None and line.waiting else 0
        self._watch_for(thing.descriptor, events, thing)

    def _watch_for(self, descriptor: int, events: int, what: Connection | _Waiting) -> None:
        before = self._watched.get(descriptor, 0)
        if events == before:
            return
        if not events:
            self._forget(descriptor)
            return
        if self._poll is None:
            self._poll = select.epoll()
            self._watch_this(self._poll.fileno())
        if before:
            self._poll.modify(descriptor, events)
        else:
            self._poll.register(descriptor, events)
        self._watched[descriptor] = events
        self._of_descriptor[descriptor] = what

    def _forget(self, descriptor: int) -> None:
        if self._watched.pop(descriptor, None) is not None and self._poll is not None:
            self._poll.unregister(descriptor)
        self._of_descriptor.pop(descriptor, None)

    def _close(self, token: bytes) -> None:
        """A connection that was made for one process is not needed any more."""
        del self._own[token]
        thing = self._things.pop(token)
        for direction in (lent.RECEIVE, lent.SEND):
            line = self._lines.pop((thing, direction), None)
            for one in list(line.waiting) if line is not None else ():
                one.rest = None
                self._done(one, (lent.END, 0, b""))
        if isinstance(thing, Connection):
            self._forget(thing.descriptor)
        elif isinstance(thing, Relay):
            self._say_up(thing.begin, lent.CLOSE)
        thing.close()

    # -- managers

    def _connect(self, one: _Waiting) -> None:
        """Connect a process to a manager of this machine, if this program has a proxy of it."""
        address = os.fsdecode(one.call.content)
        if not _is_known(address):
            self._done(one, (lent.UNKNOWN, 0, b""))
            return
        try:
            thing = connected(address)
        except OSError as error:
            if self._up is not None:  # it may be on the machine of this process's own driver
                self._pass_on(one, functools.partial(self._up, lent.NO_TOKEN))
            else:
                self._done(one, (lent.FAILED, 0, str(error).encode()))
            return
        if thing is None:
            heapq.heappush(self._deadlines, (self._now() + AGAIN_S, next(self._count), one))
            return
        self._give_own(one, thing)

    def _give_own(self, one: _Waiting, thing: Thing) -> None:
        token = self.lend(thing)
        self._own[token] = one.caller
        self._done(one, (lent.DONE, 0, token))

    # -- what this process was lent itself

    def _pass_on(self, one: _Waiting, begin: Callable[..., socket.socket]) -> None:
        call = one.call
        seconds = lent.FOR_EVER if call.seconds is None else call.seconds
        try:
            one.socket = begin(call.operation, seconds, call.start, call.size, call.content)
            one.socket.setblocking(False)
        except (OSError, lent.Gone):
            self._done(one, (lent.UNKNOWN, 0, b""))
            return
        self._watch_for(one.socket.fileno(), select.EPOLLIN, one)

    def _on_answer(self, one: _Waiting) -> None:
        """The driver of this process has answered."""
        assert one.socket is not None
        try:
            outcome = lent.answer(one.socket)
        except BlockingIOError:
            return
        except (OSError, lent.Gone):
            outcome = lent.UNKNOWN, 0, b""
        self._forget(one.socket.fileno())
        one.socket.close()
        one.socket = None
        if one.call.operation == lent.CONNECT and outcome[0] == lent.DONE and self._up is not None:
            self._give_own(one, Relay(functools.partial(self._up, outcome[2])))
        else:
            self._done(one, outcome)

    @staticmethod
    def _say_up(begin: Callable[..., socket.socket], operation: int, content: bytes = b"") -> None:
        try:
            begin(operation, content=content).close()
        except (OSError, lent.Gone):
            pass


def _is_known(address: str) -> bool:
    """Whether this program has had a proxy of the manager at this address."""
    managers = sys.modules.get("multiprocessing.managers")
    return managers is not None and address in managers.BaseProxy._address_to_local
