"""One history: a cluster that a seed has made up, what its drivers want done, what befalls it, and what must hold.

Builds head, nodes and drivers out of the real loops, and plans the faults. Raises Violation if a task is lost, told
twice, run without need or given up without cause, if anything hangs, or if a node keeps what nobody wants any more.
"""

from __future__ import annotations

import gc
import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any, cast
from unittest import mock

from dpool import engine
from dpool.cluster.driver import dispatch as dispatch_module
from dpool.cluster.driver import group as group_module
from dpool.cluster.driver import luggage, spreading
from dpool.cluster.driver.client import Client
from dpool.cluster.driver.dispatch import Dispatch, Job
from dpool.cluster.driver.functions import FunctionTable
from dpool.cluster.driver.group import Group
from dpool.cluster.driver.remote import ClusterPort
from dpool.cluster.head.membership import Membership
from dpool.cluster.head.server import Head
from dpool.cluster.node import exchange
from dpool.cluster.node.agent import ORPHAN_AFTER_S, Agent
from dpool.cluster.node.part import Part
from dpool.cluster.node.workers import Workers
from dpool.cluster.store import refs, store, transfer
from dpool.cluster.wire import frames, messages
from dpool.cluster.wire.keys import Keys
from dpool.engine import Failure, GroupSpec
from dpool.errors import ClusterError, NodeLost, WorkerDied
from dpool.resources import Stock

from .clock import Process, Thread, Violation, Waker, World
from .network import Network, Place
from .workers import Habits, SimWorker, SimWorkers

HEAD = "tcp://head:7077"
KEYS = Keys(bytes(32))
# After the last fault everything must be done within this time.
DONE_WITHIN_S = 150.0
# After the last fault what was given up must have ended within this time.
FENCED_WITHIN_S = 20.0
# After the last result nodes must have forgotten everything within this time: the lease of a driver, and a little.
FORGOTTEN_WITHIN_S = 100.0
# Where nothing happens to the network, the part of a driver that has died has ended within this time: what a node waits
# for one whose connection has ended, and a little.
DEAD_WITHIN_S = 8.0
# And what a driver has stopped is over: a worker may be in a batch of other tasks first.
STOPPED_WITHIN_S = 20.0
ENDLESS_S = 1000.0
# No fault begins later.
FAULTS_UNTIL_S = 30.0

CALM, BRIEF, DEATHS, WILD = "calm", "brief", "deaths", "wild"
KINDS = (CALM, BRIEF, BRIEF, DEATHS, WILD, WILD, WILD, WILD)

NORMAL, RAISES, POISON = range(3)
Key = tuple[int, int]


def deed(item: Sequence[Any]) -> int:
    """What tasks do. Some have an object, too, at which their worker has looked."""
    job: int = item[0]
    task: int = item[1]
    kind: int = item[2]
    if kind == RAISES:
        raise ValueError(task)
    return job * 1_000_003 + task * 7_919


class Deed:
    """The same, as something that is no function and travels with what it holds."""

    def __init__(self, ballast: bytes) -> None:
        self.ballast = ballast

    def __call__(self, item: Sequence[Any]) -> int:
        return deed(item)


def _rebuild(key: bytes) -> bytes:
    """A worker's ref: all workers of a history have one store, so they keep no handles of their own."""
    return key


_rebuild.__module__ = refs.__name__


