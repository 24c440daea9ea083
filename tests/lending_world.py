"""Stands for what lending works in: a driver and its program, nodes, and processes that call; and says what is wrong.

Real books on both sides (driver/lending.py, node/calls.py), real sessions and pipes, in one thread: links are queues,
processes are numbers, and a semaphore's thread goes on when it is told to. Decides nothing: test_lending_machine.py.
"""

from __future__ import annotations

import errno
import functools
import os
import pickle
import select
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any
from unittest import mock

import msgspec

from dpool.cluster.driver import lending as lending_module
from dpool.cluster.driver.lending import Lending
from dpool.cluster.driver.things import Connection, Relay, Semaphore
from dpool.cluster.node import calls as calls_module
from dpool.cluster.node.calls import Calls
from dpool.cluster.wire import lent, messages, sessions

LOCK, READERS, WRITERS, COUNTER, READ, WRITE = "lock", "readers", "writers", "counter", "read", "write"
LOCKS = (LOCK, READERS, WRITERS)
UNITS = 2  # of the counter
# A message that a pipe has room for, and one that comes in parts.
SMALL, LARGE = 8, 80_000


class Waits(BaseException):
    """A thread would have to wait."""


class Units(Semaphore):
    """A semaphore for which nobody waits: who would is told so, and tried again later."""

    def __init__(self, units: int, is_lock: bool) -> None:
        self.units = self.most = units
        self.is_lock = is_lock
        self.is_wanted: Callable[[], bool] = lambda: False

    def take(self) -> bool:
        taken = self.units > 0
        self.units -= taken
        return taken

    def wait(self, seconds: float) -> bool:
        if self.take():
            return True
        if self.is_wanted():
            raise Waits
        return False  # its time is up

    def give(self) -> None:
        self.units += 1
        assert self.units <= self.most, "released more often than it was acquired"

    def value(self) -> int:
        return self.units

    def release(self) -> tuple[int, int, bytes]:
        if self.units == self.most:
            return lent.TOO_OFTEN, 0, b""
        self.give()
        return lent.DONE, 0, b""


class Threads:
    """Stands for `threading`: its threads run as long as they need not wait, when they are told to."""

    Lock = staticmethod(threading.Lock)

    def __init__(self) -> None:
        self.running: list[tuple[Callable[..., None], Any, Any]] = []

    def Thread(self, target: Callable[..., None], args: tuple[Any, Any], **_: Any) -> Any:
        return mock.Mock(start=lambda: self.running.append((target, *args)))

    def run(self) -> None:
        for one in list(self.running):
            target, thing, line = one
            thing.is_wanted = lambda line=line: line.wanted > 0
            try:
                target(thing, line)
            except Waits:
                continue
            self.running.remove(one)


