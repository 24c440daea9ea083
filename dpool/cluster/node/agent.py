"""The node's agent: one process a machine, which runs the workers of every group that has a part here.

It carries batches from drivers to workers and outcomes back by their headers alone, and unpickles nothing. What is
lost is ledger.py's to decide, how many workers there should be supervisor.py's. Run by `dpool node`, in the thread
that calls serve(); the simulation calls step().

    driver  --- TCP, CURVE --->  agent  --- socket pair, one a group --->  workers
                                   |  --- requests to fork --->  zygote
    head   <--- TCP, CURVE ------- |
    other nodes <-- TCP, CURVE --> |
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable

import msgspec

from dpool.cluster.node.batches import Batches
from dpool.cluster.node.exchange import Exchange
from dpool.cluster.node.modules import Library, Questions
from dpool.cluster.node.objects import ASK, GOT, READY, Deed
from dpool.cluster.node.output import Output
from dpool.cluster.node.starting import Zygote, ZygoteContext
from dpool.cluster.node.workers import Workers
from dpool.cluster.store import segments
from dpool.cluster.store.transfer import Arrivals, BadPiece, pieces
from dpool.cluster.wire import frames, messages, sessions
from dpool.cluster.wire.death import Death
from dpool.cluster.wire.events import MESSAGE
from dpool.cluster.wire.keys import AGENT, DRIVER, HEAD, Keys
from dpool.cluster.wire.links import Frame, Received, address_of
from dpool.cluster.wire.surroundings import Surroundings
from dpool.cluster.worker import home
from dpool.engine import GroupSpec
from dpool.resources import MEMORY, Lacking, Stock

# How often the head hears of this node, and how often the clock is looked at.
STATE_EVERY_S = 1.0
# A driver that says nothing for so long is gone. Long, for a driver may be stopped for a while and go on.
DRIVER_LEASE_S = 60.0
# One whose connection has ended and that has not come back is gone after this time.
BROKEN_AFTER_S = 5.0
# Without a head and without a driver for so long, the node ends.
ORPHAN_AFTER_S = 300.0
# A driver that is behind in reading is not sent more of what its workers print.
MAX_UNREAD_OUTPUT = 64
# A task that is to be stopped may stand in the workers' socket, and no worker says when it begins it.
STOP_RECHECK_S = 0.01
# Results of one group that are forwarded before the others have their turn.
_BURST = 64
# How often a turn looks again for what other nodes have sent, before it looks after the workers.
_ROUNDS = 4


class Part:
    """A group's part on this node: its session with the driver, its workers, its books."""

    def __init__(self, session: bytes, now: float, library: Library, exchange: Exchange) -> None:
        self.id = session
        self.session = sessions.Session()
        self.peer: bytes | None = None
        self.attempt = 0  # which of the session's connections that is
        self.gone_at = now + DRIVER_LEASE_S
        self.arrivals = Arrivals()
        self.batches = Batches(session, exchange)
        self.ledger = self.batches.ledger
        self.output = Output()
        self.group = b""
        self.workers: Workers | None = None
        self.initializer = -1
        self.asks = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.questions = Questions(self.asks[0], library)
        self.ending = False
        self.paused = False
        self.stops: set[tuple[int, int]] = set()  # tasks to be stopped: batch, index
        self.stopped: set[int] = set()  # slots of workers that were ended for that

    @property
    def stops_soon(self) -> bool:
        """Whether a task that is to be stopped may begin: not in a batch that waits for objects."""
        return any(batch not in self.ledger.parked for batch, _ in self.stops)

    def close(self) -> None:
        """Give every descriptor back; its workers must have ended or be ending."""
        if self.workers is not None:
            for process in self.workers.by_slot.values():
                process.let_go()
            self.workers.close()
        self.arrivals.close()
        self.output.close()
        self.batches.close()
        if self.initializer >= 0:
            os.close(self.initializer)
        self.questions.close()
        for end in self.asks:
            end.close()


# Makes the workers of a part, as its driver has asked for them; starts none.
MakeWorkers = Callable[[Part, messages.Open], Workers]