class Sink:
    """Takes the outcomes of a job, and judges each."""

    def __init__(self, history: History, driver: Driver, number: int, kinds: Sequence[int]) -> None:
        self.history = history
        self.driver = driver
        self.number = number
        self.kinds = kinds
        self.known: set[int] = set()
        self.job: Any = None  # the group's
        self.endless = False  # some of its tasks do not end until they are stopped
        self.stopped_at: float | None = None

    @property
    def left(self) -> int:
        """Tasks that have no outcome yet and will have one. Of a job that was stopped some have none, and are over."""
        if self.stopped_at is not None:
            return int(self.job.unsettled)
        return len(self.kinds) - len(self.known)

    def start(self) -> bool:
        return True

    def set(self, first: int, values: Sequence[Any]) -> None:
        for task, value in enumerate(values, first):
            self._once(task)
            if self.kinds[task] != NORMAL or value != deed((self.number, task, NORMAL)):
                raise Violation(f"task {task} of job {self.number} has the value {value!r}")

    def fail(self, index: int, failure: Failure) -> None:
        self._once(index)
        key = (self.number, index)
        history, error = self.history, failure.exception
        history.world.say(f"{key} failed: {error!r}")
        if isinstance(error, ValueError):
            if self.kinds[index] == RAISES and error.args == (index,):
                return
        elif isinstance(error, NodeLost):
            if history.lost_with[key] == history.losses + 1:
                return
        elif isinstance(error, WorkerDied):
            if history.died_in[key] > self.driver.spec.retries or self.stopped_at is not None:
                return
        raise Violation(f"task {key} failed without cause: {error!r}")

    def _once(self, task: int) -> None:
        if task in self.known:
            raise Violation(f"task {task} of job {self.number} was told twice")
        self.known.add(task)


class Watched(Dispatch):
    """The group's Dispatch; notes which tasks may have to be run again, and why."""

    history: History

    def node_lost(self, number: int) -> list[tuple[Job, int]]:
        lost = self._keys(number)
        for key in lost:
            self.history.lost_with[key] += 1
            self.history.given_back[key] += 1
        self.history.world.say(f"batch {number} given up with its node: {lost}")
        doomed = super().node_lost(number)
        keys = [(job.sink.number, task) for job, task in doomed]  # type: ignore[attr-defined]
        if keys != [key for key in lost if self.history.lost_with[key] > self.history.losses]:
            raise Violation(f"{keys} are lost for ever, of {lost} that are lost")
        return doomed

    def died(self, number: int, running: int, ended: bool = False) -> tuple[Job, int] | None:
        for key in self._keys(number):
            self.history.given_back[key] += 1
        return super().died(number, running, ended)

    def _keys(self, number: int) -> list[Key]:
        batch = self.inflight.get(number)
        if batch is None:
            return []
        tasks = [batch.task(index) for index in range(batch.reported, batch.stop)]
        return [(job.sink.number, task) for job, task in tasks]  # type: ignore[attr-defined]


