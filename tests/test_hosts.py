"""Owns the tests of a cluster on hosts of their own, whose links are cut, cut one way, delayed and made lossy.

Needs root; skipped where hosts cannot be made. The driver is a program on the head's host that reads orders from this
process: one a line, an answer each.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from clusters import PATIENCE_S, ROOT, Process, children_of, until
from hosts import Hosts, address, possible

from dpool.cluster.wire import bulk
from dpool.cluster.wire.keys import Keys, write

pytestmark = pytest.mark.skipif(not possible(), reason="hosts need root, namespaces and TAP devices")

HEAD, FIRST, SECOND = 0, 1, 2

DRIVER = """
import json, multiprocessing, os, random, sys, time, zlib
import dpool
from dpool.multiprocessing import Pool
from lent import count, hold, keep

def task(path, value):
    time.sleep(0.01)
    return value, os.uname().nodename

def nested(count):
    with Pool(count) as pool:
        hosts = {host for _, host in pool.starmap(task, [("", value) for value in range(100)], chunksize=1)}
        return os.uname().nodename, sorted(hosts), sorted({process.host for process in pool._pool})

def look(content, checksum, value):
    time.sleep(0.1)
    assert zlib.crc32(content) == checksum
    return value, os.uname().nodename

if __name__ == "__main__":
    pool = Pool(int(sys.argv[1]))
    others = []
    running = None
    for line in sys.stdin:
        order, *arguments = json.loads(line)
        if order == "start":
            running = pool.starmap_async(task, [("", value) for value in range(arguments[0])], chunksize=1)
            answer = None
        elif order == "send":
            running = pool.map_async(len, [bytes([n]) * arguments[0] for n in range(arguments[1])], chunksize=1)
            answer = None
        elif order == "lengths":
            answer = running.get(100)
        elif order == "put":
            content = random.randbytes(arguments[0])
            ref, checksum = dpool.put(content), zlib.crc32(content)
            answer = None
        elif order == "look":
            running = pool.starmap_async(look, [(ref, checksum, value) for value in range(arguments[0])], chunksize=1)
            answer = None
        elif order == "other pool":
            others.append(pool)
            pool = Pool(arguments[0])
            answer = None
        elif order == "result":
            answer = running.get(100)
        elif order == "hosts":
            answer = sorted({process.host for process in pool._pool})
        elif order == "nested":
            answer = pool.map(nested, [4] * arguments[0], chunksize=1)
        elif order == "lend":
            others.append(pool)
            manager = multiprocessing.Manager()
            value, queue, names, said = things = (multiprocessing.Value("i"), multiprocessing.Queue(), manager.dict(),
                                                  multiprocessing.SimpleQueue())
            pool = Pool(4, keep, things)
            answer = None
        elif order == "count":
            deep, tasks, times = arguments
            running = pool.starmap_async(count, [(deep, times)] * tasks, chunksize=1)
            answer = None
        elif order == "counted":
            running.get(100)
            answer = value.value, sorted(queue.get(timeout=30) for _ in range(arguments[0])), sorted(names.keys())
        elif order == "hold":
            running = pool.map_async(hold, [0])
            answer = said.get()
        elif order == "acquire":
            answer = value.acquire(timeout=60)
        elif order == "sessions":
            answer = sorted(key.hex() for key in pool._group.port._nodes)
        elif order == "lanes":
            answer = sum(node.pours for node in pool._group.port._nodes.values())
        elif order == "by bulk":
            answer = sum(node.lane.sender.count for node in pool._group.port._nodes.values() if node.lane is not None)
        print(json.dumps(answer), flush=True)
    for one in (pool, *others):
        one.terminate()
"""

# A module of the program's: workers have it from there.
LENT = """
import os, time
from dpool.multiprocessing import Pool

def keep(*things):
    global lent
    lent = things

def count(deep, times):
    value, queue, names, said = lent
    if deep:
        with Pool(2, keep, lent) as pool:
            return pool.starmap(count, [(deep - 1, times)] * 2, chunksize=1)
    for _ in range(times):
        with value.get_lock():
            value.value += 1
    queue.put(os.uname().nodename)
    names[os.uname().nodename] = deep

def hold(_):
    lent[0].acquire()
    lent[-1].put(os.uname().nodename)
    time.sleep(600)