class Node:
    """A node's books, and its link to its driver. What is sent is received in order; a cut loses what is under way."""

    def __init__(self, world: World, driver: Driver, name: str, parent: Process | None = None) -> None:
        self.world = world
        self.driver = driver
        self.key = name.encode()
        self.parent = parent  # in which its driver is
        self.calls = Calls(self._send, lambda _: None, lambda _: None)
        self.ours, self.theirs = sessions.Session(), sessions.Session()
        self.up: deque[sessions.Frames] = deque()
        self.down: deque[sessions.Frames] = deque()
        self.linked = True
        self.closed = False
        self.processes: list[Process] = []
        driver.nodes[self.key] = self

    @property
    def lost(self) -> bool:
        """Whether what happens here is anybody's concern any more."""
        return self.key not in self.driver.nodes or (self.parent is not None and self.parent.gone)

    def _send(self, message: Any, content: int) -> None:
        self._put(self.ours, self.up, message, os.pread(content, 1 << 30, 0) if content >= 0 else message)

    def answer(self, message: messages.Answer, content: bytes) -> None:
        self._put(self.theirs, self.down, message, content)

    def _put(self, session: sessions.Session, link: deque[sessions.Frames], message: Any, content: Any) -> None:
        frames = session.wrap(sessions.CONTROL, (pickle.dumps((message, content)),))
        if self.linked:
            link.append(frames)

    def cut(self) -> None:
        self.linked = False
        self.up.clear()
        self.down.clear()

    def resume(self, behind: int = 0) -> None:
        """What one end was told that the other has may be so many messages behind."""
        if not self.linked:
            self.linked = True
            for ours, theirs, link in ((self.ours, self.theirs, self.up), (self.theirs, self.ours, self.down)):
                kept = ours.unacknowledged[0][0] - 1 if ours.unacknowledged else ours.sent
                link.extend(ours.resume(max(theirs.received - behind, kept)))

    def receive_up(self) -> bool:
        """The driver receives one message; False if there is none."""
        if not self.up:
            return False
        message, content = self._take(self.theirs, self.up)
        if message is None or self.lost:
            return True
        if isinstance(content, bytes):
            message = msgspec.structs.replace(message, content=content)
        lending = self.driver.lending
        if isinstance(message, messages.Call):
            lending.call(self.key, message)
        elif isinstance(message, messages.Returned):
            lending.returned(self.key, message)
        elif isinstance(message, messages.Dropped):
            lending.dropped(self.key, message.request)
        else:
            lending.ended(self.key, message.process)
        return True

    def receive_down(self) -> bool:
        if not self.down:
            return False
        message, content = self._take(self.ours, self.down)
        if message is not None and not self.closed:
            along, segment = lent.pack(content)
            self.calls.on_answer(msgspec.structs.replace(message, content=bytes(along)),
                                 [segment] if segment >= 0 else [])
        return True

    def _take(self, session: sessions.Session, link: deque[sessions.Frames]) -> tuple[Any, Any]:
        [frames] = link.popleft()
        kind, _, _, _, number, acknowledged = sessions.HEADER.unpack_from(frames)
        if not session.accept(kind, number, acknowledged):
            return None, None
        found: tuple[Any, Any] = pickle.loads(frames[sessions.HEADER.size:])
        return found

    def see_ends(self) -> bool:
        """Of processes, and of sockets on which an answer was waited for; whether there was any."""
        found = False
        for descriptor in (*self.calls._pids, *self.calls._watched):
            if (descriptor in self.calls._pids or descriptor in self.calls._watched) and _is_readable(descriptor):
                found = True
                assert self.calls.on_ready(descriptor)
        return found

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            for process in self.processes:
                process.kill()
            self.calls.close()


class Driver:
    """Somebody who lends: the program, or a process of a node's that lends on what it was lent."""

    def __init__(self, world: World, up: Callable[..., socket.socket] | None = None) -> None:
        self.nodes: dict[bytes, Node] = {}
        self.lending = Lending(self._answer, lambda: None, lambda _: None, lambda: world.now, up)
        self.tokens: dict[str, bytes] = {}
        self.answered: set[tuple[bytes, int]] = set()

    def _answer(self, session: bytes, request: int, outcome: int, number: int, content: bytes) -> None:
        assert (session, request) not in self.answered, "a call was answered twice"
        self.answered.add((session, request))
        node = self.nodes.get(session)
        if node is not None:
            node.answer(messages.Answer(request, outcome, number), content)