class HeadMachine:
    """A head, until it is killed."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.process = Process(history.world, "head", "head")
        self.head = Head(KEYS, HEAD, history.world.say, Place(history.network, self.process))
        Thread(self.process, "head", self._step, cast(Waker, self.head._waker))

    def _step(self) -> bool:
        self.head.step()
        membership = self.head.membership
        membership.validate()
        if self.history.to_nest is not None and membership._load(b"", membership._waiting()) != _load(membership):
            raise Violation("the head counts other CPUs than are taken")
        return True


def _load(membership: Membership) -> dict[bytes, float]:
    """CPUs of each node that are taken: a worker counts unless a driver in it has groups."""
    drivers = membership.drivers.values()
    taken: dict[bytes, float] = {}
    for driver in drivers:
        for group in driver.state.groups:
            placed = driver.placed.get(group.group)
            for part in placed.members if placed is not None else group.parts:
                parents = {one.state.inside.pid for one in drivers if one.state.groups and one.state.inside is not None
                           and (one.state.inside.node, one.state.inside.group) == (part.node, group.group)}
                taken[part.node] = taken.get(part.node, 0.0) + max(part.workers - len(parents), 0)
    return taken


class NodeMachine:
    """An agent, until it is killed."""

    def __init__(self, history: History, host: str, cpus: int, bind: str | None = None) -> None:
        self.history = history
        self.host = host
        self.cpus = cpus
        self.process = Process(history.world, host, host)
        self.agent = Agent(KEYS, HEAD, bind, cpus, Stock({}), history.world.say, ORPHAN_AFTER_S,
                           Place(history.network, self.process), self._make_workers)
        self.address = self.agent.address
        self._add, self.agent.exchange._add = self.agent.exchange._add, self._on_piece  # type: ignore[method-assign]
        Thread(self.process, host, self._step, cast(Waker, self.agent._waker))

    def _make_workers(self, part: Part, message: messages.Open) -> Workers:
        history = self.history

        def died(worker: SimWorker, running: Key | None) -> None:
            history.world.say(f"{self.host}: worker {worker.slot} ends ({worker.exitcode}) in {running}")
            if running is not None:
                history.died_in[running] += 1

        return cast(Workers, SimWorkers(history.world, history.network, history.habits,
                                        lambda key: history.begins(self, key), history.looks, message, died))

    def _on_piece(self, key: bytes, size: int, start: int, piece: memoryview, checksum: int | None = None) -> None:
        """Of an object; the agent's exchange takes it in."""
        self.history.arrived[self.agent.id, key] += piece.nbytes
        self._add(key, size, start, piece, checksum)

    def _step(self) -> bool:
        agent = self.agent
        agent.step()
        agent.exchange.validate()
        agent.inlets.validate()
        for part in agent._parts.values():
            part.ledger.validate()
        if agent._stop.is_set() or agent.refused:
            agent._end()
            self.process.die()
            return False
        return True

    def kill(self, silent: bool = False) -> None:
        if self.process.alive:
            self.process.die()
            self.history.network.died(self.process, silent)
            for driver in self.history.drivers if silent else ():
                if driver.process.host == self.host:
                    driver.kill(silent=True)
            for part in self.agent._parts.values():
                part.close()
            self.agent.exchange.close()

    @property
    def parts(self) -> list[SimWorkers]:
        return [cast(SimWorkers, part.workers) for part in self.agent._parts.values() if part.workers is not None]


