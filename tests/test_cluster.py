"""Owns the tests of the doors on a cluster of this machine: a head and nodes as processes, linked by encrypted TCP.

It kills and stops real processes and counts what they leave. Keys and hostile peers are in test_cluster_security.py,
links that are cut in test_hosts.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor as StdlibExecutor
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import deeds
import numpy as np
import pytest
from clusters import Cluster, Driver, Process, children_of, until, until_as_before, workers_of
from leftovers import read_line

import dpool
from dpool.cluster.driver import luggage
from dpool.concurrent.futures import ProcessPoolExecutor
from dpool.errors import GroupBroken, GroupTerminated, WorkerDied
from dpool.multiprocessing import Pool, get_context


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with two CPUs each, which no test harms."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        with Driver(cluster), Pool(4) as pool:
            # With the first large message ZeroMQ opens what it keeps.
            assert len(set(pool.starmap(parent_with, [(np.ones(100_000),)] * 40, chunksize=1))) == 2
            pool.map(shifted_ones, range(40), chunksize=1)
        yield cluster


@pytest.fixture
def driver(cluster: Cluster) -> Iterator[Cluster]:
    """This process uses the cluster, and leaves nothing of it on the nodes."""
    before = [node.descriptors() for node in cluster.nodes]
    with Driver(cluster):
        yield cluster
    for node, had in zip(cluster.nodes, before, strict=True):
        until_as_before(node, had)
    until(lambda: not cluster.workers(), "all workers are gone")


# -- what tasks do: local functions, so that they travel by value


def parent_of(_: object = None) -> int:
    return os.getppid()


def parent_with(array: Any) -> int:
    time.sleep(0.01)  # so that every worker has some
    return os.getppid()


def sum_of(*arrays: Any) -> float:
    return float(sum(array.sum() for array in arrays))


def shifted(array: Any, by: float) -> Any:
    array += by  # an argument is the task's own
    return array


def shifted_ones(by: float) -> Any:
    return shifted(np.ones(100_000), by)


def put_shifted(array: Any, by: float) -> Any:
    return dpool.put(array + by)


def wait_for_file(path: str) -> int:
    while not os.path.exists(path):
        time.sleep(0.01)
    return os.getpid()


def meet(directory: str, count: int) -> int:
    """Return when so many workers run this, or have."""
    with open(os.path.join(directory, str(os.getpid())), "w"):
        pass
    while len(os.listdir(directory)) < count:
        time.sleep(0.01)
    return os.getpid()


def note(path: str, value: int) -> int:
    """Say that this task is run."""
    with open(path, "ab", buffering=0) as file:
        file.write(b"%d\n" % value)
    return value


def pids_inode(name: str) -> int:
    return os.stat(name).st_ino


# -- the doors


def test_a_pool_spans_the_nodes(driver: Cluster) -> None:
    with Pool(4) as pool:
        assert pool.map(deeds.double, range(100)) == [2 * value for value in range(100)]
        assert len(workers_of(pool)) == 4 and all(process.is_alive() for process in workers_of(pool))
        assert pool.starmap(deeds.add, [(1, 2), (3, 4)]) == [3, 7]
        assert sorted(pool.imap_unordered(deeds.double, range(50))) == [2 * value for value in range(50)]
        assert list(pool.imap(deeds.double, iter(range(50)), chunksize=7)) == [2 * value for value in range(50)]
        assert pool.apply(deeds.add, (1, 2, 3)) == 6
        assert driver.workers() >= {process.pid for process in workers_of(pool)}
        zygotes = {zygote for node in driver.nodes for zygote in children_of(node.pid)}
        assert set(pool.map(parent_of, range(400), chunksize=1)) == zygotes


def test_a_pool_without_a_number_has_all_cpus(driver: Cluster) -> None:
    with Pool() as pool:
        until(lambda: len(workers_of(pool)) == 4, "a worker for each CPU")


def test_more_workers_than_cpus(driver: Cluster) -> None:
    with Pool(9) as pool:
        assert pool.map(deeds.double, range(20)) == [2 * value for value in range(20)]
        until(lambda: len(workers_of(pool)) == 9, "nine workers")


def test_functions_travel_by_value(driver: Cluster) -> None:
    secret = 40

    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

    with Pool(2) as pool:
        assert pool.map(lambda value: value + secret, [1, 2]) == [41, 42]
        assert pool.apply(lambda local: local.value, (Local(7),)) == 7


def test_exceptions_come_with_the_remote_traceback(driver: Cluster) -> None:
    with Pool(2) as pool:
        with pytest.raises(KeyError, match="nothing") as caught:
            pool.apply(deeds.raise_error, (KeyError, "nothing"))
        assert "raise_error" in str(caught.value.__cause__)
        assert pool.apply(deeds.double, (2,)) == 4


def test_a_dead_worker_fails_its_task_and_is_replaced(driver: Cluster) -> None:
    with Pool(2) as pool:
        with pytest.raises(WorkerDied, match="SIGKILL"):
            pool.apply(deeds.kill_self)
        assert pool.map(deeds.double, range(50), chunksize=1) == [2 * value for value in range(50)]
        until(lambda: len(workers_of(pool)) == 2, "the worker is replaced")


def test_terminate_ends_what_runs(driver: Cluster, tmp_path: Path) -> None:
    pool = Pool(2)
    running = [pool.apply_async(wait_for_file, (str(tmp_path / "never"),)) for _ in range(4)]
    pool.terminate()
    pool.join()
    for result in running:
        with pytest.raises(GroupTerminated):
            result.get()


def test_a_long_task_holds_up_no_result_that_is_there(driver: Cluster, tmp_path: Path) -> None:
    with deeds.Gate(tmp_path) as gate, Pool(1) as pool:
        pool.map(deeds.short_or_wait, [None] * 1000)
        items: list[Any] = [None] * 400
        items.insert(100, gate.args)
        results = pool.imap_unordered(deeds.short_or_wait, items)
        assert [results.next(60) for _ in range(100)] == ["short"] * 100
        gate.open()
        assert sorted(results) == ["open"] + ["short"] * 300


def test_what_waits_on_one_node_goes_to_idle_workers_of_another(driver: Cluster, tmp_path: Path) -> None:
    """Workers that are started on demand: the first one's node gets tasks before the others' have any."""
    with deeds.Gate(tmp_path) as gate, ProcessPoolExecutor(4, mp_context=get_context("spawn")) as executor:
        futures = [executor.submit(deeds.pass_gate, *gate.args) for _ in range(4)]
        told = {read_line(gate.told) for _ in range(4)}  # all of them run at the same time
        gate.open(4)
        assert [future.result(60) for future in futures] == ["open"] * 4
        assert len(told) == 4


def test_workers_have_the_signals_of_any_program_whatever_their_node_ignores(tmp_path: Path) -> None:
    with Cluster(tmp_path, nodes=0) as cluster:
        node = cluster.python("-c", "import signal, sys; from dpool.cli.main import main\n"
                                    "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
                                    f"sys.exit(main(['node', {cluster.address!r}, '--cpus', '1']))")
        cluster.nodes.append(node)
        node.expect("joined")
        with Driver(cluster), Pool(1) as pool:
            assert pool.map(signal.getsignal, [signal.SIGHUP, signal.SIGTERM]) == [signal.SIG_DFL] * 2


def test_maxtasksperchild(driver: Cluster) -> None:
    with Pool(1, maxtasksperchild=2) as pool:
        assert len(set(pool.map(deeds.pid_of_worker, range(6), chunksize=1))) == 3


def test_an_executor(driver: Cluster) -> None:
    with ProcessPoolExecutor(3) as executor:
        assert isinstance(executor, StdlibExecutor)
        futures = [executor.submit(deeds.double, value) for value in range(50)]
        assert not wait(futures, 60).not_done
        assert [future.result() for future in futures] == [2 * value for value in range(50)]
        assert list(executor.map(deeds.double, range(20), chunksize=3)) == [2 * value for value in range(20)]


def test_an_executor_starts_workers_on_demand(driver: Cluster) -> None:
    with ProcessPoolExecutor(4, get_context("spawn")) as executor:
        assert executor.submit(deeds.double, 1).result() == 2
        assert 1 <= len(driver.workers()) < 4
        assert list(executor.map(deeds.double, range(200))) == [2 * value for value in range(200)]


def test_an_executor_without_a_number_has_all_cpus_on_demand(driver: Cluster, tmp_path: Path) -> None:
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as executor:
        assert executor._max_workers == 4
        assert executor.submit(deeds.double, 1).result() == 2
        assert 1 <= len(driver.workers()) < 4
        # Two for each worker: a node is sent as many ahead. None returns before four workers are at it.
        assert len(set(executor.map(meet, [str(tmp_path)] * 8, [4] * 8))) == 4
        assert len(driver.workers()) == 4


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_executor_without_a_number_grows_with_the_cluster(method: str, tmp_path: Path) -> None:
    directory = tmp_path / "meeting"
    directory.mkdir()
    with Cluster(tmp_path, nodes=1, cpus=1) as cluster, Driver(cluster):
        with ProcessPoolExecutor(mp_context=get_context(method)) as executor:
            assert executor.submit(deeds.double, 1).result() == 2
            assert executor._max_workers == 1
            results = [executor.submit(meet, str(directory), 3) for _ in range(6)]
            cluster.start_node(cpus=2)
            assert len({result.result() for result in results}) == 3
            assert executor._max_workers == 3


def test_a_dead_worker_breaks_an_executor(driver: Cluster) -> None:
    from concurrent.futures.process import BrokenProcessPool

    with ProcessPoolExecutor(2) as executor:
        with pytest.raises(BrokenProcessPool):
            executor.submit(deeds.exit_process, 3).result()


def test_asyncio(driver: Cluster) -> None:
    from dpool import asyncio as dpool_asyncio

    async def main() -> list[int]:
        async with dpool_asyncio.Pool(2) as pool:
            found: list[int] = await asyncio.gather(*(pool.run(deeds.double, value) for value in range(20)))
            return found

    assert asyncio.run(main()) == [2 * value for value in range(20)]


def test_joblib(driver: Cluster) -> None:
    joblib = pytest.importorskip("joblib")
    with joblib.parallel_config(backend="dpool", n_jobs=2):
        found = joblib.Parallel()(joblib.delayed(deeds.double)(value) for value in range(50))
    assert found == [2 * value for value in range(50)]


def test_the_address_in_the_environment_is_enough(cluster: Cluster) -> None:
    program = ("from dpool.multiprocessing import Pool\n"
               "if __name__ == '__main__':\n"
               "    with Pool(2) as pool:\n"
               "        print(pool.map(abs, [-1, -2]), len({process.host for process in pool._pool}))\n")
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
                             env=cluster.environment() | {"DPOOL_ADDRESS": cluster.address})
    assert (process.stdout, process.stderr, process.returncode) == ("[1, 2] 1\n", "", 0)


# -- initializers, output, what a worker knows


def _remember(value: int) -> None:
    global remembered
    remembered = value  # type: ignore[name-defined]


def _recall(_: object) -> int:
    return remembered  # type: ignore[name-defined, no-any-return]


MAIN = """
import enum
import functools
from multiprocessing.reduction import ForkingPickler

