"""How costs grow: a driver's with tasks and nodes, the head's messages, bytes and memory with nodes and groups.

Drives the real Dispatch, ClusterPort and Membership, with nodes that are no more than a heap of what they will answer.
Prints curves by hand, `python -m tests.simulation --scale`; counts, without a clock, for tests/test_simulation.py.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, cast

from dpool import engine
from dpool.cluster.driver.client import Client
from dpool.cluster.driver.dispatch import Dispatch, Job, Timing
from dpool.cluster.driver.luggage import Sharing
from dpool.cluster.driver.remote import ClusterPort
from dpool.cluster.head.membership import Membership
from dpool.cluster.wire import frames, messages, sessions
from dpool.cluster.wire.events import MESSAGE
from dpool.cluster.wire.surroundings import Surroundings
from dpool.engine import GroupSpec

VERSIONS = messages.Versions.here()
WORKERS_A_NODE = 4


class _Sink:
    def set(self, first: int, values: Sequence[Any]) -> None:
        pass


class _Items:
    """So many items that take no room."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


class _Link:
    """A dialer to a node that answers every batch after a while, and the node."""

    def __init__(self, cluster: _Cluster, number: int) -> None:
        self.cluster = cluster
        self.number = number
        self.descriptors = [number]
        self.session = sessions.Session()
        self.inbox: deque[list[memoryview]] = deque()
        self.broken = False

    def send(self, parts: Sequence[bytes | memoryview]) -> bool:
        kind, _, _, _, number, acknowledged = sessions.HEADER.unpack_from(parts[0])
        if not self.session.accept(kind, number, acknowledged) or kind != sessions.TASKS:
            return True
        _, _, _, _, batch, count, *_ = frames.TASKS.unpack_from(parts[0], sessions.HEADER.size)
        self.cluster.begin(self, batch, count)
        return True

    def receive(self) -> Iterator[list[memoryview]]:
        while self.inbox:
            yield self.inbox.popleft()

    def watch(self) -> None:
        pass

    def control(self, message: messages.Message, in_session: bool = True) -> None:
        body = messages.encode(message)
        if in_session:
            self.say(sessions.CONTROL, body)
        else:
            self.inbox.append([memoryview(bytearray(sessions.HEADER.pack(sessions.CONTROL, 0, 0, 0, 0, 0) + body))])

    def say(self, kind: int, body: bytes) -> None:
        self.inbox.append([memoryview(bytearray(self.session.wrap(kind, (body,))[0]))])
        self.cluster.ready.add(self.number)


class _Cluster(Surroundings):
    """The surroundings of a driver whose nodes are links, and its waker. Time is the tasks'."""

    def __init__(self, run_s: float) -> None:
        self.run_s = run_s
        self.time = 0.0
        self.ready: set[int] = set()
        self.links: list[_Link] = []
        self._due: list[tuple[float, int, int, int]] = []  # when, link, batch, tasks
        self._numbers = itertools.count(1)
        self.now = lambda: self.time

    def dialer(self, role: str, server: str, address: str, again: bool = False) -> Any:
        self.links.append(_Link(self, len(self.links)))
        return self.links[-1]

    def waker(self) -> Any:
        return self

    def new_id(self) -> bytes:
        return next(self._numbers).to_bytes(16, "big")

    def add(self, descriptors: object) -> None:
        pass

    remove = add

    def wake(self) -> None:
        pass

    def begin(self, link: _Link, batch: int, count: int) -> None:
        heapq.heappush(self._due, (self.time + self.run_s * count, link.number, batch, count))

    def wait(self, timeout: float | None) -> set[int]:
        if not self.ready and self._due:
            self.time, number, batch, count = heapq.heappop(self._due)
            self.links[number].say(sessions.RESULTS, frames.RESULTS.pack(
                frames.DONE, 0, 0, batch, 0, count, count, int(self.run_s * count * 1e9), 0, 0, 0))
        ready, self.ready = self.ready, set()
        return ready


