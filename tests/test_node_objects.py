"""A node's objects: node/objects.py, driven directly, and by a model of parts, drivers and sources; node/exchange.py
with connections that note what is said; the agent's turns, as far as they concern objects.

No process and no clock; the agent's sockets are never connected. Run by pytest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast
from zlib import crc32

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dpool.cluster.node import part as part_module
from dpool.cluster.node.agent import Agent
from dpool.cluster.node.exchange import IDLE_S, WINDOW_BYTES, Exchange
from dpool.cluster.node.inlets import Inlets
from dpool.cluster.node.objects import (
    ASK,
    CLOSE,
    GOT,
    LEAVE,
    PULL,
    QUEUED_AFTER_S,
    READY,
    SILENT_AFTER_S,
    STALLED_AFTER_S,
    Deed,
    Objects,
)
from dpool.cluster.node.part import Part
from dpool.cluster.store.transfer import OBJECT_PIECE_BYTES, BadPiece
from dpool.cluster.wire import messages, sessions
from dpool.cluster.wire.bulk import Head
from dpool.cluster.wire.keys import AGENT, Keys
from dpool.cluster.wire.surroundings import Surroundings
from dpool.resources import Stock

KEY, OTHER_KEY = b"k" * 16, b"o" * 16
A, B = b"a" * 16, b"b" * 16
THERE = "tcp://there:1"


def test_an_object_is_pulled_once_for_all_who_need_it() -> None:
    books = Objects()
    assert books.fetch(KEY, 10, A, THERE, False, 0.0) == [Deed(PULL, KEY, source=THERE)]
    assert books.fetch(KEY, 10, B, THERE, False, 0.0) == []
    assert books.need(KEY, A, 1, 0.0) == (False, [])
    assert books.need(KEY, A, 2, 0.0) == (False, [])
    assert books.need(KEY, B, 1, 0.0) == (False, [])
    assert books.moved(KEY, 5, 0.0) == []
    assert books.moved(KEY, 10, 0.0) == [Deed(READY, KEY, A, 1), Deed(READY, KEY, A, 2), Deed(READY, KEY, B, 1),
                                         Deed(GOT, KEY, A), Deed(GOT, KEY, B)]
    assert books.need(KEY, A, 3, 0.0) == (True, [])
    books.validate()


def test_it_goes_with_the_last_who_needs_it() -> None:
    books = Objects()
    books.fetch(KEY, 10, A, THERE, False, 0.0)
    books.moved(KEY, 10, 0.0)
    assert books.need(KEY, B, 1, 0.0) == (True, [Deed(GOT, KEY, B)])
    assert books.let_go(KEY, A, 0, 0.0) == []
    assert books.let_go(KEY, A, 0, 0.0) == []
    assert books.part_ended(B, 0.0) == [Deed(CLOSE, KEY)]
    assert books.keys == []


def test_what_a_driver_takes_to_be_here_and_is_not_is_asked_for() -> None:
    books = Objects()
    assert books.need(KEY, A, 1, 0.0) == (False, [Deed(ASK, KEY, A)])
    assert books.need(KEY, A, 2, 0.0) == (False, [])
    assert books.tick(1000.0) == []  # its session lasts: it will answer
    books.validate()


def test_a_silent_source_is_left_and_the_driver_asked_for_the_rest() -> None:
    books = Objects()
    books.fetch(KEY, 10, A, THERE, False, 0.0)
    books.moved(KEY, 4, 1.0)
    assert books.tick(1.0 + SILENT_AFTER_S - 0.1) == []
    assert books.tick(1.0 + SILENT_AFTER_S) == [Deed(LEAVE, KEY, source=THERE), Deed(ASK, KEY, A, 0, 4, THERE)]
    assert books.refused(KEY, THERE, 5.0) == []  # it speaks too late
    books.validate()


def test_a_source_that_waits_itself_is_waited_for_but_not_for_ever() -> None:
    books = Objects()
    books.fetch(KEY, 10, A, THERE, False, 0.0)
    now = 0.0
    while now + 1.0 < QUEUED_AFTER_S:
        now += 1.0
        books.heard(THERE, now)
        assert books.tick(now) == []
    assert books.tick(QUEUED_AFTER_S) == [Deed(LEAVE, KEY, source=THERE), Deed(ASK, KEY, A, 0, 0, THERE)]


def test_an_object_waits_behind_others_of_its_source_as_long_as_those_come() -> None:
    books = Objects()
    books.fetch(KEY, 10, A, THERE, False, 0.0)
    books.fetch(OTHER_KEY, 1000, A, THERE, False, 0.0)
    for now in range(1, 500):
        books.heard(THERE, now)
        books.brought(THERE, now)
        books.moved(OTHER_KEY, now, now)
        assert books.tick(now) == []
    assert books.tick(499.0 + SILENT_AFTER_S) == [
        Deed(LEAVE, KEY, source=THERE), Deed(ASK, KEY, A, 0, 0, THERE),
        Deed(LEAVE, OTHER_KEY, source=THERE), Deed(ASK, OTHER_KEY, A, 0, 499, THERE)]


def test_what_another_source_or_session_brings_does_not_count() -> None:
    books = Objects()
    books.fetch(KEY, 10, A, THERE, False, 0.0)
    books.fetch(OTHER_KEY, 10, A, "tcp://another:1", False, 0.0)
    books.heard("tcp://another:1", SILENT_AFTER_S)
    books.brought("tcp://another:1", SILENT_AFTER_S)
    assert books.tick(SILENT_AFTER_S) == [Deed(LEAVE, KEY, source=THERE), Deed(ASK, KEY, A, 0, 0, THERE)]


def test_other_nodes_wait_for_a_driver_as_long_as_it_sends_anything() -> None:
    books = Objects()
    books.fetch(KEY, 10, A, "", True, 0.0)
    books.fetch(OTHER_KEY, 1000, A, "", True, 0.0)
    books.fetch(KEY, 10, B, "", False, 0.0)
    for now in range(1, 500):
        books.sent(OTHER_KEY, 1000, A, now)
        books.moved(OTHER_KEY, now, now)
        assert not books.in_vain(KEY, now) and books.tick(now) == []
    books.part_ended(B, 499.0)
    assert not books.in_vain(KEY, 499.0 + STALLED_AFTER_S - 0.1)
    assert books.in_vain(KEY, 499.0 + STALLED_AFTER_S)
    assert books.tick(499.0 + STALLED_AFTER_S) == [], "a part waits for its own driver"


def test_a_source_that_is_named_later_is_asked() -> None:
    books = Objects()
    assert books.fetch(KEY, 10, A, "", False, 0.0) == []
    assert books.fetch(KEY, 10, B, THERE, False, 5.0) == [Deed(PULL, KEY, source=THERE)]
    assert books.tick(5.0 + SILENT_AFTER_S - 0.1) == []
    books.validate()


def test_a_driver_that_sends_it_later_is_the_one_to_wait_for() -> None:
    books = Objects()
    books.fetch(KEY, 10, A, "", False, 0.0)
    assert books.fetch(KEY, 10, B, "", True, 0.0) == []
    known = books.get(KEY)
    assert known is not None and known.part == B
    assert books.fetch(KEY, 10, A, THERE, False, 0.0) == [], "it comes already"
    books.validate()


def test_when_the_part_that_brings_it_ends_another_one_asks() -> None:
    books = Objects()
    books.sent(KEY, 10, A, 0.0)
    books.moved(KEY, 3, 0.0)
    books.fetch(KEY, 10, B, "", False, 0.0)
    assert books.part_ended(A, 0.0) == [Deed(ASK, KEY, B, have=3)]
    books.validate()


def test_a_part_is_not_waited_for_by_another_for_ever() -> None:
    """Its driver may be in a callback that waits for the other one's results."""
    books = Objects()
    books.fetch(KEY, 10, A, "", True, 0.0)
    assert books.tick(1000.0) == []
    books.fetch(KEY, 10, B, "", False, 1000.0)
    assert books.tick(1000.0) == [Deed(ASK, KEY, B)]