import dpool
from dpool.concurrent.futures import ProcessPoolExecutor
from dpool.multiprocessing import Pool

class Point:
    def __init__(self, x): self.x = x
    def plus(self, y): return self.x + y
    def __call__(self, y): return self.x * y
    def __eq__(self, other): return type(other) is Point and other.x == self.x

class Wrong(Exception): pass

class Inner: pass

class Outer:
    class Inner: pass

class Registered:
    def __init__(self, number): self.number = number

def reduce_registered(value): return Registered, (value.number + 99,)

class Counting:
    count = 0

def count_up(value):
    Counting.count += 1
    return Counting.count

class Colour(enum.Enum):
    RED = 1

state = None

def set_state(value):
    global state
    state = value

def get_state(_): return state
def add(a, b): return a + b
def same(value): return value
def get_number(value): return value.number
def is_point(value): return isinstance(value, Point)
def fail(value): raise Wrong(value)

if __name__ == "__main__":
    with Pool(2, initializer=set_state, initargs=(Point(5),)) as pool:
        assert pool.map(get_state, range(4)) == [Point(5)] * 4
        assert pool.map(functools.partial(add, 3), range(4)) == [3, 4, 5, 6]
        assert pool.map(Point(2).plus, range(3)) == [2, 3, 4]
        assert pool.map(Point(2), range(3)) == [0, 2, 4]
        assert pool.map(Point, range(3)) == list(map(Point, range(3)))
        assert pool.map(same, [Point(1), Point(2)]) == [Point(1), Point(2)]
        assert list(pool.imap(same, (Point(i) for i in range(5)))) == list(map(Point, range(5)))
        assert pool.apply(is_point, (Point(1),)) is True
        assert pool.apply(same, (Colour.RED,)) is Colour.RED
        assert pool.apply(same, ([Point(1), b"x" * 1_000_000],)) == [Point(1), b"x" * 1_000_000]
        assert pool.apply(same, (dpool.put(Point(9)),)) == Point(9)
        assert pool.apply(same, (b"__main__",)) == b"__main__"
        assert list(map(type, pool.map(same, [Outer.Inner(), Inner()]))) == [Outer.Inner, Inner]
        ForkingPickler.register(Registered, reduce_registered)
        assert pool.apply(get_number, (Registered(1),)) == 100
        ref = dpool.put(Counting())
        Counting.count = 7
        assert type(dpool.get(ref)) is Counting and Counting.count == 7
    Counting.count = 0
    with Pool(1) as pool:
        assert pool.map(count_up, [Counting() for _ in range(5)], chunksize=1) == [1, 2, 3, 4, 5]
    with Pool(2) as pool:
        try:
            pool.apply(fail, (1,))
        except Wrong:
            print("as it should")
    with ProcessPoolExecutor(2, initializer=set_state, initargs=(Point(7),)) as executor:
        assert list(executor.map(get_state, range(3))) == [Point(7)] * 3
        assert executor.submit(Point(3).plus, 4).result() == 7
    print("fine")
