"""The way from a group to its workers on the nodes of a cluster: implements driver/port.py.

Follows where the head places the group, and turns what nodes say, and their loss, into news for the group. Connections
are connections.py's, what is on its way to nodes shipping.py's; what runs where is the head's and Dispatch's to decide.
Belongs to the group's I/O thread, or to its pump; send() and the like may be called by any, and only leave word.
"""

from __future__ import annotations

import copy
import itertools
import os
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import process as mp_process
from typing import Any, TypeVar

import msgspec

from dpool.cluster.driver import connections
from dpool.cluster.driver.client import Client, Standing
from dpool.cluster.driver.connections import Connections
from dpool.cluster.driver.lanes import Lanes
from dpool.cluster.driver.lending import Lending
from dpool.cluster.driver.luggage import Pieces, Unsent, control, segment
from dpool.cluster.driver.modules import answer
from dpool.cluster.driver.nodes import Node, RemoteProcess
from dpool.cluster.driver.pump import Pump
from dpool.cluster.driver.shipping import Shipping
from dpool.cluster.store import segments
from dpool.cluster.store.transfer import BadPiece, pieces
from dpool.cluster.wire import frames, lent, messages, sessions
from dpool.cluster.wire.death import Death
from dpool.cluster.wire.events import CHANGED, DEATH, HOPELESS, LOST, MESSAGE, NODE_LOST, STOLEN
from dpool.engine import GroupSpec
from dpool.errors import ClusterError
from dpool.resources import shown

# How long the submit() that has the first worker started may wait for it.
FIRST_WORKER_WITHIN_S = 5.0
# A node that was lost is not asked again for so long.
AVOID_S = 15.0
# One that has not the resources now, perhaps because it still has what a program that has died had.
LACKING_AVOID_S = 2.0
# A group without any worker waits so long for nodes to come.
REPLACE_WITHIN_S = 60.0
# Batches wait on one node while workers of another idle: after this time they are asked back. Longer: fewer are asked
# back that would have been begun meanwhile. Shorter: workers idle less.
UNEVEN_FOR_S = 0.01
# And again after this time if none came.
UNEVEN_AGAIN_S = 0.5

_SLOT_AT = 2  # where frames.RESULTS has the slot
_SLOT = struct.Struct("<H")
Carrying = TypeVar("Carrying", messages.Call, messages.Returned)


class RemoteSupervisor:
    """What the group asks about workers that fail to start: the nodes' own supervisors have counted."""

    def __init__(self) -> None:
        self.failed_starts = 0

    @property
    def hopeless(self) -> bool:
        return self.failed_starts >= 10


