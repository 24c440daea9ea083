"""Where nodes get objects from: driver/spreading.py, driven directly, and by a model of what nodes really have.

Pure: no socket, process or clock. Run by pytest.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dpool.cluster.driver.spreading import APART_S, DRIVER, FETCH, FETCH_MIN_BYTES, HERE, OTHER, SEND, Spreading

MB = 1 << 20
LARGE = 100 * MB
KEY = b"k" * 16


def test_a_broadcast_is_a_chain_that_the_driver_feeds_once() -> None:
    spread = Spreading(MB)
    assert spread.want(KEY, LARGE, "a", b"1", 0.0) == (SEND, DRIVER)
    for before, node in zip("abcdefgh", "bcdefghi", strict=True):
        assert spread.want(KEY, LARGE, node, node.encode(), 0.0) == (FETCH, before)
    spread.validate()


def test_a_small_object_goes_out_as_a_tree_and_a_tiny_one_from_the_driver() -> None:
    spread = Spreading(MB)
    sources = [spread.want(KEY, MB, node, node.encode(), 0.0)[1] for node in "abcdefgh"]
    assert sources[:4] == [DRIVER, "a", "a", "b"]
    assert all(sources.count(source) <= 3 for source in sources)
    for node in "abcdefgh":
        assert spread.want(b"t" * 16, FETCH_MIN_BYTES - 1, node, node.encode(), 0.0) == (SEND, DRIVER)
    spread.validate()


def test_nodes_that_have_it_share_the_work() -> None:
    spread = Spreading(MB)
    for node in "abc":
        spread.want(KEY, LARGE, node, node.encode(), 0.0)
        spread.arrived(KEY, node)
    sources = [spread.want(KEY, LARGE, node, node.encode(), 0.0)[1] for node in "def"]
    assert sorted(sources[:1]) == ["a"] and set(sources) <= {"a", "b", "c", "d", "e"}
    assert len(set(sources)) == 3


def test_another_session_of_a_node_finds_it_there() -> None:
    spread = Spreading(MB)
    spread.want(KEY, LARGE, "a", b"1", 0.0)
    assert spread.want(KEY, LARGE, "a", b"2", 0.0) == (OTHER, DRIVER)
    spread.arrived(KEY, "a")
    assert spread.want(KEY, LARGE, "a", b"3", 0.0) == (HERE, DRIVER)
    for session in (b"1", b"2"):
        spread.dropped(KEY, "a", session)
    assert "a" in spread.nodes(KEY)
    spread.dropped(KEY, "a", b"3")
    assert "a" not in spread.nodes(KEY)
    assert spread.want(KEY, LARGE, "a", b"1", 0.0) == (SEND, DRIVER)


def test_a_node_that_could_not_reach_another_is_not_sent_there_for_a_while() -> None:
    spread = Spreading(MB)
    spread.want(KEY, LARGE, "a", b"1", 0.0)
    spread.arrived(KEY, "a")
    assert spread.want(KEY, LARGE, "b", b"2", 0.0) == (FETCH, "a")
    spread.failed(KEY, "b", "a", 10.0)
    spread.arrived(KEY, "b")
    other = b"o" * 16
    spread.want(other, LARGE, "a", b"1", 11.0)
    spread.arrived(other, "a")
    assert spread.want(other, LARGE, "b", b"2", 11.0) == (SEND, DRIVER)
    spread.dropped(other, "b", b"2")
    assert spread.want(other, LARGE, "b", b"2", 10.0 + APART_S) == (FETCH, "a")
    spread.validate()


def test_a_source_that_comes_again_does_not_wait_for_those_it_served() -> None:
    spread = Spreading(MB)
    spread.want(KEY, LARGE, "a", b"1", 0.0)
    spread.arrived(KEY, "a")
    assert spread.want(KEY, LARGE, "b", b"2", 0.0) == (FETCH, "a")
    spread.dropped(KEY, "a", b"1")  # b does not know yet
    assert spread.want(KEY, LARGE, "a", b"1", 0.0) == (SEND, DRIVER)
    spread.validate()


NODES = st.sampled_from("abcde")
KEYS = st.sampled_from([b"k" * 16, b"l" * 16])
SIZES = {b"k" * 16: LARGE, b"l" * 16: MB}


class Cluster(RuleBasedStateMachine):
    """Nodes that get what they were told to get, some of the time. Whoever waits must wait for somebody who has it, or
    who waits for one who does, the driver at last."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = Spreading(MB)
        self.now = 0.0
        self.told: dict[tuple[bytes, str], set[bytes]] = {}  # object, node -> sessions
        self.coming: dict[tuple[bytes, str], str] = {}  # -> from where

    @rule(key=KEYS, node=NODES, session=st.sampled_from([b"1", b"2"]))
    def want(self, key: bytes, node: str, session: bytes) -> None:
        sessions = self.told.setdefault((key, node), set())
        name = node.encode() + session
        if name in sessions:
            return
        how, source = self.spread.want(key, SIZES[key], node, name, self.now)
        if sessions:
            assert how == (OTHER if (key, node) in self.coming else HERE)
        else:
            assert how in (SEND, FETCH) and (how == SEND) == (source == DRIVER)
            assert source == DRIVER or (source != node and self.told.get((key, source)))
            self.coming[key, node] = source
        sessions.add(name)

    @precondition(lambda self: self.coming)
    @rule(data=st.data())
    def arrives(self, data: st.DataObject) -> None:
        key, node = data.draw(st.sampled_from(sorted(self.coming)))
        del self.coming[key, node]
        self.spread.arrived(key, node)

    @precondition(lambda self: self.coming)
    @rule(data=st.data())
    def fails(self, data: st.DataObject) -> None:
        key, node = data.draw(st.sampled_from(sorted(self.coming)))
        self.spread.failed(key, node, self.coming[key, node], self.now)
        self.coming[key, node] = DRIVER

    @precondition(lambda self: any(self.told.values()))
    @rule(data=st.data())
    def is_dropped(self, data: st.DataObject) -> None:
        key, node = data.draw(st.sampled_from(sorted(place for place, sessions in self.told.items() if sessions)))
        session = data.draw(st.sampled_from(sorted(self.told[key, node])))
        self.told[key, node].discard(session)
        self.spread.dropped(key, node, session)
        if not self.told[key, node]:
            self.coming.pop((key, node), None)

    @rule(seconds=st.floats(0, 2 * APART_S))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def nobody_waits_for_himself(self) -> None:
        self.spread.validate()
        for key, node in self.coming:
            passed = [node]
            while (source := self.coming.get((key, passed[-1]), DRIVER)) != DRIVER:
                assert source not in passed
                passed.append(source)
        for (key, node), sessions in self.told.items():
            assert (node in self.spread.nodes(key)) == bool(sessions)


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