class _NoClient:
    """A client that speaks to nobody."""

    id = bytes(16)
    address = "tcp://head:7077"

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self.sharing = Sharing()

    def ignore(self, *_: object) -> None:
        pass

    add = update = remove = watch = unwatch = dismiss = ignore


class Work:
    """A driver with `nodes` nodes and `tasks` tasks: run() does them all."""

    def __init__(self, nodes: int, tasks: int, run_s: float = 1.0) -> None:
        self.cluster = _Cluster(run_s)
        spec = GroupSpec(nodes * WORKERS_A_NODE, None)  # type: ignore[arg-type]
        self.port = port = ClusterPort(cast(Client, _NoClient(self.cluster)), spec)
        members = [messages.Member(number.to_bytes(16, "big"), [f"tcp://node{number}:1"], f"node{number}",
                                   WORKERS_A_NODE) for number in range(nodes)]
        port._on_placed(messages.Placed(port.group, 1, members))
        port.poll(0)
        for link in self.cluster.links:
            link.control(messages.Resumed(bytes(16), 0), in_session=False)
            link.control(messages.Opened([messages.Slot(slot, 1, "worker") for slot in range(WORKERS_A_NODE)]))
        while port.count < nodes * WORKERS_A_NODE:
            port.poll(0)
        self.dispatch = Dispatch(port.count)
        self.job = Job(None, Timing(), engine.MAP, cast(Sequence[Any], _Items(tasks)), cast(engine.Sink, _Sink()))
        self.batches = self.told = 0

    def run(self) -> None:
        dispatch, port, cluster = self.dispatch, self.port, self.cluster
        dispatch.add(self.job)
        while not dispatch.idle:
            while (batch := dispatch.next_batch(cluster.time)) is not None:
                self.batches += 1
                header = frames.TASKS.pack(0, engine.MAP, 0, 1, batch.number, batch.stop, 0, 0, 0)
                port.send([header, b"", b"", b""], [])
            for kind, what, _ in port.poll(None):
                if kind == MESSAGE:
                    flags, _, _, number, first, count, executed, run_ns, *_ = frames.RESULTS.unpack_from(what)
                    dispatch.report(number, first, count)
                    dispatch.done(number, run_ns, executed)
                    self.told += count


