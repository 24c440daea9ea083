"""Simulated links: connections that deliver in order or break, over a network that delays, cuts and goes silent.

Stands for wire/links.py and wire/surroundings.py, with the habits of ZeroMQ and TCP that dpool must bear: a descriptor
tells only of what is new, a cut is silence, what was under way when a connection broke is lost from some message on,
and one end may never learn of the end. Knows no message. Used by world.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import cast

from dpool.cluster.wire import bulk
from dpool.cluster.wire.keys import AGENT
from dpool.cluster.wire.links import Dialer, Frame, Listener, Received
from dpool.cluster.wire.links import Waker as RealWaker
from dpool.cluster.wire.surroundings import Surroundings

from .clock import Process, Source, Violation, Waker, World

HANDSHAKE_S = 5.0  # a peer that has not let a connection in by then is given up
FIRST_DESCRIPTOR = 1 << 24  # simulated descriptors are larger than any real one


class Network:
    """Hosts, what cuts them off, and every connection between them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.latency = 0.0005
        self.jitter = 0.0005
        self.sources: dict[int, Source] = {}
        self.listeners: dict[str, SimListener] = {}
        self.hosts: dict[str, str] = {}  # address -> host, also of those where nobody listens any more
        self.connections: list[Connection] = []
        self.off: set[str] = set()  # hosts without power
        self._cut: dict[tuple[str, str], int] = {}
        self._stalled: list[Pipe] = []
        self._descriptor = FIRST_DESCRIPTOR
        self._port = 7000
        self._peer = 0
        self.spoils = 0.0  # how often a piece that one node sends another is not what it was
        self.messages = self.bytes = self.bulk_pieces = 0
        # Of processes there is a share that can have bulk connections, chosen by a random of its own.
        self.bulk_share = 0.0
        self.bulk_random = Random(0)
        self.bulk_breaks: set[int] = set()  # after so many pieces by bulk connections the one that carries it breaks
        self.walled: set[str] = set()  # hosts to which none can be made

    def source(self) -> Source:
        self._descriptor += 1
        source = self.sources[self._descriptor] = Source(self._descriptor)
        return source

    def free_port(self) -> int:
        self._port += 1
        return self._port

    def new_peer(self) -> bytes:
        self._peer += 1
        return self._peer.to_bytes(5, "big")

    def delay(self) -> float:
        return self.latency + self.jitter * self.world.random.random()

    # -- cuts

    def open(self, source: str, target: str) -> bool:
        """Whether packets pass from one host to another."""
        if source in self.off or target in self.off:
            return False
        return not self._cut or not self._cut.get((source, target))

    def cut(self, source: str, target: str) -> None:
        self._cut[source, target] = self._cut.get((source, target), 0) + 1

    def heal(self, source: str, target: str) -> None:
        left = self._cut[source, target] - 1
        if left:
            self._cut[source, target] = left
        else:
            del self._cut[source, target]
            self.resume()

    def resume(self) -> None:
        """What was kept waiting is sent again, each connection in its own time."""
        stalled, self._stalled = self._stalled, []
        for pipe in stalled:
            pipe.stalled = False
            pipe.schedule(self.world.random.random() * 2.0)

    def stall(self, pipe: Pipe) -> None:
        if not pipe.stalled:
            pipe.stalled = True
            self._stalled.append(pipe)

    # -- ends

    def died(self, process: Process, silent: bool) -> None:
        """A process has ended: its kernel ends its connections, unless it has no time to (`silent`)."""
        for address, listener in list(self.listeners.items()):
            if listener.process is process:
                del self.listeners[address]
        for connection in list(self.connections):
            for end in (connection.client, connection.server):
                if end is not None and end.process is process:
                    connection.abort(end, silent)

    def end(self) -> None:
        """Forget everything."""
        self.connections.clear()
        self.listeners.clear()
        self.sources.clear()
        self._stalled.clear()

    def forget(self, connection: Connection) -> None:
        if connection in self.connections:
            self.connections.remove(connection)


