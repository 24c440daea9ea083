"""Owns the tests of what crosses a link before and beside pickles: refs, pieces of segments, sessions, messages."""

from __future__ import annotations

import os
import random
import zlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpool.cluster.store import segments
from dpool.cluster.store.transfer import Arrival, Arrivals, BadPiece, pieces
from dpool.cluster.wire import frames, messages
from dpool.cluster.wire.sessions import ACK, CONTROL, HEADER, ProtocolError, Session

_keys = st.binary(min_size=16, max_size=16)
_entries = st.lists(st.tuples(_keys, st.integers(0, 1 << 60), st.binary(max_size=64), st.lists(_keys, max_size=3)),
                    max_size=4)


@given(_entries, st.lists(st.none() | _keys, max_size=4))
def test_refs_come_as_they_were_packed(entries: list[frames.Entry], layout: list[bytes | None]) -> None:
    packed = frames.pack_refs(entries, layout)
    assert frames.unpack_refs(packed) == (entries, layout)
    for end in range(len(packed)):
        with pytest.raises(ValueError):
            frames.unpack_refs(packed[:end])


@given(st.binary(max_size=200))
def test_refs_that_are_none_raise_valueerror_alone(data: bytes) -> None:
    try:
        frames.unpack_refs(data)
    except ValueError:
        pass


@settings(deadline=None)
@given(st.lists(st.binary(max_size=3000), min_size=1, max_size=5))
def test_a_segment_arrives_with_its_parts_and_nothing_else(parts: list[bytes]) -> None:
    segment = segments.Segment(segments.needed(parts) + 4096)
    os.pwrite(segment.descriptor, b"\xee" * segment.size, 0)  # of an earlier use
    table = segments.head(0) + segment.write(parts)
    arrivals = Arrivals()
    for size, start, piece in pieces(segment.descriptor, segments.places(table)):
        arrivals.add(size, start, piece)
    [arrived] = arrivals.take(1)
    try:
        assert [bytes(part) for part in segments.read(arrived, table)] == parts
        whole = os.pread(arrived, 1 << 20, 0)
        assert whole.count(b"\xee") == sum(part.count(b"\xee") for part in parts)
    finally:
        os.close(arrived)
        segment.close()


@pytest.mark.parametrize(("size", "start", "length"), [(0, 0, 0), (10, 5, 6), (10, 0, 0), (1 << 60, 0, 9), (10, 11, 1)])
def test_pieces_that_do_not_fit(size: int, start: int, length: int) -> None:
    arrivals = Arrivals()
    with pytest.raises(BadPiece):
        arrivals.add(size, start, memoryview(bytes(length)))
    arrivals.close()


def test_an_object_can_be_sent_on_while_it_comes() -> None:
    content = bytes(range(200))
    arrival = Arrival(200)
    for start in (0, 100):
        piece = content[start:start + 100]
        arrival.add(200, start, memoryview(piece))  # with no checksum: it comes from the driver
        assert b"".join(found for _, _, found in arrival.after(0, 200)) == content[:start + 100]
    assert arrival.whole
    assert [(start, checksum) for start, checksum, _ in arrival.after(1, 150)] == [(100, zlib.crc32(content[100:]))]
    assert arrival.after(200, 300) == [] == arrival.after(0, 0)
    arrival.close()


def test_pieces_of_objects_that_are_spoilt_or_missing() -> None:
    arrival = Arrival(300)
    piece = memoryview(bytes(100))
    arrival.check(piece, zlib.crc32(piece))
    with pytest.raises(BadPiece, match="checksum"):
        arrival.check(piece, zlib.crc32(piece) ^ 1)
    arrival.add(300, 0, piece, zlib.crc32(piece))
    for start in (200, 0):
        with pytest.raises(BadPiece):
            arrival.add(300, start, piece)
    assert arrival.have == 100 and len(arrival.after(0, 300)) == 1
    with pytest.raises(BadPiece, match="announced"):
        Arrival(1 << 60)
    arrival.close()


def test_pieces_that_go_back() -> None:
    arrivals = Arrivals()
    arrivals.add(10, 0, memoryview(b"12345"))
    for size, start in ((10, 4), (11, 5)):
        with pytest.raises(BadPiece):
            arrivals.add(size, start, memoryview(b"x"))
    with pytest.raises(BadPiece):
        arrivals.take(1)
    arrivals.close()


@pytest.mark.parametrize("seed", range(50))
def test_a_session_delivers_everything_once_and_in_order(seed: int) -> None:
    """Connections break at random, and lose what was under way."""
    chance = random.Random(seed)
    sender, receiver = Session(), Session()
    wire: list[bytes] = []
    got: list[int] = []
    sent = 0
    while len(got) < 200:
        step = chance.random()
        if step < 0.5 and sent < 200:
            sent += 1
            wire.append(bytes(sender.wrap(CONTROL, (sent.to_bytes(4, "little"),))[0]))
        elif step < 0.9 and wire:
            message = wire.pop(0)
            kind, _, _, _, number, acknowledged = HEADER.unpack_from(message)
            if receiver.accept(kind, number, acknowledged):
                got.append(int.from_bytes(message[HEADER.size:], "little"))
            if receiver.owes_acknowledgement:
                sender.accept(*(HEADER.unpack(receiver.acknowledgement()[0])[i] for i in (0, 4, 5)))
        elif step > 0.97 or (sent == 200 and not wire):
            wire = [bytes(again[0]) for again in sender.resume(receiver.received)]
    assert got == list(range(1, 201))
    assert len(sender.unacknowledged) <= 200


def test_a_session_refuses_what_cannot_be() -> None:
    session = Session()
    with pytest.raises(ProtocolError):
        session.accept(CONTROL, 2, 0)
    with pytest.raises(ProtocolError):
        session.accept(ACK, 0, 5)
    with pytest.raises(ProtocolError):
        session.resume(1)


@given(st.binary(max_size=300))
def test_messages_that_are_none_raise_decodeerror_alone(data: bytes) -> None:
    for decoder in (messages.to_head, messages.from_head, messages.to_node, messages.from_node, messages.to_source,
                    messages.from_source):
        try:
            decoder.decode(data)
        except msgspec.DecodeError:
            pass


def test_fields_are_checked() -> None:
    good = messages.Open(bytes(16), bytes(16), bytes(16), messages.Versions.here(), 1, "Worker", 0)
    assert messages.to_node.decode(messages.encode(good)) == good
    for field, value in (("session", b"short"), ("workers", 0), ("workers", 1 << 30), ("worker_name", "x" * 1000),
                         ("max_tasks", 0), ("authkey", bytes(5000))):
        bad = messages.encode(msgspec.structs.replace(good, **{field: value}))
        with pytest.raises(msgspec.ValidationError):
            messages.to_node.decode(bad)
    # What a newer peer says more is ignored.
    more = msgspec.msgpack.decode(messages.encode(messages.Bye(bytes(16)))) | {"new": 1}
    assert messages.to_node.decode(msgspec.msgpack.encode(more)) == messages.Bye(bytes(16))
