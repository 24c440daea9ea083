"""A group's workers on this machine: their processes, and the descriptors that tie them to their driver.

Starts, signals and reaps processes and carries messages; what should be started is the supervisor's decision, what
should be sent the driver's. Owned by the embedded engine's group, whose I/O thread calls poll().
"""

from __future__ import annotations

import array
import fcntl
import math
import mmap
import os
import select
import signal
import socket
import sys
import termios
import threading
import time
import weakref
from contextlib import contextmanager
from multiprocessing import process as mp_process
from multiprocessing import util

from dpool.cluster.node.supervisor import Supervisor
from dpool.cluster.store import segments
from dpool.cluster.wire import frames
from dpool.cluster.wire.bell import Bell
from dpool.cluster.wire.death import Death
from dpool.cluster.wire.events import DEATH, MESSAGE
from dpool.cluster.wire.handles import BATCH, READY, SLOT_WORDS, TASK, TRACE_BYTES, Handle, page_bytes, trace_offset
from dpool.cluster.worker.main import worker_main
from dpool.cluster.worker.setup import Initializer, Setup
from dpool.waiting import LOOK_EVERY_S

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from dpool.engine import GroupSpec
    from dpool.resources import Grant

_SOCKET_BUFFER_BYTES = 1 << 20
# How long a worker may take to die of SIGTERM, for handlers of the user's, before SIGKILL.
TERMINATE_GRACE_S = 1.0
# As plain numbers: what `|` and `&` of the enum's members cost is a microsecond each.
_AT_ONCE = int(socket.MSG_DONTWAIT)
_RECEIVE = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_PEEK = int(socket.MSG_DONTWAIT | socket.MSG_PEEK)
_CONTROL_BYTES = socket.CMSG_SPACE((frames.MAX_DESCRIPTORS + 2) * 4)


# Every living Workers of this process: a forked child must let go of the ends that keep workers alive.
_all: weakref.WeakSet[Workers] = weakref.WeakSet()


