"""Owns clusters for tests: a head and nodes as real processes on this machine, with a key of their own.

It ends all it has started, and counts what is left. Used by the tests of the cluster; asserts nothing itself.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from leftovers import MARK, Watched, marked, new_mark

from dpool import session
from dpool.cluster.wire.keys import Keys, write
from dpool.cluster_engine import ClusterEngine

ROOT = Path(__file__).resolve().parent.parent
# Only a hang takes longer.
PATIENCE_S = 30.0
# Within which a node has given everything of a group back.
SETTLED_S = 10.0
# What the processes of a cluster may know of this one.
_PASSED = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV")


def until(condition: Callable[[], object], what: str, patience_s: float = PATIENCE_S) -> None:
    """Wait until `condition` holds: for what other processes do without saying so. AssertionError if it never does."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {patience_s:.0f} s: {what}"
        time.sleep(0.01)


class Process:
    """A process of a cluster. Its lines can be waited for, and all are kept."""

    def __init__(self, command: list[str], environment: dict[str, str], directory: Path) -> None:
        self.process = subprocess.Popen(command, env=environment, cwd=directory, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.lines: list[str] = []
        self._news = threading.Condition()
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            with self._news:
                self.lines.append(line.decode(errors="replace").rstrip("\n"))
                self._news.notify_all()
        stream.close()
        with self._news:
            self.lines.append("<the end>")
            self._news.notify_all()

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait for a line that has `pattern` in it."""
        with self._news:
            found: list[re.Match[str]] = []

            def look() -> bool:
                found.extend(filter(None, (re.search(pattern, line) for line in self.lines)))
                return bool(found) or self.lines[-1:] == ["<the end>"]

            self._news.wait_for(look, PATIENCE_S)
        assert found, f"no line with {pattern!r} in: {self.lines}"
        return found[0]

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end; the exit code."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code

    def descriptors(self) -> list[str]:
        """What it has open."""
        return descriptors_of(self.pid)


def descriptors_of(pid: int) -> list[str]:
    """What a process has open, without the numbers that differ each time."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(re.sub(r"\d+", "N", os.readlink(f"/proc/{pid}/fd/{name}")))
        except OSError:
            continue
    return sorted(found)


def until_as_before(process: Process, before: list[str]) -> None:
    """Wait until a process has open no more than it had before. AssertionError, with the difference, if it keeps more.
    It may have less: what an earlier test has left was not gone yet."""
    deadline = time.monotonic() + SETTLED_S
    while more := Counter(process.descriptors()) - Counter(before):
        assert time.monotonic() < deadline, f"open now and not before: {more}"
        time.sleep(0.01)


def workers_of(pool: Any) -> list[Any]:
    """The living workers of a Pool, as programs that look inside see them."""
    found: list[Any] = pool._pool
    return found


def children_of(pid: int) -> list[int]:
    """The children of a process, zombies included."""
    found: list[int] = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children") as file:
            found += map(int, file.read().split())
    return found


class Cluster:
    """A head and nodes, in a directory with the cluster's key. Leave the `with` block to end all of it."""

    def __init__(self, directory: Path, nodes: int = 2, cpus: int = 2) -> None:
        self.directory = directory
        self.key = directory / "key"
        self.keys = Keys.new()
        write(self.key, self.keys)
        self.mark = new_mark()
        self.processes: list[Process] = []
        self.nodes: list[Process] = []
        self.head = self.start_head("tcp://127.0.0.1:0")
        self.address = self.head.expect(r"listens on (\S+)")[1]
        for _ in range(nodes):
            self.start_node(cpus, wait=False)
        for node in self.nodes:
            node.expect("joined")

    def environment(self) -> dict[str, str]:
        """For a process of this cluster."""
        kept = {name: os.environ[name] for name in _PASSED if name in os.environ}
        return kept | {"DPOOL_KEY_FILE": str(self.key), MARK: self.mark, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
                       "PYTHONFAULTHANDLER": "1"}

    def command(self, *arguments: str) -> Process:
        """Start `dpool` with these arguments."""
        return self.python("-m", "dpool", *arguments)

    def python(self, *arguments: str, address: bool = False) -> Process:
        """Start Python with these arguments, as a part of this cluster; `address`: as a driver of it."""
        environment = self.environment() | ({"DPOOL_ADDRESS": self.address} if address else {})
        process = Process([sys.executable, *arguments], environment, self.directory)
        self.processes.append(process)
        return process

    def start_head(self, address: str) -> Process:
        self.head = self.command("head", "--bind", address)
        return self.head

    def start_node(self, cpus: int = 2, wait: bool = True) -> Process:
        """One node more; `wait`: until it has joined."""
        node = self.command("node", self.address, "--cpus", str(cpus))
        self.nodes.append(node)
        if wait:
            node.expect("joined")
        return node

    def engine(self) -> ClusterEngine:
        """Connect this process; the caller closes it."""
        return ClusterEngine(self.address, self.key)

    def workers(self) -> set[int]:
        """The worker processes on all nodes that live: children of their zygotes."""
        found: set[int] = set()
        for node in self.nodes:
            if node.process.poll() is None:
                for zygote in children_of(node.pid):
                    found.update(pid for pid in children_of(zygote) if not _is_zombie(pid))
        return found

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for process in reversed(self.processes):
            if process.process.poll() is None:
                process.send(signal.SIGCONT)
                process.send(signal.SIGTERM)
        for process in reversed(self.processes):
            try:
                process.process.wait(10)
            except subprocess.TimeoutExpired:
                process.send(signal.SIGKILL)
        left = Watched(marked(self.mark)).left_after(10)
        for line in left:
            os.kill(int(line.split(":")[0]), signal.SIGKILL)
        if kind is None:
            assert not left, f"processes are left: {left}"


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Driver:
    """This process as a driver of a cluster, while in the `with` block."""

    def __init__(self, cluster: Cluster) -> None:
        self.engine = cluster.engine()

    def __enter__(self) -> ClusterEngine:
        self._before = session.use(self.engine)
        return self.engine

    def __exit__(self, *_: object) -> None:
        session.use(self._before)
        self.engine.close()


class Sink:
    """Gathers what a group reports, and raises if something is reported twice."""

    def __init__(self) -> None:
        self.values: dict[int, object] = {}
        self.failures: dict[int, object] = {}
        self.twice: deque[int] = deque()
        self.event = threading.Condition()

    def start(self) -> bool:
        return True

    def set(self, first: int, values: Sequence[object]) -> None:
        with self.event:
            for index, value in enumerate(values, first):
                self._note(index)
                self.values[index] = value
            self.event.notify_all()

    def fail(self, index: int, failure: object) -> None:
        with self.event:
            self._note(index)
            self.failures[index] = failure
            self.event.notify_all()

    def _note(self, index: int) -> None:
        if index in self.values or index in self.failures:
            self.twice.append(index)

    def wait_for(self, count: int) -> None:
        """Until so many tasks are reported."""
        with self.event:
            done = self.event.wait_for(lambda: len(self.values) + len(self.failures) >= count, PATIENCE_S)
        assert done, f"{len(self.values)} values and {len(self.failures)} failures of {count} came"
