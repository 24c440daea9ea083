"""The node's agent: one process a machine, which runs the workers of every group that has a part here.

Keeps the connections, to the head, to drivers and to other nodes, and which part a session is; what a part does is
part.py's. It unpickles nothing. Run by `dpool node`, in the thread that calls serve(); the simulation calls step().

    driver  --- TCP, CURVE --->  agent  --- socket pair, one a group --->  workers
                                   |  --- requests to fork --->  zygote
    head   <--- TCP, CURVE ------- |
    other nodes <-- TCP, CURVE --> |
    drivers and other nodes  --- pieces of objects: TCP, AES-GCM; see inlets.py, outlets.py
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Sequence

import msgspec

from dpool.cluster.node.exchange import Exchange
from dpool.cluster.node.inlets import Inlets
from dpool.cluster.node.modules import Library
from dpool.cluster.node.objects import ASK, GOT, READY, Deed
from dpool.cluster.node.part import Part
from dpool.cluster.node.starting import Zygote, ZygoteContext
from dpool.cluster.node.workers import Workers
from dpool.cluster.store.transfer import BadPiece
from dpool.cluster.wire import messages, sessions
from dpool.cluster.wire.bulk import Gate
from dpool.cluster.wire.keys import AGENT, DRIVER, HEAD, Keys
from dpool.cluster.wire.links import Frame, Received, address_of
from dpool.cluster.wire.surroundings import Surroundings
from dpool.cluster.worker import home
from dpool.engine import GroupSpec
from dpool.resources import MEMORY, Stock

# How often the head hears of this node, and how often the clock is looked at.
STATE_EVERY_S = 1.0
# A driver that says nothing for so long is gone. Long, for a driver may be stopped for a while and go on.
DRIVER_LEASE_S = 60.0
# One whose connection has ended and that has not come back is gone after this time.
BROKEN_AFTER_S = 5.0
# Without a head and without a driver for so long, the node ends.
ORPHAN_AFTER_S = 300.0
# How often a turn looks again for what other nodes have sent, before it looks after the workers.
_ROUNDS = 4
# What ends a part and nothing else: whoever has the key and talks nonsense, a worker that writes it, and a want of
# memory for what is sent.
_NONSENSE = (msgspec.DecodeError, sessions.ProtocolError, BadPiece, OSError, ValueError, struct.error, IndexError)

# Makes the workers of a part, as its driver has asked for them; starts none.
MakeWorkers = Callable[[Part, messages.Open], Workers]


class Agent:
    """Listens from the moment it is made. Raises ValueError for a bad address, OSError for one that is taken.

    `bulk_port`: where bulk connections are made, if they can be; 0 for any, None for nowhere.
    """

    def __init__(self, keys: Keys, head: str, bind: str | None, cpus: int, stock: Stock,
                 log: Callable[[str], object], orphan_after_s: float = ORPHAN_AFTER_S,
                 around: Surroundings | None = None, make_workers: MakeWorkers | None = None,
                 bulk_port: int | None = 0) -> None:
        self._around = around or Surroundings(keys)
        self._driver_keys = keys.for_drivers()
        self._log = log
        self._orphan_after_s = orphan_after_s
        try:
            self._listener = self._around.listener(AGENT, bind or address_of(self._around.host(head), 0))
        except BaseException:
            self._around.end()
            raise
        self.address = self._listener.address
        try:
            gate = self._open_gate(bulk_port)
        except BaseException:
            self._listener.close()
            self._around.end()
            raise
        self._head = self._around.dialer(AGENT, HEAD, head, again=True)
        self._waker = self._around.waker()
        self._waker.add(self._listener.descriptors)
        self._waker.add(self._head.descriptors)
        self.inlets = Inlets(self._around, self._waker, gate)
        self.exchange = Exchange(self._around, self._waker, self._listener, self.inlets, self._on_deed)
        self.id = self._around.new_id()
        self._cpus = cpus
        self._stock = stock
        self._number = 0
        self.versions = messages.Versions.here()
        self.library = Library()
        self._zygote = Zygote()
        if make_workers is None:
            self._zygote.start()
        self.make_workers = make_workers or self._fork_workers
        self._parts: dict[bytes, Part] = {}
        self._by_peer: dict[bytes, Part] = {}
        self._by_descriptor: dict[int, Part] = {}
        self._ended: dict[bytes, None] = {}  # sessions of late, so that a driver that resumes one learns its end
        self._tasks_done = 0
        self._stop = threading.Event()
        self._alone_since = self._state_at = self._around.now()
        self.joined = threading.Event()
        self.refused = ""  # why the head does not take this node
        self._said = ""
        self._was_connected = False
        self._more = False  # other nodes may have sent more than was taken in

    def _open_gate(self, port: int | None) -> Gate | None:
        """Where bulk connections are made; None if there are none. Raises OSError if that port cannot be had."""
        if port is None or not self._around.has_bulk():
            if port:
                self._log(f"port {port} for large objects is not used: cryptography is not installed (dpool[bulk])")
            return None
        return self._around.gate(self._listener.host, port)

    # -- the loop

    def serve(self) -> None:
        """Until stop() is called, here or by `dpool stop`, or nobody has needed this node for long."""
        try:
            while not self._stop.is_set() and not self.refused:
                self.step()
        finally:
            self._end()

    def step(self) -> None:
        """One turn of serve(): wait until something comes or falls due, and see to it."""
        now = self._around.now()
        deadline = self._state_at
        for part in self._parts.values():
            due = part.deadline(now)
            if due is not None and due < deadline:
                deadline = due
        ready = self._waker.wait(0 if self._more else deadline - now)
        # After the wait: sending may use up the news of what has come.
        now = self._around.now()
        if now >= self._state_at:
            self._say_state()
            self._look_around(now)
            self.inlets.tick()
            self.exchange.tick()
            self._state_at = now + STATE_EVERY_S
        self._listener.authenticate()
        for descriptor in ready:
            part_or_none = self._by_descriptor.get(descriptor)
            if part_or_none is not None:
                try:
                    part_or_none.on_ready(descriptor)
                except _NONSENSE as error:
                    self._fail(part_or_none, error)
        for part in list(self._parts.values()):
            try:
                part.on_time(self._around.now())
            except _NONSENSE as error:
                self._fail(part, error)
        self.inlets.turn(ready)
        self.exchange.turn(ready)
        # Last, and until there is nothing, for the same reason.
        for message in self._head.receive():
            self._from_head(message[0])
        self._head.watch()
        self._report_link()
        for _ in range(_ROUNDS):
            for received in self._listener.receive():
                if received.role == DRIVER:
                    self._from_driver(received)
                elif received.role == AGENT:
                    self.exchange.on_peer(received.peer, received.frames[0])
            self._more = self.exchange.receive()
            if not self._more:
                break
        self.inlets.go_on()
        for peer in self._listener.ended():
            self._on_broken(peer, self._around.now())
            self.exchange.peer_ended(peer)

    def stop(self) -> None:
        """Make serve() return. Any thread and any signal handler may call it."""
        self._stop.set()
        self._waker.wake()

    def _end(self) -> None:
        self._head.send((messages.encode(messages.Leaving(self.id)),))
        for part in list(self._parts.values()):
            self._drop(part)
        self.exchange.close()
        self.inlets.close()
        self._head.close(linger_ms=200)
        self._listener.close()
        self._waker.close()
        self._around.end()
        self._zygote.close()

    # -- the head

    def _say_state(self) -> None:
        self._number += 1
        groups: dict[str, int] = {}
        running = 0
        for part in self._parts.values():
            if part.workers is not None:
                name = part.group.hex()
                groups[name] = groups.get(name, 0) + part.workers.count
                running += part.ledger.running
        self._head.send((messages.encode(messages.NodeState(
            self.id, self._number, socket.gethostname(), [self.address], self._cpus, self.versions,
            int(self._stock.total.get(MEMORY, 0)), groups,
            self._tasks_done + sum(part.ledger.tasks_done for part in self._parts.values()), running,
            self._stock.total, self.inlets.address)),))

    def _from_head(self, data: Frame) -> None:
        try:
            message = messages.from_head.decode(data)
        except msgspec.DecodeError:
            return
        if isinstance(message, messages.Welcome):
            if not self.joined.is_set():
                self.joined.set()
                self._log(f"joined the cluster at {self._head.address}")
        elif isinstance(message, messages.Refused):
            self.refused = message.reason
        elif isinstance(message, messages.StopCluster):
            self._stop.set()

    def _report_link(self) -> None:
        """Say once what is wrong with the connection to the head, and once that it is there again."""
        if self._head.connected and not self._was_connected:
            self._say_state()  # what was said before there was a connection is lost
            self._said = ""
        self._was_connected = self._head.connected
        if not self._was_connected and self._head.failure and self._head.failure != self._said:
            self._said = self._head.failure
            self._log(f"no connection to the head at {self._head.address}: {self._head.failure}; trying on")

    def _look_around(self, now: float) -> None:
        """Drop the parts of drivers that are gone; end when nobody needs this node any more."""
        for part in [part for part in self._parts.values() if part.gone_at <= now]:
            self._drop(part)
        if self._parts or self._head.connected:
            self._alone_since = now
        elif now - self._alone_since > self._orphan_after_s:
            self._log(f"no head and no driver for {self._orphan_after_s:.0f} s: this node ends")
            self._stop.set()

    # -- drivers

    def _from_driver(self, received: Received) -> None:
        if len(received.frames[0]) < sessions.HEADER.size:
            return
        head = received.frames[0]
        kind, flags, arrived, _, number, acknowledged = sessions.HEADER.unpack_from(head)
        body = head[sessions.HEADER.size:]
        try:
            if not number and kind == sessions.CONTROL:
                self._on_connection(received.peer, messages.to_node.decode(body))
                return
            part = self._by_peer.get(received.peer)
            if part is None or kind not in sessions.KINDS:
                return
            if part.session.accept(kind, number, acknowledged):
                part.on_message(kind, flags, arrived, body, received.frames)
            if part.session.owes_acknowledgement:
                self._listener.send(received.peer, part.session.acknowledgement())
            part.on_read()
        except _NONSENSE as error:
            part = self._by_peer.get(received.peer)
            if part is not None:
                self._fail(part, error)

    def _on_connection(self, peer: bytes, message: messages.ToNode) -> None:
        """A message about a connection or session as a whole."""
        now = self._around.now()
        if isinstance(message, messages.Pulse):
            part = self._parts.get(message.session)
            if part is None:
                self._answer(peer, messages.Gone(message.session))
                return
            # Without a connection for the session it may be the last word of a driver that has ended: they are two
            # connections, and what was said on the one may come after the end of the other.
            part.gone_at = now + (DRIVER_LEASE_S if part.peer is not None else BROKEN_AFTER_S)
            part.session.acknowledged(message.received)
            self._answer(peer, messages.Pulse(message.session, part.session.received, part.peer is not None,
                                              self.inlets.count(part)))
        elif isinstance(message, messages.Resume):
            part = self._parts.get(message.session)
            if part is None:
                if not message.new or message.session in self._ended:
                    self._answer(peer, messages.Gone(message.session))
                    return
                part = self._parts[message.session] = Part(message.session, self)
            if message.attempt < part.attempt:
                return  # read after the one of the connection that has replaced this one
            part.attempt = message.attempt
            if part.peer is not None:
                self._by_peer.pop(part.peer, None)
            part.peer = peer
            self._by_peer[peer] = part
            part.gone_at = now + DRIVER_LEASE_S
            again = part.session.resume(message.received)
            if not self._answer(peer, messages.Resumed(message.session, part.session.received)):
                self._on_broken(peer, now)  # it has ended since
            for resent in again:
                self._listener.send(peer, resent)
        elif isinstance(message, messages.Bye):
            part = self._parts.get(message.session)
            if part is not None:
                self._drop(part)

    def _answer(self, peer: bytes, message: messages.Message) -> bool:
        """False if the connection has ended."""
        header = sessions.HEADER.pack(sessions.CONTROL, 0, 0, 0, 0, 0)
        return self._listener.send(peer, (header + messages.encode(message),))

    def _on_broken(self, peer: bytes, now: float) -> None:
        part = self._by_peer.pop(peer, None)
        if part is not None and part.peer == peer:
            part.peer = None
            part.gone_at = min(part.gone_at, now + BROKEN_AFTER_S)

    def _on_deed(self, deed: Deed) -> None:
        """The exchange has something for a part."""
        part = self._parts.get(deed.part)
        if part is None:
            return
        if deed.what == ASK:
            part.post(messages.Missing(deed.key, deed.have, deed.source))
        elif deed.what == GOT:
            part.post(messages.Got(deed.key))
        elif deed.what == READY:
            try:
                part.batches.ready(deed.batch, deed.key)
                part.hand_over()
            except _NONSENSE as error:
                self._fail(part, error)

    # -- what parts ask; see part.py, Host

    def now(self) -> float:
        return self._around.now()

    def send(self, part: Part, message: sessions.Frames) -> None:
        if part.peer is not None and not self._listener.send(part.peer, message):
            self._on_broken(part.peer, self._around.now())

    def watch(self, part: Part, descriptors: Sequence[int]) -> None:
        for descriptor in descriptors:
            self._by_descriptor[descriptor] = part
        self._waker.add(descriptors)

    def unwatch(self, descriptors: Sequence[int]) -> None:
        self._waker.remove(descriptors)
        for descriptor in descriptors:
            self._by_descriptor.pop(descriptor, None)

    def home_of(self, group: bytes) -> bytes:
        return home.answer(self._head.address, self.id, group, self._driver_keys.texts())

    def _fork_workers(self, part: Part, message: messages.Open) -> Workers:
        grant = self._stock.take(message.needs, message.workers) if message.needs else None
        request = {"authkey": message.authkey.hex(), "argv": message.argv, "directory": message.directory,
                   "replaces": message.replaces}
        context = ZygoteContext(self._zygote, message.first_number, request, part.asks[1].fileno(), part.output,
                                part.initializer)
        spec = GroupSpec(message.workers, context, None, (), message.max_tasks,  # type: ignore[arg-type]
                         on_demand=message.on_demand, worker_name=message.worker_name)
        try:
            return Workers(spec, grant)
        except BaseException:
            if grant is not None:
                grant.give_back()
            raise

    # -- the end of a part

    def _fail(self, part: Part, error: Exception) -> None:
        """Its driver is told why, and it ends."""
        part.post(messages.Failed(f"{type(error).__name__}: {error}"))
        self._drop(part)

    def _drop(self, part: Part) -> None:
        """Forget a part at once: what still runs of it is killed."""
        self._parts.pop(part.id, None)
        if part.peer is not None:
            self._by_peer.pop(part.peer, None)
        self._ended[part.id] = None
        if len(self._ended) > 10_000:
            del self._ended[next(iter(self._ended))]
        self._tasks_done += part.ledger.tasks_done
        self.inlets.end(part)
        self.unwatch([descriptor for descriptor, owner in self._by_descriptor.items() if owner is part])
        part.close()
        self.exchange.part_ended(part.id)
