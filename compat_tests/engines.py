"""Starts the cluster that the tests run on with --engine cluster or hosts: a head and two nodes.

Knows no test. What is started is reached by DPOOL_ADDRESS and DPOOL_KEY_FILE, which every child inherits; it ends with
the process that started it. Called by the command lines.

cluster: processes of this machine. hosts: head, nodes and the command line itself each in namespaces of their own, with
their own network, /tmp, /dev/shm and pids (tests/hosts.py); for root.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from compat_tests.running import CHECKOUT

ENGINES = ("embedded", "cluster", "hosts")
NODES = 2
# As many as a test's pool has, so that one node could hold it: the tests see more than one only because of the spread.
CPUS_PER_NODE = 4
# Set for a command line that runs on a host: its cluster is there.
INSIDE = "DPOOL_COMPAT_ON_A_HOST"
PORT = 7077


@contextmanager
def started(engine: str) -> Iterator[None]:
    """While this is entered, doors opened by children are on that engine."""
    if engine == "embedded" or INSIDE in os.environ:
        yield
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compat_tests-cluster-")))
        cluster = stack.enter_context(_Cluster(folder))
        address = cluster.start_head([], "tcp://127.0.0.1:0")
        for _ in range(NODES):
            cluster.start_node([], address)
        os.environ |= {"DPOOL_ADDRESS": address, "DPOOL_KEY_FILE": str(cluster.key)}
        try:
            yield
        finally:
            del os.environ["DPOOL_ADDRESS"], os.environ["DPOOL_KEY_FILE"]


def on_hosts(engine: str, module: str, arguments: Sequence[str], keep: Sequence[Path] = ()) -> int | None:
    """For "hosts": run `python -m module arguments` on a host beside its cluster, and return its exit code; `keep` are
    folders it is to see. None if this process is to go on itself."""
    if engine != "hosts" or INSIDE in os.environ:
        return None
    sys.path.insert(0, str(CHECKOUT / "tests"))
    hosts: Any = __import__("hosts")
    if not hosts.possible():
        print("hosts need root, namespaces and TAP devices")
        return 2
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compat_tests-cluster-")))
        seen = [Path(sys.prefix), Path(sys.base_prefix), CHECKOUT, folder, *keep]
        cluster = stack.enter_context(_Cluster(folder))
        lab = stack.enter_context(hosts.Hosts(2 + NODES, seen))  # all that was started there ends with it
        address = cluster.start_head(lab.command(1, []), f"tcp://{hosts.address(1)}:{PORT}")
        for number in range(NODES):
            cluster.start_node(lab.command(2 + number, []), address)
        here = ["env", f"DPOOL_ADDRESS={address}", f"DPOOL_KEY_FILE={cluster.key}", f"{INSIDE}=1",
                f"PYTHONPATH={CHECKOUT}", "sh", "-c", 'cd "$0"; exec "$@"', str(CHECKOUT)]
        return subprocess.run(lab.command(0, [*here, sys.executable, "-m", module, *arguments])).returncode


class _Cluster:
    """A head and nodes, each started by a command that begins with `where`; they end with the `with` block."""

    def __init__(self, folder: Path) -> None:
        self.key = folder / "key"
        self._folder = folder
        self._processes: list[subprocess.Popen[str]] = []
        self._environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "DPOOL_KEY_FILE": str(self.key)}
        subprocess.run([sys.executable, "-m", "dpool", "keygen", str(self.key)], env=self._environment, check=True,
                       stdout=subprocess.DEVNULL)

    def _start(self, where: Sequence[str], *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([*where, sys.executable, "-m", "dpool", *arguments], env=self._environment,
                                   text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   cwd=self._folder)
        self._processes.append(process)
        return process

    def start_head(self, where: Sequence[str], bind: str) -> str:
        """Its address."""
        head = self._start(where, "head", "--bind", bind)
        assert head.stdout is not None
        return head.stdout.readline().split()[3]

    def start_node(self, where: Sequence[str], address: str) -> None:
        node = self._start(where, "node", address, "--cpus", str(CPUS_PER_NODE))
        assert node.stderr is not None
        node.stderr.readline()  # it has joined
        os.set_blocking(node.stderr.fileno(), False)  # no one reads what it says from here on

    def __enter__(self) -> "_Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            process.communicate(timeout=30)
