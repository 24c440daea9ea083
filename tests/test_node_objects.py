"""The books of a node about objects: node/objects.py, driven directly, and by a model of parts, drivers and sources.

Pure: no socket, process or clock. Run by pytest.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dpool.cluster.node.objects import (
    ASK,
    CLOSE,
    GOT,
    LEAVE,
    PULL,
    READY,
    SILENT_AFTER_S,
    STALLED_AFTER_S,
    Deed,
    Objects,
)

KEY = b"k" * 16
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
    while now + 1.0 < STALLED_AFTER_S:
        now += 1.0
        books.heard(KEY, THERE, now)
        assert books.tick(now) == []
    assert books.tick(STALLED_AFTER_S) == [Deed(LEAVE, KEY, source=THERE), Deed(ASK, KEY, A, 0, 0, THERE)]


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

    @rule(seconds=st.sampled_from([1.0, SILENT_AFTER_S, STALLED_AFTER_S]), heard=st.booleans())
    def time_passes(self, seconds: float, heard: bool) -> None:
        self.now += seconds
        if heard and self.pulling:
            self.books.heard(KEY, self.pulling, self.now)
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
