"""Owns the tests of a cluster whose parts are killed, stopped, replaced and restarted, as processes of this machine.

Each cluster here is harmed by one test only. What holds without harm is in test_cluster.py.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import deeds
import pytest
from clusters import Cluster, Driver, Sink, children_of, until, until_as_before, workers_of
from leftovers import Watched

from dpool.engine import MAP, GroupSpec
from dpool.errors import ClusterError, GroupBroken
from dpool.multiprocessing import Pool, get_context


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path) as cluster:
        yield cluster


def note(path: str, value: int) -> int:
    """Leave a line that says that this task ran."""
    with open(path, "ab", buffering=0) as file:
        file.write(b"%d\n" % value)
    time.sleep(0.002)
    return value


def wait_for_file(path: str) -> int:
    while not os.path.exists(path):
        time.sleep(0.01)
    return os.getpid()


def host_of_worker(_: object) -> int:
    time.sleep(0.01)
    return os.getppid()


def test_a_node_is_killed_in_the_middle_of_a_map(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    sink = Sink()
    with Driver(cluster) as engine:
        group = engine.open_group(GroupSpec(4, get_context("spawn")))
        group.submit_many(note, [(str(path), value) for value in range(1000)], 2, sink)
        sink.wait_for(100)
        victim = cluster.nodes[0]
        doomed = Watched([zygote for zygote in children_of(victim.pid)] + [
            pid for zygote in children_of(victim.pid) for pid in children_of(zygote)])
        victim.end(signal.SIGKILL)
        assert not doomed.left_after(10)
        sink.wait_for(1000)
        # Each task is reported once, with its value; what ran twice, ran on the node that was lost first.
        assert not sink.twice and not sink.failures
        assert sink.values == {value: value for value in range(1000)}
        ran = sorted(int(line) for line in path.read_text().split())
        assert sorted(set(ran)) == list(range(1000))
        assert len(ran) - 1000 <= 200
        group.close()
        assert group.join(30)


def test_a_node_is_terminated_in_the_middle_of_a_map(cluster: Cluster) -> None:
    with Driver(cluster), Pool(4) as pool:
        results = pool.imap(deeds.double, range(5000))
        assert next(results) == 0
        assert cluster.nodes[1].end() == 0
        assert list(results) == [2 * value for value in range(1, 5000)]
        until(lambda: len(workers_of(pool)) == 4, "the workers are placed on the other node")


def test_all_nodes_are_lost_and_one_comes_back(cluster: Cluster) -> None:
    with Driver(cluster), Pool(2) as pool:
        assert pool.map(deeds.double, [1]) == [2]
        for node in cluster.nodes:
            node.send(signal.SIGKILL)
        until(lambda: not workers_of(pool), "the driver knows")
        result = pool.map_async(deeds.double, range(10))
        cluster.start_node()
        assert result.get(60) == [2 * value for value in range(10)]


def test_a_pool_without_a_number_grows_with_the_cluster(cluster: Cluster) -> None:
    with Driver(cluster), Pool() as pool:
        until(lambda: len(workers_of(pool)) == 4, "a worker for each CPU")
        cluster.start_node(3)
        until(lambda: len(workers_of(pool)) == 7, "workers on the new node")
        assert len(set(pool.map(host_of_worker, range(200), chunksize=1))) == 3


def test_the_head_is_killed_and_comes_back(cluster: Cluster) -> None:
    with Driver(cluster), Pool(4) as pool:
        results = pool.imap(deeds.double, range(3000))
        assert next(results) == 0
        cluster.head.end(signal.SIGKILL)
        assert list(results) == [2 * value for value in range(1, 3000)]  # no head is needed for this
        cluster.start_head(cluster.address).expect("listens")
        cluster.start_node(1)
        # Groups are placed by the new head: it knows from the nodes and drivers what there is.
        with Pool() as other:
            until(lambda: len(workers_of(other)) == 5, "all nodes have joined the new head")
            assert other.map(deeds.double, range(100)) == [2 * value for value in range(100)]
        assert pool.map(deeds.double, range(100)) == [2 * value for value in range(100)]


DRIVER = """
import sys, time
from dpool.multiprocessing import Pool

