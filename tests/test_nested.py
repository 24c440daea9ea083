"""Owns the tests of doors that tasks open on a cluster: they drive the cluster, wherever they run, and leave nothing.

Head, nodes and drivers are processes of this machine; two hosts are in test_hosts.py, keys in test_cluster_security.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import deeds
import nested_tasks as tasks
import numpy as np
import pytest
from clusters import Cluster, Driver, children_of, until, workers_of
from leftovers import Watched

import dpool
from dpool.cli.asking import ask
from dpool.cluster.wire import messages
from dpool.errors import GroupBroken, WorkerDied
from dpool.multiprocessing import Pool

# A level of workers is gone so long after the driver above it: what a node waits for one that may come back
# (BROKEN_AFTER_S), and a machine that is busy.
GONE_S = 20.0
# What ends in order is gone before anybody has to find out by himself.
AT_ONCE_S = 3.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes with two CPUs each, which no test harms."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def driver(cluster: Cluster) -> Iterator[Cluster]:
    """This process uses the cluster; whatever its tasks have opened there is gone afterwards."""
    with Driver(cluster):
        yield cluster
    until(lambda: not cluster.workers(), "all workers are gone")
    until(lambda: not drivers(cluster), "all drivers are gone")


def drivers(cluster: Cluster) -> list[messages.DriverReport]:
    """As `dpool status` shows them."""
    report = ask(cluster.keys, cluster.address, messages.Ask())
    assert isinstance(report, messages.Report)
    return report.drivers


def zygotes(cluster: Cluster) -> set[int]:
    return {zygote for node in cluster.nodes for zygote in children_of(node.pid)}


def run(cluster: Cluster, directory: Path, program: str, *before: str) -> str:
    """What a driver of the cluster prints; nothing on stderr."""
    (directory / "program.py").write_text(dedent(program))
    done = subprocess.run([sys.executable, *before, "program.py"], capture_output=True, text=True, timeout=90,
                          cwd=directory, env=cluster.environment() | {"DPOOL_ADDRESS": cluster.address})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# -- where the workers are, and how many


def test_the_pool_of_a_task_spans_the_nodes(driver: Cluster, tmp_path: Path) -> None:
    with Pool(2) as pool:
        for found in pool.starmap(tasks.nested_meeting, [(str(tmp_path), 4)] * 2, chunksize=1):
            assert {parent for parent, _ in found} == zygotes(driver)
            assert len({pid for _, pid in found}) == 4


def test_every_cpu_is_taken_by_parents_three_levels_deep(driver: Cluster, tmp_path: Path) -> None:
    """All workers of a level are in their tasks before one of them opens the next level."""
    assert tasks.tree(str(tmp_path), [4, 2, 2]) == 4 + 4 * (2 + 2 * 2)


def test_a_nested_pool_without_a_number_has_all_cpus(driver: Cluster) -> None:
    with Pool(1) as pool:
        assert pool.apply(tasks.processes_of_a_pool) == 4


def test_a_worker_stays_connected_and_is_counted(driver: Cluster) -> None:
    with Pool(1) as pool:
        [first] = pool.apply(tasks.driver_of_two_pools)
        assert pool.apply(tasks.driver_of_two_pools) == {first}
        [worker] = workers_of(pool)
        until(lambda: len(drivers(driver)) == 2, "the head knows this process and the worker")
        [nested] = [one for one in drivers(driver) if one.inside]
        [outer] = [one for one in drivers(driver) if not one.inside]
        assert (nested.driver, nested.pid, [nested.inside]) == (first.hex(), worker.pid, list(outer.groups))
        status = driver.command("status", driver.address)
        status.expect(rf"process {worker.pid} in a task of group {nested.inside[:8]}")
        assert status.wait() == 0


def test_a_worker_that_opens_no_door_imports_nothing_for_it(driver: Cluster) -> None:
    with Pool(1) as pool:
        heavy = {"zmq", "msgspec", "asyncio", "joblib", "numpy", "dpool.session", "dpool.cluster.wire.keys"}
        assert not pool.apply(tasks.modules) & heavy
        pool.apply(tasks.in_a_pool, (abs, -1))
        assert "zmq" in pool.apply(tasks.modules)  # so it would have been seen


def test_on_one_machine_nested_pools_are_as_they_were() -> None:
    with Pool(1) as pool:
        [worker] = workers_of(pool)
        parent, _ = pool.apply(tasks.in_a_pool, (tasks.where,))
        assert parent == worker.pid
        assert "zmq" not in pool.apply(tasks.modules) - set(sys.modules)


# -- the other doors


def test_an_executor_in_a_task(driver: Cluster) -> None:
    with Pool(1) as pool:
        assert {parent for parent, _ in pool.apply(tasks.an_executor, (20,))} <= zygotes(driver)


def test_asyncio_in_a_task(driver: Cluster) -> None:
    with Pool(1) as pool:
        assert {parent for parent, _ in pool.apply(tasks.with_asyncio, (20,))} <= zygotes(driver)


def test_joblib_in_a_task(driver: Cluster) -> None:
    """Without a budget, which workers of joblib's alone have, all CPUs are the cluster's."""
    pytest.importorskip("joblib")
    with Pool(1) as pool:
        found, most = pool.apply(tasks.with_joblib, (20,))
        assert {parent for parent, _ in found} <= zygotes(driver)
        assert most == 4


@pytest.mark.parametrize("how", ["fork", "multiprocessing"])
def test_a_process_that_a_task_forks_opens_a_pool(how: str, driver: Cluster) -> None:
    with Pool(1) as pool:
        pid, found = pool.apply(tasks.in_a_forked_process, (how,))
        assert {parent for parent, _ in found} <= zygotes(driver)
        assert pid not in {parent for parent, _ in found}


# -- which cluster


@pytest.mark.parametrize("init", [False, True])
def test_a_variable_in_the_node_s_environment_does_not_matter(init: bool, driver: Cluster) -> None:
    with Pool(1) as pool:
        assert pool.apply(tasks.with_variable, ("tcp://127.0.0.1:1", init))[0] in zygotes(driver)


def test_a_task_that_names_a_cluster_uses_that_one(driver: Cluster, tmp_path: Path) -> None:
    with Cluster(tmp_path, nodes=1) as other, Pool(1) as pool:
        parent, _ = pool.apply(tasks.after_init, (other.address, str(other.key)))
        assert parent in zygotes(other)


# -- functions, modules, what they print and raise


def test_functions_travel_on_by_value(driver: Cluster) -> None:
    offset = 40

    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

    with Pool(1) as pool:
        assert pool.apply(tasks.map_in_a_pool, (lambda value: value + offset, [1, 2])) == [41, 42]
        assert pool.apply(tasks.map_in_a_pool, (lambda local: local.value, [Local(7)])) == [7]
        assert pool.apply(lambda: tasks.map_in_a_pool(lambda value: value * offset, [1, 2])) == [40, 80]


def test_exceptions_come_with_both_remote_tracebacks(driver: Cluster) -> None:
    with Pool(1) as pool:
        with pytest.raises(KeyError, match="nothing") as caught:
            pool.apply(tasks.in_a_pool, (deeds.raise_error, KeyError, "nothing"))
        text = str(caught.value.__cause__)
        assert "in raise_error" in text and "in in_a_pool" in text
        with pytest.raises(WorkerDied, match="SIGKILL"):
            pool.apply(tasks.in_a_pool, (deeds.kill_self,))
        with pytest.raises(GroupBroken, match="not today"):
            first = {"initializer": deeds.raise_error, "initargs": (KeyError, "not today")}
            pool.apply(tasks.in_a_pool, (abs, -1), first)
        assert pool.apply(tasks.in_a_pool, (deeds.double, 2)) == 4


def test_refs_go_on_to_nested_workers(driver: Cluster) -> None:
    ref = dpool.put(np.ones(300_000))
    with Pool(2) as pool:
        assert pool.map(tasks.pass_on, [[ref]] * 2, chunksize=1) == [[1.0, 2.0]] * 2


def test_a_program_s_own_functions_and_modules(cluster: Cluster, tmp_path: Path) -> None:
    """Neither the nodes nor the workers that ask have any file of it; two levels below the program they work."""
    package = tmp_path / "mine"
    (package / "space").mkdir(parents=True)
    (package / "__init__.py").write_text("from mine.work import work\n")
    (package / "words.txt").write_text("a word")
    (package / "work.py").write_text(dedent("""
        def work(value):
            from importlib.resources import files
            from mine.space import deep
            import late
            return value + deep.VALUE + late.VALUE, files("mine").joinpath("words.txt").read_text()
    """))
    (package / "space" / "deep.py").write_text("VALUE = 100\n")
    (tmp_path / "late.py").write_text(dedent("""
        VALUE = 10

        def remember(value):
            global remembered
            remembered = value
    """))
    out = run(cluster, tmp_path, """
        import late
        import mine
        from dpool.multiprocessing import Pool

        LEVELS = 2

        class Value:
            def __init__(self, value):
                self.value = value

        def helper(value):
            return Value(value + LEVELS)

        def recall(value):
            print("nested", flush=True)
            return late.remembered + helper(value).value

        def missing(_):
            try:
                import nowhere_at_all
            except ModuleNotFoundError as error:
                return str(error)

        def by_module(level):
            with Pool(1) as pool:
                return pool.apply(mine.work, (1,)) if not level else pool.apply(by_module, (level - 1,))

        def by_main(level):
            with Pool(1, late.remember, (1000,)) as pool:
                if level:
                    return pool.apply(by_main, (level - 1,))
                return pool.map(recall, [1, 2]), [one.value for one in pool.map(helper, [1, 2])], pool.map(missing, [1])

        if __name__ == "__main__":
            with Pool(1) as pool:
                print(pool.apply(by_module, (1,)))
                print(pool.apply(by_main, (1,)))
    """)
    assert sorted(out.splitlines()) == sorted([
        "(111, 'a word')", "nested", "nested", "([1003, 1004], [3, 4], [\"No module named 'nowhere_at_all'\"])"])


def test_a_program_that_is_not_changed(cluster: Cluster, tmp_path: Path) -> None:
    out = run(cluster, tmp_path, """
        import os
        import sys
        from multiprocessing import Pool
        from concurrent.futures import ProcessPoolExecutor

        def leaf(_):
            return os.getppid(), "dpool.cluster.worker.zygote" in sys.modules

        def nested(_):
            with Pool(2) as pool, ProcessPoolExecutor(1) as executor:
                found = pool.map(leaf, range(4)) + [executor.submit(leaf, 0).result()]
            return os.getpid() in {pid for pid, _ in found}, {of for _, of in found}

        if __name__ == "__main__":
            with Pool(2) as pool:
                print(pool.map(nested, range(2)))
    """, "-m", "dpool", "run")
    assert out == "[(False, {True}), (False, {True})]\n"


# -- what the machines have


def test_resources_of_a_parent_are_its_own(tmp_path: Path) -> None:
    with Cluster(tmp_path, nodes=1, cpus=1) as cluster, Driver(cluster):
        node = cluster.command("node", cluster.address, "--cpus", "1", "--resources", "licence=1")
        cluster.nodes.append(node)
        node.expect("joined")
        with dpool.Pool(1, resources={"licence": 1}) as pool:
            assert "no node" in (said := pool.apply(tasks.lacks, ({"licence": 1},))) and "licence: 1" in said
            assert pool.apply(tasks.in_a_pool, (deeds.double, 2), {"resources": {"cpus": 0.5}}) == 4
        with Pool(1) as pool:
            assert pool.apply(tasks.lacks, ({"licence": 1},)) == ""


# -- the end


def _below(directory: Path) -> set[int]:
    """The workers that keep_a_pool() has below it, as soon as all three are in their tasks."""
    until(lambda: directory.exists() and len(os.listdir(directory)) == 3, "the nested workers are in their tasks")
    return set(map(int, os.listdir(directory)))


def _gone(cluster: Cluster) -> None:
    until(lambda: not cluster.workers(), "all workers are gone", GONE_S)
    until(lambda: not drivers(cluster), "all drivers are gone", GONE_S)


@pytest.mark.parametrize("how", ["killed", "terminated", "driver leaves"])
def test_a_parent_that_ends_in_the_midst_takes_its_workers_along(how: str, cluster: Cluster, tmp_path: Path) -> None:
    with Driver(cluster):
        pool = Pool(1)
        [parent] = workers_of(pool)
        running = pool.apply_async(tasks.keep_a_pool, (str(tmp_path / "never"), 3, True))
        nested = _below(tmp_path / "never")
        if how == "killed":
            os.kill(parent.pid, signal.SIGKILL)
            with pytest.raises(WorkerDied, match="SIGKILL"):
                running.get(30)
            assert not Watched(nested).left_after(GONE_S)
            assert pool.apply(tasks.in_a_pool, (deeds.double, 2)) == 4  # its successor is none the worse
        if how != "driver leaves":
            pool.terminate()
    assert not Watched(nested).left_after(GONE_S)
    _gone(cluster)


@pytest.mark.parametrize("end", ["closed", "replaced"])
def test_a_pool_that_a_task_leaves_open_ends_with_its_process(end: str, cluster: Cluster, tmp_path: Path) -> None:
    with Driver(cluster), Pool(1, maxtasksperchild=1 if end == "replaced" else None) as pool:
        pool.apply(tasks.keep_a_pool, (str(tmp_path / "never"), 3, False))
        nested = _below(tmp_path / "never")
        if end == "closed":
            pool.close()
            pool.join()
        assert not Watched(nested).left_after(AT_ONCE_S)
    _gone(cluster)


def test_a_pool_that_a_task_forgets_ends_when_it_is_collected(driver: Cluster) -> None:
    with Pool(1) as pool:
        nested = set(pool.apply(tasks.forget_a_pool))
        assert not Watched(nested).left_after(AT_ONCE_S)
        assert pool.apply(tasks.in_a_pool, (deeds.double, 2)) == 4


def test_a_driver_is_killed_and_so_is_all_below_it(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(dedent(f"""
        import nested_tasks as tasks
        from dpool.multiprocessing import Pool

        def nested(_):
            with Pool(1) as pool:
                pool.apply(tasks.keep_a_pool, ({str(tmp_path / "never")!r}, 3, True))

        if __name__ == "__main__":
            with Pool(1) as pool:
                pool.map(nested, [1])
    """))
    driver = cluster.python(str(program), address=True)
    _below(tmp_path / "never")
    assert len(cluster.workers()) == 5
    driver.end(signal.SIGKILL)
    until(lambda: not cluster.workers(), "all workers are gone", 3 * GONE_S)
    until(lambda: not drivers(cluster), "all drivers are gone", GONE_S)


def test_the_node_of_a_parent_is_killed(tmp_path: Path) -> None:
    with Cluster(tmp_path, nodes=1, cpus=1) as cluster, Driver(cluster), Pool(1) as pool:
        first = cluster.nodes[0]
        cluster.start_node(cpus=4)
        pool.apply_async(tasks.keep_a_pool, (str(tmp_path / "never"), 3, True))
        nested = _below(tmp_path / "never")
        first.end(signal.SIGKILL)
        assert not Watched(nested).left_after(GONE_S)
        # The task runs again on the other node, which the death of its first has not to do with.
        until(lambda: len(cluster.workers()) == 4, "it runs again")
        pool.terminate()
        until(lambda: not cluster.workers(), "all workers are gone", GONE_S)
