"""Owns the tests of joblib's backend on a cluster: a head and two nodes as processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import executor_tasks as deeds
import joblib_tasks as tasks
import nested_tasks
import pytest
from clusters import Cluster, Driver, children_of

joblib = pytest.importorskip("joblib")
numpy = pytest.importorskip("numpy")

from joblib import Parallel, delayed, parallel_config  # noqa: E402

import dpool  # noqa: E402
from dpool.cluster.driver import luggage  # noqa: E402
from dpool.cluster.store.transfer import pieces  # noqa: E402
from dpool.errors import WorkerDied  # noqa: E402
from dpool.joblib import backend, warm  # noqa: E402
from dpool.joblib.backend import DpoolBackend  # noqa: E402


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster, Driver(cluster):
        yield cluster
        warm.shelf.clear()


def run(function: Any, *values: Any, **options: Any) -> Any:
    with parallel_config(backend="dpool", n_jobs=-1):
        return Parallel(**options)(delayed(function)(value) for value in values)


def test_all_jobs_are_all_cpus_of_the_cluster(cluster: Cluster) -> None:
    assert DpoolBackend().effective_n_jobs(-1) == 4
    assert run(tasks.double, *range(200)) == [2 * i for i in range(200)]
    assert list(run(lambda value: value + 1, *range(20), return_as="generator")) == list(range(1, 21))


def test_arrays_arrive_with_the_same_rules(cluster: Cluster) -> None:
    large, small = numpy.zeros((1 << 17) + 1), numpy.zeros(10)
    assert run(tasks.is_writable, large, small, large) == [False, True, False]
    assert run(tasks.is_writable, large, small, mmap_mode=None) == [True, True]
    assert run(tasks.first, numpy.asfortranarray(numpy.ones((400, 400))), large[::2]) == [1.0, 0.0]
    [result] = run(tasks.as_it_is, large)
    result[0] = 1


def test_a_large_array_travels_to_each_node_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def counted(*arguments: Any) -> Any:
        found = pieces(*arguments)
        sent.extend(piece.nbytes for _, _, piece in found)
        return found

    monkeypatch.setattr(luggage, "pieces", counted)
    array = numpy.ones(1 << 18)
    assert run(tasks.first, *[array] * 40, batch_size=1) == [1.0] * 40
    assert run(tasks.first, *[array] * 40, mmap_mode=None, batch_size=1) == [1.0] * 40
    assert 2 * array.nbytes <= sum(sent) < 4.1 * array.nbytes  # two calls, two nodes at most


def test_an_array_that_changes_is_not_taken_for_what_it_was(cluster: Cluster) -> None:
    tasks.check_that_changes_are_seen(numpy.zeros(1 << 18))


def test_refs_in_tasks_arrive_as_refs(cluster: Cluster) -> None:
    ref = dpool.put(numpy.full(1 << 18, 7.0))
    assert run(lambda refs: float(dpool.get(refs["it"])[5]), {"it": ref}, {"it": ref}) == [7.0, 7.0]


def test_faults_are_exceptions(cluster: Cluster) -> None:
    with pytest.raises(ValueError, match="bad") as caught:
        Parallel(2, backend="dpool")([delayed(deeds.raise_error)(ValueError, "bad")])
    assert "the source line" in str(caught.value.__cause__)
    with pytest.raises(WorkerDied):
        Parallel(2, backend="dpool")([delayed(deeds.kill_self)()])
    assert run(tasks.double, *range(8)) == [2 * i for i in range(8)]


def test_a_parallel_in_a_task_on_a_node(cluster: Cluster) -> None:
    assert Parallel(2, backend="dpool")(delayed(tasks.nested)(count, "dpool") for count in range(4)) == [0, 0, 2, 6]


def test_such_a_parallel_is_the_cluster_s_within_the_worker_s_share(cluster: Cluster,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six processors, as it were, each of two workers has three; all of the cluster would be four."""
    monkeypatch.setattr(backend, "cpu_count", lambda: 6)
    zygotes = {zygote for node in cluster.nodes for zygote in children_of(node.pid)}
    for found, most in Parallel(2, backend="dpool")(delayed(nested_tasks.with_joblib)(20) for _ in range(2)):
        assert {parent for parent, _ in found} <= zygotes
        assert most == 3
