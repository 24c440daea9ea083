"""Owns the tests of the books of what is lent: the driver's, who waits and who holds, and the node's, who calls.

No cluster: the driver's answers go into a list, the node's messages as well; semaphores, pipes and sockets are real.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
from clusters import until

from dpool.cluster.driver import lending, things
from dpool.cluster.driver.lending import Lending
from dpool.cluster.driver.things import Connection, Relay, Semaphore
from dpool.cluster.node.calls import Calls
from dpool.cluster.wire import borrowed, frames, lent, messages
from dpool.cluster.wire.messages import Answer, Call, Dropped, Ended, Returned

NODE, OTHER = b"node", b"other node"


class Books:
    """A lending, with a clock that stands until it is set, and what it has answered."""

    def __init__(self, up: Callable[..., socket.socket] | None = None) -> None:
        self.time = 0.0
        self.answers: dict[tuple[bytes, int], tuple[int, int, bytes]] = {}
        self.order: list[int] = []
        self.watched: list[int] = []
        self.lending = Lending(self._answer, lambda: None, self.watched.append, lambda: self.time, up)
        self.numbers = iter(range(1, 1000))

    def _answer(self, session: bytes, request: int, outcome: int, number: int, content: bytes) -> None:
        assert (session, request) not in self.answers, "a call was answered twice"
        self.answers[session, request] = outcome, number, content
        self.order.append(request)

    def call(self, token: bytes, operation: int, seconds: float | None = None, process: int = 1, session: bytes = NODE,
             content: bytes = b"", start: int = 0, size: int = 0) -> int:
        request = next(self.numbers)
        self.lending.call(session, Call(request, process, token, operation, seconds, start, size, content))
        return request

    def done(self, request: int, session: bytes = NODE) -> tuple[int, int, bytes] | None:
        return self.answers.get((session, request))

    def until_done(self, request: int, session: bytes = NODE) -> tuple[int, int, bytes]:
        def look() -> bool:
            self.lending.turn()
            return (session, request) in self.answers

        until(look, "the call is answered")
        return self.answers[session, request]


@pytest.fixture
def books() -> Iterator[Books]:
    books = Books()
    yield books
    books.lending.close()


def lock_of(books: Books, lock: Any, is_lock: bool = True) -> bytes:
    return books.lending.lend(Semaphore(lock._semlock, is_lock))


DONE, NO = (lent.DONE, 0, b""), (lent.NO, 0, b"")
UNKNOWN = (lent.UNKNOWN, 0, b"")


# -- the driver's books: semaphores


def test_first_come_first_served(books: Books) -> None:
    lock = multiprocessing.Lock()
    token = lock_of(books, lock)
    requests = [books.call(token, lent.ACQUIRE, process=process) for process in range(1, 5)]
    assert books.order == requests[:1]
    for process, request in enumerate(requests[1:], 1):
        books.call(token, lent.RELEASE, process=process)
        assert books.until_done(request) == DONE
    assert [request for request in books.order if request in requests] == requests
    assert books.done(books.call(token, lent.VALUE)) == (lent.DONE, 0, b"")


def test_who_does_not_wait_does_not_stand_in_line(books: Books) -> None:
    lock = multiprocessing.Lock()
    token = lock_of(books, lock)
    lock.acquire()
    waiting = books.call(token, lent.ACQUIRE, seconds=5.0)
    assert books.done(books.call(token, lent.ACQUIRE, seconds=0.0)) == NO
    books.time = 4.9
    books.lending.turn()
    assert books.done(waiting) is None and books.lending.deadline == 5.0
    books.time = 5.0
    books.lending.turn()
    assert books.done(waiting) == NO and books.lending.deadline is None
    lock.release()
    assert lock.acquire(timeout=10)  # a thread that has taken it for nobody gives it back


def test_deadlines_of_calls_that_are_answered_are_not_kept(books: Books) -> None:
    read, write = multiprocessing.Pipe(False)
    token = books.lending.lend(Connection(read.fileno(), True, False))
    for _ in range(500):
        request = books.call(token, lent.POLL, 3600.0)
        write.send_bytes(b"")
        books.lending.turn()
        assert books.done(request) == DONE
        read.recv_bytes()
    assert len(books.lending._deadlines) < 200


def test_what_was_got_for_who_has_gone_is_given_back(books: Books) -> None:
    semaphore = multiprocessing.Semaphore(0)
    token = lock_of(books, semaphore, is_lock=False)
    first, second = books.call(token, lent.ACQUIRE), books.call(token, lent.ACQUIRE, process=2)
    semaphore.release()
    until(lambda: bool(books.lending._got), "the thread has got it")
    books.lending.dropped(NODE, first)
    assert books.until_done(second) == DONE
    semaphore.release()
    third = books.call(token, lent.ACQUIRE)
    books.lending.ended(NODE, 1)
    assert books.done(third) in (NO, DONE)
    if books.done(third) == NO:
        books.lending.turn()
        assert semaphore.acquire(timeout=10)


def test_the_dead_hold_no_lock_but_semaphores(books: Books) -> None:
    lock, semaphore = multiprocessing.Lock(), multiprocessing.Semaphore(1)
    tokens = lock_of(books, lock), lock_of(books, semaphore, is_lock=False)
    for token in tokens:
        assert books.done(books.call(token, lent.ACQUIRE, session=OTHER), OTHER) == DONE
    books.lending.ended(NODE, 1)  # of the same pid on another node
    assert not lock.acquire(False)
    books.lending.ended(OTHER, 1)
    books.lending.ended(OTHER, 1)
    assert lock.acquire(False) and not semaphore.acquire(False)
    lock.release()
    books.call(tokens[0], lent.ACQUIRE, session=OTHER)
    books.lending.lost(OTHER)
    assert lock.acquire(False)


def test_what_reached_nobody_comes_back_once(books: Books) -> None:
    """The answer and the death of who was to have it pass each other on the way."""
    lock, semaphore = multiprocessing.Lock(), multiprocessing.BoundedSemaphore(1)
    tokens = lock_of(books, lock), lock_of(books, semaphore, is_lock=False)
    for token, thing in zip(tokens, (lock, semaphore), strict=True):
        books.call(token, lent.ACQUIRE)
        books.lending.ended(NODE, 1)
        books.lending.returned(NODE, Returned(1, token, lent.ACQUIRE))
        assert thing.acquire(False)
        assert not thing.acquire(False)


def test_the_end_releases_what_workers_have(books: Books) -> None:
    lock = multiprocessing.Lock()
    books.call(lock_of(books, lock), lent.ACQUIRE)
    books.lending.close()
    assert lock.acquire(False)


# -- connections


def test_a_message_in_pieces(books: Books) -> None:
    read, write = os.pipe()
    token = books.lending.lend(Connection(read, True, False))
    content = os.urandom(300)
    framed = struct.pack("!i", len(content)) + content
    request = books.call(token, lent.RECEIVE)
    for start in range(0, len(framed), 50):
        books.lending.turn()
        assert books.done(request) is None
        os.write(write, framed[start:start + 50])
    books.lending.turn()
    assert books.done(request) == (lent.DONE, 0, content)
    os.write(write, struct.pack("!iQ", -1, 3) + b"abc" + struct.pack("!i", 0))  # the long header; an empty message
    assert books.done(books.call(token, lent.RECEIVE)) == (lent.DONE, 0, b"abc")
    assert books.done(books.call(token, lent.RECEIVE)) == DONE
    os.write(write, framed[:10])
    request = books.call(token, lent.RECEIVE)
    os.close(write)
    books.lending.turn()
    assert books.done(request) == (lent.FAILED, 0, b"got end of file during message")
    os.close(read)


def test_nothing_is_read_that_is_of_the_next_message(books: Books) -> None:
    read, write = multiprocessing.Pipe(False)
    token = books.lending.lend(Connection(read.fileno(), True, False))
    write.send("first")
    write.send("second")
    assert books.done(books.call(token, lent.RECEIVE)) is not None
    assert read.recv() == "second"


def test_what_was_received_and_returned_is_the_next(books: Books) -> None:
    read, write = multiprocessing.Pipe(False)
    token = books.lending.lend(Connection(read.fileno(), True, False))
    write.send_bytes(b"one")
    books.call(token, lent.RECEIVE)
    write.send_bytes(b"two")
    books.lending.returned(NODE, Returned(1, token, lent.RECEIVE, b"one"))
    assert books.done(books.call(token, lent.POLL, 0.0)) == DONE
    assert books.done(books.call(token, lent.RECEIVE)) == (lent.DONE, 0, b"one")
    assert books.done(books.call(token, lent.RECEIVE)) == (lent.DONE, 0, b"two")
    request = books.call(token, lent.RECEIVE)
    books.lending.returned(NODE, Returned(1, token, lent.RECEIVE, b"two"))
    assert books.done(request) == (lent.DONE, 0, b"two")


@pytest.mark.parametrize("duplex", [True, False], ids=["socket", "pipe"])
def test_half_a_message_holds_the_lock_until_it_is_whole(books: Books, duplex: bool) -> None:
    """A process ends while its message is on the way: no other may write before the end of it."""
    read, write = multiprocessing.Pipe(duplex)
    token = books.lending.lend(Connection(write.fileno(), duplex, True))
    lock = multiprocessing.Lock()
    held = lock_of(books, lock)
    content = os.urandom(2_000_000)
    books.call(held, lent.ACQUIRE)
    sending = books.call(token, lent.SEND, content=content)
    waiting = books.call(token, lent.SEND, content=b"never", process=1)
    other = books.call(token, lent.SEND, content=b"other", process=2)
    books.lending.ended(NODE, 1)
    assert books.done(waiting) == NO and books.done(sending) is None and not lock.acquire(False)
    found = b""
    while len(found) < len(content) + 4:
        found += os.read(read.fileno(), 1 << 16)
        books.lending.turn()
    assert found[4:len(content) + 4] == content
    assert books.done(sending) == DONE and lock.acquire(False)
    assert books.until_done(other) == DONE
    while len(found) < len(content) + 13:
        found += os.read(read.fileno(), 100)
    assert found[len(content) + 4:] == struct.pack("!i", 5) + b"other"


def test_half_a_message_is_read_to_its_end_before_another_reads(books: Books) -> None:
    """A process ends in the midst of a message: who has the lock next, the program perhaps, begins with a whole one."""
    read, write = os.pipe()
    token = books.lending.lend(Connection(read, True, False))
    lock = multiprocessing.Lock()
    books.call(lock_of(books, lock), lent.ACQUIRE)
    request = books.call(token, lent.RECEIVE)
    framed = struct.pack("!i", 5) + b"first"
    os.write(write, framed[:7])
    books.lending.turn()
    books.lending.ended(NODE, 1)
    assert books.done(request) is None and books.lending.waits == 0 and not lock.acquire(False)
    os.write(write, framed[7:] + struct.pack("!i", 6) + b"second")
    books.lending.turn()
    assert books.done(request) == NO and lock.acquire(False)
    assert os.read(read, 4) == struct.pack("!i", 6)
    assert books.done(books.call(token, lent.RECEIVE, process=2)) == (lent.DONE, 0, b"first")
    os.close(read)
    os.close(write)


def test_only_what_is_waited_for_is_watched(books: Books) -> None:
    """The other end is closed, which is readable for ever."""
    read, write = multiprocessing.Pipe(False)
    token = books.lending.lend(Connection(read.fileno(), True, False))
    request = books.call(token, lent.POLL, 1.0)
    [descriptor] = books.watched
    write.close()
    assert books.until_done(request) == DONE
    assert not select.select([descriptor], [], [], 0)[0]
    assert books.done(books.call(token, lent.RECEIVE)) == (lent.END, 0, b"")


def test_what_is_neither_pipe_nor_socket(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file, pytest.raises(OSError):
        Connection(file.fileno(), True, True)


# -- what nodes may do


def test_nobody_operates_what_was_not_lent(books: Books) -> None:
    lock = multiprocessing.Lock()
    token = lock_of(books, lock)
    read, _ = multiprocessing.Pipe(False)
    pipe = books.lending.lend(Connection(read.fileno(), True, False))
    for operation in lent.OPERATIONS:
        assert books.done(books.call(os.urandom(16), operation, 0.0)) == UNKNOWN
    for wrong, operation in ((token, lent.RECEIVE), (token, lent.READ), (pipe, lent.ACQUIRE), (pipe, lent.WRITE)):
        assert books.done(books.call(wrong, operation, 0.0)) == UNKNOWN
    assert books.done(books.call(token, 60)) == UNKNOWN
    assert books.done(books.call(pipe, lent.SEND)) == (lent.FAILED, 0, b"connection is read-only")
    assert books.done(books.call(token, lent.CLOSE)) == DONE  # which is for what was made for one process
    assert books.done(books.call(token, lent.ACQUIRE)) == DONE


def test_memory_has_an_end(books: Books) -> None:
    array: Any = multiprocessing.Array("c", 10)
    token = books.lending.lend(things.Memory(array.get_obj()._wrapper))
    assert books.done(books.call(token, lent.READ, start=1, size=9)) == (lent.DONE, 0, bytes(9))
    for start, size in ((1, 10), (11, 0), (0, 1 << 62)):
        found = books.done(books.call(token, lent.READ, start=start, size=size))
        assert found is not None and found[0] == (lent.FAILED if start + size > 10 else lent.DONE)
    found = books.done(books.call(token, lent.WRITE, start=8, content=b"abc"))
    assert found is not None and found[0] == lent.FAILED
    assert array.raw == bytes(10)


@pytest.fixture
def manager() -> Iterator[Any]:
    with multiprocessing.get_context("spawn").Manager() as manager:
        yield manager


def test_a_connection_to_a_manager_is_of_one_process(books: Books, manager: Any, tmp_path: Path) -> None:
    address = os.fsencode(manager.address)
    assert books.done(books.call(lent.NO_TOKEN, lent.CONNECT, content=address)) == UNKNOWN  # there is no proxy
    proxy = manager.dict()
    listener = connection.Listener(str(tmp_path / "other"))
    assert books.done(books.call(lent.NO_TOKEN, lent.CONNECT, content=os.fsencode(listener.address))) == UNKNOWN
    listener.close()
    found = books.done(books.call(lent.NO_TOKEN, lent.CONNECT, content=address))
    assert found is not None and found[0] == lent.DONE and proxy.copy() == {}
    token = found[2]
    for process, session in ((2, NODE), (1, OTHER)):
        request = books.call(token, lent.POLL, 0.0, process, session)
        assert books.done(request, session) == UNKNOWN
    request = books.call(token, lent.RECEIVE)  # the manager's challenge
    assert books.until_done(request)[0] == lent.DONE
    request = books.call(token, lent.RECEIVE)
    books.lending.ended(NODE, 1)
    assert books.done(request) == NO and books.lending.owned == 0
    assert books.done(books.call(token, lent.POLL, 0.0)) == UNKNOWN
    found = books.done(books.call(lent.NO_TOKEN, lent.CONNECT, content=address))
    assert found is not None
    books.lending.returned(NODE, Returned(1, lent.NO_TOKEN, lent.CONNECT, found[2]))
    assert books.lending.owned == 0


def test_a_manager_that_does_not_read_holds_up_nobody_but_who_lives(books: Books, monkeypatch: pytest.MonkeyPatch,
                                                                   tmp_path: Path) -> None:
    """Half a message to it is no one else's concern when its process has ended."""
    monkeypatch.setattr(lending, "_is_known", lambda address: True)
    lock = multiprocessing.Lock()
    books.call(lock_of(books, lock), lent.ACQUIRE)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "manager"))
        listener.listen()
        found = books.done(books.call(lent.NO_TOKEN, lent.CONNECT, content=os.fsencode(tmp_path / "manager")))
        assert found is not None
        sending = books.call(found[2], lent.SEND, content=bytes(2_000_000))
        assert books.done(sending) is None
        books.lending.ended(NODE, 1)
        assert books.done(sending) == (lent.END, 0, b"") and books.lending.owned == 0 and lock.acquire(False)


