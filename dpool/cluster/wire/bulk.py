"""The bulk channel: pieces of large objects over a TCP connection of their own, encrypted with AES-256-GCM.

Who receives listens (Gate) and makes up the name and the key of each connection; both go to the sender over a ZeroMQ
link, encrypted and authenticated, and serve once. Seals, opens, sends and receives without ever waiting; knows no
object, and promises nothing: what does not arrive is Missing, as everything else that goes wrong is. Each end belongs
to one thread. Needs the library `cryptography` (the extra dpool[bulk]), which is imported when a connection is made.

    sender                                                receiver
      name, seal(0)            32 bytes, once          ->   expects this name, once, for OFFER_S
                           <-  seal(0), the other way       the sender may send now
      sealed head, sealed piece, sealed head, ...      ->

A seal has its number in its nonce, and nothing else says which it is: what is replayed, left out, out of order, cut
short or sent back does not open. The length of a piece stands in its head, so that nothing is looked at before it has
opened. What does not open ends the connection, without an answer.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from dpool.cluster.wire.links import address_of, parse_address

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

# A larger piece is not one: what a receiver keeps of a connection is not larger.
MAX_PIECE_BYTES = 1 << 20
# How long a connection that was offered is expected. Longer: a slower network, or a session that has to be resumed
# before, has its channel all the same. Shorter: fewer offers that nobody takes up.
OFFER_S = 10.0
# How long who has connected may take to say the 32 bytes.
OPENING_S = 5.0
# Connections that have not said them; with more, the oldest are closed.
MAX_OPENING = 64
# One key is used for so much. With blocks of 16 bytes the odds that a forgery or a repetition helps anybody are below
# 1 in 2**50 then.
MAX_KEY_BYTES = 1 << 40

# Pieces that are sent or received in a turn of a loop, of each connection. More: fewer turns. Fewer: whatever else the
# loop has to do waits less.
BURST = 8

NAME_BYTES = 16
KEY_BYTES = 32
_TAG_BYTES = 16
_OPENING_BYTES = NAME_BYTES + _TAG_BYTES
_NONCE = struct.Struct(">IQ")  # which way, and the number of the seal
_OUT, _BACK = 1, 2
_PURPOSE = b"dpool bulk 1 "
# Object, its size, where the piece belongs, its CRC-32, its length, the number of the session's message that must have
# come before.
_HEAD = struct.Struct("<16sQQIIQ")
_HEAD_BYTES = _HEAD.size + _TAG_BYTES


@cache
def available() -> bool:
    """Whether there is the library. Imports nothing of it."""
    return find_spec("cryptography") is not None


def _cipher(key: bytes) -> AESGCM | None:
    """None if there is no library, or an old one."""
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        return None
    return AESGCM(key) if hasattr(AESGCM, "encrypt_into") else None


# What a driver says in place of one: its pieces are checked by nothing but the cipher.
NO_CHECKSUM = 0


class Head(NamedTuple):
    """What is said of a piece. It is not taken in before message `after` of the session has come (0: none)."""

    key: bytes
    size: int
    start: int
    checksum: int
    nbytes: int
    after: int


class _End:
    """What both ends have: a socket, a key, and why it is over."""

    def __init__(self, connection: socket.socket, name: bytes) -> None:
        self.name = name
        self.descriptor = connection.fileno()
        self.broken = ""  # why nothing can come or go any more
        self.count = 0  # pieces that were sent, or received
        self._socket = connection
        self._sealed = 0  # this end's, and those of the other one that were opened
        self._opened = 0
        self._bytes = 0

    def close(self) -> None:
        """Give the connection up. May be called again."""
        self.broken = self.broken or "it was closed"
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # a process that was forked meanwhile may have it, too
        except OSError:
            pass
        self._socket.close()


class Sender(_End):
    """The end that connects. It may send when it is `ready`; one that never is should be given up in time.

    The address is numeric: no name is looked up.
    """

    def __init__(self, address: str, name: bytes, key: bytes) -> None:
        """Raises ValueError for no numeric address, OSError if there can be no connection."""
        cipher = _cipher(key)
        if cipher is None:
            raise OSError("there is no library for it here")
        host, port = parse_address(address)
        try:
            family, kind, protocol, _, target = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0]
        except socket.gaierror:
            raise ValueError(f"{address!r} is no numeric address") from None
        connection = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
        connection.setblocking(False)  # whatever the default for new sockets is
        super().__init__(connection, name)
        self.ready = False
        self._cipher = cipher
        self._buffer = bytearray(name + cipher.encrypt(self._nonce(), b"", _PURPOSE + name))
        self._unsent = memoryview(self._buffer)
        self._answer = b""
        try:
            _prepare(connection)
            connection.connect(target)
        except BlockingIOError:
            pass
        except OSError:
            connection.close()
            raise

    def _nonce(self) -> bytes:
        nonce = _NONCE.pack(_OUT, self._sealed)
        self._sealed += 1
        return nonce

    @property
    def blocked(self) -> bool:
        """Whether something is left that the kernel had no room for: flush() when it has."""
        return not self.broken and len(self._unsent) > 0

    def watch(self) -> None:
        """Take note of what has become of the connection. The other side says nothing but that it is ready."""
        if self.broken:
            return
        try:
            said = self._socket.recv(_TAG_BYTES + 1)
        except BlockingIOError:
            return
        except OSError as error:
            self.broken = os.strerror(error.errno or 0)
            return
        self._answer += said
        if not said or self.ready or len(self._answer) > _TAG_BYTES:
            self.broken = "the other side has ended it"
        elif len(self._answer) == _TAG_BYTES:
            self.ready = _opens(self._cipher, _NONCE.pack(_BACK, 0), self._answer, _PURPOSE + self.name)
            if not self.ready:
                self.broken = "there is something else there"

    def flush(self) -> bool:
        """Send what is left; whether nothing is."""
        while self._unsent and not self.broken:
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent):]
            except BlockingIOError:
                return False
            except OSError as error:
                self.broken = os.strerror(error.errno or 0)
        return not self._unsent

    def send(self, head: Head, piece: memoryview) -> bool:
        """Send a piece, or begin to; False if there is no room for it now, or never. Nothing of it is kept."""
        if self.broken or not self.ready or not self.flush():
            return False
        if self._bytes > MAX_KEY_BYTES:
            self.broken = "its key has been used enough"
            return False
        end = _HEAD_BYTES + head.nbytes + _TAG_BYTES
        if len(self._buffer) < end:
            self._buffer = bytearray(end)
        frame = memoryview(self._buffer)[:end]
        self._cipher.encrypt_into(self._nonce(), _HEAD.pack(*head), None, frame[:_HEAD_BYTES])
        self._cipher.encrypt_into(self._nonce(), piece, None, frame[_HEAD_BYTES:])
        self._unsent = frame
        self._bytes += end
        self.count += 1
        self.flush()
        return True


def pour(sender: Sender, take: Callable[[], tuple[Head, memoryview] | None]) -> bool:
    """Send what take() gives until it gives nothing, or there is no room, or others should have their turn; whether to
    call this again when there is room."""
    for _ in range(BURST):
        if not sender.flush():
            return not sender.broken
        taken = take()
        if taken is None:
            return False
        sender.send(*taken)
    return not sender.broken


class Receiver(_End):
    """The end that was connected to, by one who has the key: see Gate."""

    def __init__(self, connection: socket.socket, name: bytes, cipher: AESGCM) -> None:
        super().__init__(connection, name)
        self._cipher = cipher
        self._opened = 1  # the seal with which the sender has come
        self._buffer = memoryview(bytearray(_HEAD_BYTES))
        self._piece = memoryview(bytearray())
        self._have = 0
        self._head: Head | None = None  # of the piece that is coming
        self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        seal = self._cipher.encrypt(_NONCE.pack(_BACK, 0), b"", _PURPOSE + self.name)
        try:
            if connection.send(seal) != len(seal):  # nothing was sent on it before: there is room
                self.broken = "it takes nothing"
        except OSError as error:
            self.broken = os.strerror(error.errno or 0)

    @property
    def after(self) -> int:
        """The message of the session that must come before anything more is received; 0 if none must."""
        return self._head.after if self._head is not None else 0

    def receive(self, most: int, received: int = 0) -> Iterator[tuple[Head, memoryview]]:
        """Up to so many pieces that have come whole; each is good until the next one. `received`: the number of the
        session's last message."""
        while most > 0 and not self.broken:
            most -= 1
            if self._head is None:
                if not self._read(_HEAD_BYTES):
                    return
                data = bytearray(_HEAD.size)
                if not self._open(_HEAD_BYTES, memoryview(data)):
                    return
                head = Head(*_HEAD.unpack(data))
                if not 0 < head.nbytes <= MAX_PIECE_BYTES:
                    self.broken = f"a piece of {head.nbytes} bytes is announced"
                    return
                self._head = head
            head = self._head
            if head.after > received:
                return
            end = head.nbytes + _TAG_BYTES
            if len(self._buffer) < end:
                self._buffer = memoryview(bytearray(end))
            if len(self._piece) < head.nbytes:
                self._piece = memoryview(bytearray(head.nbytes))
            piece = self._piece[:head.nbytes]
            if not self._read(end) or not self._open(end, piece):
                return
            self._head = None
            self.count += 1
            yield head, piece

    def _read(self, end: int) -> bool:
        """Whether so many bytes are there."""
        while self._have < end:
            try:
                count = self._socket.recv_into(self._buffer[self._have:end])
            except BlockingIOError:
                return False
            except OSError as error:
                self.broken = os.strerror(error.errno or 0)
                return False
            if not count:
                self.broken = "the other side has ended it"
                return False
            self._have += count
        return True

    def _open(self, end: int, into: memoryview) -> bool:
        from cryptography.exceptions import InvalidTag

        try:
            self._cipher.decrypt_into(_NONCE.pack(_OUT, self._opened), self._buffer[:end], None, into)
        except InvalidTag:
            self.broken = "something has come that was not sent"
            return False
        self._opened += 1
        self._have = 0
        return True