"""


def test_what_is_of_the_program_s_main_module_goes_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(MAIN)
    program = cluster.python(str(tmp_path / "program.py"), address=True)
    assert program.wait() == 0, program.lines
    assert program.lines[:2] == ["as it should", "fine"]


CACHING = """
import functools
import os
from dpool.multiprocessing import Pool

@functools.lru_cache(maxsize=None)
def double(value):
    return value * 2, os.getpid()

class Adder:
    @functools.cache
    def add(self, value):
        return value + 1

@functools.singledispatch
def kind(value):
    return "other"

@kind.register
def _(value: int):
    return "int"

def computed(_):
    return double.cache_info().misses

if __name__ == "__main__":
    with Pool(1) as pool:
        print([value for value, _ in pool.map(double, [1, 2, 1])], pool.map(kind, [1, "1"]), pool.map(Adder().add, [1]))
        print(pool.map(lambda value: double(value)[0], [1, 2]), pool.map(computed, [None]))
"""


def test_functions_that_cache_keep_what_they_have_cached(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(CACHING)
    program = cluster.python(str(tmp_path / "program.py"), address=True)
    assert program.wait() == 0, program.lines
    assert program.lines[:2] == ["[2, 4, 2] ['int', 'other'] [2]", "[2, 4] [2]"]


def test_the_initializer_runs_in_each_worker(driver: Cluster) -> None:
    with Pool(4, _remember, (17,)) as pool:
        assert set(pool.map(_recall, range(40), chunksize=1)) == {17}


def test_an_initializer_that_raises_breaks_the_pool(driver: Cluster) -> None:
    with Pool(2, deeds.raise_error, (ValueError, "not today")) as pool:
        with pytest.raises(GroupBroken, match="not today"):
            pool.apply(deeds.double, (1,))


def test_whole_lines_of_the_workers_reach_stdout_and_stderr(cluster: Cluster) -> None:
    program = ("import sys\n"
               "from dpool.multiprocessing import Pool\n"
               "def say(i):\n"
               "    for part in ('line ', str(i), ' of stdout\\n'):\n"
               "        sys.stdout.write(part)\n"
               "    print('line', i, 'of stderr', file=sys.stderr)\n"
               "if __name__ == '__main__':\n"
               "    with Pool(4) as pool:\n"
               "        pool.map(say, range(40), chunksize=1)\n"
               "        pool.close()\n"
               "        pool.join()\n")
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
                             env=cluster.environment() | {"DPOOL_ADDRESS": cluster.address})
    assert sorted(process.stdout.splitlines()) == sorted(f"line {i} of stdout" for i in range(40))
    assert sorted(process.stderr.splitlines()) == sorted(f"line {i} of stderr" for i in range(40))


def _authkey(_: object) -> bytes:
    import multiprocessing

    return bytes(multiprocessing.current_process().authkey)


def test_the_authkey_travels_so_that_managers_work(driver: Cluster) -> None:
    import multiprocessing

    with multiprocessing.Manager() as manager, Pool(2) as pool:
        assert set(pool.map(_authkey, range(4))) == {bytes(multiprocessing.current_process().authkey)}
        shared = manager.dict()
        pool.starmap(_put_into, [(shared, value) for value in range(10)])
        assert dict(shared) == {value: value for value in range(10)}


def _put_into(shared: Any, value: int) -> None:
    shared[value] = value


# -- modules that only the driver has


def test_the_program_s_own_modules_need_not_be_on_the_nodes(cluster: Cluster, tmp_path: Path) -> None:
    package = tmp_path / "mine"
    (package / "inner").mkdir(parents=True)
    (package / "space").mkdir()
    (package / "__init__.py").write_text("from mine.work import work\n")
    (package / "work.py").write_text("from . import inner\nfrom mine.space import deep\nimport single\n"
                                     "def work(x):\n    return inner.VALUE + deep.VALUE + single.VALUE + x\n")
    (package / "inner" / "__init__.py").write_text("VALUE = 1000\n")
    (package / "space" / "deep.py").write_text("VALUE = 100\n")
    (tmp_path / "single.py").write_text("VALUE = 10\ndef fail(x):\n    raise KeyError('in a shipped module')\n")
    program = tmp_path / "program.py"
    program.write_text("import mine, single, traceback\n"
                       "from dpool.multiprocessing import Pool\n"
                       "if __name__ == '__main__':\n"
                       "    with Pool(4) as pool:\n"
                       "        print(pool.map(mine.work, range(5), chunksize=1))\n"
                       "        try:\n"
                       "            pool.apply(single.fail, (1,))\n"
                       "        except KeyError as error:\n"
                       "            print(\"raise KeyError('in a shipped module')\" in str(error.__cause__))\n"
                       "        try:\n"
                       "            pool.apply(__import__, ('nowhere_at_all',))\n"
                       "        except ModuleNotFoundError as error:\n"
                       "            print(error)\n")
    process = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60,
                             env=cluster.environment() | {"DPOOL_ADDRESS": cluster.address})
    assert (process.stdout, process.stderr) == (
        "[1110, 1111, 1112, 1113, 1114]\nTrue\nNo module named 'nowhere_at_all'\n", "")


# -- objects


def test_large_arrays_both_ways(driver: Cluster) -> None:
    array = np.arange(700_000.0)
    with Pool(4) as pool:
        for index, result in enumerate(pool.starmap(shifted, [(array, value) for value in range(6)], chunksize=1)):
            assert (result == np.arange(700_000.0) + index).all()
        assert (array == np.arange(700_000.0)).all()


def test_refs_as_arguments_and_results_across_nodes(driver: Cluster) -> None:
    ref = dpool.put(np.ones(500_000))
    with Pool(4) as pool:
        assert set(pool.starmap(sum_of, [(ref,)] * 12, chunksize=1)) == {500_000.0}
        results = pool.starmap(put_shifted, [(ref, float(value)) for value in range(8)], chunksize=1)
        assert [float(dpool.get(result)[0]) for result in results] == [1.0 + value for value in range(8)]
        # What one node has put goes to the other.
        assert pool.starmap(sum_of, [(result,) for result in results], chunksize=1) == [
            500_000.0 * (1 + value) for value in range(8)]
        assert pool.apply(sum_of, (dpool.put(np.ones(3)), *results[:2])) == 3 + 500_000.0 * 3


def test_an_object_leaves_the_driver_once_for_all_nodes_and_pools(driver: Cluster,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    size = 1 << 20
    sent: list[int] = []

    def counted(*args: Any) -> Any:
        for message in stored(*args):
            assert message[4] is not None
            sent.append(message[4].nbytes)
            yield message

    stored = luggage.stored
    monkeypatch.setattr(luggage, "stored", counted)
    ref = dpool.put(np.zeros(size // 8))
    with Pool(4) as pool, Pool(4) as other:
        for one in (pool, other):
            assert len(set(one.starmap(parent_with, [(ref,)] * 40, chunksize=1))) == 2
    assert size <= sum(sent) < 1.1 * size


def test_an_object_is_freed_on_the_nodes_when_the_driver_frees_it(driver: Cluster) -> None:
    ref = dpool.put(np.zeros(1 << 20))
    with Pool(2) as pool:
        before = [_segments(node) for node in driver.nodes]
        assert pool.starmap(sum_of, [(ref,)] * 8, chunksize=1) == [0.0] * 8
        assert any(_segments(node) != had for node, had in zip(driver.nodes, before, strict=True))
        del ref
        until(lambda: [_segments(node) for node in driver.nodes] == before, "the object is gone")


def _segments(node: Process) -> int:
    """How many a node has open: the connections by which they came may stay."""
    return sum("memfd" in name for name in node.descriptors())


def test_what_a_segment_held_before_does_not_leave_the_machine(driver: Cluster) -> None:
    with Pool(1) as pool:
        for _ in range(3):  # fills segments that are used again
            pool.apply(sum_of, (np.frombuffer(b"secret!!" * 100_000, dtype=np.uint8),))
        # 513 kB in a segment of a larger class, which was used before. The needle itself is in there, too.
        assert pool.apply(_maps_with, (np.zeros(513_000, dtype=np.uint8), b"secret!!")) == 1


def _maps_with(array: Any, needle: bytes) -> int:
    """In how many places the segment of an argument has these bytes."""
    found = 0
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps:
            if "memfd:dpool" in line:
                first, last = (int(number, 16) for number in line.split()[0].split("-"))
                size = os.stat(f"/proc/self/map_files/{line.split()[0]}").st_size if os.geteuid() == 0 else last - first
                memory.seek(first)
                found += memory.read(min(size, last - first)).count(needle)
    return found