class Agent:
    """Listens from the moment it is made. Raises ValueError for a bad address, OSError for one that is taken."""

    def __init__(self, keys: Keys, head: str, bind: str | None, cpus: int, stock: Stock,
                 log: Callable[[str], object], orphan_after_s: float = ORPHAN_AFTER_S,
                 around: Surroundings | None = None, make_workers: MakeWorkers | None = None) -> None:
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
        self._head = self._around.dialer(AGENT, HEAD, head, again=True)
        self._waker = self._around.waker()
        self._waker.add(self._listener.descriptors)
        self._waker.add(self._head.descriptors)
        self.exchange = Exchange(self._around, self._waker, self._listener, self._on_deed)
        self.id = self._around.new_id()
        self._cpus = cpus
        self._stock = stock
        self._number = 0
        self._versions = messages.Versions.here()
        self._library = Library()
        self._zygote = Zygote()
        if make_workers is None:
            self._zygote.start()
        self._make_workers = make_workers or self._fork_workers
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
            if part.ledger.deadline is not None:
                deadline = min(deadline, part.ledger.deadline)
            if part.ending:
                deadline = min(deadline, now + 0.05)
            if part.stops_soon:
                deadline = min(deadline, now + STOP_RECHECK_S)
        ready = self._waker.wait(0 if self._more else deadline - now)
        # After the wait: sending may use up the news of what has come.
        now = self._around.now()
        if now >= self._state_at:
            self._say_state()
            self._look_around(now)
            self.exchange.tick()
            self._state_at = now + STATE_EVERY_S
        self._listener.authenticate()
        for descriptor in ready:
            part_or_none = self._by_descriptor.get(descriptor)
            if part_or_none is not None:
                self._on_part(part_or_none, descriptor)
        for part in list(self._parts.values()):
            if part.ending or part.stops_soon or part.ledger.deadline is not None:
                self._on_time(part, self._around.now())
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
            self.id, self._number, socket.gethostname(), [self.address], self._cpus, self._versions,
            int(self._stock.total.get(MEMORY, 0)), groups,
            self._tasks_done + sum(part.ledger.tasks_done for part in self._parts.values()), running,
            self._stock.total)),))

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
                self._on_message(part, kind, flags, arrived, body, received.frames)
            if part.session.owes_acknowledgement:
                self._listener.send(received.peer, part.session.acknowledgement())
            if part.paused and len(part.session.unacknowledged) < MAX_UNREAD_OUTPUT:
                part.paused = False
                self._waker.add(part.output.descriptors)
        except (msgspec.DecodeError, sessions.ProtocolError, BadPiece, OSError, ValueError, struct.error,
                IndexError) as error:
            # It has the key, and talks nonsense, or there is no memory for what it sends: its session ends.
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
            self._answer(peer, messages.Pulse(message.session, part.session.received, part.peer is not None))
        elif isinstance(message, messages.Resume):
            part = self._parts.get(message.session)
            if part is None:
                if not message.new or message.session in self._ended:
                    self._answer(peer, messages.Gone(message.session))
                    return
                part = self._parts[message.session] = Part(message.session, now, self._library, self.exchange)
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

    def _on_message(self, part: Part, kind: int, flags: int, arrived: int, body: memoryview,
                    received: list[memoryview]) -> None:
        if kind == sessions.TASKS:
            part.batches.take_in(flags, deque(part.arrivals.take(arrived)), body)
            self._hand_over(part)
        elif kind == sessions.CHUNK:
            size, start = sessions.CHUNK_HEADER.unpack(body)
            part.arrivals.add(size, start, received[1])
        elif kind == sessions.OBJECT:
            self.exchange.on_piece(part.id, sessions.OBJECT_HEADER.unpack(body), received[1])
        elif kind == sessions.CONTROL:
            self._on_control(part, messages.to_node.decode(body), arrived)

    def _hand_over(self, part: Part) -> None:
        if part.workers is not None:
            part.batches.hand_over(part.workers)

    def _on_deed(self, deed: Deed) -> None:
        """The exchange has something for a part."""
        part = self._parts.get(deed.part)
        if part is None:
            return
        if deed.what == ASK:
            self._post(part, messages.Missing(deed.key, deed.have, deed.source))
        elif deed.what == GOT:
            self._post(part, messages.Got(deed.key))
        elif deed.what == READY:
            try:
                part.batches.ready(deed.batch, deed.key)
            except OSError as error:
                self._fail(part, error)
                return
            self._hand_over(part)

    def _on_control(self, part: Part, message: messages.ToNode, arrived: int) -> None:
        workers = part.workers
        if isinstance(message, messages.Open):
            self._open(part, message, arrived)
        elif workers is None:
            return
        elif isinstance(message, messages.Demand):
            before = {process.pid for process in workers.processes}
            workers.supervisor.demand(message.workers, 0)
            self._start(part, workers, before)
        elif isinstance(message, messages.Steal):
            self._steal(part, workers, message.batch)
        elif isinstance(message, messages.GiveBack):
            self._give_back(part, workers, message.count)
        elif isinstance(message, messages.Stop):
            part.stops.add((message.batch, message.task))
            self._stop_tasks(part, workers)
        elif isinstance(message, messages.CloseTasks):
            part.ending = True
            self._close_tasks(part, workers)
        elif isinstance(message, messages.Kill):
            part.ending = True
            part.batches.drop()
            workers.kill(message.at_once)
        elif isinstance(message, messages.Signal):
            workers.signal(message.slot, message.number)
        elif isinstance(message, messages.Forget):
            part.batches.forget_function(message.function)
        elif isinstance(message, messages.ForgetObjects):
            for key in message.keys:
                self.exchange.let_go(key, part.id)
        elif isinstance(message, messages.Fetch):
            self.exchange.fetch(message, part.id)
        elif isinstance(message, messages.Found):
            self._on_found(part, message, arrived)

    # -- groups

    def _open(self, part: Part, message: messages.Open, arrived: int) -> None:
        descriptors = part.arrivals.take(arrived)
        part.initializer = descriptors[0] if message.initializer else -1
        if part.workers is not None:
            raise ValueError("a session was opened twice")
        if conflict := self._versions.conflict(message.versions):
            self._post(part, messages.Failed(f"the node on {socket.gethostname()} cannot be used: {conflict}"))
            return
        part.group = message.group
        part.questions.home = home.answer(self._head.address, self.id, message.group, self._driver_keys.texts())
        try:
            part.workers = workers = self._make_workers(part, message)
        except Lacking as error:
            self._post(part, messages.Failed(f"the node on {socket.gethostname()}: {error}", passing=True))
            return
        # What a worker needs to be forked; kept open as long as the part.
        try:
            workers.open()
        except OSError as error:
            part.workers = None
            workers.close()
            self._post(part, messages.Failed(f"no worker can be started on {socket.gethostname()}: {error}"))
            return
        for descriptor in (workers.descriptor, part.asks[0].fileno()):
            self._by_descriptor[descriptor] = part
            self._waker.add([descriptor])
        self._watch_output(part)
        self._post(part, messages.Opened(_slots(workers)))

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

    def _start(self, part: Part, workers: Workers, before: set[int]) -> None:
        """Start the workers that are missing, and tell the driver which are new."""
        try:
            workers.start()
        except OSError as error:
            if not workers.count:
                self._post(part, messages.Failed(f"no worker can be started on {socket.gethostname()}: {error}"))
        self._watch_output(part)
        new = [slot for slot in _slots(workers) if slot.pid not in before]
        if new:
            self._post(part, messages.Started(new))

    def _watch_output(self, part: Part) -> None:
        for descriptor in part.output.fresh:
            self._by_descriptor[descriptor] = part
        if not part.paused:
            self._waker.add(part.output.fresh)
        part.output.fresh.clear()

    def _steal(self, part: Part, workers: Workers, batch: int) -> None:
        if part.batches.take_back(batch):
            self._post(part, messages.Lost(batch))
            return
        # One that waits for an object stays: wherever else it went, it would have to wait as well.
        self._post(part, messages.Stolen(batch, workers.steal(batch)))

    def _give_back(self, part: Part, workers: Workers, count: int) -> None:
        self._post(part, messages.GivenBack(part.batches.give_back(count, workers)))

    def _stop_tasks(self, part: Part, workers: Workers) -> None:
        """End the workers that are in a task to be stopped. One that is still to be begun is looked at again."""
        ledger = part.ledger
        waiting = part.batches.held_back
        part.stops = {task for task in part.stops if task[0] in ledger.handed or task[0] in waiting}
        part.stopped |= workers.stop(list(part.stops))

    def _close_tasks(self, part: Part, workers: Workers) -> None:
        if not part.batches.held_back:
            workers.close_tasks()

    # -- workers

    def _on_part(self, part: Part, descriptor: int) -> None:
        workers = part.workers
        if workers is None:
            return
        if descriptor == part.asks[0].fileno():
            self._on_question(part)
            return
        if descriptor != workers.descriptor:
            self._on_output(part, descriptor)
            return
        for _ in range(_BURST):
            events = workers.poll(0)
            if not events:
                break
            deaths = False
            for kind, what, descriptors in events:
                if kind != MESSAGE:
                    self._on_death(part, workers, what)
                    deaths = True
                    continue
                try:
                    self._on_results(part, what, descriptors)
                except (OSError, ValueError) as error:
                    # A worker writes nonsense, or there is no memory to send what it has written.
                    self._fail(part, error)
                    return
            if deaths and not part.ending and not workers.supervisor.hopeless:
                # Not earlier: the driver hears of every death before it hears of whoever has the slot next.
                self._start(part, workers, {process.pid for process in workers.processes})
        if part.ledger.waiting:
            self._hand_over(part)

    def _on_results(self, part: Part, message: memoryview, descriptors: list[int]) -> None:
        (flags, _, _, batch, _, count, _, _, failure_bytes, ref_bytes, _) = frames.RESULTS.unpack_from(message)
        part.ledger.reported(batch, count, bool(flags & frames.DONE))
        # A body's segment is new, so all of it is the body's; that of an object may have been used before.
        parts: list[list[tuple[int, int]] | None] = [None] if flags & frames.BODY_IN_SEGMENT else []
        try:
            if ref_bytes:
                start = frames.RESULTS.size + failure_bytes
                entries, _ = frames.unpack_refs(message[start:start + ref_bytes])
                parts += (segments.places(table) for _, _, table, _ in entries)
            for descriptor, places in zip(descriptors, parts, strict=True):
                self._post_segment(part, descriptor, places)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._send(part, part.session.wrap(sessions.RESULTS, (message,), segments=len(descriptors)))

    def _on_death(self, part: Part, workers: Workers, death: Death) -> None:
        part.ledger.died(death.batch, workers.claimed(), self._around.now())
        self._post(part, messages.Died(death.slot, death.pid, death.exitcode, death.batch, death.task, death.ready,
                                       death.trace, death.expected, workers.supervisor.failed_starts,
                                       death.slot in part.stopped))
        part.stopped.discard(death.slot)

    def _on_time(self, part: Part, now: float) -> None:
        workers = part.workers
        if workers is None:
            return
        if part.ending:
            self._on_part(part, workers.descriptor)  # its poll() also keeps the time of kill()
            if not workers.supervisor.closing:
                self._close_tasks(part, workers)
        if part.stops_soon:
            self._stop_tasks(part, workers)
        if part.ledger.deadline is not None and part.ledger.deadline <= now:
            for batch in part.ledger.lost(workers.claimed(), workers.unread(), now):
                self._post(part, messages.Lost(batch))

    def _on_output(self, part: Part, descriptor: int) -> None:
        stream, lines, ended = part.output.read(descriptor)
        if ended:
            self._by_descriptor.pop(descriptor, None)
        if lines:
            self._post(part, messages.Output(stream, lines))
        if len(part.session.unacknowledged) >= MAX_UNREAD_OUTPUT and not part.paused:
            part.paused = True
            self._waker.remove(part.output.descriptors)

    # -- what workers ask: for modules of the driver's, and for the cluster they belong to

    def _on_question(self, part: Part) -> None:
        wanted = part.questions.ask()
        if wanted is not None:
            self._post(part, wanted)

    def _on_found(self, part: Part, message: messages.Found, arrived: int) -> None:
        wanted = part.questions.found(message, part.arrivals.take(arrived))
        if wanted is not None:
            self._post(part, wanted)

    # -- sending

    def _post(self, part: Part, message: messages.Message) -> None:
        self._send(part, part.session.wrap(sessions.CONTROL, (messages.encode(message),)))

    def _post_segment(self, part: Part, descriptor: int, places: list[tuple[int, int]] | None) -> None:
        for size, start, piece in pieces(descriptor, places):
            self._send(part, part.session.wrap(sessions.CHUNK, (sessions.CHUNK_HEADER.pack(size, start),),
                                               beside=piece))

    def _send(self, part: Part, message: sessions.Frames) -> None:
        if part.peer is not None and not self._listener.send(part.peer, message):
            self._on_broken(part.peer, self._around.now())

    # -- the end of a part

    def _fail(self, part: Part, error: Exception) -> None:
        """Its driver is told why, and it ends."""
        self._post(part, messages.Failed(f"{type(error).__name__}: {error}"))
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
        mine = [descriptor for descriptor, owner in self._by_descriptor.items() if owner is part]
        self._waker.remove(mine)
        for descriptor in mine:
            del self._by_descriptor[descriptor]
        # The end of its lifeline kills every worker and what it has started, whatever it is doing.
        part.close()
        self.exchange.part_ended(part.id)


def _slots(workers: Workers) -> list[messages.Slot]:
    found = []
    for slot, process in workers.by_slot.items():
        found.append(messages.Slot(slot, process.pid, process.name))
    return found