class Pipe:
    """One direction of a connection. Delivers in order; what arrives goes to `deliver`."""

    def __init__(self, network: Network, source: str, target: str, deliver: Callable[[object], None]) -> None:
        self.network = network
        self.source = source
        self.target = target
        self.deliver = deliver
        self.under_way: deque[tuple[float, object]] = deque()
        self.stalled = False
        self.lost = False  # whatever is sent is not received any more
        self._scheduled = False

    def send(self, what: object) -> None:
        if self.lost:
            return
        network = self.network
        arrives = network.world.now + network.delay()
        if self.under_way:
            arrives = max(arrives, self.under_way[-1][0])
        self.under_way.append((arrives, what))
        self.schedule()

    def schedule(self, delay: float = 0.0) -> None:
        if self.under_way and not self._scheduled and not self.stalled:
            self._scheduled = True
            world = self.network.world
            world.at(max(self.under_way[0][0], world.now + delay), self._arrive)

    def _arrive(self) -> None:
        self._scheduled = False
        world = self.network.world
        if self.under_way and not self.network.open(self.source, self.target):
            self.network.stall(self)
            return
        while self.under_way and self.under_way[0][0] <= world.now:
            self.deliver(self.under_way.popleft()[1])
        self.schedule()

    def truncate(self) -> None:
        """The connection breaks: some of what is under way still arrives, the rest never does."""
        self.lost = True
        kept = self.network.world.random.randint(0, len(self.under_way))
        while len(self.under_way) > kept:
            self.under_way.pop()


class End:
    """What a connection's end must know of the process that holds it."""

    process: Process


class _Fin:
    """The last thing in a direction: the other side has ended the connection."""


FIN = _Fin()


class Connection:
    """A TCP connection with its handshake: from a dialer to whoever listens at an address."""

    def __init__(self, network: Network, client: SimDialer, address: str) -> None:
        self.network = network
        self.client: SimDialer | None = client
        self.client_host = client.process.host
        self.address = address
        self.server: SimListener | None = None
        self.server_host = network.hosts.get(address, "nowhere")
        self.peer = network.new_peer()
        self.role = client.role
        self.to_server = Pipe(network, self.client_host, self.server_host, self._at_server)
        self.to_client = Pipe(network, self.server_host, self.client_host, self._at_client)
        self.inbox: deque[list[memoryview]] = deque()  # arrived at the server, not yet received
        self.backlog: list[list[bytes]] = []  # sent before the connection was there
        self.established = False  # as the dialer knows
        self.answered = False  # its handshake was done by the server
        self.known = False  # the server has received something on it
        self._attempts = 0
        network.connections.append(self)
        network.world.after(network.delay(), self._knock)

    # -- the handshake

    def _knock(self) -> None:
        network, world = self.network, self.network.world
        if self.client is None or not self.client.process.alive:
            return
        if not (network.open(self.client_host, self.server_host) and network.open(self.server_host, self.client_host)):
            self._attempts += 1
            world.after(min(2.0 ** (self._attempts - 1), 32.0), self._knock)
            return
        listener = network.listeners.get(self.address)
        if listener is None:
            world.after(network.delay(), lambda: self._fail("connection refused or not answered"))
            return
        self.server = listener
        listener.pending.append(self)
        listener.knocks.rise()
        world.after(HANDSHAKE_S, self._give_up)

    def _fail(self, why: str) -> None:
        client, self.client = self.client, None
        self.network.forget(self)
        if client is not None:
            client.on_event(self, "closed", why)

    def _give_up(self) -> None:
        """The dialer has waited long enough for the end of the handshake."""
        client = self.client
        if not self.established and client is not None:
            self.abort(client)
            self.network.forget(self)
            client.on_event(self, "closed", "the connection ended")

    def let_in(self) -> None:
        """The listener's owner has authenticated it."""
        self.answered = True
        assert self.server is not None
        self.server.connections[self.peer] = self
        self.to_client.send(self)  # the end of the handshake

    # -- messages

    def _at_server(self, what: object) -> None:
        server = self.server
        if server is None:
            return
        if what is FIN:
            self._end_at_server()
        else:
            self.inbox.append([memoryview(bytearray(frame)) for frame in cast(list[bytes], what)])
            server.news.rise()

    def _at_client(self, what: object) -> None:
        client = self.client
        if client is None:
            return
        if what is FIN:
            self.client = None
            self.to_server.lost = True
            self._forget_if_over()
            client.on_event(self, "disconnected", "the connection ended")
        elif what is self:
            self.established = True
            client.on_event(self, "connected", "")
            backlog, self.backlog = self.backlog, []
            for frames in backlog:
                self.to_server.send(frames)
        else:
            copies = [bytearray(frame) for frame in cast(list[bytes], what)]
            if self.role == AGENT and len(copies) == 2 and self.network.world.random.random() < self.network.spoils:
                copies[1][self.network.world.random.randrange(len(copies[1]))] ^= 1
                self.network.world.say(f"a piece from {self.server_host} to {self.client_host} is spoilt")
            client.inbox.append([memoryview(frame) for frame in copies])
            client.news.rise()

    def send_from(self, end: End, frames: list[bytes]) -> None:
        network = self.network
        network.messages += 1
        network.bytes += sum(map(len, frames))
        pipe = self.to_server if end is self.client else self.to_client
        if end is self.client and not self.established:
            self.backlog.append(frames)
            return
        pipe.send(frames)
        if pipe.lost:
            self._reset_answer(end, pipe)

    def _reset_answer(self, end: End, pipe: Pipe) -> None:
        """Something was sent to where the connection is unknown: its end is the answer, if anything is."""
        back = self.to_client if end is self.client else self.to_server
        if self.network.open(pipe.source, pipe.target) and not back.under_way:
            back.lost = False
            back.send(FIN)
            back.lost = True

    # -- the end

    def abort(self, end: End, silent: bool = False, lossy: bool = True) -> None:
        """One side ends it. The other learns of it when that gets through, or, if `silent`, when it next sends."""
        mine, other = ((self.to_server, self.to_client) if end is self.client else (self.to_client, self.to_server))
        if end is self.client:
            self.client = None
            if not self.established:
                if self.server is not None and self in self.server.pending:
                    self.server.pending.remove(self)
        else:
            if self.server is not None:
                self.server.connections.pop(self.peer, None)
                if self in self.server.pending:
                    self.server.pending.remove(self)
            self.server = None
            self.answered = True
        other.lost = True
        other.under_way.clear()
        if lossy:
            mine.truncate()
        if not silent:
            mine.lost = False
            mine.send(FIN)
        else:
            mine.under_way.clear()
        mine.lost = True
        self._forget_if_over()

    def reset(self, who_learns: int) -> None:
        """It breaks on the way: both ends learn of it (0), or only the dialer (1), or only the listener (2)."""
        for number, pipe in ((1, self.to_client), (2, self.to_server)):
            pipe.truncate()
            if who_learns in (0, number):
                pipe.lost = False
                pipe.send(FIN)
                pipe.lost = True

    def _end_at_server(self) -> None:
        server, self.server = self.server, None
        self.to_client.lost = True
        self._forget_if_over()
        if server is not None:
            if self in server.pending:
                server.pending.remove(self)
            if server.connections.get(self.peer) is self:
                server.on_ended(self)

    def _forget_if_over(self) -> None:
        if self.client is None and self.server is None:
            self.network.forget(self)


