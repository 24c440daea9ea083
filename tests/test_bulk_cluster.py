"""Owns the tests of large objects on a real cluster that go by bulk connections, and of what is left when these fail.

A sender is made to fail in this process, which is the driver, or in a node, by what the node calls before all else.
What arrives is compared with what was put; descriptors and threads are counted. Skipped without cryptography.
"""

from __future__ import annotations

import os
import signal
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bulk_faults
import pytest
from clusters import Cluster, Driver, Process, until, until_as_before, workers_of

import dpool
from dpool.cluster.wire import bulk
from dpool.cluster.wire.surroundings import Surroundings
from dpool.multiprocessing import Pool

pytest.importorskip("cryptography")

MB = 1 << 20
SIZE = 24 * MB  # more than a session has under way
NODE = "import sys, bulk_faults; bulk_faults.{}; from dpool.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, nodes=0) as cluster:
        yield cluster


def _node(cluster: Cluster, first: str = "nothing()", *more: str) -> Process:
    """A node with one worker, in which this is called first."""
    node = cluster.python("-c", NODE.format(first), "node", cluster.address, "--cpus", "1", *more)
    cluster.nodes.append(node)
    node.expect("joined")
    return node


def _nodes(pool: Any) -> list[Any]:
    return list(pool._group.port._nodes.values())


def _lanes(pool: Any) -> list[bulk.Sender | None]:
    return [node.lane.sender if node.lane is not None else None for node in _nodes(pool)]


def _counts(pool: Any) -> list[int]:
    """Pieces that went to each node by bulk."""
    return [sender.count if sender is not None else 0 for sender in _lanes(pool)]


def _opened(pool: Any) -> None:
    """Have a large object travel, until the bulk connection is there that it brings about."""
    ref = dpool.put(os.urandom(MB))
    pool.map(_crc, [ref] * len(workers_of(pool)), chunksize=1)
    until(lambda: any(sender is not None and sender.ready for sender in _lanes(pool)), "a bulk connection")


def _crc(content: bytes) -> int:
    return zlib.crc32(content)


def _travels(pool: Any, size: int = SIZE) -> None:
    """An object comes to all workers as it was put."""
    content = os.urandom(size)
    ref = dpool.put(content)
    workers = len(workers_of(pool))
    assert pool.map(_crc, [ref] * workers, chunksize=1) == [zlib.crc32(content)] * workers


def test_large_objects_go_by_bulk_and_small_ones_do_not(cluster: Cluster) -> None:
    _node(cluster)
    with Driver(cluster), Pool(1) as pool:
        _travels(pool, 100_000)
        assert _lanes(pool) == [None], "it is made when it is of use"
        _opened(pool)
        before = _counts(pool)
        _travels(pool)
        [sent] = [now - then for now, then in zip(_counts(pool), before, strict=True)]
        assert sent * bulk.MAX_PIECE_BYTES >= SIZE and sent >= SIZE // (256 * 1024)


def test_many_objects_many_pools_and_nothing_is_left(cluster: Cluster) -> None:
    node = _node(cluster)
    with Driver(cluster):
        with Pool(1) as pool:
            _opened(pool)
        until(lambda: not cluster.workers(), "the workers are gone")
        before, threads = node.descriptors(), threading.active_count()
        mine = len(os.listdir("/proc/self/fd"))
        for _ in range(2):
            with Pool(1) as pool, Pool(1) as other:
                _opened(pool)
                for size in (MB, 3 * MB, 5 * MB):
                    _travels(pool, size)
                    _travels(other, size)
        until(lambda: not cluster.workers(), "the workers are gone")
        until_as_before(node, before)
        until(lambda: threading.active_count() <= threads, "the pools' threads are gone")
        until(lambda: len(os.listdir("/proc/self/fd")) <= mine, "the pools' descriptors are gone")


