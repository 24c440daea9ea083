"""Simulated workers: what the agent needs of node/workers.py, with workers that run tasks in simulated time.

They take batches from one bounded socket, claim, report and end as worker/main.py does, and die when it hurts most.
Used by world.py, one SimWorkers a part.
"""

from __future__ import annotations

import os
import pickle
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpool.cluster.node.supervisor import Supervisor
from dpool.cluster.store import segments
from dpool.cluster.wire import frames, messages, pickling
from dpool.cluster.wire.death import Death
from dpool.cluster.wire.events import DEATH, MESSAGE
from dpool.cluster.worker.main import describe_exception
from dpool.engine import CALL

from .clock import Violation, World
from .network import Network

REPORT_EVERY_S = 0.002
TERMINATE_GRACE_S = 1.0


@dataclass
class Habits:
    """How the workers of a history behave."""

    socket_bytes: int = 1 << 20
    dies_taking: float = 0.0  # between a batch's leaving the socket and the worker's saying so
    dies_in_task: float = 0.0
    dies_leaving: float = 0.0  # after its last word on a batch
    dies_starting: float = 0.0
    dies_idle: float = 0.0
    large_results: float = 0.0
    claim_s: float = 0.001  # how long a worker may take from taking a batch to saying so


class SimWorker:
    """One worker, as its node sees it and as it is."""

    def __init__(self, slot: int, pid: int, name: str) -> None:
        self.slot = slot
        self.pid = pid
        self.name = name
        self.exitcode: int | None = None
        self.alive = True  # else dead, and not yet reaped
        self.ready = False
        self.batch = self.task = self.claims = 0
        self.busy = False
        self.left = 1 << 62
        self.looked_at: list[int] = []  # segments of the driver's, until it is in another batch
        self.released: list[int] = []  # those that it looks at no more
        self.on_end: list[Callable[[], None]] = []  # what ends with its process

    def let_go(self) -> None:
        pass


# Told of every task that begins: (job, task) -> how long it takes, or None if the worker dies of it.
Begin = Callable[[tuple[int, int]], float | None]
# Told of every object that a worker looks at: its key and its bytes.
Look = Callable[[bytes, bytes], None]


