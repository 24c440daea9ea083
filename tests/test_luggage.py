"""What travels to a node beside batches: driver/luggage.py, driven directly, with segments and without a network."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from dpool.cluster.driver import luggage as luggage_module
from dpool.cluster.driver.luggage import Luggage, Sharing, Unsent
from dpool.cluster.driver.spreading import FETCH_MIN_BYTES
from dpool.cluster.store import segments
from dpool.cluster.store.transfer import OBJECT_PIECE_BYTES
from dpool.cluster.wire import frames, messages, sessions

KEY = b"k" * 16
SIZE = 4 * OBJECT_PIECE_BYTES
FIRST, SECOND = "tcp://first:1", "tcp://second:1"


class Stored:
    """An object, and a batch that needs it."""

    def __init__(self, size: int = SIZE) -> None:
        self.content = os.urandom(size)
        self.descriptor, table = segments.write([self.content])
        refs = frames.pack_refs([(KEY, size, table, [])], [])
        self.parts = [frames.TASKS.pack(0, 0, 0, 1, 7, 1, 0, len(refs), 0), b"", refs, b"body"]


@pytest.fixture
def stored() -> Iterator[Stored]:
    stored = Stored()
    yield stored
    os.close(stored.descriptor)


def all_of(packed: list[Iterator[Unsent]]) -> list[Unsent]:
    return [unsent for one in packed for unsent in one]


def told(packed: list[Iterator[Unsent]]) -> list[messages.Message]:
    return [messages.to_node.decode(unsent[1][0]) for unsent in all_of(packed) if unsent[0] == sessions.CONTROL]


def content(later: Iterator[Unsent]) -> bytes:
    """Of the pieces of an object, in order."""
    out = b""
    first = None
    for kind, (head,), _, _, piece in later:
        assert kind == sessions.OBJECT and piece is not None
        _, _, start = sessions.OBJECT_HEADER.unpack(head)
        first = start if first is None else first
        assert start == first + len(out)
        out += piece
    return out


def test_a_large_object_is_named_first_and_sent_when_nothing_else_is(stored: Stored) -> None:
    luggage = Luggage(Sharing(), FIRST, b"1")
    packed = all_of(luggage.pack(stored.parts, [stored.descriptor], {KEY}, 0.0))
    assert [unsent[0] for unsent in packed] == [sessions.CONTROL, sessions.TASKS]
    assert messages.to_node.decode(packed[0][1][0]) == messages.Fetch(KEY, SIZE, own=True)
    assert content(luggage.later[KEY]) == stored.content
    assert told(luggage.pack(stored.parts, [stored.descriptor], {KEY}, 0.0)) == []


def test_a_small_one_goes_before_its_batch() -> None:
    stored = Stored(FETCH_MIN_BYTES - 1)
    luggage = Luggage(Sharing(), FIRST, b"1")
    kinds = [unsent[0] for unsent in all_of(luggage.pack(stored.parts, [stored.descriptor], {KEY}, 0.0))]
    assert kinds == [sessions.OBJECT, sessions.TASKS] and not luggage.later
    os.close(stored.descriptor)


def test_other_nodes_and_sessions_get_it_without_the_driver_and_the_rest_from_it_if_that_fails(stored: Stored) -> None:
    sharing = Sharing()
    first, again, second = Luggage(sharing, FIRST, b"1"), Luggage(sharing, FIRST, b"2"), Luggage(sharing, SECOND, b"3")
    first.pack(stored.parts, [stored.descriptor], {KEY}, 0.0)
    assert told(again.pack(stored.parts, [stored.descriptor], {KEY}, 0.0)) == [messages.Fetch(KEY, SIZE)]
    assert told(second.pack(stored.parts, [stored.descriptor], {KEY}, 0.0)) == [messages.Fetch(KEY, SIZE, FIRST)]
    assert not again.later and not second.later
    second.missing(messages.Missing(KEY, OBJECT_PIECE_BYTES, FIRST), 0.0)
    assert content(second.missed[KEY]) == stored.content[OBJECT_PIECE_BYTES:]
    first.got(KEY)
    assert told(Luggage(sharing, FIRST, b"4").pack(stored.parts, [stored.descriptor], {KEY}, 0.0)) == []


def test_what_the_node_may_still_ask_for_is_kept_and_not_forgotten(stored: Stored) -> None:
    luggage = Luggage(Sharing(), FIRST, b"1")
    luggage.pack(stored.parts, [stored.descriptor], {KEY}, 0.0)
    assert luggage.gone(set()) == []  # the program has let go of it
    luggage.missing(messages.Missing(KEY, 0), 0.0)
    assert content(luggage.missed[KEY]) == stored.content
    luggage.missing(messages.Missing(KEY, 0), 0.0)
    luggage.got(KEY)
    assert not luggage.missed, "the node has it: no more of it is sent"
    assert luggage.gone({KEY}) == [] and luggage.gone(set()) == [KEY]
    luggage.missing(messages.Missing(KEY, 0), 0.0)
    assert not luggage.later and not luggage.missed


def test_a_function_is_known_at_the_node_when_all_was_packed_and_not_before(stored: Stored,
                                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    parts = [frames.TASKS.pack(frames.FUNCTION_IN_SEGMENT, 0, 0, 1, 7, 1, 0, 0, 0), b"", b"", b"body"]
    luggage = Luggage(Sharing(), FIRST, b"1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(luggage_module, "segment", interrupted)
        luggage.pack(parts, [stored.descriptor], (), 0.0)
    flags = [all_of(luggage.pack(parts, [stored.descriptor], (), 0.0))[-1][2] for _ in range(2)]
    assert flags == [sessions.FUNCTION_STORED, sessions.FUNCTION_KNOWN]


def test_a_batch_that_cannot_be_mapped_leaves_no_trace(stored: Stored) -> None:
    sharing = Sharing()
    luggage = Luggage(sharing, FIRST, b"1")
    with pytest.raises(OSError):
        luggage.pack(stored.parts, [-1], {KEY}, 0.0)
    assert not luggage.objects and sharing.places({KEY: SIZE}) == {}
    assert told(luggage.pack(stored.parts, [stored.descriptor], {KEY}, 0.0)) == [messages.Fetch(KEY, SIZE, own=True)]
    luggage.end()
    assert sharing.places({KEY: SIZE}) == {}