# -- a driver that is a worker


class Above:
    """The driver above: what it is asked, each with the socket that the answer goes to."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[Any], socket.socket]] = []

    def begin(self, *call: Any, **more: Any) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.asked.append(([*call, *more.values()], theirs))
        return ours

    def answer(self, outcome: int, number: int = 0, content: bytes = b"") -> None:
        lent.tell(self.asked[-1][1], outcome, number, content, -1)

    @property
    def last(self) -> list[Any]:
        return self.asked[-1][0]


def test_calls_are_passed_on_and_taken_back(books: Books) -> None:
    above = Above()
    token = books.lending.lend(Relay(above.begin, is_lock=True))
    request = books.call(token, lent.ACQUIRE)
    assert above.last == [lent.ACQUIRE, lent.FOR_EVER, 0, 0, b""]
    books.lending.turn()
    assert books.done(request) is None
    above.answer(lent.DONE)
    assert books.until_done(request) == DONE
    books.lending.ended(NODE, 1)
    assert above.last[0] == lent.RELEASE

    request = books.call(token, lent.ACQUIRE)
    books.lending.dropped(NODE, request)
    assert books.done(request) == NO and above.asked[-1][1].recv(1) == b""  # hung up

    request = books.call(token, lent.ACQUIRE)
    above.answer(lent.DONE)  # which nobody has read when the process ends
    books.lending.ended(NODE, 1)
    assert books.done(request) == NO and above.last[0] == lent.RELEASE

    request = books.call(token, lent.RECEIVE)
    above.answer(lent.DONE, content=b"item")
    books.lending.dropped(NODE, request)
    assert above.last == [lent.PUT_BACK, b"item"]
    books.lending.returned(NODE, Returned(1, token, lent.RECEIVE, b"item"))
    assert above.last == [lent.PUT_BACK, b"item"]

    request = books.call(token, lent.VALUE)
    above.asked[-1][1].close()  # the driver above is gone
    assert books.until_done(request) == UNKNOWN


def test_a_release_that_was_passed_on_is_not_made_again(books: Books) -> None:
    """Neither for who has ended meanwhile, nor is the next holder forgotten when its answer comes late."""
    above = Above()
    token = books.lending.lend(Relay(above.begin, is_lock=True))
    held = books.call(token, lent.ACQUIRE)
    above.answer(lent.DONE)
    books.until_done(held)
    released = books.call(token, lent.RELEASE)
    _, releasing = above.asked[-1]
    other = books.call(token, lent.ACQUIRE, process=2)
    above.answer(lent.DONE)
    assert books.until_done(other) == DONE
    lent.tell(releasing, lent.DONE, 0, b"", -1)
    assert books.until_done(released) == DONE
    books.lending.ended(NODE, 2)
    assert above.last[0] == lent.RELEASE

    count = len(above.asked)
    books.call(token, lent.ACQUIRE, process=3)
    above.answer(lent.DONE)
    books.lending.turn()
    books.call(token, lent.RELEASE, process=3)
    books.lending.ended(NODE, 3)
    assert [call[0] for call, _ in above.asked[count:]] == [lent.ACQUIRE, lent.RELEASE]


def test_a_message_that_was_passed_on_holds_the_lock_until_it_is_sent(books: Books) -> None:
    above = Above()
    lock = books.lending.lend(Relay(above.begin, is_lock=True))
    pipe = books.lending.lend(Relay(above.begin))
    held = books.call(lock, lent.ACQUIRE)
    above.answer(lent.DONE)
    books.until_done(held)
    sending = books.call(pipe, lent.SEND, content=b"content")
    books.lending.ended(NODE, 1)
    assert above.last[0] == lent.SEND and books.done(sending) is None
    above.answer(lent.DONE)
    assert books.until_done(sending) == DONE and above.last[0] == lent.RELEASE


# -- the node's books


class Caller:
    """A process that calls, on one side, and the node's books on the other."""

    def __init__(self) -> None:
        self.sent: list[tuple[messages.Message, bytes]] = []
        self.watched: set[int] = set()
        self.calls = Calls(self._send, self.watched.add, self.watched.remove)
        self.asks, self.asked = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = lent.Channel(self.asks)

    def _send(self, message: messages.Message, content: int) -> None:
        self.sent.append((message, os.pread(content, 1 << 30, 0) if content >= 0 else b""))

    def take(self) -> None:
        """The node reads the next call."""
        data, descriptors, _, _ = socket.recv_fds(self.asked, lent.MESSAGE_BYTES, 2)
        assert data.startswith(lent.CALL)
        self.calls.on_call(data, descriptors)

    def begin(self, *call: Any, **more: Any) -> tuple[socket.socket, Call]:
        ours = self.channel.begin(*call, **more)
        self.take()
        message = self.sent[-1][0]
        assert isinstance(message, Call)
        return ours, message

    def ready(self) -> None:
        """See to descriptors that are readable."""
        poll = select.poll()
        for descriptor in self.watched:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(10_000):
            if descriptor in self.watched:  # what was seen of another may have ended this one
                assert self.calls.on_ready(descriptor)

    def close(self) -> None:
        self.calls.close()
        self.asks.close()
        self.asked.close()