class Workers:
    """Up to `spec.processes` workers on one socket pair. start() and kill() may be called by any thread of the process
    that made it; poll() by one. close() gives back what they had been granted of the machine."""

    def __init__(self, spec: GroupSpec, grant: Grant | None = None) -> None:
        self.spec = spec
        self._grant = grant
        self.supervisor = Supervisor(spec.processes, spec.on_demand)
        self.processes: list[Any] = []  # of all living workers; doors show it to users, so it is changed in place
        self.by_slot: dict[int, Any] = {}  # slot -> process
        self._pidfds: dict[int, int] = {}  # pidfd -> slot
        # Guards the supervisor, processes, by_slot and _pidfds against a submitter that starts workers on demand.
        self._lock = threading.Lock()
        self._kill_at: float | None = None
        self._closed = False
        self.tasks, self._tasks_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.results, self._results_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.tasks, self._tasks_end, self.results, self._results_end):
            end.setblocking(True)  # whatever the default for new sockets is
        for end in (self.tasks, self._results_end):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        self._lifeline_end, self._lifeline = os.pipe()
        size = page_bytes(spec.processes)
        # Its size is sealed: a worker's last words do not make it longer, however many they are.
        self._page_fd = segments.Segment(size).descriptor
        self._map = mmap.mmap(self._page_fd, size)
        self.page = memoryview(self._map)[:spec.processes * SLOT_WORDS * 8].cast("Q")
        self._initializer = Initializer(spec.initializer, spec.initargs)
        self._claims: dict[int, Any] = {}
        self._reused: dict[int, bool] = {}
        self.splits = self._can_split()
        self.shares_memory = True
        self._bell: Bell | None = Bell()
        self._poll = select.epoll()
        self._poll.register(self.results, select.EPOLLIN)
        self._poll.register(self._bell.descriptor, select.EPOLLIN)
        self._results_fd = self.results.fileno()
        self._views = [memoryview(bytearray(frames.RECEIVE_BYTES))]
        # For peek(), made when it is first needed: what it waits with, what it receives into, and the bell that ends
        # the waiting.
        self._alone: Any = None
        self._alone_view = self._views[0]
        self._leave: Bell | None = None
        self._rung = False
        _all.add(self)

    def _can_split(self) -> bool:
        try:
            self._claims[0] = _claims(self.spec.context)
        except (OSError, ImportError):  # no room in /dev/shm for a semaphore
            return False
        return True

    # -- starting

    def demand(self, queued: int, inflight: int) -> None:
        """There is work: start workers for it, where workers are started on demand."""
        if self.supervisor.wanted < self.supervisor.most:
            self.supervisor.demand(queued, inflight)
            self.start()

    @property
    def count(self) -> int:
        """Living workers."""
        return len(self.supervisor.living)

    def open(self) -> None:
        """Start the first workers. If one cannot be started, end the others, close, and raise what that raised."""
        slots = self.supervisor.to_start()
        try:
            for slot in slots:
                self._start_one(slot)
        except BaseException:
            for process in self.processes:
                if process.exitcode is None:
                    process.terminate()
            for process in self.processes:
                process.join()
            self.close()
            raise
        for slot, process in zip(slots, self.processes, strict=True):
            self._watch(slot, process)

    def start(self) -> None:
        """Start the workers that should be there and are not. Raises what starting one of them raises; those that are
        still missing then are left for later."""
        with self._lock:
            slots = self.supervisor.to_start()
            for index, slot in enumerate(slots):
                try:
                    process = self._start_one(slot)
                except BaseException:
                    for missing in slots[index:]:
                        self.supervisor.ended(missing, was_ready=False)
                    raise
                self._watch(slot, process)

    def _start_one(self, slot: int) -> Any:
        spec = self.spec
        claims = None
        if self.splits:
            claims = self._claims.get(slot)
            if claims is None:
                claims = self._claims[slot] = _claims(spec.context)
            elif self._reused.get(slot):
                while claims.acquire(False):  # what the worker before this one left unbegun
                    pass
            self._reused[slot] = True
        base = slot * SLOT_WORDS
        self.page[base:base + SLOT_WORDS] = memoryview(bytes(SLOT_WORDS * 8)).cast("Q")
        start = trace_offset(spec.processes, slot)
        self._map[start:start + TRACE_BYTES] = bytes(TRACE_BYTES)
        setup = Setup(Handle(self._tasks_end.fileno()), Handle(self._results_end.fileno()),
                      Handle(self._lifeline_end), Handle(self._page_fd), spec.processes, slot, claims,
                      spec.max_tasks, self._initializer, self._grant.environment(slot) if self._grant else {})
        make = spec.start_process or spec.context.Process  # type: ignore[attr-defined]
        process = make(target=worker_main, args=(setup,))
        process.name = process.name.replace("Process", spec.worker_name)
        process.daemon = spec.daemon
        # A Ctrl-C before the worker has left the terminal's process group would make it print a traceback.
        old = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        try:
            with _main_without_missing_file():
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        self.processes.append(process)
        util.debug("started worker %s", process.name)
        return process

    def _watch(self, slot: int, process: Any) -> None:
        self.by_slot[slot] = process
        try:
            pidfd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            # It has died and been reaped already, by the start of the next one or the fork server: in its place
            # something that says so at the next poll.
            pidfd = os.eventfd(1, os.EFD_CLOEXEC)
        self._pidfds[pidfd] = slot
        self._poll.register(pidfd, select.EPOLLIN)

    # -- messages

    @property
    def descriptor(self) -> int:
        """Readable when poll() has something."""
        return self._poll.fileno()

    def send(self, parts: list[bytes], descriptors: list[int]) -> bool:
        """Hand one message to whichever worker reads next; False if the socket is full: try again after a result."""
        control = []
        if descriptors:
            data = b"".join(d.to_bytes(4, "little") for d in descriptors)
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, data)]
        try:
            self.tasks.sendmsg(parts, control, _AT_ONCE)
        except BlockingIOError:
            return False
        return True

    def wake(self) -> None:
        """Make the current or next poll() return."""
        bell = self._bell
        if bell is not None:  # else nobody polls any more
            bell.ring()

    def poll(self, timeout: float | None) -> Sequence[tuple[int, Any, list[int]]]:
        """What has happened, messages before deaths; waits for it up to `timeout` seconds, for ever if None. A message
        is a view of a buffer that the next call writes to."""
        if self._kill_at is not None:
            left = self._kill_at - time.monotonic()
            if left <= 0:
                self._kill_at = None
                self.signal_all(signal.SIGKILL)
            else:
                timeout = left if timeout is None else min(timeout, left)
        ready = self._poll.poll(timeout)
        if len(ready) == 1 and ready[0][0] == self._results_fd:
            # One message a call: a second read to learn that there is no more would cost more than it saves.
            message = self._receive(self._views)
            return () if message is None else (message,)
        return list(self._events(ready))

    def _events(self, ready: list[tuple[int, int]]) -> Iterator[tuple[int, Any, list[int]]]:
        dead: list[int] = []
        bell = self._bell
        assert bell is not None
        for descriptor, _ in ready:
            if descriptor == bell.descriptor:
                bell.silence()
            elif descriptor != self._results_fd:
                dead.append(descriptor)
        if dead or len(ready) > 1:
            # What a worker sent before it died is in the socket by now: all of it comes before the news of its death.
            while (message := self._receive(self._views)) is not None:
                yield message[0], memoryview(bytes(message[1])), message[2]
                if not dead:
                    break
        for descriptor in dead:
            yield DEATH, self._reap(descriptor), []

    # -- results in another thread than poll()'s

    def lead(self) -> None:
        """From here on poll() sees no results; peek() does."""
        if self._leave is None:
            leave = Bell()
            self._alone_view = memoryview(bytearray(frames.RECEIVE_BYTES))
            self._alone = select.poll()
            self._alone.register(self._results_fd, select.POLLIN)
            self._alone.register(leave.descriptor, select.POLLIN)
            self._leave = leave  # last: an interrupt may come before
        if self._rung:
            self._rung = False
            self._leave.silence()
        self._poll.modify(self._results_fd, 0)

    def peek(self, timeout: float | None) -> memoryview | None:
        """The next message, left where it is, without its descriptors; None if none has come when follow() is called or
        `timeout` seconds have passed. For one thread at a time."""
        if timeout != 0:
            ready = self._wait_alone(timeout)
            if not ready or ready[0][0] != self._results_fd:
                return None
        try:
            size = self.results.recv_into(self._alone_view, 0, _PEEK)
        except OSError:  # somebody else was faster; or it is closed
            return None
        return self._alone_view[:size]

    def _wait_alone(self, timeout: float | None) -> list[tuple[int, int]]:
        if timeout is None:
            timeout = math.inf
        while True:
            ready = self._alone.poll(math.ceil(min(timeout, LOOK_EVERY_S) * 1000))
            timeout -= LOOK_EVERY_S
            if ready or timeout <= 0:
                return ready  # type: ignore[no-any-return]

    def consume(self) -> None:
        """Take the message that peek() has returned."""
        try:
            self.results.recv(1, _AT_ONCE)
        except OSError:
            pass

    def follow(self, ring: bool) -> None:
        """poll() sees results again. With `ring`, peek() returns in the thread that is in it."""
        if not self._closed and self._leave is not None:
            self._poll.modify(self._results_fd, select.EPOLLIN)
            if ring:
                self._rung = True
                self._leave.ring()

    def _receive(self, views: list[memoryview]) -> tuple[int, memoryview, list[int]] | None:
        try:
            size, control, _, _ = self.results.recvmsg_into(
                views, _CONTROL_BYTES, _RECEIVE)
        except BlockingIOError:
            return None
        return MESSAGE, views[0][:size], _descriptors(control) if control else []

    # -- deaths

    def _reap(self, pidfd: int) -> Death:
        with self._lock:
            slot = self._pidfds.pop(pidfd)
            process = self.by_slot.pop(slot)
            self._poll.unregister(pidfd)
            os.close(pidfd)
            # Whatever its task started in its process group goes with it, while the zombie still holds the number.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
            process.join(5)  # it is dead; a fork server takes a moment to say so
            base = slot * SLOT_WORDS
            start = trace_offset(self.spec.processes, slot)
            trace = self._map[start:start + TRACE_BYTES].split(b"\0", 1)[0].decode("utf-8", "replace")
            ready = bool(self.page[base + READY])
            batch = self.page[base + BATCH]
            death = Death(slot, process.pid, process.exitcode, batch, self.page[base + TASK], ready, trace,
                          process.exitcode == 0 and ready and not batch)  # os._exit(0) in a task is a death too
            self.page[base + BATCH] = 0
            self.processes.remove(process)
            self.supervisor.ended(slot, ready)
        return death

    def signal(self, slot: int, number: int) -> None:
        """Send a signal to the worker in a slot, if there is one."""
        with self._lock:
            for pidfd, its in self._pidfds.items():
                if its == slot:
                    try:
                        signal.pidfd_send_signal(pidfd, number)
                    except OSError:
                        pass  # it has ended already

    def signal_all(self, number: int) -> None:
        """Send a signal to every living worker, by pidfd, so that it reaches no stranger."""
        with self._lock:
            for pidfd in self._pidfds:
                try:
                    signal.pidfd_send_signal(pidfd, number)
                except OSError:
                    pass  # it has ended already

    def close_tasks(self) -> None:
        """No more messages will be sent: each worker ends when it has read what there is."""
        self.supervisor.closing = True
        try:
            self.tasks.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def kill(self, at_once: bool = True) -> None:
        """End every worker: SIGTERM now, SIGKILL after TERMINATE_GRACE_S for those that handle it and go on.

        Not `at_once`: no SIGTERM, but no more tasks either, so that most end by themselves and run their finalizers.
        """
        if at_once:
            self.supervisor.closing = True  # who ends is not replaced
            # A handler that raises in a task ends that task alone: its worker is to find no other, and nothing to wait
            # for.
            while self.take_unread() is not None:
                pass
            self.signal_all(signal.SIGTERM)
        self.close_tasks()
        self._kill_at = time.monotonic() + TERMINATE_GRACE_S
        self.wake()

    # -- who has which batch

    def claimed(self) -> dict[int, int]:
        """Batches that workers say they are in, and their slots."""
        page = self.page
        return {page[slot * SLOT_WORDS + BATCH]: slot for slot in list(self.by_slot) if page[slot * SLOT_WORDS + BATCH]}

    def unread(self) -> bool:
        """Whether a message is in the socket that no worker has taken yet."""
        waiting = array.array("i", [0])
        fcntl.ioctl(self._tasks_end, termios.FIONREAD, waiting)
        return waiting[0] > 0

    def take_unread(self) -> int | None:
        """Take the next message from the socket, as a worker would; the number of its batch. None if there is none."""
        try:
            header, control, _, _ = self._tasks_end.recvmsg(frames.TASKS.size, _CONTROL_BYTES,
                                                            _RECEIVE)
        except OSError:
            return None
        for descriptor in _descriptors(control):
            os.close(descriptor)
        return int(frames.TASKS.unpack(header)[4]) if header else None

    def steal(self, number: int) -> int:
        """Take the unbegun tasks of a batch from its worker; how many, counted from the batch's end. 0 if it is in no
        worker, or if the worker left it meanwhile: then its report of what it ran tells what was taken. The worker is
        asked to send what it has finished, too."""
        slot = self.claimed().get(number)
        if slot is not None and self.page[slot * SLOT_WORDS + TASK]:
            self.signal(slot, signal.SIGURG)
        claims = self._claims.get(slot) if slot is not None else None
        if slot is None or claims is None:
            return 0
        count = 0
        while claims.acquire(False):
            count += 1
        return count if self.page[slot * SLOT_WORDS + BATCH] == number else 0

    def stop(self, tasks: list[tuple[int, int]]) -> set[int]:
        """Kill the workers that are in one of `tasks`, each (batch, index); returns their slots."""
        claimed = self.claimed()
        slots = {claimed[batch] for batch, index in tasks
                 if batch in claimed and self.page[claimed[batch] * SLOT_WORDS + TASK] == index}
        for slot in slots:
            self.signal(slot, signal.SIGKILL)
        return slots

    # -- the end

    def after_fork(self) -> None:
        """In a forked child: let go of what keeps the parent's workers alive or reads their messages."""
        if not self._closed:
            self._closed = True
            os.close(self._lifeline)
            self.tasks.close()
            self.results.close()
            # At its exit multiprocessing would end them and join them, as if they were this process's own.
            for process in self.processes:
                mp_process._children.discard(process)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Give every descriptor back. Call when all workers have ended; may be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            _all.discard(self)
            self._poll.close()
            for descriptor in (self._lifeline, self._lifeline_end, self._page_fd, *self._pidfds):
                os.close(descriptor)
            self._bell = self._leave = None
            for end in (self.tasks, self._tasks_end, self.results, self._results_end):
                end.close()
            self.page.release()
            self._map.close()
            self._claims.clear()
            self._initializer.close()
            if self._grant is not None:
                self._grant.give_back()


