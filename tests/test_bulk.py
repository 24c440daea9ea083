"""The bulk channel, wire/bulk.py: over loopback TCP, with peers that are honest, that lie, and that say nothing.

One thread and no clock: the time is an argument. Skipped without cryptography. Run by pytest.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterator

import pytest

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from dpool.cluster.wire import bulk
from dpool.cluster.wire.bulk import MAX_PIECE_BYTES, OFFER_S, OPENING_S, Gate, Head, Receiver, Sender, pour
from dpool.cluster.wire.links import parse_address

KEY = b"k" * 16
# Only a hang takes longer.
PATIENCE_MS = 20_000


def _wait(descriptor: int, events: int = select.POLLIN) -> None:
    poll = select.poll()
    poll.register(descriptor, events)
    assert poll.poll(PATIENCE_MS), "nothing comes"


class Pair:
    """A gate, and a sender and a receiver that have met."""

    def __init__(self) -> None:
        self.gate = Gate("127.0.0.1", 0)
        offered = self.gate.offer(0.0)
        assert offered is not None
        self.name, self.key = offered
        self.sender = Sender(self.gate.address, self.name, self.key)
        _wait(self.sender.descriptor, select.POLLOUT)
        assert self.sender.blocked and self.sender.flush() and not self.sender.ready
        self.receiver = self.arrived()
        _wait(self.sender.descriptor)
        self.sender.watch()
        assert self.sender.ready and not self.sender.broken

    def arrived(self) -> Receiver:
        while not (arrived := self.gate.accept(0.0)):
            _wait(self.gate.descriptor)
        [receiver] = arrived
        return receiver

    def received(self, count: int, most: int = 100, after: int = 0) -> list[tuple[Head, bytes]]:
        """So many pieces, or fewer if the connection ends."""
        found: list[tuple[Head, bytes]] = []
        while len(found) < count and not self.receiver.broken:
            found += [(head, bytes(piece)) for head, piece in self.receiver.receive(most, after)]
            if len(found) < count and not self.receiver.broken:
                poll = select.poll()
                poll.register(self.receiver.descriptor, select.POLLIN)
                if self.sender.blocked:
                    poll.register(self.sender.descriptor, select.POLLOUT)
                assert poll.poll(PATIENCE_MS), "nothing comes"
                self.sender.flush()
        return found

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        self.gate.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    before = os.listdir("/proc/self/fd")
    pair = Pair()
    yield pair
    pair.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.fixture
def gate() -> Iterator[Gate]:
    before = os.listdir("/proc/self/fd")
    gate = Gate("127.0.0.1", 0)
    yield gate
    gate.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def piece(content: bytes, start: int = 0, after: int = 0) -> tuple[Head, memoryview]:
    return Head(KEY, 1 << 40, start, 7, len(content), after), memoryview(content)


def _connect(gate: Gate, *said: bytes) -> socket.socket:
    """A stranger, who says this; the gate has seen it."""
    stranger = socket.create_connection(parse_address(gate.address), 20)
    for words in said:
        stranger.sendall(words)
    _wait(gate.descriptor)
    return stranger


def _is_closed(stranger: socket.socket) -> bool:
    """Without a word."""
    try:
        return stranger.recv(1) == b""
    except ConnectionResetError:
        return True


# -- what is sent comes


@pytest.mark.parametrize("size", [1, 1000, 256 * 1024, MAX_PIECE_BYTES])
def test_pieces_come_as_they_were_sent(pair: Pair, size: int) -> None:
    sent = [piece(os.urandom(size), number * size) for number in range(5)]
    waiting = list(sent)
    found: list[tuple[Head, bytes]] = []
    while len(found) < 5:
        if waiting and pair.sender.send(*waiting[0]):
            waiting.pop(0)
        found += [(head, bytes(content)) for head, content in pair.receiver.receive(100)]
    assert found == [(head, bytes(content)) for head, content in sent]
    assert pair.sender.count == pair.receiver.count == 5
    assert not pair.sender.broken and not pair.receiver.broken


def test_nothing_that_is_sent_can_be_read_on_the_way(pair: Pair) -> None:
    content = b"secret " * 1000
    pair.sender.send(*piece(content))
    _wait(pair.receiver.descriptor)
    seen = socket.socket(fileno=os.dup(pair.receiver.descriptor))
    with seen:
        on_the_way = seen.recv(1 << 16, socket.MSG_PEEK)
    assert b"secret" not in on_the_way and KEY not in on_the_way and pair.key not in on_the_way


def test_who_does_not_receive_stops_who_sends_and_nobody_keeps_more_than_the_kernel(pair: Pair) -> None:
    content = os.urandom(MAX_PIECE_BYTES)
    sent = 0
    while pair.sender.send(*piece(content, sent * len(content))):
        sent += 1
        assert sent < 100, "it takes all"
    assert pair.sender.blocked
    assert pour(pair.sender, lambda: pytest.fail("there is no room")), "it is to be called again"
    found = pair.received(sent)
    assert [head.start for head, _ in found] == [number * len(content) for number in range(sent)]
    assert pair.sender.flush() and not pair.sender.blocked


def test_a_turn_is_bounded_on_both_sides(pair: Pair) -> None:
    waiting = [piece(b"x", number) for number in range(3 * bulk.BURST)]
    assert pour(pair.sender, lambda: waiting.pop(0))
    assert len(waiting) == 2 * bulk.BURST
    assert pour(pair.sender, lambda: waiting.pop(0)) and pour(pair.sender, lambda: waiting.pop(0))
    assert not pour(pair.sender, lambda: None)
    assert len(pair.received(bulk.BURST, bulk.BURST)) == bulk.BURST
    assert len(pair.received(2 * bulk.BURST)) == 2 * bulk.BURST


def test_a_piece_waits_for_what_was_said_before(pair: Pair) -> None:
    pair.sender.send(*piece(b"early", after=7))
    pair.sender.send(*piece(b"next", 5))
    while not pair.receiver.after:
        _wait(pair.receiver.descriptor)
        assert not list(pair.receiver.receive(10, 6))
    assert pair.receiver.after == 7 and not list(pair.receiver.receive(10, 6))
    assert [content for _, content in pair.received(2, after=7)] == [b"early", b"next"]
    assert pair.receiver.after == 0


def test_an_end_is_seen_by_the_other_side(pair: Pair) -> None:
    pair.sender.send(*piece(b"last"))
    pair.sender.close()
    assert [content for _, content in pair.received(2)] == [b"last"]
    assert pair.receiver.broken == "the other side has ended it"
    assert not list(pair.receiver.receive(10))


def test_the_end_of_the_receiver_is_seen_by_the_sender(pair: Pair) -> None:
    pair.receiver.close()
    _wait(pair.sender.descriptor)
    pair.sender.watch()
    assert pair.sender.broken and not pair.sender.send(*piece(b"x")) and not pair.sender.blocked


def test_an_end_reaches_the_other_side_though_a_forked_process_has_the_connection_too(pair: Pair) -> None:
    copy = os.dup(pair.sender.descriptor)
    try:
        pair.sender.close()
        assert not pair.received(1) and pair.receiver.broken
    finally:
        os.close(copy)


def test_a_key_is_not_used_for_ever(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "MAX_KEY_BYTES", 1000)
    assert pair.sender.send(*piece(bytes(2000)))
    assert not pair.sender.send(*piece(b"more")) and "used enough" in pair.sender.broken


def test_no_two_connections_have_a_name_or_a_key_in_common(gate: Gate) -> None:
    offers = [gate.offer(0.0) for _ in range(100)]
    assert len({part for offer in offers if offer is not None for part in offer}) == 200


# -- strangers at the gate


GARBAGE = [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", bytes(32), b"\xff" * 10_000, os.urandom(64)]


@pytest.mark.parametrize("words", GARBAGE)
def test_garbage_is_closed_without_an_answer(gate: Gate, words: bytes) -> None:
    gate.offer(0.0)
    with _connect(gate, words) as stranger:
        while gate.accept(0.0) or gate._opening:
            _wait(gate.descriptor)
        assert _is_closed(stranger)


def test_a_name_alone_is_not_enough_and_does_not_spend_the_offer(gate: Gate) -> None:
    """Whoever has seen the name on its way, and comes first."""
    name, key = gate.offer(0.0) or pytest.fail("no offer")
    with _connect(gate, name + os.urandom(16)) as stranger:
        assert not gate.accept(0.0) and _is_closed(stranger)
    seal = AESGCM(os.urandom(32)).encrypt(struct.pack(">IQ", 1, 0), b"", b"dpool bulk 1 " + name)
    with _connect(gate, name + seal) as stranger:
        assert not gate.accept(0.0) and _is_closed(stranger)
    with _connect(gate, _opening(name, key)):
        [receiver] = gate.accept(0.0)
        receiver.close()


def _opening(name: bytes, key: bytes) -> bytes:
    return name + AESGCM(key).encrypt(struct.pack(">IQ", 1, 0), b"", b"dpool bulk 1 " + name)


def test_an_offer_serves_once(gate: Gate) -> None:
    name, key = gate.offer(0.0) or pytest.fail("no offer")
    with _connect(gate, _opening(name, key)):
        [receiver] = gate.accept(0.0)
        with _connect(gate, _opening(name, key)) as again:  # what was recorded is said once more
            assert not gate.accept(0.0) and _is_closed(again)
        assert not receiver.broken
        receiver.close()


def test_an_offer_expires(gate: Gate) -> None:
    name, key = gate.offer(0.0) or pytest.fail("no offer")
    with _connect(gate, _opening(name, key)) as late:
        assert not gate.accept(OFFER_S) and _is_closed(late)


def test_an_offer_that_is_withdrawn_is_none(gate: Gate) -> None:
    name, key = gate.offer(0.0) or pytest.fail("no offer")
    gate.withdraw(name)
    with _connect(gate, _opening(name, key)) as late:
        assert not gate.accept(0.0) and _is_closed(late)


@pytest.mark.parametrize("said", [b"", b"half of what is to be"])
def test_who_says_nothing_or_not_all_is_closed_in_time(gate: Gate, said: bytes) -> None:
    with _connect(gate, said) as silent:
        assert not gate.accept(0.0) and gate._opening
        assert not gate.accept(OPENING_S - 0.1) and gate._opening
        assert not gate.accept(OPENING_S) and not gate._opening and _is_closed(silent)


def test_who_comes_byte_by_byte_is_let_in(gate: Gate) -> None:
    name, key = gate.offer(0.0) or pytest.fail("no offer")
    with _connect(gate) as slow:
        arrived: list[Receiver] = []
        for byte in _opening(name, key):
            assert not arrived
            slow.sendall(bytes([byte]))
            _wait(gate.descriptor)
            arrived = gate.accept(0.0)
        [receiver] = arrived
        receiver.close()


def test_many_who_say_nothing_do_not_use_up_the_descriptors(gate: Gate) -> None:
    silent = []
    for _ in range(bulk.MAX_OPENING + 10):
        silent.append(_connect(gate))
        gate.accept(0.0)
    assert len(gate._opening) == bulk.MAX_OPENING
    assert all(_is_closed(one) for one in silent[:10])
    for one in silent:
        one.close()


def test_without_descriptors_the_gate_rests_and_does_not_have_its_owner_turn_in_vain(
        gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            raise OSError(24, "Too many open files")

    name, key = gate.offer(0.0) or pytest.fail("no offer")
    real = gate._socket
    poll = select.poll()
    poll.register(gate.descriptor, select.POLLIN)
    with Full(fileno=os.dup(real.fileno())) as full, _connect(gate, _opening(name, key)):
        assert poll.poll(0)
        # The descriptor that is watched is the real one's.
        monkeypatch.setattr(full, "fileno", real.fileno)
        monkeypatch.setattr(gate, "_socket", full)
        assert not gate.accept(0.0) and not poll.poll(0)
        assert not gate.accept(0.5) and not poll.poll(0)
        monkeypatch.undo()
        [receiver] = gate.accept(1.0)
        receiver.close()


def test_a_gate_whose_port_is_taken_says_so(gate: Gate) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {gate.address} for large objects: Address already in use"):
        Gate(*parse_address(gate.address))


# -- liars in the middle: all that is sent passes through the hands of this one


class Tapped(Pair):
    """A pair whose bytes are the test's to pass on."""

    def __init__(self) -> None:
        self.gate = Gate("127.0.0.1", 0)
        self.name, self.key = self.gate.offer(0.0) or pytest.fail("no offer")
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.sender = Sender(f"tcp://127.0.0.1:{server.getsockname()[1]}", self.name, self.key)
            self.to_sender, _ = server.accept()
        self.to_receiver = socket.create_connection(parse_address(self.gate.address))
        assert self.sender.flush()
        self.opening = self.to_sender.recv(32, socket.MSG_WAITALL)
        self.to_receiver.sendall(self.opening)
        self.receiver = self.arrived()
        self.answer = self.to_receiver.recv(16, socket.MSG_WAITALL)

    def let_begin(self) -> None:
        self.to_sender.sendall(self.answer)
        _wait(self.sender.descriptor)
        self.sender.watch()
        assert self.sender.ready

    def sent(self, *contents: bytes) -> list[bytes]:
        """What each piece is on the way."""
        found = []
        for number, content in enumerate(contents):
            assert self.sender.send(*piece(content, number))
            found.append(self.to_sender.recv(64 + len(content) + 16, socket.MSG_WAITALL))
        return found

    def close(self) -> None:
        super().close()
        self.to_sender.close()
        self.to_receiver.close()