class SimDialer(End):
    """Stands for links.Dialer."""

    def __init__(self, network: Network, process: Process, role: str, address: str, again: bool) -> None:
        self.network = network
        self.process = process
        self.role = role
        self.address = address
        self.connected = self.broken = False
        self.failure = ""
        self.inbox: deque[list[memoryview]] = deque()
        self.news = network.source()
        self.events = network.source()
        self.descriptors = [self.news.number, self.events.number]
        self._again = again
        self._events: list[tuple[str, str]] = []
        self._closed = False
        self._connection: Connection | None = Connection(network, self, address)

    def on_event(self, connection: Connection, kind: str, why: str) -> None:
        if connection is not self._connection or self._closed:
            return
        self._events.append((kind, why))
        self.events.rise()
        if kind != "connected":
            self._connection = None
            if self._again:
                self.network.world.after(0.1 + self.network.world.random.random(), self._redial)

    def _redial(self) -> None:
        if not self._closed and self.process.alive:
            self._connection = Connection(self.network, self, self.address)

    def watch(self) -> None:
        self._check_open()
        self.events.ready = False
        for kind, why in self._events:
            if kind == "connected":
                self.connected, self.failure, self.broken = True, "", False
            else:
                self.connected = False
                self.failure = self.failure or why
                self.broken = not self._again
        self._events.clear()

    def send(self, frames: Sequence[Frame]) -> bool:
        self.news.ready = False
        connection = self._connection
        if connection is None or (self._again and not connection.established):
            return False
        connection.send_from(self, [bytes(frame) for frame in frames])
        return True

    def receive(self) -> Iterator[list[memoryview]]:
        self.news.ready = False
        self._check_open()
        while self.inbox:
            yield self.inbox.popleft()
            self._check_open()
        self.news.ready = False

    def _check_open(self) -> None:
        """A socket of libzmq's that is closed cannot even be asked whether there is anything."""
        if self._closed:
            raise Violation("a connection is used that was closed")

    def close(self, linger_ms: int = 0) -> None:
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort(self, lossy=not linger_ms)
        for source in (self.news, self.events):
            self.network.sources.pop(source.number, None)


