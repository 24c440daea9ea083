"""What workers take of their machines: the arithmetic, by Hypothesis too, and real workers with GPUs set apart.

The GPUs are names alone, as CUDA_VISIBLE_DEVICES has them: no test needs one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import deeds
import pytest
from clusters import Cluster, Driver, until
from hypothesis import given
from hypothesis import strategies as st
from leftovers import PATIENCE_S, Census

import dpool
import dpool.asyncio
import dpool.multiprocessing as mp_of_dpool
from dpool import resources, session
from dpool.cluster.head.membership import spread
from dpool.cluster.node import machine
from dpool.concurrent.futures import ProcessPoolExecutor
from dpool.embedded import EmbeddedEngine
from dpool.errors import ClusterError
from dpool.multiprocessing.pool import Pool
from dpool.resources import Lacking, Stock, parse, parse_words, room

mp: Any = mp_of_dpool  # whose names a type checker takes for the standard library's

# -- what the user writes


@pytest.mark.parametrize("given_, meant", [
    (None, {}), ({}, {}), ({"gpu": 1}, {"gpus": 1}), ({"gpus": 0.25, "cpu": 2}, {"gpus": 0.25, "cpus": 2}),
    ({"memory": "4 GB"}, {"memory": 4e9}), ({"memory": "512MiB"}, {"memory": 512 << 20}),
    ({"memory": 1000}, {"memory": 1000}),
    ({"licence": 1}, {"licence": 1}), ({"gpu": 0}, {})])
def test_what_is_written_is_understood(given_: Any, meant: dict[str, float]) -> None:
    assert parse(given_) == meant


@pytest.mark.parametrize("given_, kind, text", [
    (3, TypeError, "must be a dict"), ({"gpu": "two"}, TypeError, "must be a number"),
    ({"gpu": True}, TypeError, "must be a number"), ({"gpu": -1}, ValueError, "at least 0"),
    ({"gpu": float("nan")}, ValueError, "at least 0"), ({"gpu": float("inf")}, ValueError, "at least 0"),
    ({"gpu": 1.5}, ValueError, "whole ones"), ({"gpu": 1, "gpus": 1}, ValueError, "twice"),
    ({"memory": "much"}, ValueError, "write it like"), ({"a b": 1}, ValueError, "without spaces"),
    ({1: 1}, ValueError, "name of a resource")])
@pytest.mark.parametrize("door", [
    lambda needs: Pool(1, resources=needs), lambda needs: mp.Pool(1, resources=needs),
    lambda needs: mp.get_context("spawn").Pool(1, resources=needs),
    lambda needs: ProcessPoolExecutor(1, resources=needs), lambda needs: dpool.asyncio.Pool(1, resources=needs)])
def test_bad_resources_are_refused_by_every_door(door: Callable[[Any], Any], given_: Any, kind: type[Exception],
                                                 text: str) -> None:
    with pytest.raises(kind, match=text):
        door(given_)


def test_a_machine_s_resources_are_words() -> None:
    assert parse_words("licence=2 tape=0.5,memory=4GB") == {"licence": 2, "tape": 0.5, "memory": 4e9}
    for wrong in ("licence", "licence=many", "=1"):
        with pytest.raises(ValueError, match="licence=2|name of a resource"):
            parse_words(wrong)


# -- the arithmetic


def test_what_lacks_is_said() -> None:
    stock = Stock({"licence": 2}, ["0"])
    held = stock.take({"licence": 1}, 2)
    with pytest.raises(Lacking, match="1 workers with licence: 1 each do not fit: there is licence: 2, of which others "
                                      "have licence: 2"):
        stock.take({"licence": 1}, 1)
    held.give_back()
    held.give_back()
    with pytest.raises(Lacking, match="there is gpus: 1$"):
        stock.take({"gpus": 1}, 2)
    with pytest.raises(Lacking, match="there is tape: 0$"):
        stock.take({"tape": 1}, 1)


def test_workers_that_share_gpus_leave_whole_ones_whole() -> None:
    stock = Stock({}, ["3", "5", "7"])
    halves = stock.take({"gpus": 0.5}, 2)
    whole = stock.take({"gpus": 2}, 1)
    assert [halves.environment(slot) for slot in (0, 1)] == [{"CUDA_VISIBLE_DEVICES": "3"}] * 2
    assert whole.environment(0) == {"CUDA_VISIBLE_DEVICES": "5,7"}
    with pytest.raises(Lacking):
        stock.take({"gpus": 0.1}, 1)


needs_of = st.dictionaries(st.sampled_from(["gpus", "licence", "memory"]), st.sampled_from([0.25, 0.5, 0.6, 1, 2]),
                           min_size=1)


@given(st.integers(0, 4), st.lists(st.tuples(needs_of, st.integers(1, 4), st.booleans()), max_size=20))
def test_nothing_is_given_twice_and_everything_comes_back(gpus: int, wishes: list[tuple[Any, int, bool]]) -> None:
    stock = Stock({"licence": 3, "memory": 5}, [str(index) for index in range(gpus)])
    held: list[resources.Grant] = []
    for needs, workers, back in wishes:
        if back and held:
            held.pop().give_back()
        fits = room(stock.total, stock.used, needs)
        try:
            held.append(stock.take(needs, workers))
        except Lacking:
            pass
        else:
            assert fits is not None and fits >= workers
            assert len(held[-1].gpus) == (workers if "gpus" in needs else 0)
        stock.validate()
        for name, amount in stock.used.items():
            assert amount <= stock.total.get(name, 0) + 1e-6
        for index in range(gpus):
            shares = sum(min(grant.needs["gpus"], 1) * mine.count(index) for grant in held for mine in grant.gpus)
            assert shares <= 1 + 1e-6
    for grant in held:
        grant.give_back()
    stock.validate()
    assert all(abs(amount) < 1e-6 for amount in stock.used.values())


@given(st.integers(0, 30), st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8), st.none() | st.integers(0, 6)),
                                    max_size=6))
def test_workers_are_spread_within_the_room(workers: int, nodes: list[tuple[int, int, int | None]]) -> None:
    ids = [bytes([index]) for index in range(len(nodes))]
    limits = {id: limit for id, (_, _, limit) in zip(ids, nodes, strict=True) if limit is not None}
    found = spread(workers, {id: cpus for id, (cpus, _, _) in zip(ids, nodes, strict=True)},
                   {id: load for id, (_, load, _) in zip(ids, nodes, strict=True)}, limits)
    assert all(found.get(id, 0) <= limit for id, limit in limits.items())
    most = workers if len(limits) < len(nodes) else min(workers, sum(limits.values()))
    assert sum(found.values()) == most


# -- this machine


def visible(_: object = None) -> tuple[int, str | None]:
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")


def seen(pool: Pool) -> dict[int, str | None]:
    """What each of a pool's two workers sees, by pid."""
    found: dict[int, str | None] = {}

    def look() -> bool:
        found.update(pool.map(visible, range(20), 1))
        return len(found) == 2

    until(look, "two workers")
    return found


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This machine has two GPUs, and two licences."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setenv(machine.VARIABLE, "licence=2")
    before = session.use(EmbeddedEngine())
    yield
    session.use(before)


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_each_worker_sees_its_own_gpu_also_after_another_has_died(gpus: None, method: str) -> None:
    census = Census()
    with Pool(2, context=get_context(method), resources={"gpu": 1}) as pool:
        assert sorted(map(str, seen(pool).values())) == ["GPU-a", "GPU-b"]
        with pytest.raises(dpool.WorkerDied):
            pool.apply(deeds.kill_self)
        assert sorted(map(str, seen(pool).values())) == ["GPU-a", "GPU-b"]
        with pytest.raises(Lacking, match="of which others have gpus: 2"):
            Pool(1, resources={"gpu": 0.5})
    pool.join()
    with Pool(resources={"gpu": 1}) as pool:
        assert pool._processes == min(2, session.default_processes())
    pool.join()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b"
    del pool
    census.check()