@pytest.fixture
def caller() -> Iterator[Caller]:
    before = len(os.listdir("/proc/self/fd"))
    caller = Caller()
    yield caller
    caller.close()
    assert len(os.listdir("/proc/self/fd")) == before


TOKEN = bytes(range(16))


def test_a_call_goes_up_and_its_answer_comes_down(caller: Caller) -> None:
    ours, call = caller.begin(TOKEN, lent.SEND, lent.FOR_EVER, 3, 4, b"content")
    assert call == Call(call.request, os.getpid(), TOKEN, lent.SEND, None, 3, 4, b"content")
    caller.calls.on_answer(Answer(call.request, lent.DONE, -7, b"found"), [])
    with ours:
        assert lent.answer(ours) == (lent.DONE, -7, b"found")
    assert len(caller.watched) == 1  # this process, for its end


@pytest.mark.parametrize("size", [frames.INLINE_CALL_BYTES, frames.INLINE_CALL_BYTES + 1, 1_000_000])
def test_content_that_does_not_go_along(caller: Caller, size: int) -> None:
    content = os.urandom(size)
    ours, call = caller.begin(TOKEN, lent.SEND, content=content)
    assert call.content + caller.sent[-1][1] == content
    along, segment = lent.pack(content)
    caller.calls.on_answer(Answer(call.request, lent.DONE, 0, bytes(along)), [segment] if segment >= 0 else [])
    with ours:
        assert lent.answer(ours) == (lent.DONE, 0, content)