class SimListener(End):
    """Stands for links.Listener."""

    def __init__(self, network: Network, process: Process, address: str) -> None:
        self.network = network
        self.process = process
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self.port = int(port) or network.free_port()
        self.host = host
        self.address = f"tcp://{host}:{self.port}"
        if self.address in network.listeners:
            raise OSError(98, f"cannot listen on {address}: Address already in use")
        network.listeners[self.address] = self
        network.hosts[self.address] = process.host
        self.refusals: list[str] = []
        self.pending: list[Connection] = []
        self.connections: dict[bytes, Connection] = {}
        self.news = network.source()
        self.knocks = network.source()
        self.endings = network.source()
        self.descriptors = [self.news.number, self.knocks.number, self.endings.number]
        self._ended: list[bytes] = []
        self._closing: list[Connection] = []  # ended, with messages that were not yet received

    def authenticate(self) -> None:
        self.knocks.ready = False
        pending, self.pending = self.pending, []
        for connection in pending:
            connection.let_in()

    def receive(self) -> Iterator[Received]:
        self.news.ready = False
        while True:
            waiting = [one for one in (*self.connections.values(), *self._closing) if one.inbox]
            if not waiting:
                break
            # Fair among connections: their order says nothing.
            start = self.network.world.random.randrange(len(waiting))
            for connection in (*waiting[start:], *waiting[:start]):
                if connection.inbox:
                    connection.known = True
                    yield Received(connection.peer, connection.role, connection.inbox.popleft())
        self._closing.clear()
        self.news.ready = False

    def on_ended(self, connection: Connection) -> None:
        del self.connections[connection.peer]
        if connection.inbox:
            self._closing.append(connection)
        if connection.known:  # the end of one that never said anything is not told
            self._ended.append(connection.peer)
            self.endings.rise()

    def ended(self) -> list[bytes]:
        self.endings.ready = False
        ended, self._ended = self._ended, []
        return ended

    def send(self, peer: bytes, frames: Sequence[Frame]) -> bool:
        self.news.ready = False
        connection = self.connections.get(peer)
        if connection is None:
            return False
        connection.send_from(self, [bytes(frame) for frame in frames])
        return True

    def close(self) -> None:
        self.network.listeners.pop(self.address, None)
        for connection in (*self.connections.values(), *self.pending):
            connection.abort(self, lossy=False)
        for source in (self.news, self.knocks, self.endings):
            self.network.sources.pop(source.number, None)


class Place(Surroundings):
    """The surroundings of one process in a simulated world."""

    def __init__(self, network: Network, process: Process) -> None:
        self.network = network
        self.process = process
        self.now = process.now
        self.wakers: list[Waker] = []
        self._bulk = network.bulk_random.random() < network.bulk_share

    def has_bulk(self) -> bool:
        return self._bulk

    def gate(self, host: str, port: int) -> bulk.Gate:
        from .bulk import SimGate

        return cast(bulk.Gate, SimGate(self.network, self.process, host, port))

    def sender(self, address: str, name: bytes, key: bytes) -> bulk.Sender:
        from .bulk import SimSender

        is_node = self.process.name == self.process.host and self.process.name.startswith("node")
        return cast(bulk.Sender, SimSender(self.network, self.process, address, name, is_node))

    def listener(self, role: str, address: str) -> Listener:
        return cast(Listener, SimListener(self.network, self.process, address))

    def dialer(self, role: str, server: str, address: str, again: bool = False) -> Dialer:
        return cast(Dialer, SimDialer(self.network, self.process, role, address, again))

    def waker(self) -> RealWaker:
        self.wakers.append(Waker(self.process, self.network.sources))
        return cast(RealWaker, self.wakers[-1])

    def host(self, towards: str) -> str:
        return self.process.host

    def new_id(self) -> bytes:
        return self.network.world.new_id()

    def end(self) -> None:
        pass