class Process:
    """A process of a node's: makes one call after the other."""

    def __init__(self, node: Node, pid: int) -> None:
        self.node = node
        self.pid = pid
        self.asked, asks = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.asks = asks
        self.channel = lent.Channel(self)  # type: ignore[arg-type]
        self.unread: deque[int] = deque()  # operations that the node has not read yet
        self.end, self._alive = os.pipe()  # readable once it has ended, as a pidfd
        self.alive, self.is_zombie = True, True
        self.holds: Counter[str] = Counter()
        self.call: tuple[int, str, bytes, socket.socket] | None = None
        node.processes.append(self)
        node.world.processes[pid] = self

    def sendmsg(self, buffers: Any, *more: Any) -> int:
        """In place of the socket on which calls are made: notes what is under way."""
        self.unread.append(lent.HEADER.unpack(buffers[0])[2])
        return self.asks.sendmsg(buffers, *more)

    @property
    def gone(self) -> bool:
        return not self.alive or self.node.lost

    @property
    def takes_part(self) -> bool:
        return not self.gone and not self.node.closed

    def begin(self, operation: int, thing: str, seconds: float = 0.0, content: bytes = b"") -> None:
        assert self.call is None
        if operation == lent.RELEASE:
            self.holds[thing] -= 1
        ours = self.channel.begin(self.node.driver.tokens[thing], operation, seconds, content=content)
        self.call = operation, thing, content, ours

    @property
    def is_idle(self) -> bool:
        return self.call is None

    @property
    def may_hang_up(self) -> bool:
        """Not in a message, which is spoilt for everybody then, as in the standard library."""
        return self.call is not None and self.call[0] in (lent.ACQUIRE, lent.POLL, lent.RELEASE)

    def finish(self) -> bool:
        """Read the answer, if it has come."""
        if self.call is None or not _is_readable(self.call[3].fileno()):
            return False
        operation, thing, content, ours = self.call
        self.call = None
        with ours:
            outcome, _, found = lent.answer(ours)
        assert outcome in (lent.DONE, lent.NO), f"{operation} of {thing} came to {outcome}: {found!r}"
        if outcome == lent.DONE:
            self._done(operation, thing, found if operation == lent.RECEIVE else content)
        return True

    def _done(self, operation: int, thing: str, content: bytes) -> None:
        if operation == lent.ACQUIRE:
            self.holds[thing] += 1
        elif operation == lent.RECEIVE:
            self.node.world.got(content)
        elif operation == lent.SEND:
            self.node.world.sent.add(_number(content))

    def hang_up(self) -> None:
        """As when the handler of a signal raises: what Channel.call() does then."""
        assert self.call is not None
        operation, thing, content, ours = self.call
        self.call = None
        if operation == lent.SEND:
            self.node.world.perhaps.add(_number(content))
        taken = lent.withdraw(ours)
        if taken is not None:
            lent.undo(self.channel, self.node.driver.tokens[thing], operation, taken)

    def kill(self, is_zombie: bool = True) -> None:
        """The kernel closes what it has. Until somebody has waited for it, its number is its own."""
        if not self.alive:
            return
        world = self.node.world
        lost = self.node.lost or self.node.closed
        if self.call is not None:
            operation, thing, content, ours = self.call
            self.call = None
            if not lost and _is_readable(ours.fileno()):
                with ours:
                    outcome, _, found = lent.answer(ours)
                if outcome == lent.DONE:
                    self._done(operation, thing, found if operation == lent.RECEIVE else content)
            else:
                ours.close()
                if operation == lent.SEND:
                    world.perhaps.add(_number(content))
                if operation == lent.RELEASE and thing == COUNTER:
                    world.unclear += 1
        world.leaked += self.holds[COUNTER]
        world.unclear += self.unread.count(lent.RELEASE)
        world.losable += self.unread.count(lent.PUT_BACK)
        self.alive, self.is_zombie = False, is_zombie
        self.holds.clear()
        os.close(self._alive)
        self.asks.close()
        if self is world.parent:
            world.end_of(world.nested)

    def close(self) -> None:
        self.kill()
        if self.call is not None:
            self.call[3].close()
        os.close(self.end)
        self.asked.close()


