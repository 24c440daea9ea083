"""A group's part on a node: its workers, its books, and what its driver and its workers have said last.

Does what the driver asks and tells it what becomes of it, by headers alone: it unpickles nothing. Knows a session, not
the connections that carry it. What is lost is ledger.py's to decide, how many workers there should be supervisor.py's.
Made and called by node/agent.py, in its one thread.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Protocol

from dpool.cluster.node.batches import Batches
from dpool.cluster.node.calls import Calls
from dpool.cluster.node.exchange import Exchange
from dpool.cluster.node.inlets import Inlets
from dpool.cluster.node.modules import Library, Questions
from dpool.cluster.node.output import Output
from dpool.cluster.node.workers import Workers
from dpool.cluster.store import segments
from dpool.cluster.store.transfer import Arrivals, pieces
from dpool.cluster.wire import frames, lent, messages, sessions
from dpool.cluster.wire.bulk import Head
from dpool.cluster.wire.death import Death
from dpool.cluster.wire.events import MESSAGE
from dpool.resources import Lacking

# A driver that is behind in reading is not sent more of what its workers print.
MAX_UNREAD_OUTPUT = 64
# A task that is to be stopped may stand in the workers' socket, and no worker says when it begins it.
STOP_RECHECK_S = 0.01
# How often the workers of a part that ends are looked at.
END_RECHECK_S = 0.05
# Results of one group that are forwarded before the others have their turn.
_BURST = 64


class Host(Protocol):
    """What a part asks of its node."""

    exchange: Exchange
    inlets: Inlets
    library: Library
    versions: messages.Versions

    def now(self) -> float: ...

    def send(self, part: Part, message: sessions.Frames) -> None:
        """To its driver; what the connection loses is sent again."""

    def watch(self, part: Part, descriptors: Sequence[int]) -> None:
        """Call on_ready() when one of them is readable."""

    def unwatch(self, descriptors: Sequence[int]) -> None: ...

    def home_of(self, group: bytes) -> bytes:
        """What its workers are told of the cluster. Secret."""

    def make_workers(self, part: Part, message: messages.Open) -> Workers:
        """As the driver has asked for them; starts none."""


class Part:
    """Raises, from whatever a driver or worker calls: struct.error, IndexError, msgspec.DecodeError, ValueError and its
    kind for nonsense, OSError for want of memory or descriptors; the part is of no use then."""

    def __init__(self, session: bytes, host: Host) -> None:
        self.id = session
        self.session = sessions.Session()
        self._host = host
        # The connection that carries the session now, which of its connections that is, and when the driver is gone;
        # the node's to keep.
        self.peer: bytes | None = None
        self.attempt = 0
        self.gone_at = 0.0
        self.arrivals = Arrivals()
        self.batches = Batches(session, host.exchange)
        self.ledger = self.batches.ledger
        self.output = Output()
        self.group = b""
        self.workers: Workers | None = None
        self.initializer = -1
        self.asks = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.questions = Questions(host.library)
        self.calls = Calls(self._post_call, lambda one: host.watch(self, (one,)), lambda one: host.unwatch((one,)))
        self.ending = False
        self._bulk = False  # its driver can send by a bulk connection
        self._paused = False  # no more output is read
        self._stops: set[tuple[int, int]] = set()  # tasks to be stopped: batch, index
        self._stopped: set[int] = set()  # slots of workers that were ended for that

    # -- time

    def deadline(self, now: float) -> float | None:
        """When on_time() is to be called, if not earlier."""
        due = [] if self.ledger.deadline is None else [self.ledger.deadline]
        if self.ending:
            due.append(now + END_RECHECK_S)
        if self._stops_soon:
            due.append(now + STOP_RECHECK_S)
        return min(due, default=None)

    @property
    def _stops_soon(self) -> bool:
        """Whether a task that is to be stopped may begin: not in a batch that waits for objects."""
        return any(batch not in self.ledger.parked for batch, _ in self._stops)

    def on_time(self, now: float) -> None:
        """See to what has fallen due, if anything has."""
        workers = self.workers
        if workers is None:
            return
        if self.ending:
            self._on_workers(workers)  # its poll() also keeps the time of kill()
            if not workers.supervisor.closing:
                self._close_tasks(workers)
        if self._stops_soon:
            self._stop_tasks(workers)
        if self.ledger.deadline is not None and self.ledger.deadline <= now:
            # In this order: what leaves the socket meanwhile is in one of them.
            unread, claimed = workers.unread(), workers.claimed()
            for batch in self.ledger.lost(claimed, unread, now):
                self.post(messages.Lost(batch))

    # -- what the driver says

    def on_message(self, kind: int, flags: int, arrived: int, body: memoryview, received: list[memoryview]) -> None:
        """A message of the session that is new."""
        if kind == sessions.TASKS:
            self.batches.take_in(flags, deque(self.arrivals.take(arrived)), body)
            self.hand_over()
        elif kind == sessions.CHUNK:
            size, start = sessions.CHUNK_HEADER.unpack(body)
            self.arrivals.add(size, start, received[1])
        elif kind == sessions.OBJECT:
            self._host.exchange.on_piece(self.id, sessions.OBJECT_HEADER.unpack(body), received[1])
        elif kind == sessions.CONTROL:
            self._on_control(messages.to_node.decode(body), arrived)

    def on_read(self) -> None:
        """The driver has read something of what was sent."""
        if self._paused and len(self.session.unacknowledged) < MAX_UNREAD_OUTPUT:
            self._paused = False
            self._host.watch(self, self.output.descriptors)

    def _on_control(self, message: messages.ToNode, arrived: int) -> None:
        workers = self.workers
        if isinstance(message, messages.Open):
            self._open(message, arrived)
        elif workers is None:
            return
        elif isinstance(message, messages.Demand):
            before = {process.pid for process in workers.processes}
            workers.supervisor.demand(message.workers, 0)
            self._start(workers, before)
        elif isinstance(message, messages.Steal):
            self._steal(workers, message.batch)
        elif isinstance(message, messages.GiveBack):
            self.post(messages.GivenBack(self.batches.give_back(message.count, workers)))
        elif isinstance(message, messages.Stop):
            self._stops.add((message.batch, message.task))
            self._stop_tasks(workers)
        elif isinstance(message, messages.CloseTasks):
            self.ending = True
            self._close_tasks(workers)
        elif isinstance(message, messages.Kill):
            self.ending = True
            self.batches.drop()
            workers.kill(message.at_once)
        elif isinstance(message, messages.Signal):
            workers.signal(message.slot, message.number)
        elif isinstance(message, messages.Forget):
            self.batches.forget_function(message.function)
        elif isinstance(message, messages.ForgetObjects):
            for key in message.keys:
                self._host.exchange.let_go(key, self.id)
        elif isinstance(message, messages.Fetch):
            self._host.exchange.fetch(message, self.id)
            if message.own and self._bulk and (offer := self._host.inlets.offer(self)) is not None:
                self.post(offer)
        elif isinstance(message, messages.BulkOver):
            self._host.inlets.over(self, message.name)
            if message.used:
                self._host.exchange.lacking(self.id)
        elif isinstance(message, messages.Found):
            wanted = self.questions.found(message, self.arrivals.take(arrived))
            if wanted is not None:
                self.post(wanted)
        elif isinstance(message, messages.Answer):
            self.calls.on_answer(message, self.arrivals.take(arrived))

    def _open(self, message: messages.Open, arrived: int) -> None:
        descriptors = self.arrivals.take(arrived)
        self.initializer = descriptors[0] if message.initializer else -1
        if self.workers is not None:
            raise ValueError("a session was opened twice")
        if conflict := self._host.versions.conflict(message.versions):
            self.post(messages.Failed(f"the node on {socket.gethostname()} cannot be used: {conflict}"))
            return
        self.group = message.group
        self._bulk = message.bulk
        self.questions.home = self._host.home_of(message.group)
        try:
            self.workers = workers = self._host.make_workers(self, message)
        except Lacking as error:
            self.post(messages.Failed(f"the node on {socket.gethostname()}: {error}", passing=True))
            return
        # What a worker needs to be forked; kept open as long as the part.
        try:
            workers.open()
        except OSError as error:
            self.workers = None
            workers.close()
            self.post(messages.Failed(f"no worker can be started on {socket.gethostname()}: {error}"))
            return
        self._host.watch(self, (workers.descriptor, self.asks[0].fileno()))
        self._watch_output()
        self.post(messages.Opened(_slots(workers)))

    def _start(self, workers: Workers, before: set[int]) -> None:
        """Start the workers that are missing, and tell the driver which are new."""
        try:
            workers.start()
        except OSError as error:
            if not workers.count:
                self.post(messages.Failed(f"no worker can be started on {socket.gethostname()}: {error}"))
        self._watch_output()
        new = [slot for slot in _slots(workers) if slot.pid not in before]
        if new:
            self.post(messages.Started(new))

    def _watch_output(self) -> None:
        if not self._paused:
            self._host.watch(self, self.output.fresh)
        self.output.fresh.clear()

    def _steal(self, workers: Workers, batch: int) -> None:
        if self.batches.take_back(batch):
            self.post(messages.Lost(batch))
            return
        # One that waits for an object stays: wherever else it went, it would have to wait as well.
        self.post(messages.Stolen(batch, workers.steal(batch)))

    def _stop_tasks(self, workers: Workers) -> None:
        """End the workers that are in a task to be stopped. One that is still to be begun is looked at again."""
        waiting = self.batches.held_back
        self._stops = {task for task in self._stops if task[0] in self.ledger.handed or task[0] in waiting}
        self._stopped |= workers.stop(list(self._stops))

    def _close_tasks(self, workers: Workers) -> None:
        if not self.batches.held_back:
            workers.close_tasks()

    # -- its bulk connection: see inlets.Owner

    @property
    def place(self) -> Hashable:
        return self.id

    @property
    def received(self) -> int:
        return self.session.received

    def on_bulk(self, head: Head, piece: memoryview) -> None:
        self._host.exchange.on_bulk_piece(self.id, head, piece)

    def on_bulk_end(self, name: bytes) -> None:
        self.post(messages.BulkOver(name))  # the driver says it, too, behind all that it has said before

    # -- what the workers say

    def on_ready(self, descriptor: int) -> None:
        """One of the descriptors that are watched for this part is readable."""
        workers = self.workers
        if workers is None:
            return
        if descriptor == workers.descriptor:
            self._on_workers(workers)
        elif descriptor == self.asks[0].fileno():
            self._on_asks()
        elif not self.calls.on_ready(descriptor):
            self._on_output(descriptor)

    def _on_asks(self) -> None:
        """A worker, or a process that a task has forked, asks for a module or calls for what the driver has lent."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self.asks[0], lent.MESSAGE_BYTES, 2)
        except OSError:
            return
        if not descriptors:
            return
        if data.startswith(lent.CALL):
            self.calls.on_call(data, descriptors)
            return
        for more in descriptors[1:]:
            os.close(more)
        wanted = self.questions.ask(data, descriptors[0])
        if wanted is not None:
            self.post(wanted)

    def _on_workers(self, workers: Workers) -> None:
        for _ in range(_BURST):
            events = workers.poll(0)
            if not events:
                break
            deaths = False
            for kind, what, descriptors in events:
                if kind == MESSAGE:
                    self._on_results(what, descriptors)
                else:
                    self._on_death(workers, what)
                    deaths = True
            if deaths and not self.ending and not workers.supervisor.hopeless:
                # Not earlier: the driver hears of every death before it hears of whoever has the slot next.
                self._start(workers, {process.pid for process in workers.processes})
        if self.ledger.waiting:
            self.hand_over()

    def hand_over(self) -> None:
        """Give the workers what they have room for."""
        if self.workers is not None:
            self.batches.hand_over(self.workers)

    def _on_results(self, message: memoryview, descriptors: list[int]) -> None:
        (flags, _, _, batch, _, count, _, _, failure_bytes, ref_bytes, _) = frames.RESULTS.unpack_from(message)
        self.ledger.reported(batch, count, bool(flags & frames.DONE))
        # A body's segment is new, so all of it is the body's; that of an object may have been used before.
        parts: list[list[tuple[int, int]] | None] = [None] if flags & frames.BODY_IN_SEGMENT else []
        try:
            if ref_bytes:
                start = frames.RESULTS.size + failure_bytes
                entries, _ = frames.unpack_refs(message[start:start + ref_bytes])
                parts += (segments.places(table) for _, _, table, _ in entries)
            for descriptor, places in zip(descriptors, parts, strict=True):
                self._post_segment(descriptor, places)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._host.send(self, self.session.wrap(sessions.RESULTS, (message,), segments=len(descriptors)))

    def _on_death(self, workers: Workers, death: Death) -> None:
        self.ledger.died(death.batch, workers.claimed(), self._host.now())
        self.post(messages.Died(death.slot, death.pid, death.exitcode, death.batch, death.task, death.ready,
                                death.trace, death.expected, workers.supervisor.failed_starts,
                                death.slot in self._stopped))
        self._stopped.discard(death.slot)

    def _on_output(self, descriptor: int) -> None:
        stream, lines, ended = self.output.read(descriptor)
        if ended:
            self._host.unwatch([descriptor])
        if lines:
            self.post(messages.Output(stream, lines))
        if len(self.session.unacknowledged) >= MAX_UNREAD_OUTPUT and not self._paused:
            self._paused = True
            self._host.unwatch(self.output.descriptors)

    # -- sending

    def post(self, message: messages.Message) -> None:
        """Tell the driver something."""
        self._host.send(self, self.session.wrap(sessions.CONTROL, (messages.encode(message),)))

    def _post_call(self, message: messages.Message, content: int) -> None:
        """The same with the content of a call, if there is one."""
        if content >= 0:
            self._post_segment(content, None)
        self._host.send(self, self.session.wrap(sessions.CONTROL, (messages.encode(message),),
                                                segments=int(content >= 0)))

    def _post_segment(self, descriptor: int, places: list[tuple[int, int]] | None) -> None:
        for size, start, piece in pieces(descriptor, places):
            self._host.send(self, self.session.wrap(sessions.CHUNK, (sessions.CHUNK_HEADER.pack(size, start),),
                                                    beside=piece))

    # -- the end

    def close(self) -> None:
        """Give every descriptor back. The end of their lifeline kills the workers and what they have started, whatever
        they are doing."""
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
        self.calls.close()
        for end in self.asks:
            end.close()


def _slots(workers: Workers) -> list[messages.Slot]:
    return [messages.Slot(slot, process.pid, process.name) for slot, process in workers.by_slot.items()]