def test_an_object_that_no_session_brings_is_asked_for() -> None:
    books = Objects()
    books.fetch(KEY, 10, A, "", False, 0.0)
    assert books.tick(STALLED_AFTER_S - 0.1) == []
    assert books.tick(STALLED_AFTER_S) == [Deed(ASK, KEY, A)]


PARTS = st.sampled_from([A, B])
SOURCES = st.sampled_from(["tcp://one:1", "tcp://two:1", ""])
SIZE = 8


class Node(RuleBasedStateMachine):
    """One object, two parts. Whatever happens: who waits is waited for by somebody, and is told once; what is here is
    closed when nobody needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.books = Objects()
        self.now = 0.0
        self.batches = 0
        self.waiting: set[tuple[bytes, int]] = set()
        self.named: set[bytes] = set()  # parts that hold it
        self.got: set[bytes] = set()
        self.asked: set[bytes] = set()  # parts whose driver will send it
        self.pulling = ""
        self.there = False  # some of it
        self.have = 0

    def do(self, deeds: list[Deed]) -> None:
        for deed in deeds:
            if deed.what == PULL:
                assert not self.pulling
                self.pulling = deed.source
            elif deed.what == LEAVE:
                assert self.pulling == deed.source
                self.pulling = ""
            elif deed.what == ASK:
                assert deed.have == self.have and deed.part in self.named | {part for part, _ in self.waiting}
                self.asked.add(deed.part)
            elif deed.what == READY:
                self.waiting.remove((deed.part, deed.batch))
            elif deed.what == GOT:
                assert deed.part not in self.got
                self.got.add(deed.part)
            else:
                self.have = 0
                self.asked.clear()
                self.pulling = ""

    @rule(part=PARTS, source=SOURCES, own=st.booleans())
    def fetch(self, part: bytes, source: str, own: bool) -> None:
        if part not in self.named:
            self.named.add(part)
            if own and not source:
                self.asked.add(part)
            self.do(self.books.fetch(KEY, SIZE, part, source, own, self.now))

    @rule(part=PARTS)
    def need(self, part: bytes) -> None:
        self.batches += 1
        self.named.add(part)
        self.waiting.add((part, self.batches))
        here, deeds = self.books.need(KEY, part, self.batches, self.now)
        self.do(deeds)
        assert here == (self.have == SIZE)
        if here:
            self.waiting.discard((part, self.batches))

    @rule(part=PARTS)
    def a_driver_sends_more(self, part: bytes) -> None:
        if part in self.asked:
            self.do(self.books.sent(KEY, SIZE, part, self.now))
            self.more()

    @precondition(lambda self: self.pulling)
    @rule()
    def the_source_sends_more(self) -> None:
        self.more()

    def more(self) -> None:
        if self.have < SIZE:
            self.have += 2
            if self.have == SIZE:
                self.pulling = ""
            self.do(self.books.moved(KEY, self.have, self.now))

    @rule(seconds=st.sampled_from([1.0, SILENT_AFTER_S, STALLED_AFTER_S, QUEUED_AFTER_S]), heard=st.booleans())
    def time_passes(self, seconds: float, heard: bool) -> None:
        self.now += seconds
        if heard and self.pulling:
            self.books.heard(self.pulling, self.now)
        self.do(self.books.tick(self.now))

    @precondition(lambda self: self.pulling)
    @rule(lost=st.booleans())
    def the_source_fails(self, lost: bool) -> None:
        self.do(self.books.source_lost(self.pulling, self.now) if lost
                else self.books.refused(KEY, self.pulling, self.now))

    @rule(part=PARTS)
    def is_forgotten(self, part: bytes) -> None:
        if part in self.got:  # not earlier: driver/luggage.py
            self.got.remove(part)
            self.named.remove(part)
            self.asked.discard(part)  # what it still had to send is not sent
            self.do(self.books.let_go(KEY, part, 0, self.now))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def a_batch_is_given_back(self, data: st.DataObject) -> None:
        part, batch = data.draw(st.sampled_from(sorted(self.waiting)))
        self.waiting.remove((part, batch))
        self.do(self.books.let_go(KEY, part, batch, self.now))

    @rule(part=PARTS)
    def a_part_ends(self, part: bytes) -> None:
        self.named.discard(part)
        self.got.discard(part)
        self.asked.discard(part)
        self.waiting = {one for one in self.waiting if one[0] != part}
        self.do(self.books.part_ended(part, self.now))

    @invariant()
    def all_is_accounted_for(self) -> None:
        self.books.validate()
        known = self.books.get(KEY)
        assert (known is not None) == bool(self.named or self.waiting)
        if known is None:
            return
        assert known.have == self.have and known.source == self.pulling
        if self.have == SIZE:
            assert not self.waiting and self.got == self.named
        elif known.part:
            assert known.part in self.asked, "it waits for a driver that was not asked"

    def teardown(self) -> None:
        """Nothing more comes by itself: in the end every part that waits has a driver that was asked."""
        for _ in range(3):
            self.time_passes(STALLED_AFTER_S, False)
        if self.books.get(KEY) is not None and self.have < SIZE:
            assert self.asked


TestNode = Node.TestCase
TestNode.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


# -- the exchange, between connections that note what is said


class Connection:
    """To another node: what is said to it, and what it says."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []
        self.broken = False
        self.closed = False
        self.said: list[Any] = []
        self.says: list[list[memoryview]] = []

    def send(self, frames: Sequence[bytes]) -> bool:
        self.said.append(messages.to_source.decode(frames[0]))
        return True

    def receive(self) -> Iterator[list[memoryview]]:
        while self.says:
            yield self.says.pop(0)

    def watch(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def piece(self, key: bytes, size: int, start: int, content: bytes) -> None:
        message = messages.Piece(key, size, start, crc32(content))
        self.says.append([memoryview(messages.encode(message)), memoryview(content)])

    def patience(self, key: bytes) -> None:
        self.says.append([memoryview(messages.encode(messages.Patience(key)))])


class Around:
    """Surroundings, waker and listener of an exchange."""

    def __init__(self) -> None:
        self.time = 0.0
        self.connections: dict[str, Connection] = {}
        self.sent: list[Any] = []  # to those who ask here
        self.told: list[Deed] = []
        self.inlets = Inlets(cast(Any, self), cast(Any, self), None)
        self.exchange = Exchange(cast(Any, self), cast(Any, self), cast(Any, self), self.inlets, self.told.append)

    def now(self) -> float:
        return self.time

    def dialer(self, role: str, server: str, address: str) -> Connection:
        self.connections[address] = Connection()
        return self.connections[address]

    def add(self, descriptors: Sequence[int]) -> None:
        pass

    remove = add

    def send(self, peer: bytes, frames: Sequence[bytes]) -> bool:
        self.sent.append(messages.from_source.decode(frames[0]))
        return True

    def fetch(self, key: bytes, size: int, source: str = "", own: bool = False, part: bytes = A) -> None:
        self.exchange.fetch(messages.Fetch(key, size, source, own=own), part)

    def driver_sends(self, key: bytes, size: int, start: int, content: bytes) -> None:
        self.exchange.on_piece(A, (key, size, start), memoryview(content))

    def pull(self, key: bytes, start: int) -> Any:
        """Another node asks for an object: the answer."""
        self.sent.clear()
        self.exchange.on_peer(b"peer", messages.encode(messages.Pull(key, start, start + WINDOW_BYTES)))
        [answer] = self.sent
        return answer

    def second(self) -> None:
        self.time += 1.0
        self.exchange.receive()
        self.exchange.tick()
        self.exchange.validate()


@pytest.fixture
def around() -> Iterator[Around]:
    around = Around()
    yield around
    around.exchange.close()


def test_one_window_is_divided_among_the_objects_that_a_source_gives(around: Around) -> None:
    keys = [bytes([number]) * 16 for number in range(1, 41)]
    size = 2 * WINDOW_BYTES
    for key in keys:
        around.fetch(key, size, THERE)
    there = around.connections[THERE]
    assert [pull.upto - pull.start for pull in there.said] == [OBJECT_PIECE_BYTES] * len(keys)
    content = bytes(OBJECT_PIECE_BYTES)
    for start in range(0, 3 * len(content), len(content)):
        for key in keys[:4]:
            there.piece(key, size, start, content)
        there.said.clear()
        around.exchange.receive()
    asked = {pull.key: pull.upto - pull.start for pull in there.said}
    known = [around.exchange.objects.get(key) for key in keys[:4]]
    assert all(one is not None and one.have == 3 * len(content) for one in known)
    assert all(asked.get(key, WINDOW_BYTES // 4) == WINDOW_BYTES // 4 for key in keys[:4])
    source = around.exchange._sources[THERE]
    under_way = sum(source.asked[key] for key in keys) - 12 * len(content)
    assert under_way <= 2.1 * WINDOW_BYTES + 36 * OBJECT_PIECE_BYTES  # 16 / 1 + 16 / 2 + 16 / 3 + 16 / 4 MiB, at most
    for key in keys[1:4]:
        there.patience(key)
    there.piece(keys[0], size, 3 * len(content), content)
    around.exchange.receive()
    assert source.window(keys[0]) == WINDOW_BYTES, "what waits has no share"


def test_whatever_a_source_says_it_is_alive_for_all_its_objects(around: Around) -> None:
    around.fetch(KEY, 10, THERE)
    around.fetch(OTHER_KEY, 1000, THERE)
    there = around.connections[THERE]
    for second in range(100):
        there.piece(OTHER_KEY, 1000, second, b"x")
        around.second()
        assert not around.told
    while not around.told:
        around.second()
    assert around.time == 100.0 + SILENT_AFTER_S
    assert around.told == [Deed(ASK, KEY, A, 0, 0, THERE), Deed(ASK, OTHER_KEY, A, 0, 100, THERE)]


def test_what_came_from_elsewhere_is_not_asked_for_again(around: Around) -> None:
    around.fetch(KEY, 10, THERE)
    there = around.connections[THERE]
    around.driver_sends(KEY, 10, 0, bytes(10))
    assert around.told == [Deed(GOT, KEY, A)]
    there.said.clear()
    for _ in range(int(IDLE_S) + 1):
        around.second()
    assert there.said == [messages.Enough(KEY)] and there.closed


def test_who_waits_is_told_when_the_driver_here_is_silent(around: Around) -> None:
    """Somebody must notice: the node that waits hears of patience alone."""
    around.fetch(KEY, 10, own=True)
    around.fetch(OTHER_KEY, 1000, own=True)
    for second in range(100):
        around.driver_sends(OTHER_KEY, 1000, second, b"x")
        assert around.pull(KEY, 0) == messages.Patience(KEY)
        around.second()
    around.driver_sends(OTHER_KEY, 1000, 100, b"x")
    around.time += STALLED_AFTER_S - 0.1
    assert around.pull(KEY, 0) == messages.Patience(KEY)
    around.time += 0.1
    assert around.pull(KEY, 0) == messages.NotHere(KEY)
    assert not around.exchange._pullers


def test_who_has_not_all_yet_that_is_here_waits_for_the_rest_of_it(around: Around) -> None:
    around.fetch(KEY, 10, own=True)
    around.driver_sends(KEY, 10, 0, bytes(4))
    assert isinstance(around.pull(KEY, 0), messages.Piece)
    around.time += STALLED_AFTER_S
    assert around.pull(KEY, 0) == messages.Patience(KEY), "it is under way"
    assert around.pull(KEY, 4) == messages.NotHere(KEY)


# -- by bulk connections


def _head(key: bytes, size: int, start: int, content: bytes) -> Head:
    return Head(key, size, start, crc32(content), len(content), 0)


def test_what_comes_by_bulk_is_taken_in_if_the_part_needs_it(around: Around) -> None:
    around.fetch(KEY, 10, own=True)
    for start in (0, 5):
        around.exchange.on_bulk_piece(A, _head(KEY, 10, start, b"12345"), memoryview(b"12345"))
    assert around.told == [Deed(GOT, KEY, A)]


def test_what_comes_by_bulk_too_late_brings_nothing_back(around: Around) -> None:
    around.fetch(KEY, 10, own=True)
    around.driver_sends(KEY, 10, 0, bytes(10))
    around.exchange.let_go(KEY, A)
    around.exchange.on_bulk_piece(A, _head(KEY, 10, 5, b"12345"), memoryview(b"12345"))
    around.fetch(OTHER_KEY, 10, own=True, part=B)
    around.exchange.on_bulk_piece(A, _head(OTHER_KEY, 10, 0, b"12345"), memoryview(b"12345"))
    assert around.exchange.objects.keys == [OTHER_KEY] and not around.exchange._arrivals


def test_when_a_bulk_connection_is_over_its_driver_is_asked_for_all_that_is_to_come_from_it(around: Around) -> None:
    around.fetch(KEY, 10, own=True)
    around.fetch(OTHER_KEY, 10, own=True)
    around.fetch(b"3" * 16, 10, own=True, part=B)
    around.fetch(b"4" * 16, 10, THERE)
    around.exchange.on_bulk_piece(A, _head(KEY, 10, 0, b"1234"), memoryview(b"1234"))
    around.exchange.lacking(A)
    assert around.told == [Deed(ASK, KEY, A, have=4), Deed(ASK, OTHER_KEY, A)]
    around.exchange.validate()


def test_a_hole_is_no_piece(around: Around) -> None:
    around.fetch(KEY, 1000, own=True)
    with pytest.raises(BadPiece):
        around.exchange.on_bulk_piece(A, _head(KEY, 1000, 500, b"12345"), memoryview(b"12345"))


# -- the agent's turns


class Cut(Surroundings):
    """No other node can be dialed, if there is an error to raise."""

    error: Exception | None = None

    def dialer(self, role: str, server: str, address: str, again: bool = False) -> Any:
        if server == AGENT and self.error is not None:
            raise self.error
        return super().dialer(role, server, address, again)


@pytest.fixture
def agent() -> Iterator[Agent]:
    keys = Keys(bytes(32))
    agent = Agent(keys, "tcp://127.0.0.1:9", "tcp://127.0.0.1:0", 1, Stock({}), lambda _: None, around=Cut(keys),
                  make_workers=cast(Any, lambda *_: pytest.fail("no workers are wanted")))
    agent.step()  # it says its state
    yield agent
    agent._end()


def _part(agent: Agent) -> Part:
    part = agent._parts[A] = Part(A, agent)
    part.gone_at = agent.now() + 60.0
    part.workers = cast(Any, Idle())
    return part


class Idle:
    """Workers that have nothing to do."""

    count = 0

    def __init__(self) -> None:
        self.by_slot: dict[int, Any] = {}
        self.stops: list[list[tuple[int, int]]] = []

    def stop(self, tasks: list[tuple[int, int]]) -> set[int]:
        self.stops.append(tasks)
        return set()

    def send(self, *_: Any) -> bool:
        return True

    def close(self) -> None:
        pass


@pytest.mark.parametrize("error", [None, OSError(24, "Too many open files")], ids=["no address", "no descriptors"])
def test_a_source_that_cannot_be_dialed_refuses(agent: Agent, monkeypatch: pytest.MonkeyPatch,
                                                error: Exception | None) -> None:
    monkeypatch.setattr(Cut, "error", error)
    part = _part(agent)
    part._on_control(messages.Fetch(KEY, 10, "tcp://a b:7077"), 0)
    agent.step()
    assert agent._parts == {A: part}
    [said] = [messages.from_node.decode(frames[0][sessions.HEADER.size:]) for frames in part.session.resume(0)]
    assert said == messages.Missing(KEY, 0, "tcp://a b:7077")


def test_a_stop_of_what_waits_for_an_object_waits_with_it(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    part = _part(agent)
    workers = cast(Idle, part.workers)
    waits: list[float] = []

    def wait(timeout: float) -> set[int]:
        waits.append(timeout)
        return set()

    monkeypatch.setattr(agent._waker, "wait", wait)
    part.ledger.park(7, 1, (b"", []))
    part._on_control(messages.Stop(7, 0), 0)
    workers.stops.clear()
    agent._state_at = agent._around.now() + 1000.0
    agent.step()
    assert waits.pop() > 900.0 and not workers.stops
    part.ledger.unpark(7)
    part.hand_over()
    agent.step()
    assert waits.pop() < 2 * part_module.STOP_RECHECK_S and workers.stops == [[(7, 0)]]


def test_nothing_is_sent_before_the_wait(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may use up the news of what has come, and then the wait is long."""
    order: list[str] = []
    for owner, name in ((agent, "_say_state"), (agent, "_look_around"), (agent.exchange, "tick"),
                        (agent._waker, "wait"), (agent._listener, "receive"), (agent.exchange, "receive")):
        original = getattr(owner, name)

        def noted(*args: Any, name: str = name, original: Any = original) -> Any:
            order.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, noted)
    agent._state_at = agent._around.now()
    agent.step()
    assert order == ["wait", "_say_state", "_look_around", "tick", "receive", "receive"]