class Driver:
    """A program with one pool: the client's thread and the group's. Or another pool of the program of `first`. One that
    is a task, `inside` a worker, has the host of its node."""

    def __init__(self, history: History, number: int, spec: GroupSpec, first: Driver | None = None, host: str = "",
                 inside: messages.Inside | None = None) -> None:
        self.history = history
        self.spec = spec
        self.name = f"driver{number}"
        self.inside = inside
        self.pools: list[Driver] = first.pools if first is not None else []
        self.pools.append(self)
        self.refs: list[refs.ObjectRef] = first.refs if first is not None else []
        self.process: Process = (first.process if first is not None
                                 else Process(history.world, host or self.name, self.name))
        self.place: Place = first.place if first is not None else Place(history.network, self.process)
        self.client: Client = first.client if first is not None else Client(KEYS, HEAD, self.place, inside)
        self.group: Group | None = None
        self.sinks: list[Sink] = []
        self.to_submit = 0
        self.phase = "connecting"
        self._retry_at = 0.0
        self._turns = 0
        self.port = ClusterPort(self.client, spec)
        if first is None:
            Thread(self.process, f"{self.name}, client", self.client.step, self.place.wakers[0])
        self.thread = Thread(self.process, f"{self.name}, group", self._step, self.place.wakers[-1])

    @property
    def finished(self) -> bool:
        return not self.process.alive or (not self.to_submit and not any(sink.left for sink in self.sinks))

    @property
    def gone(self) -> bool:
        return not self.process.alive or all(thread.ended for thread in self.process.threads)

    def _step(self) -> bool:
        history = self.history
        if self.phase == "connecting":
            if self.client._welcomed.is_set() and self.process.now() >= self._retry_at:
                self.phase = "opening"
                self.port.begin()
            else:
                self.port._connections.wait(0.05)
        elif self.phase == "opening":
            try:
                if not self.port.opening():
                    self._open()
            except ClusterError as error:
                history.world.say(f"{self.name}: {error}")
                if history.kind in (CALM, BRIEF):
                    raise Violation(f"the pool does not open: {error}") from error
                self.port.kill()
                self.port.close()
                self.port = ClusterPort(self.client, self.spec)
                self.thread.waker = self.place.wakers[-1]
                self.thread.waker.thread = self.thread
                self._retry_at = self.process.now() + 1.0
                self.phase = "connecting"
        elif self.group is not None:
            if not self.group.step():
                self.phase = "closed"
            self._check()
            if self.phase == "closed":
                if all(pool.phase == "closed" for pool in self.pools):
                    self.client.close()
                return False
        return True

    def _check(self) -> None:
        assert self.group is not None
        if self.group.ended is not None:
            raise Violation(f"the group has ended: {self.group.ended!r}")
        if self.port._avoid and self.history.kind != WILD:
            raise Violation(f"a node was given up without cause, in a {self.history.kind} history")
        self.history.gave_up |= bool(self.port._avoid)
        self._turns += 1
        if self._turns % 4 == 0:
            self.group._dispatch.validate()

    def _open(self) -> None:
        history, random = self.history, self.history.world.random
        self.phase = "open"
        known = history.head.head.membership.drivers.get(self.client.id)
        if known is not None and known.state.inside != self.inside:
            raise Violation(f"the head takes {self.name} for one in {known.state.inside}")
        port, spec = self.port, self.spec
        self.group = Group(spec, port, port.supervisor, self.process.now)
        watched = Watched(port.count, spec.retries, spec.max_tasks, port.splits)
        watched.history = history
        self.group._dispatch = watched
        for _ in range(self.to_submit):
            history.world.after(random.random() * history.spread, self._submit)

    def _submit(self) -> None:
        """As another thread of the program does."""
        history, random, group = self.history, self.history.world.random, self.group
        if not self.process.alive or group is None:
            return
        if self.process.frozen:
            history.world.after(0.5, self._submit)
            return
        owner = self.port._owner
        if self.port._any.is_set():
            self.port._owner = 0
        number = history.new_job()
        function = history.function(number)
        single = random.random() < 0.3
        many = 60 if history.tempo > 0.01 else 200
        kinds = [history.kind_of_task() for _ in range(1 if single else random.choice([1, 3, 20, many]))]
        items: list[tuple[Any, ...]] = [(number, task, kind) for task, kind in enumerate(kinds)]
        if self.refs and random.random() < 0.8:
            ref = random.choice(self.refs)
            items = [(*item, ref) for item in items]
        sink = Sink(history, self, number, kinds)
        self.sinks.append(sink)
        if single:
            sink.job = group.submit(function, (items[0],), {}, sink)
        else:
            sink.job = group.submit_many(function, items, engine.MAP, sink)
        self.to_submit -= 1
        self._forget_some()
        self.port._owner = owner
        if history.stops is not None and history.stops.random() < 0.4:
            sink.endless = True
            history.world.after(history.stops.choice([0.0, 0.05, 1.0, 5.0]) * history.stops.random(),
                                lambda: self._stop(sink))
        # In a calm history an object that one pool had stays for the other.
        if not self.to_submit and random.random() < 0.5 and (len(self.pools) == 1 or history.kind != CALM):
            group.close()

    def _stop(self, sink: Sink) -> None:
        """The program, in another thread, wants nothing more of a job."""
        history = self.history
        if not self.process.alive or self.group is None or not sink.left:
            return
        if self.process.frozen:
            history.world.after(0.5, lambda: self._stop(sink))
            return
        owner, self.port._owner = self.port._owner, 0
        sink.stopped_at = history.world.now
        dropped = self.group.stop(sink.job)
        self.port._owner = owner
        history.world.say(f"{self.name} stops job {sink.number}: {dropped} tasks of it are dropped")
        if history.kind == CALM:
            history.world.after(STOPPED_WITHIN_S, lambda: self._check_stopped(sink))

    def _check_stopped(self, sink: Sink) -> None:
        if sink.left:
            raise Violation(f"job {sink.number} was stopped {STOPPED_WITHIN_S:.0f} s ago, and {sink.left} of its tasks "
                            f"are not over")

    def _forget_some(self) -> None:
        """The program lets go of an object that no task needs any more."""
        random = self.history.world.random
        if self.refs and random.random() < 0.2 and not any(sink.left for pool in self.pools for sink in pool.sinks):
            self.history.forget(self.refs.pop(random.randrange(len(self.refs))))

    def close(self) -> None:
        if self.group is not None:
            self.group.close()

    def kill(self, silent: bool = False) -> None:
        """The process ends; what its kernel would close is closed."""
        if self.process.alive:
            self.process.die()
            self.history.network.died(self.process, silent)
            for pool in self.pools:
                pool._let_go()

    def _let_go(self) -> None:
        for node in self.port._nodes.values():
            node.arrivals.close()
        if self.group is not None and self.phase != "closed":
            here = self.group._store
            holders = [one.holder for one in here.ledger.segments.values() if type(one.holder) is tuple]
            for holder in holders:
                if holder[0] is self.group:
                    here.lost(holder)
            here.detach()

    def end_with_worker(self) -> None:
        """The worker that it is in has ended."""
        if self.process.alive:
            self.history.world.say(f"{self.name} ends with its worker")
            self.kill()
            if self.history.kind in (CALM, DEATHS):
                self.history.world.after(DEAD_WITHIN_S, self._check_gone)

    def _check_gone(self) -> None:
        for node in self.history.nodes:
            if node.process.alive and any(part.group == self.port.group for part in node.agent._parts.values()):
                raise Violation(f"{node.host} has workers of {self.name} {DEAD_WITHIN_S:.0f} s after its death")