"""


# Where large objects come to every node.
BULK = 7078


class Lab:
    """The head and the driver on one host, `nodes` nodes on hosts of their own; a pool with a worker for each CPU."""

    def __init__(self, directory: Path, nodes: int = 2, cpus: int = 2) -> None:
        write(directory / "key", Keys.new())
        (directory / "driver.py").write_text(DRIVER)
        (directory / "lent.py").write_text(LENT)
        self.hosts = Hosts(1 + nodes, [Path(sys.prefix), Path(sys.base_prefix), ROOT, directory])
        self._settings = [f"DPOOL_KEY_FILE={directory / 'key'}", f"PYTHONPATH={ROOT}"]
        self._directory = directory
        self.processes: list[Process] = []
        self.address = f"tcp://{address(HEAD)}:7077"
        self.start(HEAD, "-m", "dpool", "head", "--bind", self.address).expect("listens")
        self.numbers = range(1, 1 + nodes)
        self.nodes = [self.start(host, "-m", "dpool", "node", self.address, "--cpus", str(cpus), "--bulk-port",
                                 str(BULK)) for host in self.numbers]
        for node in self.nodes:
            node.expect("joined")
        command = self.hosts.command(HEAD, ["env", *self._settings, f"DPOOL_ADDRESS={self.address}", sys.executable,
                                            str(directory / "driver.py"), str(nodes * cpus)])
        self.driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.ask("hosts") == [f"h{number}" for number in self.numbers]

    def start(self, host: int, *arguments: str) -> Process:
        command = self.hosts.command(host, ["env", *self._settings, sys.executable, *arguments])
        process = Process(command, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}, self._directory)
        self.processes.append(process)
        return process

    def ask(self, *order: object) -> object:
        """Have the driver do something; its answer."""
        assert self.driver.stdin is not None and self.driver.stdout is not None
        self.driver.stdin.write(json.dumps(order) + "\n")
        self.driver.stdin.flush()
        line = self.driver.stdout.readline()
        assert line, "the driver has ended"
        return json.loads(line)

    def result(self, count: int) -> list[str]:
        """The results of what was started, each there once; the hosts they come from."""
        values = self.ask("result")
        assert isinstance(values, list)
        assert [value for value, _ in values] == list(range(count))
        return [host for _, host in values]

    def status(self) -> list[str]:
        """The hosts that the head knows."""
        command = self.hosts.command(HEAD, ["env", *self._settings, sys.executable, "-m", "dpool", "status", "--json",
                                            self.address])
        report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return sorted(node["host"] for node in report["nodes"])

    @contextmanager
    def stopped(self, host: int) -> Iterator[None]:
        """All that runs on a host stands still meanwhile."""
        pids = self.hosts.processes(host)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            for process in self.processes:  # an nsenter stops with what it has started
                if process.process.poll() is None:
                    process.send(signal.SIGCONT)

    def close(self) -> None:
        assert self.driver.stdin is not None
        self.driver.stdin.close()
        try:
            assert self.driver.wait(PATIENCE_S) == 0
            # Nothing of the driver's is left on the nodes: the agent and its zygote, and not even those where the
            # agent was killed.
            for host in self.numbers:
                until(lambda host=host: len(self.hosts.processes(host)) in (0, 2), "workers are gone")  # type: ignore[misc]
        finally:
            self.driver.kill()
            self.driver.wait()
            self.hosts.close()


@pytest.fixture
def lab(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Lab]:
    lab = Lab(tmp_path, *getattr(request, "param", ()))
    yield lab
    lab.hosts.heal()
    lab.close()


def test_hosts_share_neither_memory_nor_files_nor_processes(lab: Lab) -> None:
    lab.ask("start", 100)
    assert set(lab.result(100)) == {"h1", "h2"}


def test_the_pools_of_tasks_have_workers_on_both_hosts(lab: Lab) -> None:
    """With four parents on four CPUs: two on each host."""
    found = lab.ask("nested", 4)
    assert isinstance(found, list)
    assert {host for host, _, _ in found} <= {"h1", "h2"}
    assert [rest for _, *rest in found] == [[["h1", "h2"], ["h1", "h2"]]] * 4


@pytest.mark.parametrize("deep", [0, 1])
def test_what_the_driver_lends_is_one_for_all_hosts(lab: Lab, deep: int) -> None:
    """A value, a queue, and a manager's dict, at its Unix socket; also in pools of tasks."""
    lab.ask("lend")
    lab.ask("count", deep, 4, 20)
    found = lab.ask("counted", 4 * 2 ** deep)
    assert isinstance(found, list)
    count, hosts, names = found
    assert count == 4 * 2 ** deep * 20
    assert set(hosts) == set(names) == {"h1", "h2"}


def test_a_short_cut_loses_and_doubles_no_call(lab: Lab) -> None:
    lab.ask("lend")
    lab.ask("count", 0, 4, 150)
    lab.hosts.cut(FIRST)
    time.sleep(2)
    lab.hosts.heal()
    assert lab.ask("counted", 4) == [600, ["h1", "h1", "h2", "h2"], ["h1", "h2"]]


