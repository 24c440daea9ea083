"""Starts the cluster that the tests run on with --engine cluster: a head and two nodes, processes of this machine.

Knows no test. What is started is reached by DPOOL_ADDRESS and DPOOL_KEY_FILE, which every child inherits; it ends with
the process that started it. Called by __main__.py.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compat_tests.running import CHECKOUT

ENGINES = ("embedded", "cluster")
NODES = 2
# As many as a test's pool has, so that one node could hold it: the tests see more than one only because of the spread.
CPUS_PER_NODE = 4


@contextmanager
def started(engine: str) -> Iterator[None]:
    """While this is entered, doors opened by children are on that engine."""
    if engine == "embedded":
        yield
        return
    with tempfile.TemporaryDirectory(prefix="compat_tests-cluster-") as folder:
        environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "DPOOL_KEY_FILE": str(Path(folder) / "key")}
        dpool = [sys.executable, "-m", "dpool"]
        subprocess.run([*dpool, "keygen", environment["DPOOL_KEY_FILE"]], env=environment, check=True,
                       stdout=subprocess.DEVNULL)
        processes = []
        try:
            head = subprocess.Popen([*dpool, "head", "--bind", "tcp://127.0.0.1:0"], env=environment, text=True,
                                    stdout=subprocess.PIPE, cwd=folder)
            processes.append(head)
            assert head.stdout is not None
            address = head.stdout.readline().split()[3]
            for _ in range(NODES):
                node = subprocess.Popen([*dpool, "node", address, "--cpus", str(CPUS_PER_NODE)], env=environment,
                                        text=True, stderr=subprocess.PIPE, cwd=folder)
                processes.append(node)
                assert node.stderr is not None
                node.stderr.readline()  # it has joined
                os.set_blocking(node.stderr.fileno(), False)  # no one reads what it says from here on
            os.environ |= {"DPOOL_ADDRESS": address, "DPOOL_KEY_FILE": environment["DPOOL_KEY_FILE"]}
            yield
        finally:
            os.environ.pop("DPOOL_ADDRESS", None)
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait(30)