def test_who_hangs_up_has_the_driver_forget(caller: Caller) -> None:
    ours, call = caller.begin(TOKEN, lent.ACQUIRE, lent.FOR_EVER)
    assert lent.withdraw(ours) is None
    caller.ready()
    assert caller.sent[-1][0] == Dropped(call.request)
    caller.calls.on_answer(Answer(call.request, lent.NO), [])
    assert caller.sent[-1][0] == Dropped(call.request)


def test_what_reaches_nobody_goes_back(caller: Caller) -> None:
    for operation in lent.OPERATIONS:
        ours, call = caller.begin(TOKEN, operation, lent.FOR_EVER)
        assert lent.withdraw(ours) is None
        caller.calls.on_answer(Answer(call.request, lent.DONE, 0, b"item"), [])
        back = Returned(os.getpid(), TOKEN, operation, b"item")
        assert caller.sent[-1][0] == (back if operation in lent.TAKING else call)
        ours, call = caller.begin(TOKEN, operation, lent.FOR_EVER)
        assert lent.withdraw(ours) is None
        caller.calls.on_answer(Answer(call.request, lent.NO), [])
        assert caller.sent[-1][0] == call


def test_what_came_before_it_was_withdrawn_is_known_here(caller: Caller) -> None:
    ours, call = caller.begin(TOKEN, lent.RECEIVE, lent.FOR_EVER)
    caller.calls.on_answer(Answer(call.request, lent.DONE, 0, b"item"), [])
    assert lent.withdraw(ours) == b"item"