class SimWorkers:
    """The workers of one part."""

    def __init__(self, world: World, network: Network, habits: Habits, begin: Begin, look: Look,
                 message: messages.Open, died: Callable[[SimWorker, tuple[int, int] | None], None]) -> None:
        self.world = world
        self.habits = habits
        self.supervisor = Supervisor(message.workers, message.on_demand)
        self.processes: list[Any] = []
        self.by_slot: dict[int, Any] = {}
        self.max_tasks = message.max_tasks
        self.worker_name = message.worker_name
        self.source = network.source()
        self._network = network
        self._begin = begin
        self._look = look
        self._on_died = died
        self._socket: deque[tuple[bytes, list[int]]] = deque()
        self._bytes = 0
        self._shut = self._closed = False
        self._results: deque[tuple[bytes, list[int]]] = deque()
        self._dead: list[SimWorker] = []
        self._kill_at: float | None = None
        self.keys: dict[int, list[tuple[int, int]]] = {}  # batch -> its tasks, for who asks what it held

    @property
    def descriptor(self) -> int:
        return self.source.number

    @property
    def count(self) -> int:
        return len(self.supervisor.living)

    # -- starting

    def open(self) -> None:
        self.start()

    def start(self) -> None:
        for slot in self.supervisor.to_start():
            self.world.ids += 1
            worker = SimWorker(slot, 1000 + self.world.ids, f"{self.worker_name}-{slot}")
            worker.left = self.max_tasks or 1 << 62
            self.by_slot[slot] = worker
            self.processes.append(worker)
            self._later(worker, 0.002 + self.world.random.random() * 0.02, self._get_ready)

    def _get_ready(self, worker: SimWorker) -> None:
        if self.world.random.random() < self.habits.dies_starting:
            self._die(worker, 1)
            return
        worker.ready = True
        self._take_soon(worker)

    # -- what the agent asks

    def send(self, parts: list[bytes], descriptors: list[int]) -> bool:
        if self._shut:
            raise BrokenPipeError(32, "the tasks are closed")
        size = sum(map(len, parts))
        if self._socket and self._bytes + size > self.habits.socket_bytes:
            return False
        self._socket.append((b"".join(map(bytes, parts)), [os.dup(descriptor) for descriptor in descriptors]))
        self._bytes += size
        for worker in self.by_slot.values():
            self._take_soon(worker)
        return True

    def poll(self, timeout: float | None) -> Sequence[tuple[int, Any, list[int]]]:
        if self._kill_at is not None and self._kill_at <= self.world.now:
            self._kill_at = None
            self.signal_all(9)
        events: list[tuple[int, Any, list[int]]] = []
        dead, self._dead = self._dead, []
        while self._results and (dead or not events):
            data, descriptors = self._results.popleft()
            events.append((MESSAGE, memoryview(bytearray(data)), descriptors))
        for worker in dead:
            del self.by_slot[worker.slot]
            self.processes.remove(worker)
            self.supervisor.ended(worker.slot, worker.ready)
            events.append((DEATH, Death(worker.slot, worker.pid, worker.exitcode, worker.batch, worker.task,
                                        worker.ready, "", worker.exitcode == 0 and worker.ready and not worker.batch),
                           []))
        self.supervisor.validate()
        self.source.ready = bool(self._results)
        return events

    def claimed(self) -> dict[int, int]:
        return {worker.batch: slot for slot, worker in self.by_slot.items() if worker.batch}

    def unread(self) -> bool:
        return bool(self._socket)

    def take_unread(self) -> int | None:
        if not self._socket:
            return None
        data, descriptors = self._socket.popleft()
        self._bytes -= len(data)
        for descriptor in descriptors:
            os.close(descriptor)
        return int(frames.TASKS.unpack_from(data)[4])

    def steal(self, number: int) -> int:
        slot = self.claimed().get(number)
        if slot is None:
            return 0
        worker = self.by_slot[slot]
        count, worker.claims = worker.claims, 0
        return int(count)

    def stop(self, tasks: list[tuple[int, int]]) -> set[int]:
        claimed = self.claimed()
        slots = {claimed[batch] for batch, index in tasks
                 if batch in claimed and self.by_slot[claimed[batch]].task == index}
        for slot in slots:  # which may be in its next task by then
            self._later(self.by_slot[slot], self.world.random.random() * 0.002, lambda one: self._die(one, -9))
        return slots

    def signal(self, slot: int, number: int) -> None:
        if slot in self.by_slot:
            self._die(self.by_slot[slot], -number)

    def signal_all(self, number: int) -> None:
        for worker in list(self.by_slot.values()):
            self._die(worker, -number)

    def close_tasks(self) -> None:
        self.supervisor.closing = True
        self._shut = True
        for worker in self.by_slot.values():
            self._take_soon(worker)

    def kill(self, at_once: bool = True) -> None:
        if at_once:
            self.supervisor.closing = True
            for worker in list(self.by_slot.values()):
                self._later(worker, self.world.random.random() * 1.5, lambda one: self._die(one, -15))
        else:
            self.close_tasks()
        self._kill_at = self.world.now + TERMINATE_GRACE_S

    def close(self) -> None:
        """The lifeline ends: so do all workers, and nobody hears of it."""
        if self._closed:
            return
        self._closed = True
        for worker in self.by_slot.values():
            self._over(worker)
        for _, descriptors in (*self._socket, *self._results):
            for descriptor in descriptors:
                os.close(descriptor)
        self._socket.clear()
        self._results.clear()
        self._network.sources.pop(self.source.number, None)

    # -- a worker's life

    def _later(self, worker: SimWorker, delay: float, what: Callable[[SimWorker], None]) -> None:
        self.world.after(delay, lambda: what(worker) if worker.alive else None)

    def _die(self, worker: SimWorker, exitcode: int) -> None:
        if not worker.alive or self._closed:
            return
        self._over(worker)
        worker.exitcode = exitcode
        held = self.keys.get(worker.batch) if worker.busy else None
        running = held[worker.task] if held and worker.task < len(held) else None
        self._on_died(worker, running)
        self._dead.append(worker)
        self.source.rise()

    def _over(self, worker: SimWorker) -> None:
        if worker.alive:
            worker.alive = False
            for what in worker.on_end:
                self.world.after(0.0, what)  # this may be in the midst of anything

    def kill_one(self) -> bool:
        """A fault: some worker is killed; whether there was one."""
        living = [worker for worker in self.by_slot.values() if worker.alive]
        if not living:
            return False
        self._die(self.world.random.choice(living), -9)
        return True

    def _take_soon(self, worker: SimWorker) -> None:
        if worker.alive and worker.ready and not worker.busy and (self._socket or self._shut):
            worker.busy = True
            self._later(worker, self.world.random.random() * 0.0002, self._take)

    def _take(self, worker: SimWorker) -> None:
        worker.busy = False
        if not self._socket:
            if self._shut:
                self._die(worker, 0)
            return
        worker.busy = True
        data, descriptors = self._socket.popleft()
        self._bytes -= len(data)
        random, habits = self.world.random, self.habits
        if random.random() < habits.dies_taking:
            for descriptor in descriptors:
                os.close(descriptor)
            worker.busy = False
            self._later(worker, random.random() * 0.02, lambda one: self._die(one, -11))
            return
        self._later_with(worker, random.random() * habits.claim_s, data, descriptors)

    def _later_with(self, worker: SimWorker, delay: float, data: bytes, descriptors: list[int]) -> None:
        def claim() -> None:
            if worker.alive:
                self._claim(worker, data, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)

        self.world.after(delay, claim)

    def _claim(self, worker: SimWorker, data: bytes, descriptors: list[int]) -> None:
        message = memoryview(data)
        worker.released += worker.looked_at
        worker.looked_at = []
        (flags, mode, _, _, number, count, function_bytes, ref_bytes, _) = frames.TASKS.unpack_from(message)
        worker.task = 0
        worker.batch = number
        worker.claims = count - 1
        function = message[frames.TASKS.size:frames.TASKS.size + function_bytes]
        body = message[frames.TASKS.size + function_bytes + ref_bytes:]
        own = bool(flags & frames.FUNCTION_IN_SEGMENT) + bool(flags & frames.BODY_IN_SEGMENT)
        refs = message[frames.TASKS.size + function_bytes:][:ref_bytes]
        objects = frames.unpack_refs(refs)[0] if ref_bytes else []
        if len(descriptors) != own + len(objects):
            raise Violation(f"batch {number} came with {len(descriptors)} segments instead of {own + len(objects)}")
        for (key, _, table, _), descriptor in zip(objects, descriptors[own:], strict=True):
            self._look(key, bytes(segments.read(descriptor, table)[0]))
        if flags & frames.BY_NAME:
            self._report(worker, frames.DONE | frames.NEED_VALUE, 0, [], pickle.dumps("no such function"), 0, 0)
            self._leave(worker)
            return
        if flags & frames.FUNCTION_IN_SEGMENT:
            call = pickle.loads(bytes(segments.read(descriptors[0], function)[0]))
        else:
            call = pickle.loads(function)
        buffers: Sequence[memoryview] = ()
        if flags & frames.BODY_IN_SEGMENT:
            body, *buffers = segments.read(descriptors[own - 1], body, worker.looked_at.append)
        tasks = pickling.unpack(body, buffers, bool(flags & frames.ONE_PICKLE))
        items = tasks if isinstance(tasks, list) else [tasks.load(index) for index in range(count)]
        if len(items) != count:
            raise Violation(f"batch {number} has {len(items)} items instead of {count}")
        if mode == CALL:
            items = [item[0][0] for item in items]
        self.keys[number] = [item[:2] for item in items]
        run = _Run(self, worker, call, items)
        run.begin()

    def _report(self, worker: SimWorker, flags: int, first: int, values: list[Any], failures: bytes, executed: int,
                run_ns: int) -> None:
        packed, _ = pickling.pack(values)
        if packed.one:
            flags |= frames.ONE_PICKLE
        body, descriptors = packed.body, []
        if values and self.world.random.random() < self.habits.large_results:
            descriptor, body = segments.write([failures, body, *packed.buffers])
            failures = b""
            flags |= frames.BODY_IN_SEGMENT
            descriptors = [descriptor]
        header = frames.RESULTS.pack(flags, 0, worker.slot, worker.batch, first, len(values), executed, run_ns,
                                     len(failures), 0, 8 * len(worker.released))
        released = array("Q", worker.released).tobytes()
        worker.released.clear()
        self._results.append((header + failures + released + body, descriptors))
        self.source.rise()

    def _leave(self, worker: SimWorker) -> None:
        """After the last word on a batch."""
        worker.busy = False
        if self.world.random.random() < self.habits.dies_leaving:
            self._die(worker, -11)
            return
        self.keys.pop(worker.batch, None)
        worker.batch = 0
        if worker.left <= 0:
            worker.busy = True  # it takes no more
            self._later(worker, self.world.random.random() * 0.005, lambda one: self._die(one, 0))
        elif self.world.random.random() < self.habits.dies_idle:
            self._later(worker, self.world.random.random() * 0.005, lambda one: self._die(one, -11))
        else:
            self._take_soon(worker)