def lines(what: Callable[[], object]) -> int:
    """How many lines of dpool's deciding and dealing code a call runs: a cost that no other load changes."""
    count = 0
    names = ("dispatch.py", "remote.py", "connections.py", "shipping.py", "lanes.py", "membership.py", "dealing.py",
             "batching.py", "sessions.py", "luggage.py")

    def local(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        count += event == "line"
        return local

    def enter(frame: FrameType, event: str, _: object) -> Any:
        return local if frame.f_code.co_filename.endswith(names) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        what()
    finally:
        sys.settrace(before)
    return count


class Head:
    """A head with so many nodes, and drivers of one group each, that have said what they say once a second."""

    def __init__(self, nodes: int, groups: int, tasks: int = 0) -> None:
        self.membership = Membership(bytes(16), VERSIONS)
        self.nodes = nodes
        self.groups = groups
        self.tasks = tasks
        self.messages = self.bytes = 0
        self.parts: dict[int, tuple[int, list[messages.Part]]] = {}
        self.second(0)
        for when in (1, 2):  # drivers follow what they were told
            self.second(when)

    def second(self, number: int) -> None:
        """One second: everybody says what there is to say, and the head answers."""
        for node in range(self.nodes):
            state = messages.NodeState(node.to_bytes(16, "big"), number, f"node{node}", [f"tcp://node{node}:7077"], 4,
                                       VERSIONS, 1 << 34, {}, self.tasks // self.nodes, 4)
            self._say(node.to_bytes(5, "big"), "agent", state, number)
        for group in range(self.groups):
            key = (1_000_000 + group).to_bytes(16, "big")
            epoch, parts = self.parts.get(group, (0, []))
            driver = messages.DriverState(key, number, "driver", 1, VERSIONS,
                                          [messages.GroupState(key, 8, epoch, parts)])
            self._say((1_000_000 + group).to_bytes(5, "big"), "driver", driver, number)
        self._count(self.membership.tick(number))

    def _say(self, connection: bytes, role: str, message: messages.Message, now: float) -> None:
        self.messages += 1
        self.bytes += len(messages.encode(message))
        self._count(self.membership.handle(connection, role, message, now))

    def _count(self, mail: list[tuple[bytes, messages.Message]]) -> None:
        for connection, message in mail:
            self.messages += 1
            self.bytes += len(messages.encode(message))
            if isinstance(message, messages.Placed):
                self.parts[int.from_bytes(connection, "big") - 1_000_000] = (
                    message.epoch, [messages.Part(member.node, member.workers) for member in message.members])


def measure_head(nodes: int, groups: int, tasks: int) -> tuple[int, int, int, float]:
    """Messages and bytes of one second, bytes of memory, and milliseconds of that second."""
    gc.collect()
    tracemalloc.start()
    head = Head(nodes, groups, tasks)
    parts, head.parts = head.parts, {}
    before = tracemalloc.get_traced_memory()[0]
    membership, head.membership = head.membership, Membership(bytes(16), VERSIONS)
    del membership
    memory = before - tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    head = Head(nodes, groups, tasks)
    head.parts = parts
    head.messages = head.bytes = 0
    started = time.perf_counter()
    head.second(3)
    return head.messages, head.bytes, memory, (time.perf_counter() - started) * 1000


def measure_work(nodes: int, tasks: int, run_s: float = 1.0) -> tuple[int, float, float]:
    """Batches, microseconds a task, and microseconds a batch, of the driver's process."""
    work = Work(nodes, tasks, run_s)
    gc.collect()
    started = time.process_time()
    work.run()
    seconds = time.process_time() - started
    assert work.told == tasks
    return work.batches, seconds / tasks * 1e6, seconds / work.batches * 1e6


def curves(nodes: int, tasks: int, which: str) -> None:
    """Print how costs grow, up to so many nodes and tasks: with `tasks`, `nodes` or `both`, or those of the `head`."""
    if which != "head":
        _driver_curve(nodes, tasks, which)
    else:
        _head_curve(nodes, tasks)


def _driver_curve(nodes: int, tasks: int, which: str) -> None:
    print(f"driver: cost of a task's decisions and dealing, {WORKERS_A_NODE} workers a node")
    print(f"{'nodes':>8} {'tasks':>10} {'a task takes':>12} {'batches':>10} {'us/task':>9} {'us/batch':>9}")

    def row(some: int, many: int, run_s: float) -> None:
        batches, of_task, of_batch = measure_work(some, many, run_s)
        print(f"{some:>8,} {many:>10,} {run_s * 1000:>9.1f} ms {batches:>10,} {of_task:>9.2f} {of_batch:>9.2f}",
              flush=True)

    if which == "tasks":
        for many in (1_000, 10_000, 100_000, 1_000_000):
            if many <= tasks:
                row(100, many, 1.0)
    elif which == "nodes":
        for some in (10, 30, 100, 300, 1000, 2000):
            if some <= nodes:
                row(some, min(100_000, tasks), 1.0)
    else:
        for run_s in (1.0, 0.0001):
            row(nodes, tasks, run_s)


def _head_curve(nodes: int, tasks: int) -> None:
    print("head: one second, with groups of 8 workers")
    print(f"{'nodes':>8} {'groups':>8} {'tasks':>12} {'messages':>9} {'bytes':>10} {'memory':>10} {'ms':>8}")
    for some, groups, many in ((10, 1, 0), (100, 1, 0), (1000, 1, 0), (nodes, 1, 0), (nodes, 10, 0), (nodes, 100, 0),
                               (nodes, 10, tasks), (nodes, 10, 1000 * tasks)):
        said, size, memory, took = measure_head(some, groups, many)
        print(f"{some:>8,} {groups:>8,} {many:>12,} {said:>9,} {size:>10,} {memory:>10,} {took:>8.1f}", flush=True)