def wait(path):
    with open(path, "w") as file:
        file.write("running")
    time.sleep(1000)
if __name__ == "__main__":
    pool = Pool(4)
    results = [pool.apply_async(wait, (f"{sys.argv[1]}/{i}",)) for i in range(8)]
    results[0].get()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_driver_is_killed(cluster: Cluster, tmp_path: Path, number: int) -> None:
    before = [node.descriptors() for node in cluster.nodes]
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "running").mkdir()
    driver = cluster.python(str(tmp_path / "driver.py"), str(tmp_path / "running"), address=True)
    until(lambda: len(list((tmp_path / "running").iterdir())) == 4, "four tasks are running")
    workers = Watched(cluster.workers())
    driver.end(number)
    assert not workers.left_after(15)
    for node, had in zip(cluster.nodes, before, strict=True):
        until_as_before(node, had)


def test_a_driver_that_stops_for_a_while_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    program = ("from dpool.multiprocessing import Pool\n"
               "if __name__ == '__main__':\n"
               "    with Pool(2) as pool:\n"
               "        for value in pool.imap(abs, range(-2000, 0)): print(value, flush=True)\n")
    (tmp_path / "driver.py").write_text(program)
    driver = cluster.python(str(tmp_path / "driver.py"), address=True)
    driver.expect("2000")
    driver.send(signal.SIGSTOP)
    time.sleep(2)  # what is under test is that time passes
    driver.send(signal.SIGCONT)
    assert driver.wait() == 0
    assert driver.lines[:-1] == [str(value) for value in range(2000, 0, -1)]


def test_a_zygote_that_dies_is_replaced(cluster: Cluster) -> None:
    with Driver(cluster):
        with Pool(4) as pool:
            assert pool.map(deeds.double, [1]) == [2]
            for node in cluster.nodes:
                for zygote in children_of(node.pid):
                    os.kill(zygote, signal.SIGKILL)
        with Pool(4) as pool:
            assert pool.map(deeds.double, range(50)) == [2 * value for value in range(50)]


def test_without_a_node_a_pool_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpool.cluster.driver import connections

    monkeypatch.setattr(connections, "OPEN_TIMEOUT_S", 0.5)
    with Cluster(tmp_path, nodes=0) as cluster, Driver(cluster):
        with pytest.raises(ClusterError, match=r"has no node: start one with dpool node tcp://127\.0\.0\.1:\d+"):
            Pool(2)


def test_workers_that_cannot_live_break_the_group(cluster: Cluster) -> None:
    with Driver(cluster), Pool(2, deeds.exit_process, (3,)) as pool:
        with pytest.raises(GroupBroken):
            pool.map(deeds.double, range(10))


def test_stop_ends_head_and_nodes(cluster: Cluster) -> None:
    assert cluster.command("stop", cluster.address).wait() == 0
    assert cluster.head.wait() == 0
    assert [node.wait() for node in cluster.nodes] == [0, 0]


def test_a_session_whose_connection_breaks_goes_on(cluster: Cluster) -> None:
    with Driver(cluster) as engine:
        group = engine.open_group(GroupSpec(4, get_context("spawn")))
        nodes = group.port._nodes  # type: ignore[attr-defined]
        keys = set(nodes)
        for cut in range(1, 6):
            sink = Sink()
            group.submit_many(deeds.double, range(500), MAP, sink)
            for node in list(nodes.values()):
                _break_connections(node.addresses[0])
            sink.wait_for(500)
            assert not sink.twice and not sink.failures, cut
            assert sink.values == {value: 2 * value for value in range(500)}
        assert set(nodes) == keys  # the same sessions
        group.close()
        assert group.join(30)


def _break_connections(address: str) -> None:
    """End this process's TCP connections to an address, as seen by both sides."""
    port = int(address.rpartition(":")[2])
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername()[1] == port:
                    connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue
