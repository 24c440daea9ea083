"""ZeroMQ sockets as dpool uses them: always encrypted, both sides authenticated, bounded in what they accept.

Opens, sends, receives and sees connections end; knows no message. A Listener or Dialer belongs to one thread. There is
no way to open one without keys, and none for ipc:// (whose closing senders lose messages).
"""

from __future__ import annotations

import os
import re
import select
import socket
import struct
import time
from collections.abc import Iterator, Sequence

import zmq

from dpool.cluster.wire.bell import Bell
from dpool.cluster.wire.keys import AGENT, DRIVER, DriverKeys, Keys

# A frame is a control message, a batch, or a chunk of a segment: nothing is larger.
MAX_FRAME_BYTES = 4 << 20
# How long a peer that has connected may take to prove who it is.
HANDSHAKE_TIMEOUT_MS = 5000
# A message has few frames; a peer that sends more is not one of ours.
MAX_FRAMES = 4

_DOMAIN = b"dpool"
# What a monitor socket says of an event: which, and a number, for DISCONNECTED the descriptor. pyzmq's own function
# for it would import asyncio, which takes longer than all the rest.
_EVENT = struct.Struct("=HI")
_ADDRESS = re.compile(r"tcp://(?:\[(?P<six>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:/\[\]]+)):(?P<port>\d+)")
# Refused keys are reported this often per address.
_REFUSAL_REPORT_EVERY_S = 60.0

Frame = bytes | memoryview


def parse_address(address: str, any_port: bool = False) -> tuple[str, int]:
    """Host and port of an address. Raises ValueError, which shows the wanted form; port 0 only if `any_port`."""
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if match is None:
        raise ValueError(f"{address!r} is no address of a cluster: it looks like tcp://host:7077 or tcp://[::1]:7077")
    port = int(match["port"])
    if not (0 if any_port else 1) <= port <= 65535:
        raise ValueError(f"{address!r} has port {port}: ports are 1 to 65535")
    return match["six"] or match["host"], port


def address_of(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _prepare(sock: zmq.Socket[bytes]) -> None:
    # Nothing is dropped for a full queue: credits bound what is in flight.
    sock.setsockopt(zmq.RCVHWM, 0)
    sock.setsockopt(zmq.SNDHWM, 0)
    sock.setsockopt(zmq.LINGER, 0)  # what must arrive is acknowledged before a socket is closed
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    sock.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_TIMEOUT_MS)
    sock.setsockopt(zmq.IPV6, 1)


class Received:
    """A message that came to a Listener: from which connection, in which role, its frames."""

    __slots__ = ("peer", "role", "frames")

    def __init__(self, peer: bytes, role: str, frames: list[memoryview]) -> None:
        self.peer = peer
        self.role = role
        self.frames = frames


class Listener:
    """The side that binds. `peer` is a connection: one that breaks and comes back is another peer.

    Raises ValueError for an address that is none and OSError, naming it, for one that cannot be bound.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: Keys, role: str, address: str) -> None:
        host, port = parse_address(address, any_port=True)
        public, secret = keys.pair(role)
        self._allowed = {keys.public(name): name for name in (AGENT, DRIVER)}
        self._zap = context.socket(zmq.REP)
        self._zap.setsockopt(zmq.LINGER, 0)
        self._zap.bind("inproc://zeromq.zap.01")
        self._socket = context.socket(zmq.ROUTER)
        _prepare(self._socket)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._peers: dict[bytes, tuple[str, int]] = {}  # connection -> role, descriptor
        self._descriptors: dict[int, bytes] = {}  # descriptor -> connection
        self._refused: dict[str, float] = {}  # address -> when it was last reported
        self.refusals: list[str] = []  # to be logged by the owner
        try:
            self._socket.bind(address_of("*" if host == "0.0.0.0" else host, port))
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, f"cannot listen on {address}: {os.strerror(error.errno or 0)}") from None
        bound = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        bound_host, self.port = parse_address(bound)
        self.host = bound_host.removeprefix("::ffff:")  # in figures, also where the address names an interface
        self.address = address_of(host, self.port)
        self.descriptors = [int(s.getsockopt(zmq.FD)) for s in (self._socket, self._zap, self._monitor)]

    def authenticate(self) -> None:
        """Answer the connections that are waiting to be let in."""
        while True:
            try:
                request = self._zap.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            version, number, domain, address, _, mechanism, *credentials = request
            role = None
            if domain == _DOMAIN and mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == 32:
                from zmq.utils import z85

                role = self._allowed.get(z85.encode(credentials[0]))
            if role is None:
                self._refuse(address.decode("ascii", "replace").removeprefix("::ffff:"))
                self._zap.send_multipart([version, number, b"400", b"unknown key", b"", b""])
            else:
                self._zap.send_multipart([version, number, b"200", b"", role.encode(), b""])

    def _refuse(self, address: str) -> None:
        now = time.monotonic()
        if now - self._refused.get(address, -_REFUSAL_REPORT_EVERY_S) >= _REFUSAL_REPORT_EVERY_S:
            if len(self._refused) >= 1024:
                self._refused.clear()
            self._refused[address] = now
            self.refusals.append(address)

    def receive(self) -> Iterator[Received]:
        """What has come and was not yet received."""
        receive = self._socket.recv_multipart
        peers = self._peers
        while True:
            try:
                first, *frames = receive(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            if not 1 <= len(frames) <= MAX_FRAMES:
                continue
            peer = first.bytes
            known = peers.get(peer)
            if known is None:
                # Both are properties of the connection, set when it was let in; the frames cannot forge them.
                role, descriptor = frames[0].get("User-Id"), frames[0].get(zmq.SRCFD)
                known = peers[peer] = (str(role), int(descriptor))
                self._descriptors[known[1]] = peer
            yield Received(peer, known[0], [frame.buffer for frame in frames])

    def ended(self) -> list[bytes]:
        """The connections that have ended since the last call."""
        ended: list[bytes] = []
        while True:
            try:
                _, descriptor = _EVENT.unpack(self._monitor.recv_multipart(zmq.NOBLOCK)[0])
            except zmq.Again:
                return ended
            peer = self._descriptors.pop(descriptor, None)
            if peer is not None:
                self._peers.pop(peer, None)
                ended.append(peer)

    def send(self, peer: bytes, frames: Sequence[Frame]) -> bool:
        """Send a copy of the frames to a connection; False if it has ended. Without the copy, which costs little beside
        the encryption, pyzmq would keep a thread and sockets of its own to learn when they are free."""
        try:
            self._socket.send_multipart([peer, *frames], zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        self._zap.close(0)


class Dialer:
    """The side that connects: one connection to one address. With `again` it is made anew, as long as it takes,
    whenever it breaks; what was under way is lost then.

    Raises ValueError for an address that is none, OSError if there can be no more sockets.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: Keys | DriverKeys, role: str, server: str,
                 address: str, again: bool = False) -> None:
        parse_address(address)
        public, secret = keys.pair(role)
        self.address = address
        self.connected = False
        self.failure = ""  # why the last attempt failed
        self.broken = False  # there is no connection, and without `again` there will be none
        self._again = again
        try:
            self._socket = context.socket(zmq.DEALER)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"no socket for {address}: {error.strerror}") from None
        try:
            self._open(public, secret, keys.public(server))
        except zmq.ZMQError as error:
            self._socket.close(0)
            if error.errno == zmq.EINVAL:
                raise ValueError(f"{address!r} is no address of a cluster: {error.strerror}") from None
            raise OSError(error.errno, f"no connection to {address}: {error.strerror}") from None

    def _open(self, public: bytes, secret: bytes, server: bytes) -> None:
        _prepare(self._socket)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, server)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        if self._again:
            self._socket.setsockopt(zmq.IMMEDIATE, 1)  # what is said while there is no connection is not kept
            self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
            self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        else:
            self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_CONNECT_RETRIED)
        self._socket.connect(self.address)
        self.descriptors = [int(s.getsockopt(zmq.FD)) for s in (self._socket, self._monitor)]

    def watch(self) -> None:
        """Take note of what has become of the connection."""
        while True:
            try:
                kind, _ = _EVENT.unpack(self._monitor.recv_multipart(zmq.NOBLOCK)[0])
            except zmq.Again:
                return
            if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected, self.failure, self.broken = True, "", False
                continue
            self.connected = False
            if kind == zmq.EVENT_CLOSED:
                self.failure = self.failure or "connection refused or not answered"
            elif kind == zmq.EVENT_DISCONNECTED:
                self.failure = self.failure or "the connection ended"
            elif kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self.failure = "it refused this key"
            elif kind in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
                self.failure = "there is something else there, or it has another key"
            if not self._again:
                self.broken = True

    def send(self, frames: Sequence[Frame]) -> bool:
        """Send; False if there is no connection (with `again`), or it has ended."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def receive(self) -> Iterator[list[memoryview]]:
        """What has come and was not yet received."""
        receive = self._socket.recv_multipart
        while True:
            try:
                frames = receive(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            if len(frames) <= MAX_FRAMES:
                yield [frame.buffer for frame in frames]

    def close(self, linger_ms: int = 0) -> None:
        """Close; what was sent last may take `linger_ms` to leave."""
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger_ms)


class Waker:
    """Waits for several descriptors at once, and can be woken by another thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._bell: Bell | None = Bell()
        self._epoll.register(self._bell.descriptor, select.EPOLLIN)

    def add(self, descriptors: Sequence[int]) -> None:
        for descriptor in descriptors:
            self._epoll.register(descriptor, select.EPOLLIN)

    def remove(self, descriptors: Sequence[int]) -> None:
        for descriptor in descriptors:
            try:
                self._epoll.unregister(descriptor)
            except (FileNotFoundError, OSError):
                pass  # closed already

    def want_room(self, descriptor: int, wanted: bool) -> None:
        """Whether wait() is to return also when something can be written to a descriptor that was added."""
        self._epoll.modify(descriptor, select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def wake(self) -> None:
        """Make the current or next wait() return. Any thread may."""
        bell = self._bell
        if bell is not None:  # else nobody waits any more
            bell.ring()

    def wait(self, timeout: float | None) -> set[int]:
        """The descriptors that are readable, or have the room that is wanted, after at most `timeout` seconds, or never
        if None."""
        ready = {descriptor for descriptor, _ in self._epoll.poll(-1 if timeout is None else max(timeout, 0))}
        bell = self._bell
        if bell is not None and bell.descriptor in ready:
            bell.silence()
        return ready

    def close(self) -> None:
        self._epoll.close()
        self._bell = None


def local_host(towards: str) -> str:
    """The address of this machine on the way to `towards` (an address of a cluster); nothing is sent."""
    host, port = parse_address(towards)
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