@pytest.mark.parametrize("fault", bulk_faults.FAULTS)
def test_a_driver_whose_connection_fails_sends_the_rest_by_the_session(
        cluster: Cluster, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    node = _node(cluster)
    with Driver(cluster):
        with Pool(1) as pool:
            _travels(pool, MB)
        before = node.descriptors()
        with Pool(1) as pool:
            if fault not in bulk_faults.EARLY:
                _opened(pool)
            failed = bulk_faults.install(fault, monkeypatch.setattr)
            _travels(pool)
            until(lambda: failed and _lanes(pool) == [None], "the connection has failed and is given up")
            _travels(pool, MB)
            assert _lanes(pool) == [None], "another one is not tried at once"
            assert len(_nodes(pool)) == 1 and len(failed) == 1
        until_as_before(node, before)


@pytest.mark.parametrize("fault", bulk_faults.FAULTS)
def test_a_node_whose_connection_fails_gives_the_rest_by_its_link(cluster: Cluster, fault: str) -> None:
    """Whichever of the two it is that gives the other the object."""
    nodes = [_node(cluster, f"install({fault!r})") for _ in range(2)]
    with Driver(cluster), Pool(2) as pool:
        sessions = _nodes(pool)
        for _ in range(3):  # the first goes by the links, at least in part
            _travels(pool)
        until(lambda: any("FAULT" in line for node in nodes for line in node.lines), "one has failed")
        _travels(pool)
        assert _nodes(pool) == sessions, "nobody was given up"


def test_nodes_give_each_other_objects_by_bulk(cluster: Cluster) -> None:
    nodes = [_node(cluster, "say_count()") for _ in range(2)]
    with Driver(cluster), Pool(2) as pool:
        for _ in range(3):
            _travels(pool)
        until(lambda: any("20 PIECES" in line for node in nodes for line in node.lines), "pieces between nodes")


def test_a_driver_is_killed_in_the_midst(cluster: Cluster) -> None:
    program = ("import os, dpool, bulk_faults\nfrom dpool.multiprocessing import Pool\n"
               "bulk_faults.say_count()\n"
               "with Pool(1) as pool:\n"
               "    while True:\n"
               "        pool.apply(len, (dpool.put(os.urandom(1 << 20) * 24),))\n")
    node = _node(cluster)
    with Driver(cluster), Pool(1) as pool:
        _travels(pool)
    until(lambda: not cluster.workers(), "the workers are gone")
    before = node.descriptors()
    driver = cluster.python("-c", program, address=True)
    driver.expect("20 PIECES")
    driver.end(signal.SIGKILL)
    until(lambda: not cluster.workers(), "the workers are gone")
    until_as_before(node, before)


def test_a_node_is_killed_in_the_midst(cluster: Cluster) -> None:
    nodes = [_node(cluster) for _ in range(2)]
    with Driver(cluster), Pool(2) as pool:
        _opened(pool)
        content = os.urandom(MB) * 256
        results = pool.map_async(_crc, [dpool.put(content)] * 20, chunksize=1)
        before = sum(_counts(pool))
        until(lambda: sum(_counts(pool)) > before + 10, "it is on its way")
        nodes[0].end(signal.SIGKILL)
        assert results.get(60) == [zlib.crc32(content)] * 20
        until(lambda: len({node.id for node in _nodes(pool)}) == 1, "the node is lost")


def test_a_node_without_the_library_has_no_gate(cluster: Cluster) -> None:
    _node(cluster, "without()", "--bulk-port", "4711").expect("port 4711 for large objects is not used")
    with Driver(cluster), Pool(1) as pool:
        _travels(pool)
        assert _lanes(pool) == [None]


def test_a_node_whose_port_is_off_has_no_gate(cluster: Cluster) -> None:
    _node(cluster, "nothing()", "--bulk-port", "off")
    with Driver(cluster), Pool(1) as pool:
        _travels(pool)
        assert _lanes(pool) == [None]


def test_a_driver_without_the_library_is_offered_nothing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    _node(cluster)
    monkeypatch.setattr(Surroundings, "has_bulk", lambda self: False)
    monkeypatch.setattr(Surroundings, "sender", lambda *_: pytest.fail("it was offered something"))
    with Driver(cluster), Pool(1) as pool:
        _travels(pool)
        _travels(pool)
        assert _lanes(pool) == [None]


def test_nodes_without_the_library_and_with_it_give_each_other_objects(cluster: Cluster) -> None:
    _node(cluster, "without()")
    _node(cluster)
    with Driver(cluster), Pool(2) as pool:
        for _ in range(3):
            _travels(pool)


def test_nothing_of_the_library_is_imported_before_an_object_travels(cluster: Cluster) -> None:
    program = ("import sys, dpool\nfrom dpool.multiprocessing import Pool\n"
               "with Pool(1) as pool:\n"
               "    assert pool.map(abs, range(-9, 0)) == list(range(9, 0, -1))\n"
               "    print('IMPORTED', [name for name in sys.modules if name.startswith('cryptography')])\n")
    node = _node(cluster)
    assert cluster.python("-c", program, address=True).expect(r"IMPORTED (.*)")[1] == "[]"
    with open(f"/proc/{node.pid}/maps") as file:
        assert "cryptography" not in file.read()