@pytest.mark.parametrize("visible_, gpus_, more, names", [
    ("4,5", None, "", ["4", "5"]), ("4,5", 1, "", ["4"]), ("4,5", None, "gpus=1", ["4"]),
    ("4,5", 3, "", ["0", "1", "2"]), ("", 2, "", ["0", "1"]), ("-1", None, "", [])])
def test_gpus_have_the_names_that_this_process_sees(monkeypatch: pytest.MonkeyPatch, visible_: str, gpus_: int | None,
                                                    more: str, names: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible_)
    assert machine.stock(gpus_, more).gpus == names


def nested(_: object) -> tuple[str | None, str | None]:
    with Pool(1, resources={"gpu": 1}) as pool:
        inner = pool.apply(visible)[1]
    pool.join()
    return os.environ.get("CUDA_VISIBLE_DEVICES"), inner


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_pool_in_a_worker_has_the_workers_gpu(gpus: None, method: str) -> None:
    with Pool(2, context=get_context(method), resources={"gpu": 1}) as pool:
        found = pool.map(nested, range(6), 1)
    pool.join()
    assert all(own == inner and own in ("GPU-a", "GPU-b") for own, inner in found)


def test_the_other_doors_take_resources_too(gpus: None) -> None:
    with ProcessPoolExecutor(2, resources={"gpu": 0.5}) as executor:
        assert executor.submit(visible).result(PATIENCE_S)[1] == "GPU-a"

    async def run() -> Any:
        async with dpool.asyncio.Pool(1, resources={"gpu": 2, "licence": 1}) as pool:
            return await pool.run(visible)

    assert asyncio.run(run())[1] == "GPU-a,GPU-b"