def _is_readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def _number(content: bytes) -> int:
    number = int.from_bytes(content[:4], "big")
    assert content == content[:4] * (len(content) // 4) and len(content) in (SMALL, LARGE), "a message is spoilt"
    return number


class Program:
    """The process of the driver's that uses locks and pipes itself. `wire` ends are its own."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.holds: set[str] = set()
        self.to_read = bytearray()  # of a message from the lent processes' pipe to it
        self.taking = bytearray()  # of one that it takes from those who are lent the end
        self.to_write = b""  # of one to them
        self.to_slip = b""  # of one that it writes where they write

    def acquire(self, name: str) -> None:
        if name not in self.holds and self.world.things[name].take():
            self.holds.add(name)

    def release(self, name: str) -> None:
        if name in self.holds and not (name == READERS and self.taking or name == WRITERS and self.to_slip):
            self.holds.remove(name)
            self.world.things[name].give()

    def write(self, size: int) -> None:
        """A message for the processes, or the rest of one."""
        if not self.to_write:
            self.to_write = bytes(Connection.framed(self.world.new_message(size)))
            self.world.written.add(self.world.number)
        self.to_write = _write(self.world.ends[1], self.to_write)

    def slip(self, size: int) -> None:
        """The same between those of the processes, where the lock allows it."""
        if not self.to_slip and WRITERS in self.holds:
            self.to_slip = bytes(Connection.framed(self.world.new_message(size)))
            self.world.sent.add(self.world.number)
        self.to_slip = _write(self.world.ends[3], self.to_slip)

    def read(self) -> bool:
        """What processes have sent."""
        found = False
        while (content := _read(self.world.ends[2], self.to_read)) is not None:
            found = True
            number = _number(content)
            assert number not in self.world.arrived, "a message arrived twice"
            self.world.arrived.add(number)
        return found

    def take(self) -> None:
        """Messages for the processes, in their place."""
        while READERS in self.holds and (content := _read(self.world.ends[0], self.taking)) is not None:
            self.world.got(content)


def _write(descriptor: int, content: bytes) -> bytes:
    try:
        while content:
            content = content[os.write(descriptor, content):]
    except BlockingIOError:
        pass
    return content


def _read(descriptor: int, come: bytearray) -> bytes | None:
    """A whole message; else what has come of it stays."""
    while True:
        size = int.from_bytes(come[:4], "big") + 4 if len(come) >= 4 else 4
        if len(come) == size and size > 4:
            content = bytes(come[4:])
            come.clear()
            return content
        try:
            data = os.read(descriptor, size - len(come))
        except BlockingIOError:
            return None
        assert data
        come += data


class World:
    """A program, two nodes with two processes each, and one of those that lends on to a node of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self._patches: list[Any] = []
        self.threads = Threads()
        self.processes: dict[int, Process] = {}
        self.calling = 0  # whose call a node reads
        self.number = 0  # of the last message
        self.written: set[int] = set()  # to the processes
        self.received: set[int] = set()  # by whom it was meant for
        self.losable = 0  # so many may be gone with a node, or with who has died
        self.sent: set[int] = set()  # by processes, which know it
        self.perhaps: set[int] = set()  # and by those that do not
        self.arrived: set[int] = set()
        self.leaked = self.unclear = 0  # units of the counter that the dead have, or may have
        self._patches += [
            mock.patch.object(lending_module, "threading", self.threads),
            mock.patch.object(calls_module, "_introduced", lambda one: (socket.socket(fileno=one), self.calling)),
            mock.patch.object(calls_module, "os", mock.Mock(close=os.close, pidfd_open=self._pidfd))]
        for patch in self._patches:
            patch.start()
        self.ends = (*os.pipe(), *os.pipe())
        for end in self.ends:
            os.set_blocking(end, False)
        self.things: dict[str, Any] = {name: Units(1, True) for name in LOCKS}
        self.things[COUNTER] = Units(UNITS, False)
        self.things[READ] = Connection(self.ends[0], True, False)
        self.things[WRITE] = Connection(self.ends[3], False, True)
        self.program = Program(self)
        self.top = Driver(self)
        self.top.tokens = {name: self.top.lending.lend(thing) for name, thing in self.things.items()}
        self.nodes = [Node(self, self.top, name) for name in ("one", "two")]
        for number in range(4):
            Process(self.nodes[number % 2], 100 + number)
        parent = Process(self.nodes[0], 104)
        self.nested = Driver(self, parent.channel.begin)
        for name, token in self.top.tokens.items():
            begin = functools.partial(parent.channel.begin, token)
            self.nested.tokens[name] = self.nested.lending.lend(Relay(begin, name in LOCKS))
        self.parent = parent
        self.nodes.append(Node(self, self.nested, "three", parent))
        for number in range(2):
            Process(self.nodes[2], 200 + number)
        self.drivers = [self.top, self.nested]

    @property
    def callers(self) -> list[Process]:
        """Processes that call of their own accord."""
        return [one for one in self.processes.values() if one is not self.parent and one.takes_part]

    def _pidfd(self, pid: int) -> int:
        process = self.processes[pid]
        if not process.alive and not process.is_zombie:
            raise ProcessLookupError(errno.ESRCH, "it has been waited for")
        return os.dup(process.end)

    def new_message(self, size: int) -> bytes:
        self.number += 1
        return self.number.to_bytes(4, "big") * (size // 4)

    def got(self, content: bytes) -> None:
        number = _number(content)
        assert number not in self.received, "a message came twice"
        self.received.add(number)

    def read_call(self, process: Process) -> bool:
        """A node reads one call of a process, which may have ended."""
        if not process.unread or process.node.closed:
            return False
        process.unread.popleft()
        self.calling = process.pid
        data, descriptors, _, _ = socket.recv_fds(process.asked, lent.MESSAGE_BYTES, 2)
        process.node.calls.on_call(data, descriptors)
        return True

    def lose(self, node: Node) -> None:
        """A driver gives a node up; it may be a while before that learns of it."""
        if node.key not in node.driver.nodes:
            return
        asked = [one.operation for one in node.calls._asked.values()]
        unread = [operation for process in node.processes for operation in process.unread]
        returned = sum(isinstance(pickle.loads(frames[0][sessions.HEADER.size:])[0], messages.Returned)
                       for _, frames in node.ours.unacknowledged)
        # An answer may stand on a socket from which nobody has read it.
        asked += [process.call[0] for process in node.processes if process.call is not None]
        self.losable += asked.count(lent.RECEIVE) + (asked + unread).count(lent.PUT_BACK) + returned
        self.unclear += asked.count(lent.ACQUIRE) + (asked + unread).count(lent.RELEASE) + returned
        for process in node.processes:
            self.leaked += process.holds[COUNTER]
            process.holds.clear()
            if process.call is not None and process.call[0] == lent.SEND:
                self.perhaps.add(_number(process.call[2]))
        del node.driver.nodes[node.key]
        node.driver.lending.lost(node.key)
        if any(one is self.parent for one in node.processes):
            self.end_of(self.nested)

    def end_of(self, driver: Driver) -> None:
        """The process of a driver has ended, or is no concern of anybody's: the kernel closes its sockets."""
        for node in list(driver.nodes.values()):
            self.lose_quietly(node)
        for one in driver.lending._waiting.values():
            if one.socket is not None:
                one.socket.close()
                one.socket = None
        if driver.lending._poll is not None:
            driver.lending._poll.close()
            driver.lending._poll = None

    def lose_quietly(self, node: Node) -> None:
        with mock.patch.object(Lending, "lost", lambda *_: None):
            self.lose(node)
        node.close()

    def turn(self) -> bool:
        """All that the two drivers' loops would do now."""
        self.threads.run()
        before = sum(len(driver.answered) for driver in self.drivers)
        self.top.lending.turn()
        if self.parent.takes_part:
            self.nested.lending.turn()
        return before != sum(len(driver.answered) for driver in self.drivers)

    def go_on(self) -> None:
        """Everything that can happen without anybody's doing anything new."""
        stirs = True
        while stirs:
            stirs = False
            for node in self.nodes:
                if not node.closed:
                    node.resume()
                    stirs |= node.receive_up()
                    stirs |= node.receive_down()
                    stirs |= node.see_ends()
            for process in self.processes.values():
                stirs |= self.read_call(process)
                stirs |= process.takes_part and process.finish()
            stirs |= self.turn()
            stirs |= self.program.read()

    def look(self) -> None:
        """At any time."""
        for name in LOCKS:
            having: list[Any] = [one.pid for one in self.callers if one.holds[name] > 0]
            having += ["the program"] * (name in self.program.holds)
            assert len(having) <= 1, f"{having} have the lock {name!r}"

    def settle(self) -> None:
        """The faults are over: everybody ends what was begun, and gives back what he has."""
        program = self.program
        for node in self.nodes:
            if node.lost:
                node.close()
        for _ in range(200):
            self.now += 1.0
            self.go_on()
            if program.to_write or any(one.call is not None and one.call[0] == lent.RECEIVE for one in self.callers):
                program.write(SMALL)
            if program.to_slip:
                program.slip(SMALL)
            if program.to_write or program.taking:
                program.acquire(READERS)
            program.take()
            for name in (*LOCKS, COUNTER):
                program.release(name)
            for process in self.callers:
                held = [name for name in process.holds if process.holds[name] > 0]
                if process.call is None and held:
                    process.begin(lent.RELEASE, held[0])
                elif process.call is not None and process.call[1] == COUNTER and self.leaked + self.unclear >= UNITS:
                    process.hang_up()  # perhaps the dead have all
            if not any(process.call or +process.holds for process in self.callers) and not (
                    program.holds or program.to_write or program.to_slip):
                break
        else:
            waiting = [(one.pid, one.call and one.call[:2], +one.holds) for one in self.callers]
            free = {name: self.things[name].units for name in (*LOCKS, COUNTER)}
            raise AssertionError(f"it does not end: {free} are free; {waiting}; the program has {program.holds}, "
                                 f"and {len(program.to_write)}, {len(program.to_slip)} bytes to write")
        self.go_on()

    def check(self) -> None:
        """After settle()."""
        for name in LOCKS:
            assert self.things[name].units == 1, f"nobody has the lock {name!r}, and it is not free"
        leaked = UNITS - self.things[COUNTER].units
        assert self.leaked - self.unclear <= leaked <= self.leaked + self.unclear, (
            f"of the counter {leaked} are missing, and the dead had {self.leaked}, perhaps {self.unclear} more or less")
        for driver in self.drivers:
            if driver is self.top or self.parent.takes_part:
                lending = driver.lending
                for books in (lending._waiting, lending._holders, lending._ending, lending._got, lending._watched,
                              lending._of_descriptor, *(line.waiting for line in lending._lines.values())):
                    assert not books, f"a book is not empty: {books}"
                assert lending.deadline is None
        assert not self.threads.running, "a thread is left"
        for node in self.nodes:
            if not node.closed:
                assert not node.calls._asked and not node.calls._watched
                assert set(node.calls._processes) <= {one.pid for one in node.processes if one.alive}
        read = self.things[READ]
        self.program.holds.add(READERS)
        self.program.take()
        assert not self.program.taking and not read._come
        for content in read._ready:
            self.got(content)
        lost = self.written - self.received
        assert self.received <= self.written and len(lost) <= self.losable, f"messages {lost} are lost"
        assert self.sent <= self.arrived <= self.sent | self.perhaps, "not all arrived that were sent"

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        self.end_of(self.nested)
        self.top.lending.close()
        for process in self.processes.values():
            process.close()
        for end in self.ends:
            os.close(end)
        for patch in self._patches:
            patch.stop()