def _descriptors(control: list[tuple[int, int, bytes]]) -> list[int]:
    """Those that came beside a message."""
    return [int.from_bytes(data[i:i + 4], "little") for _, _, data in control for i in range(0, len(data) - 3, 4)]


@contextmanager
def _main_without_missing_file() -> Iterator[None]:
    """A program that is read from stdin has a __main__ whose file is called "<stdin>"; a worker that is not forked
    would look for it, and end."""
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None or os.path.exists(path):
        yield
        return
    del main.__file__
    try:
        yield
    finally:
        main.__file__ = path


def _claims(context: Any) -> Any:
    """A counter that one process raises and others lower, each step atomic, no lock to be left held by the dead."""
    return context.Semaphore(0)._semlock if context.get_start_method() == "fork" else context.Semaphore(0)


def _let_go() -> None:
    for workers in list(_all):
        workers.after_fork()
    _all.clear()
    # The parent's fork server cannot start processes for its child, which would be told that it has no such child; and
    # it must not outlive the parent because the child holds its lifeline.
    forkserver = sys.modules.get("multiprocessing.forkserver")
    server = getattr(forkserver, "_forkserver", None)
    if server is not None and server._forkserver_pid is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_pid = server._forkserver_alive_fd = server._forkserver_address = None
        server._lock = threading.Lock()


os.register_at_fork(after_in_child=_let_go)
