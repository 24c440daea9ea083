"""Owns the tests of `dpool doctor`: each thing that can be wrong with a machine is said in a sentence, and only then.

Provokes what can be provoked here: bad keys, low limits, heads and nodes that are not there or do not answer.
"""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from clusters import ROOT, Cluster

from dpool.cli import doctor
from dpool.cli.asking import ask
from dpool.cluster.wire import bulk, messages
from dpool.cluster.wire.keys import Keys, write

CHECKS = ["versions", "encryption", "key", "open files", "processes", "shared memory", "encrypted link"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=1) as cluster:
        yield cluster


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good key, and none but this."""
    for name in ("DPOOL_KEY", "DPOOL_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(doctor, "PROBE_BYTES", 1 << 20)
    monkeypatch.setattr(doctor, "SLOW_BYTES_PER_S", 1.0)
    write(tmp_path / "key", Keys.new())
    return tmp_path / "key"


def findings(key: Path | None, address: str | None = None) -> dict[str, str]:
    """What is wrong, by check; all that is not is said to be ok."""
    lines: list[str] = []
    code = doctor.examine(key, address, lines.append)
    found = {}
    for line in lines:
        state, _, rest = line.partition(" ")
        name, _, text = rest.strip().partition(": ")
        assert state in ("ok", "WRONG") and text
        if state == "WRONG":
            found[name] = text
    assert code == (1 if found else 0)
    return found


def test_a_machine_that_is_well(key: Path) -> None:
    lines: list[str] = []
    assert doctor.examine(key, None, lines.append) == 0
    assert [line[len("ok     "):].partition(":")[0] for line in lines] == CHECKS


def test_no_key(key: Path) -> None:
    assert list(findings(None)) == ["key"]
    assert "make one with: dpool keygen" in findings(None)["key"]


def test_a_key_that_others_may_read(key: Path) -> None:
    key.chmod(0o644)
    assert findings(key) == {"key": f"others may use the key file {key} (mode 0644): chmod 600 {key}"}


def test_a_file_that_holds_no_key(key: Path) -> None:
    key.write_text("nonsense\n")
    assert "holds no dpool key" in findings(key)["key"]


def test_few_open_files(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    found = findings(key)
    assert found["open files"] == ("a process may have 256 files open, and one with many workers or objects needs "
                                   "more: ulimit -n 4096")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 256))
    assert findings(key)["open files"].endswith("256 is the hard limit, which root can raise")


def test_few_processes(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "process_limit", lambda: (20, "RLIMIT_NPROC"))
    assert findings(key)["processes"].startswith("no more than 20 processes can be started here (RLIMIT_NPROC), and a")


def test_the_limits_of_a_real_process(key: Path) -> None:
    program = ("import resource, sys\n"
               "for name, limit in (('NOFILE', 128), ('FSIZE', 1 << 16)):\n"
               "    resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (limit, limit))\n"
               "from dpool.cli.main import main\n"
               "sys.exit(main(sys.argv[1:]))\n")
    done = subprocess.run([sys.executable, "-c", program, "doctor", "--key", str(key)], capture_output=True, text=True,
                          timeout=60, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})
    wrong = [line for line in done.stdout.splitlines() if line.startswith("WRONG")]
    assert done.returncode == 1 and done.stderr == ""
    # A busy machine may find its link slow, too.
    wrong = [line for line in wrong if "encrypted link" not in line]
    assert len(wrong) >= 2
    assert wrong[0].startswith("WRONG  open files: a process may have 128 files open")
    assert wrong[-1].startswith("WRONG  shared memory: a segment of 16 MiB cannot be had (File too large)")


def test_a_library_that_cannot_encrypt(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda what: False)
    assert findings(key) == {"encryption": "this ZeroMQ cannot encrypt: install pyzmq from its wheels, or build it "
                                           "with libsodium"}


def test_slow_encryption(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SLOW_BYTES_PER_S", 1e15)
    assert "this ZeroMQ's cryptography is slow" in findings(key)["encrypted link"]


# -- with a head


def test_a_cluster_that_is_well(cluster: Cluster, key: Path) -> None:
    lines: list[str] = []
    assert doctor.examine(cluster.key, cluster.address, lines.append) == 0
    names = [line[len("ok     "):].partition(":")[0] for line in lines]
    host = socket.gethostname()
    bulk_too = [f"large objects to {host}"] if bulk.available() else []
    assert names == [*CHECKS, "head", "clock", f"node on {host}", *bulk_too]


def test_no_head(cluster: Cluster, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ANSWER_TIMEOUT_S", 0.5)
    with socket.socket() as taken:  # bound and not listening: nobody else gets this port
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        assert findings(key, address) == {"head": f"no head of a dpool cluster at {address}: connection refused or not "
                                                  f"answered"}
    assert "is no address of a cluster" in findings(key, "nonsense")["head"]


def test_a_head_with_another_key(cluster: Cluster, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ANSWER_TIMEOUT_S", 2.0)
    assert "key" in findings(key, cluster.address)["head"]


def test_another_version(cluster: Cluster, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = messages.Versions.here()
    monkeypatch.setattr(messages.Versions, "here", staticmethod(lambda: messages.Versions(here.protocol, "3.9", "0.0")))
    found = findings(cluster.key, cluster.address)
    assert list(found) == ["head"] and f"Python 3.9 does not fit Python {here.python}" in found["head"]


@pytest.mark.parametrize("apart, words", [(30, "is 30 s ahead of the head's"), (-30, "is 30 s behind the head's")])
def test_clocks_that_differ(apart: int, words: str, cluster: Cluster, key: Path, monkeypatch: pytest.MonkeyPatch
                            ) -> None:
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + apart)
    found = findings(cluster.key, cluster.address)
    assert list(found) == ["clock"] and words in found["clock"] and "NTP" in found["clock"]


def test_a_node_that_does_not_answer(cluster: Cluster, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REACH_TIMEOUT_S", 0.3)
    cluster.nodes[0].send(signal.SIGSTOP)
    try:
        found = findings(cluster.key, cluster.address)
    finally:
        cluster.nodes[0].send(signal.SIGCONT)
    assert list(found) == [f"node on {socket.gethostname()}"]
    assert "(no answer within 0.3 s): open that port, or start the node with --bind" in found[list(found)[0]]


def test_a_node_at_an_address_that_leads_nowhere(cluster: Cluster, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        node = messages.NodeReport("n", "far", [address], 1, 1, 0, 0, 0, "3", "0", 0.0)
        report = messages.Report("c", "3", "0", [node], [], time.time())
        monkeypatch.setattr(doctor, "ask", lambda *_: report)
        found = findings(cluster.key, cluster.address)
    assert list(found) == ["node on far"]
    assert found["node on far"].startswith(f"it cannot be reached from here at {address} (connection refused")


def test_a_node_whose_port_for_large_objects_cannot_be_reached(cluster: Cluster, key: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    real = ask(cluster.keys, cluster.address, messages.Ask())
    assert isinstance(real, messages.Report)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        node = msgspec.structs.replace(real.nodes[0], bulk=address)
        monkeypatch.setattr(doctor, "ask", lambda *_: msgspec.structs.replace(real, nodes=[node], clock_s=time.time()))
        found = findings(cluster.key, cluster.address)
    assert list(found) == [f"large objects to {socket.gethostname()}"]
    assert found[list(found)[0]].startswith(f"the port where they come cannot be reached from here at {address} "
                                            f"(Connection refused), so that they go the slower way")


def test_a_machine_without_the_library_for_large_objects_is_well(cluster: Cluster, key: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography")
    lines: list[str] = []
    monkeypatch.setattr(bulk, "available", lambda: False)
    assert doctor.examine(cluster.key, cluster.address, lines.append) == 0
    assert "can be reached, but not used from here: cryptography is not installed (dpool[bulk])" in lines[-1]