class _Run:
    """A worker in a batch: as worker/main.py, _run."""

    def __init__(self, workers: SimWorkers, worker: SimWorker, call: Any, items: list[Any]) -> None:
        self.workers = workers
        self.worker = worker
        self.call = call
        self.items = items
        self.index = self.first = 0
        self.values: list[Any] = []
        self.failures: list[tuple[Any, ...]] = []
        self.started = self.reported_at = workers.world.now
        self.last = min(len(items), worker.left)

    def begin(self) -> None:
        workers, worker = self.workers, self.worker
        takes = workers._begin(self.items[self.index][:2])
        random = workers.world.random
        if takes is None:
            workers._later(worker, random.random() * 0.003, lambda one: workers._die(one, -11))
        elif random.random() < workers.habits.dies_in_task:
            workers._later(worker, random.random() * takes, lambda one: workers._die(one, -9))
        else:
            workers._later(worker, takes, self._end)

    def _end(self, worker: SimWorker) -> None:
        workers = self.workers
        now = workers.world.now
        try:
            self.values.append(self.call(self.items[self.index]))
        except Exception as error:
            self.failures.append((self.index - self.first, *describe_exception(error)))
            self.values.append(None)
        self.index += 1
        ran_ns = int((now - self.started) * 1e9)
        if self.index < self.last and worker.claims > 0:
            worker.claims -= 1
            worker.task = self.index
            if now - self.reported_at > REPORT_EVERY_S:
                workers._report(worker, 0, self.first, self.values, self._failed(), self.index, ran_ns)
                self.values, self.failures = [], []
                self.first, self.reported_at = self.index, now
            self.begin()
            return
        worker.left -= self.index
        worker.claims = 0
        workers._report(worker, frames.DONE, self.first, self.values, self._failed(), self.index, ran_ns)
        workers._leave(worker)

    def _failed(self) -> bytes:
        return pickle.dumps(self.failures, pickling.PROTOCOL) if self.failures else b""