@pytest.fixture
def tapped() -> Iterator[Tapped]:
    before = os.listdir("/proc/self/fd")
    tapped = Tapped()
    yield tapped
    tapped.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


FRAME = 64 + 100 + 16


@pytest.mark.parametrize("bit", [0, 8 * 20, 8 * 63, 8 * 64, 8 * 100, 8 * FRAME - 1])
def test_a_bit_that_is_flipped_ends_it(tapped: Tapped, bit: int) -> None:
    tapped.let_begin()
    good, bad = tapped.sent(bytes(100), bytes(100))
    spoilt = bytearray(bad)
    spoilt[bit // 8] ^= 1 << bit % 8
    tapped.to_receiver.sendall(good + spoilt + bytes(1000))
    assert len(tapped.received(2)) == 1 and tapped.receiver.broken == "something has come that was not sent"


@pytest.mark.parametrize("order", [(0, 0), (1,), (0, 2), (0, 1, 0), (1, 0)],
                         ids=["twice", "without the first", "one is left out", "an old one", "in another order"])
def test_what_is_replayed_left_out_or_out_of_order_ends_it(tapped: Tapped, order: tuple[int, ...]) -> None:
    tapped.let_begin()
    frames = tapped.sent(b"a" * 100, b"b" * 100, b"c" * 100)
    tapped.to_receiver.sendall(b"".join(frames[one] for one in order))
    good = next(count for count, one in enumerate((*order, -1)) if one != count)
    assert len(tapped.received(3)) == good and tapped.receiver.broken == "something has come that was not sent"


def test_the_head_of_one_piece_does_not_fit_another_one(tapped: Tapped) -> None:
    tapped.let_begin()
    first, second = tapped.sent(b"a" * 100, b"b" * 100)
    tapped.to_receiver.sendall(first[:64] + second[64:])
    assert not tapped.received(1) and tapped.receiver.broken


@pytest.mark.parametrize("end", [1, 63, 64, 70, FRAME - 1])
def test_what_is_cut_short_is_no_piece(tapped: Tapped, end: int) -> None:
    tapped.let_begin()
    [frame] = tapped.sent(bytes(100))
    tapped.to_receiver.sendall(frame[:end])
    tapped.to_receiver.shutdown(socket.SHUT_WR)
    assert not tapped.received(1) and tapped.receiver.broken == "the other side has ended it"


def test_what_was_sent_does_not_serve_as_an_answer(tapped: Tapped) -> None:
    tapped.to_sender.sendall(tapped.opening[16:])
    _wait(tapped.sender.descriptor)
    tapped.sender.watch()
    assert not tapped.sender.ready and tapped.sender.broken == "there is something else there"


def test_the_answer_does_not_serve_as_a_piece(tapped: Tapped) -> None:
    tapped.to_receiver.sendall(tapped.answer * 10)
    assert not tapped.received(1) and tapped.receiver.broken


def test_an_answer_that_is_long_ends_it(tapped: Tapped) -> None:
    tapped.to_sender.sendall(tapped.answer + b"x")
    while not tapped.sender.broken:
        _wait(tapped.sender.descriptor)
        tapped.sender.watch()
    assert not tapped.sender.send(*piece(b"x"))


def test_nothing_is_sent_to_who_has_not_shown_the_key(tapped: Tapped) -> None:
    assert not tapped.sender.send(*piece(b"x"))
    tapped.to_sender.sendall(os.urandom(16))
    _wait(tapped.sender.descriptor)
    tapped.sender.watch()
    assert not tapped.sender.send(*piece(b"x"))
    tapped.to_sender.settimeout(0)
    tapped.sender.close()
    assert not tapped.to_sender.recv(1)


@pytest.mark.parametrize("nbytes", [0, MAX_PIECE_BYTES + 1, (1 << 32) - 1])
def test_a_length_that_cannot_be_ends_it_before_there_is_memory_for_it(tapped: Tapped, nbytes: int) -> None:
    """Of who has the key: of others no length is looked at."""
    head = struct.pack("<16sQQIIQ", KEY, 1 << 40, 0, 0, nbytes, 0)
    tapped.to_receiver.sendall(AESGCM(tapped.key).encrypt(struct.pack(">IQ", 1, 1), head, None))
    assert not tapped.received(1) and tapped.receiver.broken == f"a piece of {nbytes} bytes is announced"
    assert len(tapped.receiver._buffer) < 1000


# -- where it cannot be


def test_an_address_that_is_none_or_a_name_is_refused() -> None:
    for address in ("nonsense", "tcp://somewhere.example:7077"):
        with pytest.raises(ValueError):
            Sender(address, b"n" * 16, b"k" * 32)


def test_where_nobody_listens_it_is_broken_soon() -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else gets this port
        taken.bind(("127.0.0.1", 0))
        try:
            sender = Sender(f"tcp://127.0.0.1:{taken.getsockname()[1]}", b"n" * 16, b"k" * 32)
        except ConnectionRefusedError:
            return
        _wait(sender.descriptor)
        sender.watch()
        assert sender.broken == "Connection refused" and not sender.blocked
        sender.close()


def test_without_the_library_there_are_no_connections(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "_cipher", lambda key: None)
    assert gate.offer(0.0) is None
    with pytest.raises(OSError, match="no library"):
        Sender(gate.address, b"n" * 16, b"k" * 32)


def test_a_library_that_is_too_old_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cryptography.hazmat.primitives.ciphers.aead.AESGCM", type("AESGCM", (), {"__init__": lambda
                                                                                               self, key: None}))
    assert bulk._cipher(bytes(32)) is None