class History:
    """A seed's history, of the kind that it chooses if none is given. run() raises Violation if something is wrong."""

    def __init__(self, seed: int, kind: str | None = None) -> None:
        self.seed = seed
        self.world = World(seed)
        self.network = Network(self.world)
        random = self.world.random
        self.kind = random.choice(KINDS)
        self.kind = kind or self.kind
        self.habits = self._habits()
        self.network.latency, self.network.jitter = random.choice([(0.0002, 0.0002), (0.002, 0.01), (0.08, 0.05)])
        self.poison = random.choice([0.0, 0.0, 0.02]) if self.kind in (DEATHS, WILD) else 0.0
        self.spread = random.choice([1.0, 20.0, 60.0] if self.kind == BRIEF else [0.01, 10.0, 20.0])
        slow = [0.0005, 0.005, 0.1, 0.4, 0.4]
        self.tempo = random.choice(slow if self.kind in (BRIEF, WILD) else [0.0002, 0.005, 0.1])
        self.tail = random.choice([10.0, 10.0, 1000.0]) if self.tempo < 0.01 else 5.0  # what a few take longer
        self.segments = random.random() < 0.3
        self.by_name = random.random() < 0.2
        self.objects = random.choice([0, 0, 1, 3])  # that a driver's tasks need
        self.contents: dict[bytes, bytes] = {}  # of objects
        self.arrived: Counter[tuple[bytes, bytes]] = Counter()  # node, object -> bytes
        self.network.spoils = random.choice([0.0, 0.01]) if self.kind == WILD else 0.0
        self.losses = random.choice([0, 1, 3])  # how often a task may be run again whose node is lost
        # Not the process's: that one keeps segments warm for whatever else the process does.
        self.store = store.Store(store.memory_bytes(), tempfile.gettempdir())
        self.store._keep_warm_alone = lambda: None  # type: ignore[method-assign]  # by a thread of its own
        self.jobs = 0
        # How many tasks are still to become drivers; None where tasks do not. By a random of its own, so that all other
        # histories are what they are without it.
        self._nesting = Random(f"tasks that drive, seed {seed}")
        self.to_nest = self._nesting.randint(1, 6) if self._nesting.random() < 0.25 else None
        # Which processes can have bulk connections, and to which hosts they cannot be made: for the same reason.
        self._bulk = self.network.bulk_random = Random(f"bulk connections, seed {seed}")
        self.network.bulk_share = self._bulk.choice([0.0, 1.0, 1.0, 0.7])
        # By what jobs are stopped, in the same way; None where none is.
        stops = Random(f"jobs that are stopped, seed {seed}")
        self.stops = stops if stops.random() < 0.25 else None
        self.gave_up = False  # a driver has given up a node
        self.begun: Counter[Key] = Counter()
        self.given_back: Counter[Key] = Counter()
        self.lost_with: Counter[Key] = Counter()
        self.died_in: Counter[Key] = Counter()
        self.head: HeadMachine
        self.nodes: list[NodeMachine] = []
        self.drivers: list[Driver] = []

    def _habits(self) -> Habits:
        random = self.world.random
        habits = Habits(socket_bytes=random.choice([200, 2000, 1 << 20]), large_results=random.choice([0.0, 0.0, 0.3]))
        if self.kind in (DEATHS, WILD) and random.random() < (1.0 if self.kind == DEATHS else 0.4):
            habits.claim_s = random.choice([0.001, 0.05])
            for name in ("dies_taking", "dies_in_task", "dies_leaving", "dies_starting", "dies_idle"):
                setattr(habits, name, random.choice([0.0, 0.01, 0.05]))
        return habits

    # -- what workers and drivers ask

    def new_job(self) -> int:
        self.jobs += 1
        return self.jobs

    def function(self, number: int) -> Callable[[Any], Any]:
        if self.by_name:
            return deed
        return Deed(bytes(self.world.random.choice([0, 0, 500])))

    def new_ref(self) -> refs.ObjectRef:
        """A new object, of a size that all nodes get from the driver or of one that they get from each other."""
        content = self.world.random.randbytes(self.world.random.choice([100, 1_000, 5_000, 20_000]))
        ref = refs.store_value(content)
        assert ref._stored is not None
        self.contents[ref.key] = bytes(self.store.open(ref._stored)[0])
        return ref

    def forget(self, ref: refs.ObjectRef) -> None:
        """As when the last handle goes, but at a time that does not depend on the garbage collector."""
        ref._stored = None
        self.store.drop(ref.key)

    def looks(self, key: bytes, content: bytes) -> None:
        """A worker looks at an object."""
        if content != self.contents[key]:
            raise Violation(f"object {key.hex()} is not what was stored")

    def kind_of_task(self) -> int:
        luck = self.world.random.random()
        return POISON if luck < self.poison else RAISES if luck > 0.97 else NORMAL

    def begins(self, node: NodeMachine, key: Key) -> float | None:
        """A worker begins a task: how long that takes, None if the worker dies of it."""
        self.begun[key] += 1
        sink = next(sink for driver in self.drivers for sink in driver.sinks if sink.number == key[0])
        if sink.driver.process.alive and self.begun[key] > 1 + self.given_back[key]:
            raise Violation(f"task {key} is run for the {self.begun[key]}. time, on {node.host}, and was given up "
                            f"{self.given_back[key]} times")
        if sink.kinds[key[1]] == POISON:
            return None
        if sink.endless and self.stops is not None and self.stops.random() < 0.3:
            return ENDLESS_S
        random = self.world.random
        return self.tempo * random.random() * (self.tail if random.random() < 0.05 else 1.0)

    # -- the whole

    def run(self) -> None:
        """The history from beginning to end."""
        with self._patched():
            before = _open_descriptors()
            try:
                self._begin()
                self._live()
                self._end()
            except Violation:
                raise
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                raise Violation(f"{type(error).__name__}: {error}, in {where.name}, line {where.lineno}") from error
            finally:
                self._clean()
        self.nodes.clear()
        self.drivers.clear()
        self.world.end()
        self.network.end()
        if _open_descriptors() > before:
            gc.collect()
            if _open_descriptors() > before:
                raise Violation(f"{_open_descriptors()} descriptors are open, {before} were before")
        if self.store.ledger.total:
            raise Violation(f"the store still holds {self.store.summary()}")

    @contextmanager
    def _patched(self) -> Iterator[None]:
        """What is a process's own in reality is a history's own here; and small things count as large ones."""
        clock = mock.Mock(monotonic=lambda: self.world.now)
        with (mock.patch.object(group_module, "table", FunctionTable()), mock.patch.object(store, "time", clock),
              mock.patch.object(store, "_store", self.store),
              mock.patch.object(frames, "INLINE_MAX_BYTES", 100 if self.segments else frames.INLINE_MAX_BYTES),
              mock.patch.object(transfer, "PIECE_BYTES", 64 if self.segments else transfer.PIECE_BYTES),
              mock.patch.object(dispatch_module, "NODE_LOSSES", self.losses),
              mock.patch.object(refs, "SMALL_BYTES", 16), mock.patch.object(refs, "_rebuild", _rebuild),
              mock.patch.object(spreading, "FETCH_MIN_BYTES", 500), mock.patch.object(exchange, "WINDOW_BYTES", 2_000),
              mock.patch.object(transfer, "OBJECT_PIECE_BYTES", 100),
              mock.patch.object(luggage, "MAX_KEPT", 2 if self.segments else luggage.MAX_KEPT)):
            yield

    def _begin(self) -> None:
        random = self.world.random
        self.world.say(f"seed {self.seed}: a {self.kind} history")
        self.head = HeadMachine(self)
        if self.kind != CALM:
            self.network.bulk_breaks = {self._bulk.randint(1, 200) for _ in range(self._bulk.choice([0, 1, 3]))}
        if self._bulk.random() < 0.2:
            self.network.walled.add(f"node{self._bulk.randrange(3)}")
        for number in range(random.choice([1, 1, 2, 3, 4])):
            self.nodes.append(NodeMachine(self, f"node{number}", random.randint(1, 4)))
        for number in range(random.choice([1, 1, 2])):
            spec = GroupSpec(random.randint(1, 6), None, retries=random.randint(0, 2),  # type: ignore[arg-type]
                             max_tasks=random.choice([None, None, 5]), on_demand=random.random() < 0.2,
                             all_cpus=random.random() < 0.3)
            driver = Driver(self, number, spec)
            driver.to_submit = random.randint(1, 4) if self.kind in (CALM, DEATHS) else random.randint(2, 8)
            self.drivers.append(driver)
            driver.refs += [self.new_ref() for _ in range(self.objects)]
            if self.objects and random.random() < 0.4:
                other = Driver(self, number + 10, GroupSpec(random.randint(1, 4), None), driver)  # type: ignore[arg-type]
                other.to_submit = random.randint(1, 4)
                self.drivers.append(other)

    def _nest(self) -> None:
        """Some worker's task becomes a driver of the cluster that it runs on. It does not wait for its pool."""
        assert self.to_nest is not None
        self.to_nest -= 1
        parts = [(node, part) for node in self.nodes if node.process.alive for part in node.agent._parts.values()]
        found = [(node, part, worker) for node, part in parts if part.workers is not None
                 for worker in part.workers.by_slot.values() if worker.alive]
        if not found:
            return
        random = self._nesting
        node, part, worker = random.choice(found)
        spec = GroupSpec(random.randint(1, 4), None, retries=random.randint(0, 2),  # type: ignore[arg-type]
                         max_tasks=random.choice([None, 5]), all_cpus=random.random() < 0.2)
        driver = Driver(self, len(self.drivers), spec, None, node.host,
                        messages.Inside(node.agent.id, part.group, worker.pid))
        self.world.say(f"{driver.name} is in worker {worker.slot} on {node.host}")
        driver.to_submit = random.randint(1, 3)
        self.drivers.append(driver)
        worker.on_end.append(driver.end_with_worker)

    def _live(self) -> None:
        from .faults import plan

        quiet = plan(self)
        for _ in range(self.to_nest or 0):
            self.world.at(self._nesting.uniform(0.05, max(quiet, 3.0)), self._nest)
        until = quiet + DONE_WITHIN_S
        self.world.at(quiet + FENCED_WITHIN_S, self._check_fences)

        def finished() -> bool:
            least = quiet + FENCED_WITHIN_S if self.gave_up else quiet
            return self.world.now >= least and not self.to_nest and all(driver.finished for driver in self.drivers)

        known = -1
        while not self.world.run(until, finished):
            # Some histories have much work and few workers left: what counts is that it goes on.
            before, known = known, sum(len(sink.known) for driver in self.drivers for sink in driver.sinks)
            if known > before:
                until = self.world.now + DONE_WITHIN_S
                continue
            stuck = [(driver.name, driver.phase, sink.number, sorted(set(range(len(sink.kinds))) - sink.known))
                     for driver in self.drivers for sink in driver.sinks if sink.left and driver.process.alive]
            phases = [(driver.name, driver.phase, driver.to_submit) for driver in self.drivers]
            raise Violation(f"nothing is done within {DONE_WITHIN_S:.0f} s: {stuck or phases}")
        twice = [(key.hex(), count) for (_, key), count in self.arrived.items()
                 if spreading.FETCH_MIN_BYTES <= len(self.contents[key]) < count]
        if self.kind == CALM and twice:
            raise Violation(f"objects came more than once to a node: {twice}")
        if self.kind in (CALM, BRIEF) and self.stops is None:
            again = [key for key, count in self.begun.items() if count != 1]
            if again:
                raise Violation(f"tasks were run more than once in a {self.kind} history: {again}")

    def _check_fences(self) -> None:
        """What drivers have given up has ended: nothing of it runs on a node that can be reached again."""
        of = {driver.port.group: driver for driver in self.drivers if driver.process.alive}
        for node in self.nodes:
            for part in node.agent._parts.values() if node.process.alive else ():
                driver = of.get(part.group)
                if driver is not None and driver.phase == "open" and part.id not in driver.port._nodes:
                    raise Violation(f"{node.host} still has a part that {driver.name} gave up")

    def _end(self) -> None:
        for driver in self.drivers:
            driver.close()
        until = self.world.now + FORGOTTEN_WITHIN_S

        def forgotten() -> bool:
            head = self.head.head.membership
            living = [node for node in self.nodes if node.process.alive]
            kept = any(map(_keeps, living))
            return (all(driver.gone for driver in self.drivers) and not kept
                    and not head.drivers and set(head.nodes) == {node.agent.id for node in living})

        if not self.world.run(until, forgotten):
            left = [driver.name for driver in self.drivers if not driver.gone]
            kept = [node.host for node in self.nodes if node.process.alive
                    and _keeps(node)]
            raise Violation(f"{FORGOTTEN_WITHIN_S:.0f} s after the last result drivers {left} have not ended, nodes "
                            f"{kept} have not forgotten, the head knows {len(self.head.head.membership.nodes)} nodes")

    def _clean(self) -> None:
        for driver in self.drivers:
            if not driver.gone:
                driver.kill()
        for node in self.nodes:
            node.kill()
        for ref in [ref for driver in self.drivers for ref in driver.refs]:
            if ref._stored is not None:
                self.forget(ref)


def _keeps(node: NodeMachine) -> bool:
    """Whether a node has anything of a program."""
    agent = node.agent
    return bool(agent._parts or agent.exchange.objects.keys or agent.exchange._sources or agent.inlets._of
                or agent.exchange._outlets._of)


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