def test_joblib_s_idle_workers_make_room(gpus: None) -> None:
    joblib = pytest.importorskip("joblib")
    with joblib.parallel_config(backend="dpool", n_jobs=2, resources={"gpu": 1}):
        first = joblib.Parallel()(joblib.delayed(visible)() for _ in range(8))
    assert {gpu for _, gpu in first} <= {"GPU-a", "GPU-b"}
    with joblib.parallel_config(backend="dpool", n_jobs=2, resources={"gpu": 0.5}):
        second = joblib.Parallel()(joblib.delayed(visible)() for _ in range(8))
    assert {gpu for _, gpu in second} == {"GPU-a"}
    from dpool.joblib import warm

    warm.shelf.clear()


def test_what_this_machine_has_not_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = session.use(EmbeddedEngine())
    try:
        with pytest.raises(ValueError, match="2 workers with gpus: 1 each do not fit: there is gpus: 0"):
            Pool(2, resources={"gpu": 1})
        with pytest.raises(ValueError, match="memory"):
            Pool(2, resources={"memory": "10000 TB"})
        with Pool(2, resources={"memory": "1 MB", "cpus": 1}) as pool:
            assert pool.apply(deeds.double, (4,)) == 8
        pool.join()
    finally:
        session.use(before)


# -- a cluster


def test_workers_are_placed_where_the_resources_are(tmp_path: Path) -> None:
    with Cluster(tmp_path, nodes=1) as cluster:
        node = cluster.command("node", cluster.address, "--cpus", "2", "--gpus", "3", "--resources", "licence=1")
        node.expect("joined")
        cluster.nodes.append(node)
        with Driver(cluster):
            with Pool(resources={"gpu": 1}) as pool:
                assert pool._processes == 2  # its CPUs
                found = seen(pool)
                assert {*map(str, found.values())} == {"0", "1"}
                assert {process.pid for process in pool._pool} == set(found)
                status = cluster.command("status", cluster.address)
                status.expect(r"gpus 2 of 3 taken, licence 0 of 1 taken")
                # There is room for one more with a GPU, and for none with two.
                with ProcessPoolExecutor(1, resources={"gpu": 1, "licence": 1}) as executor:
                    assert executor.submit(visible).result(PATIENCE_S)[1] == "2"
            pool.join()
            with pytest.raises(ClusterError, match=r"no node of the cluster .* has free .*\(gpus: 4\)"):
                Pool(1, resources={"gpu": 4})


def test_a_group_grows_to_its_size_when_a_node_with_more_of_it_comes(tmp_path: Path) -> None:
    with Cluster(tmp_path, nodes=0) as cluster:
        def start_node() -> None:
            node = cluster.command("node", cluster.address, "--cpus", "4", "--resources", "licence=1")
            node.expect("joined")
            cluster.nodes.append(node)

        start_node()
        with Driver(cluster), Pool(2, resources={"licence": 1}) as pool:
            assert len(pool._pool) == 1
            start_node()
            until(lambda: len(pool._pool) == 2, "the second worker")
            assert pool.map(deeds.double, range(10)) == list(range(0, 20, 2))


def test_names_are_the_same_everywhere() -> None:
    assert (resources.CPUS, resources.GPUS, resources.MEMORY) == ("cpus", "gpus", "memory")