class Gate:
    """Where senders connect. Its `descriptor` is readable when one does, or says who it is: call accept() then.

    Raises OSError, naming the address, if it cannot be bound.
    """

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET,
                                     socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(MAX_OPENING)
        except OSError as error:
            self._socket.close()
            raise OSError(error.errno, f"cannot listen on {address_of(host, port)} for large objects: "
                                       f"{os.strerror(error.errno or 0)}") from None
        bound = self._socket.getsockname()
        self.address = address_of(bound[0], bound[1])
        self._epoll = select.epoll()
        self._epoll.register(self._socket, select.EPOLLIN)
        self._rests = False  # who connects is not let in, for want of descriptors
        self.descriptor = self._epoll.fileno()
        self._offers: dict[bytes, tuple[bytes, float]] = {}  # name -> key, until when it is expected
        self._opening: OrderedDict[int, tuple[socket.socket, bytes, float]] = OrderedDict()  # by descriptor

    def offer(self, now: float) -> tuple[bytes, bytes] | None:
        """The name and key of a connection that is expected from now on; None if there is no library for it."""
        name, key = os.urandom(NAME_BYTES), os.urandom(KEY_BYTES)
        if _cipher(key) is None:
            return None
        self._offers[name] = key, now + OFFER_S
        return name, key

    def withdraw(self, name: bytes) -> None:
        """This one is not expected any more."""
        self._offers.pop(name, None)

    def accept(self, now: float) -> list[Receiver]:
        """Those that have connected, and have shown that they have the key. Whoever shows something else is closed, and
        so is who takes too long: call this once a second."""
        if self._rests:
            self._rests = False
            self._epoll.register(self._socket, select.EPOLLIN)
        while True:
            try:
                connection, _ = self._socket.accept()
            except BlockingIOError:
                break
            except ConnectionError:
                continue  # it is gone already
            except OSError:
                # Until the next call: it would be told of at once, again and again.
                self._rests = True
                self._epoll.unregister(self._socket)
                break
            connection.setblocking(False)
            self._opening[connection.fileno()] = connection, b"", now + OPENING_S
            self._epoll.register(connection, select.EPOLLIN)
            if len(self._opening) > MAX_OPENING:
                self._turn_away(self._opening.popitem(last=False)[1][0])
        for name in [name for name, (_, until) in self._offers.items() if until <= now]:
            del self._offers[name]
        arrived = []
        for descriptor, (connection, said, until) in list(self._opening.items()):
            more = _read_more(connection, _OPENING_BYTES - len(said))
            said += more or b""
            if len(said) == _OPENING_BYTES:
                del self._opening[descriptor]
                receiver = self._let_in(connection, said)
                if receiver is not None:
                    self._epoll.unregister(connection)
                    arrived.append(receiver)
                else:
                    self._turn_away(connection)
            elif more is None or until <= now:
                del self._opening[descriptor]
                self._turn_away(connection)
            else:
                self._opening[descriptor] = connection, said, until
        return arrived

    def _turn_away(self, connection: socket.socket) -> None:
        self._epoll.unregister(connection)
        connection.close()

    def _let_in(self, connection: socket.socket, said: bytes) -> Receiver | None:
        name = said[:NAME_BYTES]
        key, _ = self._offers.get(name, (b"", 0.0))
        cipher = _cipher(key) if key else None
        if cipher is None or not _opens(cipher, _NONCE.pack(_OUT, 0), said[NAME_BYTES:], _PURPOSE + name):
            return None
        del self._offers[name]
        _prepare(connection)
        return Receiver(connection, name, cipher)

    def close(self) -> None:
        for connection, _, _ in self._opening.values():
            connection.close()
        self._opening.clear()
        self._offers.clear()
        self._epoll.close()
        self._socket.close()


def _prepare(connection: socket.socket) -> None:
    # A piece goes out at once, also if it is the last one for now. The kernel's buffers grow with the link (up to
    # net.ipv4.tcp_wmem); setting their size would end that, at less than what they come to.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _read_more(connection: socket.socket, most: int) -> bytes | None:
    """What has come; None if nothing will."""
    try:
        return connection.recv(most) or None
    except BlockingIOError:
        return b""
    except OSError:
        return None


def _opens(cipher: AESGCM, nonce: bytes, seal: bytes, purpose: bytes) -> bool:
    from cryptography.exceptions import InvalidTag

    try:
        cipher.decrypt(nonce, seal, purpose)
    except InvalidTag:
        return False
    return True