def test_a_lock_of_a_host_that_is_cut_off_is_released(lab: Lab) -> None:
    lab.ask("lend")
    holder = lab.ask("hold")
    lab.hosts.cut(FIRST if holder == "h1" else SECOND)
    assert lab.ask("acquire") is True


@pytest.mark.parametrize("oneway", [False, True], ids=["both ways", "one way"])
def test_a_short_cut_is_not_noticed(lab: Lab, oneway: bool) -> None:
    sessions = lab.ask("sessions")
    lab.ask("start", 400)
    lab.hosts.cut(FIRST, oneway)
    time.sleep(2)  # the cut's length is what is under test
    lab.hosts.heal()
    assert set(lab.result(400)) == {"h1", "h2"}
    assert lab.ask("sessions") == sessions


@pytest.mark.parametrize("oneway", [False, True], ids=["both ways", "one way"])
def test_after_a_long_cut_tasks_run_again_elsewhere(lab: Lab, oneway: bool) -> None:
    lab.ask("start", 400)
    lab.hosts.cut(FIRST, oneway)
    assert lab.result(400).count("h2") > 200
    until(lambda: lab.ask("hosts") == ["h2"], "the group has its workers on the other host")
    lab.hosts.heal()
    # The driver has given the session up: what it had on the node ends as soon as the node hears of it.
    until(lambda: len(lab.hosts.processes(FIRST)) == 2, "the node has ended what was given up")
    lab.ask("start", 50)
    lab.result(50)


def test_a_node_behind_a_slow_and_lossy_link_works(lab: Lab) -> None:
    sessions = lab.ask("sessions")
    lab.hosts.slow(FIRST, delay_s=0.05, loss=0.05)
    lab.ask("start", 300)
    lab.result(300)
    assert lab.ask("sessions") == sessions


def test_what_is_large_does_not_keep_a_slow_node_from_being_heard(lab: Lab) -> None:
    """Ten seconds of a full link: longer than a node may be silent."""
    sessions = lab.ask("sessions")
    for host in (FIRST, SECOND):
        lab.hosts.slow(host, rate=2e6)
    lab.ask("send", 5 << 20, 8)
    assert lab.ask("lengths") == [5 << 20] * 8
    assert lab.ask("sessions") == sessions


def test_a_machine_loses_power_and_comes_back(lab: Lab) -> None:
    """No connection is closed: the others find out by themselves."""
    lab.ask("start", 400)
    lab.hosts.power_off(FIRST)
    assert lab.result(400).count("h2") > 200
    until(lambda: lab.ask("hosts") == ["h2"], "the group has its workers on the other host")
    lab.hosts.boot(FIRST)
    lab.start(FIRST, "-m", "dpool", "node", lab.address, "--cpus", "2").expect("joined")
    until(lambda: lab.status() == ["h1", "h2"], "the head knows the new node, and no longer the old one")
    lab.ask("start", 50)
    lab.result(50)


def test_a_node_that_is_stopped_for_long_comes_back_empty(lab: Lab) -> None:
    before = lab.ask("sessions")
    lab.ask("start", 400)
    with lab.stopped(FIRST):
        lab.result(400)
        until(lambda: lab.ask("hosts") == ["h2"], "the group has its workers on the other host")
    assert before != lab.ask("sessions")
    until(lambda: len(lab.hosts.processes(FIRST)) == 2, "the node has ended what was given up")
    lab.ask("start", 50)
    lab.result(50)


def test_a_node_that_is_stopped_for_a_moment_is_not_given_up(lab: Lab) -> None:
    before = lab.ask("sessions")
    lab.ask("start", 400)
    with lab.stopped(FIRST):
        time.sleep(2)  # the stop's length is what is under test
    assert set(lab.result(400)) == {"h1", "h2"}
    assert lab.ask("sessions") == before
# -- objects: which way they go is counted in bytes on the links

MB = 1 << 20
# What a link carries beside an object: headers of TCP and of the cipher, and all other messages.
MORE = 1.25


@pytest.mark.parametrize("lab", [(4, 1)], indirect=True, ids=["four nodes"])
def test_a_broadcast_leaves_the_driver_once_and_comes_to_each_node_once(lab: Lab) -> None:
    size = 8 * MB
    lab.ask("put", size)
    lab.ask("look", 40)
    assert set(lab.result(40)) == {"h1", "h2", "h3", "h4"}
    sent = lab.hosts.bytes
    assert size <= sum(sent[HEAD, node] for node in lab.numbers) < MORE * size
    for node in lab.numbers:
        assert size <= sum(sent[other, node] for other in range(5)) < MORE * size