class ClusterPort:
    """A group's nodes. open() first, in any thread; then poll() by one thread."""

    splits = True
    shares_memory = False

    def __init__(self, client: Client, spec: GroupSpec, replaces: bool = False,
                 fetch: Callable[[str], bytes | None] | None = None) -> None:
        self.client = client
        self.spec = spec
        self._replaces = replaces
        self._fetch = fetch  # see driver/modules.py
        self._now = client.around.now
        self.group = client.around.new_id()
        self.processes: list[Any] = []
        self.supervisor = RemoteSupervisor()
        self._nodes: dict[bytes, Node] = {}  # by session
        self._shipping = Shipping(client.sharing, self._now)
        self._connections = Connections(client, self._tell)
        self._lanes = Lanes(client.around, self._connections, self._shipping)
        self._inbox: deque[tuple[str, Any]] = deque()  # from the client's thread
        self._owner = 0
        self._any = threading.Event()  # there is a worker, or was, or none will come
        self._avoid: dict[bytes, float] = {}
        self._numbers = itertools.count(0)
        self._first_number = 0
        self._open = self._closing = self._killed = self._closed = False
        self._empty_since: float | None = None
        self._level_at: float | None = None  # when to have batches given back, if they are dealt unevenly still
        self._open_until = 0.0
        self._lending = Lending(self._answer_call, self._connections.wake, self._connections.wait_for, self._now,
                                lent.up())
        self._pump: Pump | None = None  # if something is lent, or a worker asks for a manager
        self._initializer = self._pack_initializer(spec)
        self._prefix = _name_prefix(spec)
        # A door that has not been told how many workers takes what the cluster has.
        self._standing = Standing(self.group, 0 if spec.all_cpus else spec.processes, spec.resources, self._on_placed)

    def _pack_initializer(self, spec: GroupSpec) -> int:
        """A segment with the pickle of the initializer and its arguments, -1 if there is none. Raises what pickling
        them raises."""
        if spec.initializer is None:
            return -1
        from dpool.cluster.driver import handing  # and much of multiprocessing with it, which others do without

        try:
            return segments.write([handing.pickled(spec.initializer, spec.initargs, self._lending)])[0]
        except BaseException:
            self._lending.close()
            raise

    # -- opening

    def open(self) -> None:
        """Have the group placed and its workers started. Raises ClusterError if that fails, or takes too long."""
        self.begin()
        try:
            while self.opening():
                pass
        except BaseException:
            self.kill()
            self.close()
            raise
        self._owner = 0  # from now on another thread polls
        self._open = True

    def begin(self) -> None:
        """Ask the head for nodes."""
        self._open_until = self._now() + connections.OPEN_TIMEOUT_S
        self.client.add(self._standing)

    def opening(self) -> bool:
        """One turn of open() after begin(); False when the workers are there. Raises ClusterError if they never are."""
        if self._nodes and all(node.opened for node in self._nodes.values()):
            return False
        left = self._open_until - self._now()
        if left <= 0:
            if not self._nodes and self.spec.resources and self.client.nodes:
                raise ClusterError(f"no node of the cluster at {self.client.address} has free what each worker needs "
                                   f"({shown(self.spec.resources)}): dpool status shows what there is")
            if not self._nodes:
                raise ClusterError(f"the cluster at {self.client.address} has no node: start one with "
                                   f"dpool node {self.client.address}")
            names = ", ".join(node.host for node in self._nodes.values() if not node.opened)
            raise ClusterError(f"no answer within {connections.OPEN_TIMEOUT_S:.0f} s from: {names}")
        for kind, what, _ in self.poll(min(left, 0.2)):
            if kind == HOPELESS:
                raise what
        return True

    def _on_placed(self, placed: messages.Placed) -> None:
        self._inbox.append(("placed", placed))
        self._connections.wake()

    def _follow(self, placed: messages.Placed) -> None:
        """Open sessions for what the head has placed and is not there."""
        if placed.epoch <= self._standing.epoch or self._closing or self._killed:
            return
        has = self._parts()
        for member in placed.members:
            more = member.workers - has.get(member.node, 0)
            if more > 0 and member.addresses:
                self._connect(Node(member, more, self.client.around.new_id(), self.client.sharing,
                                   self._now() + connections.OPEN_TIMEOUT_S))
        self._tell_head(placed.epoch)

    def _parts(self) -> dict[bytes, int]:
        parts: dict[bytes, int] = {}
        for node in self._nodes.values():
            parts[node.id] = parts.get(node.id, 0) + node.workers
        return parts

    def _tell_head(self, epoch: int | None = None) -> None:
        now = self._now()
        self._avoid = {id: until for id, until in self._avoid.items() if until > now}
        self.client.update(self._standing, epoch or self._standing.epoch, self._parts(), list(self._avoid))

    def _connect(self, node: Node) -> None:
        self._nodes[node.key] = node
        self._connections.open(node)
        spec = self.spec
        self._post(node, messages.Open(
            node.key, self.group, self.client.id, messages.Versions.here(), node.workers,
            self._prefix, self._first_number, spec.max_tasks, spec.on_demand, self._initializer >= 0,
            bytes(mp_process.current_process().authkey), os.getcwd(), [str(arg) for arg in sys.argv],
            spec.resources, self._replaces, self.client.around.has_bulk()),
            [pieces(self._initializer)] if self._initializer >= 0 else [])
        node.first_slot = self._first_number % (1 << 16)
        self._first_number += node.workers
        if spec.all_cpus:
            spec.processes = max(sum(one.workers for one in self._nodes.values()), 1)

    def _tell(self, kind: str, what: Any) -> None:
        self._inbox.append((kind, what))
        node = what[0]
        if kind == "lost" or node.luggage.objects or not what[2]:  # some of the objects may be gone here
            self._connections.wake()

    # -- what the group asks

    @property
    def count(self) -> int:
        """Living workers, on all nodes."""
        return len(self.processes) if self._pump is None else self._pump.count

    def start(self) -> None:
        """Nothing: nodes replace their own workers."""

    def demand(self, queued: int, inflight: int) -> None:
        """There is work for so many workers, where workers are started on demand."""
        if not self.spec.on_demand:
            return
        nodes = [node for node in tuple(self._nodes.values()) if node.opened]
        self._shipping.demand(nodes, min(queued + inflight, self.spec.processes))
        self._flush_or_wake()
        if not self._any.is_set() and threading.get_ident() != self._owner:
            # As where a submit() starts the first worker itself: when it returns, there is one.
            self._any.wait(FIRST_WORKER_WITHIN_S)

    def send(self, parts: list[bytes], descriptors: list[int]) -> bool:
        """Deal one batch to the node that has the most room for it; False if there is none now."""
        dealt = self._shipping.deal(parts, descriptors)
        if dealt:
            self._flush_or_wake()
        return dealt

    def wake(self) -> None:
        if self._pump is not None:
            self._pump.wake()
        else:
            self._connections.wake()

    def claimed(self) -> dict[int, int]:
        """Every batch that was dealt to a node: which of them no worker has begun the nodes find out, and say so."""
        return dict.fromkeys(self._shipping.batches, 0)

    def unread(self) -> bool:
        """Never: see claimed()."""
        return False

    def steal(self, number: int) -> int:
        """Ask for the unbegun tasks of a batch; 0 now, STOLEN later."""
        self._shipping.steal(number)
        self._flush_or_wake()
        return 0

    def stop(self, tasks: list[tuple[int, int]]) -> set[int]:
        """Ask for the end of the workers that are in one of `tasks`, each (batch, index), now or later; their deaths
        tell which they were."""
        self._shipping.stop(tasks)
        self._flush_or_wake()
        return set()

    def signal(self, node: Node, slot: int, number: int) -> None:
        """Send a signal to one worker."""
        self._leave(node, messages.Signal(slot, number))

    def close_tasks(self) -> None:
        self._closing = True
        for node in tuple(self._nodes.values()):
            self._leave(node, messages.CloseTasks())

    def kill(self, at_once: bool = True) -> None:
        self._killed = True
        self._any.set()
        for node in tuple(self._nodes.values()):
            self._leave(node, messages.Kill(at_once))
        self._connections.wake()
        self.wake()

    def _leave(self, node: Node, message: messages.Message) -> None:
        self._shipping.leave(node, message)
        self._flush_or_wake()

    def _flush_or_wake(self) -> None:
        if threading.get_ident() == self._owner:
            self._flush()
        else:
            self._connections.wake()

    # -- the I/O thread

    def poll(self, timeout: float | None) -> Sequence[tuple[int, Any, list[int]]]:
        """What has happened; waits for it up to `timeout` seconds."""
        if self._pump is not None:
            return self._pump.poll(timeout)
        events = self._turn(timeout)
        if self._open and (self._lending.in_use or self._lending.lends):
            # From now on calls are answered whatever the caller does with these events. It sends no more by itself.
            self._owner = 0
            self._pump = Pump(self._turn, self._connections.wake, lambda: len(self.processes),
                              self.client.around.waker())
        return events

    def _turn(self, timeout: float | None) -> Sequence[tuple[int, Any, list[int]]]:
        self._owner = threading.get_ident()
        events: list[tuple[int, Any, list[int]]] = []
        self._catch_up(events)
        if not events:
            self._connections.wait(self._until_due(timeout))
            self._catch_up(events)
        self._look_after(events)
        return events

    def _catch_up(self, events: list[tuple[int, Any, list[int]]]) -> None:
        """Send and receive what there is. Not once, unless there are events: sending may use up the news of what has
        come, and what has come may say that there is room for more."""
        while True:
            self._flush()
            self._drain(self._connections.stirred(), events)
            self._work_inbox(events)
            if events or (self._connections.still and not self._shipping.waits):
                break

    def _until_due(self, timeout: float | None) -> float | None:
        waiting = self._connections.deadlines()
        if self._empty_since is not None:
            waiting.append(self._empty_since + REPLACE_WITHIN_S)
        if self._level_at is not None:
            waiting.append(self._level_at)
        if self._avoid:
            waiting.append(min(self._avoid.values()))
        if (due := self._lending.deadline) is not None:
            waiting.append(due)
        if not waiting:
            return timeout
        left = max(min(waiting) - self._now(), 0.0)
        return left if timeout is None else min(left, timeout)

    def _flush(self) -> None:
        """Send what was left for nodes."""
        while (taken := self._shipping.take()) is not None:
            node, unsent = taken
            for message in unsent:
                self._say(node, message)
        for node in self._shipping.for_bulk():
            self._lanes.pour(node)

    def _drain(self, nodes: list[Node], events: list[tuple[int, Any, list[int]]]) -> None:
        """Receive, until there is nothing more, from nodes that may have sent something."""
        for node in nodes:
            if node.lane is not None:
                self._lanes.stirred(node)
            dialer = node.dialer
            if dialer is None:
                continue
            for received in dialer.receive():
                try:
                    self._on_frames(node, received, events)
                except (msgspec.DecodeError, sessions.ProtocolError, BadPiece, OSError, ValueError) as error:
                    self._lose(node, f"{type(error).__name__}: {error}", events)
                if node.lost:
                    break
            if node.lost:
                continue  # its connection is closed, and cannot even be asked whether there is more
            if node.session.owes_acknowledgement:
                self._connections.send(node, node.session.acknowledgement())
            self._shipping.look_again(node)
            dialer.watch()
            if dialer.broken and node.dialer is dialer and (why := self._connections.broken(node, dialer)):
                self._lose(node, why, events)

    def _on_frames(self, node: Node, received: list[memoryview], events: list[tuple[int, Any, list[int]]]) -> None:
        head = received[0]
        kind, flags, count, _, number, acknowledged = sessions.HEADER.unpack_from(head)
        body = head[sessions.HEADER.size:]
        if not number and kind == sessions.CONTROL:
            self._on_connection_message(node, messages.from_node.decode(body), events)
        elif not node.session.accept(kind, number, acknowledged):
            pass
        elif kind == sessions.RESULTS:
            descriptors = node.arrivals.take(count)
            result_flags, _, _, batch = frames.RESULTS.unpack_from(body)[:4]
            if result_flags & frames.DONE:
                self._shipping.settle(batch)
            slot = (_SLOT.unpack_from(body, _SLOT_AT)[0] + node.first_slot) % (1 << 16)
            _SLOT.pack_into(body, _SLOT_AT, slot)
            events.append((MESSAGE, body, descriptors))
        elif kind == sessions.CHUNK:
            size, start = sessions.CHUNK_HEADER.unpack(body)
            node.arrivals.add(size, start, received[1])
        elif kind == sessions.CONTROL:
            self._on_control(node, messages.from_node.decode(body), count, events)

    def _on_connection_message(self, node: Node, message: messages.Message,
                               events: list[tuple[int, Any, list[int]]]) -> None:
        if isinstance(message, messages.Resumed):
            self._connections.resumed(node, message.received)
        elif isinstance(message, messages.Gone):
            self._lose(node, "it knows nothing of this group any more", events)

    def _on_control(self, node: Node, message: messages.Message, count: int,
                    events: list[tuple[int, Any, list[int]]]) -> None:
        if isinstance(message, messages.Opened):
            node.opened = True
            self._add_workers(node, message.workers)
            events.append((CHANGED, [], []))
        elif isinstance(message, messages.Started):
            self._add_workers(node, message.workers)
            events.append((CHANGED, [], []))
        elif isinstance(message, messages.Died):
            self._on_died(node, message, events)
        elif isinstance(message, messages.Lost):
            self._shipping.settle(message.batch)
            events.append((LOST, message.batch, []))
        elif isinstance(message, messages.GivenBack):
            node.asked_back = False
            self._level_at = self._now() + (UNEVEN_FOR_S if message.batches else UNEVEN_AGAIN_S)
            for batch in message.batches:
                self._shipping.settle(batch)
                events.append((LOST, batch, []))
        elif isinstance(message, messages.Stolen):
            self._shipping.stolen(node, message.batch)
            if message.count:
                events.append((STOLEN, (message.batch, message.count), []))
        elif isinstance(message, messages.Got):
            self._shipping.got(node, message.key)
            self._lanes.got(node, message.key)
        elif isinstance(message, messages.Missing):
            self._shipping.missing(node, message)
        elif isinstance(message, messages.BulkOffer):
            self._lanes.offered(node, message)
        elif isinstance(message, messages.BulkOver):
            self._lanes.ended(node, message.name)
        elif isinstance(message, messages.Output):
            _print(message.stream, message.data)
        elif isinstance(message, messages.Failed):
            error = ClusterError(message.reason)
            self._lose(node, message.reason, events, LACKING_AVOID_S if message.passing else None)
            if not self._nodes and not message.passing:
                events.append((HOPELESS, error, []))
        elif isinstance(message, messages.Wanted):
            self._answer(node, message)
        elif isinstance(message, messages.Call):
            self._lending.call(node.key, self._with_content(node, message, count))
        elif isinstance(message, messages.Returned):
            self._lending.returned(node.key, self._with_content(node, message, count))
        elif isinstance(message, messages.Dropped):
            self._lending.dropped(node.key, message.request)
        elif isinstance(message, messages.Ended):
            self._lending.ended(node.key, message.process)

    def _answer(self, node: Node, message: messages.Wanted) -> None:
        found = answer(message.name, self._fetch)
        if found is None:
            self._post(node, messages.Found(message.request, False))
            return
        digest = messages.digest_of(found)
        if (node.id, digest) in self.client.told and not message.whole:
            self._post(node, messages.Found(message.request, True, digest))
            return
        self._post(node, messages.Found(message.request, True, digest), [_carried(found)])
        self.client.told.add((node.id, digest))

    def _answer_call(self, session: bytes, request: int, outcome: int, number: int, content: bytes) -> None:
        """What came of a call to what is lent. A node that is lost has no use for it."""
        node = self._nodes.get(session)
        if node is None:
            return
        if len(content) <= frames.INLINE_CALL_BYTES:
            self._post(node, messages.Answer(request, outcome, number, content))
        else:
            self._post(node, messages.Answer(request, outcome, number), [_carried(content)])

    @staticmethod
    def _with_content(node: Node, message: Carrying, count: int) -> Carrying:
        """A message with what came before it."""
        for descriptor in node.arrivals.take(count):
            with open(descriptor, "rb") as file:
                file.seek(0)
                message = msgspec.structs.replace(message, content=file.read())
        return message

    def _add_workers(self, node: Node, slots: list[messages.Slot]) -> None:
        for slot in slots:
            process = RemoteProcess(self, node, slot)
            node.living[slot.slot] = process
            self.processes.append(process)
        self._shipping.staffed(node)
        self._empty_since = None
        if slots:
            self._any.set()

    def _on_died(self, node: Node, message: messages.Died, events: list[tuple[int, Any, list[int]]]) -> None:
        process = node.living.pop(message.slot, None)
        if process is not None:
            process.ended(message.exitcode)
            self.processes.remove(process)
            self._shipping.staffed(node)
        self.supervisor.failed_starts = message.failed_starts
        if message.batch:
            self._shipping.settle(message.batch)
        slot = (message.slot + node.first_slot) % (1 << 16)
        events.append((DEATH, Death(slot, message.pid, message.exitcode, message.batch, message.task, message.ready,
                                message.trace, message.expected, node.host, message.stopped), []))

    # -- nodes that are lost

    def _look_after(self, events: list[tuple[int, Any, list[int]]]) -> None:
        """What falls due with time."""
        now = self._now()
        for node, why in self._connections.tend(now):
            self._lose(node, why, events)
        self._level(now)
        self._lending.turn()
        if self._avoid and now >= min(self._avoid.values()):
            self._tell_head()  # that the node may serve again
        if self._empty_since is not None and now >= self._empty_since + REPLACE_WITHIN_S:
            self._empty_since = None
            events.append((HOPELESS, ClusterError(
                f"every node of this group was lost, and the cluster at {self.client.address} has had no other for "
                f"{REPLACE_WITHIN_S:.0f} s"), []))

    def _level(self, now: float) -> None:
        """Have batches given back that wait on one node while workers of another have none."""
        uneven = self._shipping.uneven()
        if uneven is None or uneven[0].asked_back:
            self._level_at = None
        elif self._level_at is None:
            self._level_at = now + UNEVEN_FOR_S
        elif now >= self._level_at:
            self._level_at = None
            node, count = uneven
            node.asked_back = True
            self._leave(node, messages.GiveBack(count))

    def _work_inbox(self, events: list[tuple[int, Any, list[int]]]) -> None:
        while self._inbox:
            kind, what = self._inbox.popleft()
            if kind == "placed":
                self._follow(what)
            elif kind == "echo":
                node, received, linked, bulk = what
                if received <= node.session.sent:
                    node.session.acknowledged(received)
                self._connections.linked(node, linked)
                self._shipping.look_again(node)
                if node.lane is not None:
                    self._lanes.echoed(node, bulk)
                if node.luggage.objects and not node.lost:
                    self._shipping.tidy(node)
                    self._flush()
            else:
                node, why = what
                self._lose(node, why, events)

    def _lose(self, node: Node, why: str, events: list[tuple[int, Any, list[int]]],
              avoid_s: float | None = None) -> None:
        """A node is lost: whatever it still sends is not listened to, and its batches run elsewhere."""
        if node.lost or node.key not in self._nodes:
            return
        node.lost = why
        self._any.set()
        del self._nodes[node.key]
        batches = self._shipping.lose(node)
        self._lending.lost(node.key)
        self._lanes.close(node)
        self._connections.lose(node)
        node.arrivals.close()
        for process in node.living.values():
            process.ended(None)
            self.processes.remove(process)
        slots = [(slot + node.first_slot) % (1 << 16) for slot in node.living]
        node.living.clear()
        self._avoid[node.id] = self._now() + (AVOID_S if avoid_s is None else avoid_s)
        self._tell_head()
        events.extend((NODE_LOST, (batch, node.host, why), []) for batch in batches)
        events.append((CHANGED, slots, []))
        if not self._nodes and not self._closing and not self._killed:
            self._empty_since = self._now()

    # -- sending, by the I/O thread

    def _post(self, node: Node, message: messages.Message, carried: Sequence[Pieces] = ()) -> None:
        """Send a message, behind the segments that belong to it."""
        for unsent in itertools.chain(*map(segment, carried), control(message, len(carried))):
            self._say(node, unsent)

    def _say(self, node: Node, unsent: Unsent) -> None:
        self._connections.send(node, node.session.wrap(*unsent))

    # -- the end

    def close(self) -> None:
        """Leave the nodes; what still runs there is killed. May be called again."""
        if self._closed:
            return
        self._closed = True
        if self._pump is not None:
            self._pump.stop()
        self.client.remove(self._standing)
        self._lending.close()
        for node in self._nodes.values():
            self._lanes.close(node)
            self._connections.leave(node)
            node.arrivals.close()
            node.luggage.end()
            for process in node.living.values():
                process.ended(None)
        self._connections.close()
        # Locks among the arguments are given back with the last reference. This object is in cycles, and waits for the
        # garbage collector.
        self.spec = copy.copy(self.spec)
        self.spec.initargs = ()
        if self._initializer >= 0:
            os.close(self._initializer)


def _name_prefix(spec: GroupSpec) -> str:
    """What stands for "Process" in the names of workers: with the prefix that the context's own class has."""
    name = getattr(getattr(spec.context, "Process", None), "__name__", "Process")
    return name.replace("Process", spec.worker_name)


def _carried(content: bytes) -> Pieces:
    """A segment with this content, cut into pieces."""
    descriptor, _ = segments.write([content])
    try:
        return pieces(descriptor, [(0, len(content))])
    finally:
        os.close(descriptor)


def _print(stream: int, data: bytes) -> None:
    """Write what workers have written to where this process writes."""
    target = sys.stdout if stream == 1 else sys.stderr
    if target is not None:
        try:
            target.write(data.decode(getattr(target, "encoding", None) or "utf-8", "replace"))
            target.flush()
        except (OSError, ValueError):
            pass  # closed: there is nowhere to write to
