"""Owns the tests of who may be part of a cluster, and of what strangers and liars can do to it: nothing.

It speaks to real heads and nodes over TCP, raw and through ZeroMQ. The rules of key files are in test_keys.py.
"""

from __future__ import annotations

import base64
import os
import re
import select
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import deeds
import msgspec
import nested_tasks as tasks
import pytest
import zmq
from clusters import ROOT, Cluster, Driver, until, workers_of

import dpool
from dpool.cli.asking import ask
from dpool.cluster.head.server import Head
from dpool.cluster.node import machine
from dpool.cluster.node.agent import Agent
from dpool.cluster.wire import bulk, links, messages, sessions
from dpool.cluster.wire import keys as cluster_keys
from dpool.cluster.wire.keys import AGENT, DRIVER, HEAD, DriverKeys, Keys
from dpool.cluster_engine import ClusterEngine
from dpool.errors import ClusterError, KeyProblem
from dpool.multiprocessing import Pool, get_context


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=1) as cluster:
        yield cluster


def _node_address(cluster: Cluster) -> str:
    status = cluster.command("status", cluster.address)
    assert status.wait() == 0
    return next(found[0] for line in status.lines if "node" in line and (found := re.search(r"tcp://[\d.]+:\d+", line)))


@pytest.fixture(scope="module")
def addresses(cluster: Cluster) -> list[str]:
    """Of the head and of the node, and where large objects come to the node."""
    return [cluster.address, _node_address(cluster), _nodes(cluster)[0].bulk]


def works(cluster: Cluster) -> None:
    with Driver(cluster), Pool(2) as pool:
        assert pool.map(deeds.double, range(10)) == [2 * value for value in range(10)]


def rss_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- keys


def test_another_key_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    other = Keys.new()
    cluster_keys.write(tmp_path / "other", other)
    with pytest.raises(ClusterError, match=f"key.*{other.id}"):
        ClusterEngine(cluster.address, tmp_path / "other")
    node = cluster.command("node", cluster.address, "--key", str(tmp_path / "other"))
    node.expect("no connection to the head.*key")
    node.end()
    works(cluster)


def test_the_head_says_whom_it_refused_and_names_no_key(tmp_path: Path) -> None:
    with Cluster(tmp_path, nodes=0) as cluster:
        stranger = zmq.Context()
        dialer = _dialer_with_own_key(stranger, cluster.keys.public(HEAD), cluster.address)
        try:
            cluster.head.expect(r"refused 127\.0\.0\.1")
        finally:
            dialer.close(0)
            stranger.term()
        text = "\n".join(cluster.head.lines)
        assert cluster.keys.text().partition(":")[2] not in text


def _dialer_with_own_key(context: zmq.Context[zmq.Socket[bytes]], server: bytes, address: str) -> zmq.Socket[bytes]:
    """A stranger who knows the server's public key, but no key of the cluster."""
    dialer = context.socket(zmq.DEALER)
    public, secret = zmq.curve_keypair()
    dialer.setsockopt(zmq.CURVE_SERVERKEY, server)
    dialer.setsockopt(zmq.CURVE_PUBLICKEY, public)
    dialer.setsockopt(zmq.CURVE_SECRETKEY, secret)
    dialer.connect(address)
    dialer.send(messages.encode(messages.StopCluster()))
    return dialer


def test_without_a_key_nothing_starts(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for arguments in (["node", "tcp://127.0.0.1:7077"], ["status"], ["head", "--bind", "tcp://0.0.0.0:0"]):
        done = subprocess.run([sys.executable, "-m", "dpool", *arguments], env=environment, capture_output=True,
                              text=True, timeout=60)
        assert done.returncode == 1 and "no key file" in done.stderr and "Traceback" not in done.stderr, arguments
    with pytest.raises(KeyProblem, match="no key file"):
        ClusterEngine("tcp://127.0.0.1:7077", tmp_path / "none")


def test_an_empty_key_is_no_way_to_turn_it_off(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> None:
    monkeypatch.delenv("DPOOL_KEY_FILE", raising=False)
    monkeypatch.setenv("DPOOL_KEY", "")
    with pytest.raises(KeyProblem, match="DPOOL_KEY is empty"):
        ClusterEngine(cluster.address)


def test_the_key_is_not_in_environments_arguments_or_descriptors_of_workers(cluster: Cluster) -> None:
    secret = cluster.keys.text()
    with Driver(cluster), Pool(2) as pool:
        for environment, arguments, names in pool.map(_what_a_worker_knows, range(4), chunksize=1):
            assert not any(name.startswith("DPOOL_KEY") or name == "DPOOL_ADDRESS" for name in environment)
            assert secret not in "".join(environment.values()) and secret not in arguments
            assert not [name for name in names if name.endswith("/key")]
    for process in cluster.processes:
        if process.process.poll() is None:
            with open(f"/proc/{process.pid}/cmdline") as file:
                assert secret not in file.read()


def _what_a_worker_knows(_: object) -> tuple[dict[str, str], str, list[str]]:
    names = []
    for name in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    with open("/proc/self/cmdline") as file:
        return dict(os.environ), file.read(), names


def _memory(pid: int) -> Iterator[bytes]:
    """What a process has in its memory, and in the files that it has open."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            place, rights, *_ = line.split()
            if rights[0] != "r" or line.rstrip().endswith(("[vvar]", "[vvar_vclock]", "[vsyscall]")):
                continue
            first, last = (int(number, 16) for number in place.split("-"))
            try:
                memory.seek(first)
                yield memory.read(last - first)
            except OSError:
                continue  # of a file that has become shorter
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        if stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "rb") as file:
                yield file.read()
    for name in ("environ", "cmdline"):
        with open(f"/proc/{pid}/{name}", "rb") as file:
            yield file.read()


def _holds(pid: int, *needles: bytes) -> set[bytes]:
    """Which of these bytes a process has anywhere."""
    return {needle for piece in _memory(pid) for needle in needles if needle in piece}


def test_workers_never_have_the_secret_and_those_that_drive_have_a_driver_s_keys(cluster: Cluster,
                                                                                 tmp_path: Path) -> None:
    try:
        open(f"/proc/{cluster.nodes[0].pid}/mem", "rb").close()
    except PermissionError:
        pytest.skip("the memory of other processes cannot be read here")
    text = cluster.keys.text().partition(":")[2]
    secrets = {base64.b64decode(text), text.encode().rstrip(b"=")}
    role = cluster.keys.pair(DRIVER)[1]
    others = {cluster.keys.pair(other)[1] for other in (HEAD, AGENT)}
    with Driver(cluster), Pool(2) as pool:
        idle, parent = (process.pid for process in pool._pool)  # type: ignore[attr-defined]
        assert not _holds(idle, *secrets, role, *others)
        while pool.apply(tasks.drive_unless, (str(tmp_path / "never"), idle)) != parent:
            pass
        below = set(map(int, os.listdir(tmp_path / "never")))
        assert len(below) == 2
        assert _holds(parent, *secrets, role, *others) == {role}
        for worker in (idle, *below):
            assert not _holds(worker, *secrets, role, *others)
        # The search finds what is there: the node has both.
        assert _holds(cluster.nodes[0].pid, *secrets, role) >= {role, base64.b64decode(text)}


def test_a_driver_s_keys_are_no_node_s_and_no_head_s(cluster: Cluster, addresses: list[str]) -> None:
    keys = DriverKeys.of(cluster.keys.for_drivers().texts())
    context = zmq.Context()
    opened: list[links.Dialer] = []
    try:
        dialer = links.Dialer(context, keys, DRIVER, HEAD, addresses[0])
        opened.append(dialer)
        # It is let in as a driver, and what it says of nodes is not listened to.
        until(lambda: dialer.watch() or dialer.connected, "connected")  # type: ignore[func-returns-value]
        dialer.send((messages.encode(messages.NodeState(bytes(16), 1, "false", ["tcp://127.0.0.1:1"], 1000,
                                                        messages.Versions.here())),))
        assert len(_nodes(cluster)) == 1
        for role in (HEAD, AGENT):
            with pytest.raises(ValueError, match="a driver's"):
                links.Dialer(context, keys, role, HEAD, addresses[0])
            with pytest.raises(ValueError, match="a driver's"):
                links.Listener(context, keys, role, "tcp://127.0.0.1:0")  # type: ignore[arg-type]
        # Who listens with them by hand is taken for neither.
        server = context.socket(zmq.ROUTER)
        server.setsockopt(zmq.CURVE_SERVER, 1)
        server.setsockopt(zmq.CURVE_PUBLICKEY, keys.pair(DRIVER)[0])
        server.setsockopt(zmq.CURVE_SECRETKEY, keys.pair(DRIVER)[1])
        port = server.bind_to_random_port("tcp://127.0.0.1")
        for mine, role in ((AGENT, HEAD), (DRIVER, HEAD), (DRIVER, AGENT)):
            victim = links.Dialer(context, cluster.keys, mine, role, f"tcp://127.0.0.1:{port}")
            opened.append(victim)
            until(lambda victim=victim: victim.watch() or victim.broken, "refused")  # type: ignore[misc]
            assert not victim.connected
        server.close(0)
    finally:
        for dialer in opened:
            dialer.close()
        context.term()
    works(cluster)


def _nodes(cluster: Cluster) -> list[messages.NodeReport]:
    report = ask(cluster.keys, cluster.address, messages.Ask())
    assert isinstance(report, messages.Report)
    return report.nodes


# -- strangers


def _listening(pids: Iterable[int]) -> list[str]:
    """Where these processes listen for TCP, as the kernel writes it."""
    inodes: dict[str, str] = {}
    for table in ("tcp", "tcp6"):
        with open(f"/proc/net/{table}") as file:
            for line in file.readlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":  # listening
                    inodes[fields[9]] = fields[1]
    found = []
    for pid in pids:
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{name}")
            except FileNotFoundError:
                continue
            if (match := re.fullmatch(r"socket:\[(\d+)\]", target)) and match[1] in inodes:
                found.append(inodes[match[1]])
    return found


def test_without_a_cluster_nobody_listens() -> None:
    before = _listening([os.getpid()])
    with get_context("forkserver").Pool(2) as pool:
        assert pool.map(len, [dpool.put(bytes(1 << 20))] * 4, chunksize=1) == [1 << 20] * 4
        assert _listening([os.getpid(), *(worker.pid for worker in workers_of(pool))]) == before == []


def test_a_default_start_listens_on_the_loopback_interface_alone(cluster: Cluster, addresses: list[str]) -> None:
    found = _listening(process.pid for process in (cluster.head, *cluster.nodes))
    # The node's second one is for large objects.
    assert len(found) == (3 if bulk.available() else 2)
    # 127.0.0.1, or the same seen by a socket that speaks IPv6 too.
    assert all(entry.partition(":")[0].endswith("0100007F") for entry in found)


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    bytes(10_000),
    b"\xff" * 10_000,
    b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f" + b"\x03\x00NULL" + bytes(48),  # a ZMTP greeting without encryption
    b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00CURVE" + bytes(47) + b"\x06" + (1 << 40).to_bytes(8, "big"),
]


@pytest.mark.parametrize("which", [0, 1, 2], ids=["head", "node", "bulk"])
def test_garbage_changes_nothing(cluster: Cluster, addresses: list[str], which: int) -> None:
    if not addresses[which]:
        pytest.skip("cryptography is not installed")
    host, port = links.parse_address(addresses[which])
    process = (cluster.head, *cluster.nodes, *cluster.nodes)[which]
    before = rss_bytes(process.pid)
    for garbage in GARBAGE:
        for _ in range(10):
            with socket.create_connection((host, port)) as connection:
                try:
                    connection.sendall(garbage)
                except OSError:
                    pass  # it has cut us off
    silent = [socket.create_connection((host, port)) for _ in range(20)]
    works(cluster)
    for connection in silent:
        connection.close()
    assert rss_bytes(process.pid) - before < 16 << 20
    assert process.process.poll() is None


@pytest.mark.parametrize("which", [0, 1], ids=["head", "node"])
def test_a_giant_frame_before_the_handshake_is_cut_off(cluster: Cluster, addresses: list[str], which: int) -> None:
    host, port = links.parse_address(addresses[which])
    process = (cluster.head, *cluster.nodes)[which]
    before = rss_bytes(process.pid)
    with socket.create_connection((host, port)) as connection:
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(15) + b"\x00" + bytes(31)
        connection.sendall(greeting + b"\x06" + (2 << 30).to_bytes(8, "big"))
        sent = 0
        try:
            while sent < 64 << 20:
                sent += connection.send(bytes(1 << 20))
        except OSError:
            pass
    assert sent < 64 << 20, "it took 64 MiB of a frame from a stranger"
    assert rss_bytes(process.pid) - before < 16 << 20
    works(cluster)


def test_a_recorded_session_cannot_be_played_again(cluster: Cluster) -> None:
    recorded = bytearray()
    host, port = links.parse_address(cluster.address)
    with socket.create_server(("127.0.0.1", 0)) as tap:
        thread = threading.Thread(target=_tap, args=(tap, (host, port), recorded), daemon=True)
        thread.start()
        engine = ClusterEngine(f"tcp://127.0.0.1:{tap.getsockname()[1]}", cluster.key)
        until(lambda: _drivers(cluster) == 1, "the head knows the driver")
        engine.close()
        thread.join(30)
    until(lambda: _drivers(cluster) == 0, "the driver is gone")
    assert len(recorded) > 500
    with socket.create_connection((host, port)) as connection:
        connection.sendall(recorded)
        connection.settimeout(10)
        try:
            while connection.recv(65536):
                pass  # it is answered until the head sees that it is not whom it spoke to
        except OSError:
            pass
    assert _drivers(cluster) == 0
    works(cluster)


def _tap(listener: socket.socket, target: tuple[str, int], recorded: bytearray) -> None:
    client, _ = listener.accept()
    server = socket.create_connection(target)
    with client, server:
        other = {client: server, server: client}
        while True:
            for ready in select.select([client, server], [], [])[0]:
                data = ready.recv(65536)
                if not data:
                    return
                if ready is client:
                    recorded += data
                other[ready].sendall(data)


def _drivers(cluster: Cluster) -> int:
    """As the head says, without those who ask it."""
    status = cluster.command("status", cluster.address, "--json")
    assert status.wait() == 0
    report = msgspec.json.decode("\n".join(status.lines[:-1]))
    return len(report["drivers"])


# -- liars: they have the key, and do not keep to the protocol


@pytest.fixture
def dial(cluster: Cluster, addresses: list[str]) -> Iterator[object]:
    context = zmq.Context()
    opened: list[links.Dialer] = []

    def dial(which: int, role: str = DRIVER) -> links.Dialer:
        dialer = links.Dialer(context, cluster.keys, role, (HEAD, AGENT)[which], addresses[which])
        opened.append(dialer)
        return dialer

    yield dial
    for dialer in opened:
        dialer.close()
    context.term()


PICKLE = b"cbuiltins\nprint\n(S'unpickled'\ntR."
LIES = [b"", b"\xc1", PICKLE, bytes(100), b"\x80" * 1000, os.urandom(1000), messages.encode(messages.Bye(bytes(16))),
        b"\x81\xa4type\xa9NodeState", messages.encode(messages.Ask()) * 2]


@pytest.mark.parametrize("role", [DRIVER, AGENT])
@pytest.mark.parametrize("which", [0, 1], ids=["head", "node"])
def test_messages_that_are_none(cluster: Cluster, dial: object, which: int, role: str) -> None:
    process = (cluster.head, *cluster.nodes)[which]
    dialer: links.Dialer = dial(which, role)  # type: ignore[operator]
    for lie in LIES:
        dialer.send((lie,))
        dialer.send((lie, lie, lie))
        dialer.send([lie] * 20)
        for kind in range(8):
            dialer.send((sessions.HEADER.pack(kind, 255, 3, 0, 1, 0) + lie,))
            dialer.send((sessions.HEADER.pack(kind, 0, 0, 0, 0, 1 << 60) + lie,))
    works(cluster)
    assert process.process.poll() is None


def test_a_frame_that_is_too_large_ends_the_connection(cluster: Cluster, dial: object) -> None:
    for which in (0, 1):
        dialer: links.Dialer = dial(which)  # type: ignore[operator]
        until(lambda dialer=dialer: dialer.watch() or dialer.connected, "connected")  # type: ignore[misc]
        dialer.send((bytes(links.MAX_FRAME_BYTES + 1),))
        until(lambda dialer=dialer: dialer.watch() or dialer.broken, "it is cut off")  # type: ignore[misc]
    works(cluster)


def test_an_agent_gets_objects_of_a_node_and_nothing_else(dial: object) -> None:
    dialer: links.Dialer = dial(1, AGENT)  # type: ignore[operator]
    key, nobody = os.urandom(16), sessions.HEADER.pack(sessions.CONTROL, 0, 0, 0, 0, 0)
    # A driver would be answered to both.
    dialer.send((nobody + messages.encode(messages.Pulse(key, 0)),))
    dialer.send((nobody + messages.encode(messages.Resume(key, 0, True, 1)),))
    dialer.send((messages.encode(messages.Enough(key)),))
    dialer.send((messages.encode(messages.Pull(key, 0, 1 << 60)),))
    assert [messages.from_source.decode(answer) for answer in _answers(dialer)] == [messages.NotHere(key)]
    driver: links.Dialer = dial(1)  # type: ignore[operator]
    driver.send((messages.encode(messages.Pull(key, 0, 1 << 60)),))
    driver.send((nobody + messages.encode(messages.Pulse(key, 0)),))
    told = [messages.from_node.decode(answer[sessions.HEADER.size:]) for answer in _answers(driver)]
    assert told == [messages.Gone(key)]


def _answers(dialer: links.Dialer) -> list[bytes]:
    found: list[bytes] = []

    def look() -> bool:
        found.extend(bytes(frames[0]) for frames in dialer.receive())
        return bool(found)

    until(look, "it is answered")
    return found


def test_an_agent_may_not_stop_the_cluster(cluster: Cluster, dial: object) -> None:
    dialer: links.Dialer = dial(0, AGENT)  # type: ignore[operator]
    dialer.send((messages.encode(messages.StopCluster()),))
    works(cluster)


def test_versions_that_do_not_fit_are_refused_with_both(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    real = messages.Versions.here()
    monkeypatch.setattr(messages.Versions, "here", staticmethod(lambda: messages.Versions(real.protocol, "3.7", "0.0")))
    with pytest.raises(ClusterError, match=rf"Python 3\.7 does not fit Python {re.escape(real.python)}"):
        ClusterEngine(cluster.address, cluster.key)
    monkeypatch.setattr(messages.Versions, "here", staticmethod(
        lambda: messages.Versions(real.protocol + 1, real.python, "9.9")))
    with pytest.raises(ClusterError, match=r"dpool 9\.9 with protocol \d+ does not fit dpool"):
        ClusterEngine(cluster.address, cluster.key)


def test_a_node_that_does_not_fit_says_so_and_is_left(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head does: it may be of another version than its nodes. The node's refusal is the last thing it says."""
    real = messages.Versions.here()
    with Driver(cluster):
        monkeypatch.setattr(messages.Versions, "here", staticmethod(
            lambda: messages.Versions(real.protocol, "3.7", "0.0")))
        with pytest.raises(ClusterError, match=rf"cannot be used: Python 3\.7 does not fit Python {real.python}"):
            Pool(1)
    monkeypatch.undo()
    works(cluster)


# -- the rule that head and node never unpickle


HOOK = """
import sys
def hook(event, arguments):
    if event == "pickle.find_class":
        print("UNPICKLED", arguments, flush=True)
sys.addaudithook(hook)
from dpool.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_head_and_node_never_unpickle(tmp_path: Path) -> None:
    with Cluster(tmp_path, nodes=0) as cluster:
        cluster.head.end()
        head = cluster.python("-c", HOOK, "head", "--bind", cluster.address)
        head.expect("listens")
        node = cluster.python("-c", HOOK, "node", cluster.address, "--cpus", "2")
        node.expect("joined")
        works(cluster)
        with Driver(cluster), Pool(2, deeds.double, (3,)) as pool:
            assert pool.map(lambda value: [value], [1, 2]) == [[1], [2]]
            with pytest.raises(KeyError):
                pool.apply(deeds.raise_error, (KeyError, 1))
        assert cluster.command("stop", cluster.address).wait() == 0
        assert (head.wait(), node.wait()) == (0, 0)
        assert not [line for line in head.lines + node.lines if "UNPICKLED" in line]


def test_the_hook_of_the_test_above_sees_an_unpickle() -> None:
    program = HOOK.replace("from dpool.cli.main import main\nsys.exit(main(sys.argv[1:]))", "") + (
        "import pickle, fractions\npickle.loads(pickle.dumps(fractions.Fraction(1)))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "UNPICKLED" in done.stdout


# -- addresses


@pytest.mark.parametrize("address", ["host:7077", "http://host:7077", "tcp://host", "tcp://host:0", "tcp://host:70000",
                                     "tcp://host:abc", "tcp://::1:7077", "ipc:///tmp/x", "", 7077])
def test_addresses_that_are_none(address: str, cluster: Cluster) -> None:
    with pytest.raises(ValueError, match="tcp://|ports are"):
        ClusterEngine(address, cluster.key)


def test_where_nothing_listens(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpool import cluster_engine

    monkeypatch.setattr(cluster_engine, "CONNECT_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(ClusterError, match=f"no head of a dpool cluster at tcp://127.0.0.1:{port}"):
        ClusterEngine(f"tcp://127.0.0.1:{port}", cluster.key)
    assert time.monotonic() - started < 60


def test_an_address_that_is_taken_names_it(cluster: Cluster) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {cluster.address}"):
        Head(cluster.keys, cluster.address, print)
    with pytest.raises(OSError, match=f"cannot listen on {cluster.address}"):
        Agent(cluster.keys, cluster.address, cluster.address, 1, machine.stock(), print)