@pytest.mark.parametrize("lab", [(1, 8)], indirect=True, ids=["eight workers"])
def test_an_object_comes_once_to_a_node_for_all_its_workers_and_pools(lab: Lab) -> None:
    size = 8 * MB
    lab.ask("put", size)
    for _ in range(2):
        lab.ask("look", 40)
        assert set(lab.result(40)) == {"h1"}
        lab.ask("other pool", 8)
    assert size <= lab.hosts.bytes[HEAD, FIRST] < MORE * size


def _between_nodes(lab: Lab) -> tuple[int, int]:
    """Which of the two nodes gives the other one the object, and which one gets it; waits until it does."""
    ways = [(FIRST, SECOND), (SECOND, FIRST)]
    until(lambda: any(lab.hosts.bytes[way] > MB for way in ways), "a node serves the other")
    return max(ways, key=lambda way: lab.hosts.bytes[way])


def test_a_node_that_serves_another_is_killed(lab: Lab) -> None:
    lab.ask("put", 64 * MB)
    lab.ask("look", 40)
    source, target = _between_nodes(lab)
    (agent,) = children_of(lab.nodes[source - 1].pid)  # of what entered the host
    os.kill(agent, signal.SIGKILL)
    lab.nodes[source - 1].wait()
    until(lambda: not lab.hosts.processes(source), "its processes are gone")
    assert lab.hosts.bytes[source, target] < 64 * MB, "it was killed too late"
    assert f"h{target}" in lab.result(40)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_link_between_nodes_is_cut(lab: Lab, when: str) -> None:
    sessions = lab.ask("sessions")
    size = 48 * MB
    lab.ask("put", size)
    if when == "before":
        lab.hosts.cut_between(FIRST, SECOND)
        lab.ask("look", 40)
    else:
        lab.ask("look", 40)
        way = _between_nodes(lab)
        lab.hosts.cut_between(FIRST, SECOND)
        assert lab.hosts.bytes[way] < size, "it was cut too late"
    assert set(lab.result(40)) == {"h1", "h2"}
    # Nobody was given up, and the driver has sent what the other node could not.
    assert lab.ask("sessions") == sessions
    assert sum(lab.hosts.bytes[HEAD, node] for node in (FIRST, SECOND)) > 1.2 * size


# -- bulk connections


needs_bulk = pytest.mark.skipif(not bulk.available(), reason="bulk connections need cryptography")


@needs_bulk
def test_where_a_firewall_forbids_bulk_connections_objects_go_the_way_of_all_else(lab: Lab) -> None:
    sessions = lab.ask("sessions")
    lab.hosts.wall(BULK)
    for _ in range(2):
        lab.ask("put", 24 * MB)
        lab.ask("look", 40)
        assert set(lab.result(40)) == {"h1", "h2"}
    assert lab.ask("by bulk") == 0 and lab.ask("sessions") == sessions


@needs_bulk
@pytest.mark.parametrize("lab", [(1, 2)], indirect=True, ids=["one node"])
def test_a_firewall_goes_up_in_the_midst(lab: Lab) -> None:
    """Nobody sees an end: what is on its way never comes."""
    sessions = lab.ask("sessions")
    lab.ask("put", MB)
    lab.ask("look", 40)
    lab.result(40)
    until(lambda: lab.ask("lanes") == 1, "the bulk connection is there")
    lab.hosts.slow(FIRST, rate=20e6)
    before = lab.hosts.bytes[HEAD, FIRST]
    lab.ask("put", 32 * MB)
    lab.ask("look", 40)
    until(lambda: lab.hosts.bytes[HEAD, FIRST] > before + 4 * MB, "it is on its way")
    lab.hosts.wall(BULK)
    assert lab.hosts.bytes[HEAD, FIRST] < before + 32 * MB, "it went up too late"
    lab.result(40)
    assert lab.ask("by bulk") == 0 and lab.ask("sessions") == sessions


@needs_bulk
def test_a_firewall_goes_up_between_nodes_in_the_midst(lab: Lab) -> None:
    sessions = lab.ask("sessions")
    lab.ask("put", 64 * MB)
    lab.ask("look", 40)
    source, target = _between_nodes(lab)
    lab.hosts.wall(BULK)
    assert lab.hosts.bytes[source, target] < 64 * MB, "it went up too late"
    assert set(lab.result(40)) == {"h1", "h2"}
    assert lab.ask("sessions") == sessions
