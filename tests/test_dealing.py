"""Which node gets the next batch, and which one is to give some back: driver/dealing.py, driven directly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dpool.cluster.driver.dealing import Dealing

counts = st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 4))  # node, batches, workers


@given(st.lists(counts, max_size=60))
def test_the_least_loaded_node_is_next_and_the_overloaded_one_gives_back(changes: list[tuple[int, int, int]]) -> None:
    dealing: Dealing[int] = Dealing()
    now: dict[int, tuple[int, int]] = {}
    for node, batches, workers in changes:
        dealing.set(node, batches, workers)
        now.pop(node, None)
        if workers:
            now[node] = batches, workers
        dealing.validate()
        least = dealing.next()
        assert (least is None) == (not now)
        if least is not None:
            assert now[least][0] / now[least][1] == min(batches / workers for batches, workers in now.values())
        uneven = dealing.uneven()
        idle = [node for node, (batches, workers) in now.items() if batches < workers]
        surplus = {node: batches - workers for node, (batches, workers) in now.items() if batches > workers}
        assert (uneven is not None) == bool(idle and surplus)
        if uneven is not None:
            assert 1 <= uneven[1] <= surplus[uneven[0]]


def test_a_batch_goes_where_its_objects_are_if_a_worker_is_idle_there() -> None:
    dealing: Dealing[str] = Dealing()
    dealing.set("empty", 0, 2)
    dealing.set("some", 1, 2)
    dealing.set("most", 1, 2)
    there = {"empty": 0, "some": 40, "most": 60}
    assert dealing.near("empty", 100, there.__getitem__) == "most"
    dealing.set("most", 2, 2)  # no worker of it is idle
    assert dealing.near("empty", 100, there.__getitem__) == "some"
    there["empty"] = 100
    assert dealing.near("empty", 100, there.__getitem__) == "empty"
    for node in ("empty", "some"):
        dealing.set(node, 2, 2)
    assert dealing.near("some", 100, {"empty": 0, "some": 0, "most": 100}.__getitem__) == "some"