def test_a_process_that_has_called_ends(caller: Caller) -> None:
    """Though another one has what it waits on."""
    program = ("import os, socket, sys; from dpool.cluster.wire import lent; "
               "channel = lent.Channel(socket.socket(fileno=int(sys.argv[1]))); "
               "ours = channel.begin(bytes(16), lent.ACQUIRE, lent.FOR_EVER); print('called', flush=True); input()")
    process = subprocess.Popen([sys.executable, "-c", program, str(caller.asks.fileno())], text=True,
                               pass_fds=[caller.asks.fileno()], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None and process.stdout.readline() == "called\n"
        caller.take()
        call = caller.sent[-1][0]
        assert isinstance(call, Call) and call.process == process.pid
        process.kill()
    caller.sent.clear()
    while Ended(call.process) not in [message for message, _ in caller.sent]:
        caller.ready()
    assert not caller.watched
    caller.calls.on_answer(Answer(call.request, lent.DONE), [])
    assert caller.sent[-1][0] == Returned(call.process, bytes(16), lent.ACQUIRE)


def test_a_call_that_is_read_after_its_process_has_ended_is_not_made(caller: Caller) -> None:
    """What it held is free by then: its release would be that of who has the lock now. Nobody has waited for it yet."""
    program = ("import socket, sys; from dpool.cluster.wire import lent; "
               "channel = lent.Channel(socket.socket(fileno=int(sys.argv[1]))); "
               "[channel.begin(bytes(16), operation) for operation in (lent.VALUE, lent.RELEASE)]")
    process = subprocess.Popen([sys.executable, "-c", program, str(caller.asks.fileno())],
                               pass_fds=[caller.asks.fileno()])
    caller.asked.recv(1, socket.MSG_PEEK)
    descriptor = os.pidfd_open(process.pid)
    known = select.poll()
    known.register(descriptor, select.POLLIN)
    assert known.poll(10_000)
    os.close(descriptor)
    caller.take()
    caller.take()
    assert not caller.sent and not caller.watched
    process.wait()


def test_an_answer_for_which_no_descriptor_is_left_is_an_error(caller: Caller) -> None:
    """And not an empty one."""
    ours, call = caller.begin(TOKEN, lent.RECEIVE, lent.FOR_EVER)
    along, segment = lent.pack(bytes(100_000))
    caller.calls.on_answer(Answer(call.request, lent.DONE, 0, bytes(along)), [segment])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    with ours:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                lent.answer(ours)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_call_for_which_no_memory_is_left_leaves_nothing(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(24, "Too many open files")

    before = len(os.listdir("/proc/self/fd"))
    for owner, name in ((os, "memfd_create"), (socket, "socketpair")):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, full)
            with pytest.raises(OSError, match="Too many open files"):
                caller.channel.begin(TOKEN, lent.SEND, lent.FOR_EVER, content=bytes(1 << 20))
        assert len(os.listdir("/proc/self/fd")) == before


def test_nonsense_is_not_passed_on(caller: Caller) -> None:
    for operation, seconds, start in ((0, 1.0, 0), (99, 1.0, 0), (1, -1.0, 0), (1, float("nan"), 0), (1, 1.0, 1 << 63)):
        ours = caller.channel.begin(TOKEN, operation, seconds, start)
        caller.take()
        with ours, pytest.raises(lent.Gone):
            lent.answer(ours)
    loose = os.memfd_create("loose")
    os.ftruncate(loose, 100)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    header = lent.HEADER.pack(lent.CALL, TOKEN, lent.SEND, 0.0, 0, 0)
    for data, descriptors in ((header, [theirs.fileno(), loose]), (header[:20], [theirs.fileno()])):
        socket.send_fds(caller.asks, [data], descriptors)
        caller.take()
    os.close(loose)
    theirs.close()
    with ours, pytest.raises(lent.Gone):
        lent.answer(ours)
    assert not caller.sent


def test_what_is_no_socket_is_not_answered(caller: Caller) -> None:
    with open(os.devnull) as file:
        socket.send_fds(caller.asks, [lent.HEADER.pack(lent.CALL, TOKEN, lent.VALUE, 0.0, 0, 0)], [file.fileno()])
        caller.take()
    assert not caller.sent


def test_a_handler_that_raises_when_the_answer_has_come_gives_it_back(caller: Caller,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    answer = lent.answer

    def interrupted(_: socket.socket) -> Any:
        monkeypatch.setattr(lent, "answer", answer)
        caller.take()
        call = caller.sent[-1][0]
        assert isinstance(call, Call)
        caller.calls.on_answer(Answer(call.request, lent.DONE, 0, b"item"), [])
        raise KeyboardInterrupt

    for operation, back in ((lent.ACQUIRE, lent.RELEASE), (lent.RECEIVE, lent.PUT_BACK), (lent.READ, None)):
        monkeypatch.setattr(lent, "answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            caller.channel.call(TOKEN, operation, lent.FOR_EVER)
        if back is not None:
            caller.take()
            call = caller.sent[-1][0]
            assert isinstance(call, Call) and (call.token, call.operation) == (TOKEN, back)
            assert call.content == (b"item" if back == lent.PUT_BACK else b"")
    assert len(caller.sent) == 5


def test_a_lock_is_not_kept_by_who_was_interrupted_releasing_it(caller: Caller,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """The release is under way: who took it to be still its own would have it together with the next."""
    outcomes: list[Any] = [(lent.DONE, 0, b""), KeyboardInterrupt(), (lent.TOO_OFTEN, 0, b"")]

    def answered(_: socket.socket) -> Any:
        caller.take()
        if isinstance(outcome := outcomes.pop(0), BaseException):
            monkeypatch.setattr(lent, "withdraw", lambda ours: None)
            raise outcome
        return outcome

    monkeypatch.setattr(lent, "_channel", caller.channel)
    monkeypatch.setattr(lent, "answer", answered)
    lock = borrowed.SemLock(TOKEN, borrowed.RECURSIVE, 1)
    assert lock.acquire() and lock._is_mine()
    with pytest.raises(KeyboardInterrupt):
        lock.release()
    assert not lock._is_mine()
    lock = borrowed.SemLock(TOKEN, borrowed.SEMAPHORE, 1)
    with pytest.raises(ValueError, match="too many times"):
        lock.release()
    assert lock._count() == 0


def test_who_waits_at_the_end_is_told(caller: Caller) -> None:
    ours, _ = caller.begin(TOKEN, lent.ACQUIRE, lent.FOR_EVER)
    caller.calls.close()
    with ours, pytest.raises(lent.Gone):
        lent.answer(ours)


def test_a_process_that_is_no_worker_can_operate_nothing() -> None:
    with pytest.raises(lent.Gone, match="none of them"):
        lent.channel()
    assert lent.up() is None
