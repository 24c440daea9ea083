"""The cluster's protocols under simulated faults: fresh seeds, old ones that failed once, bugs that must be noticed.

Each seed is a history that replays exactly; see tests/simulation and docs/architecture.md. Owns no process and no
socket, and waits for nothing.
"""

from __future__ import annotations

import os
import random

import pytest
from simulation.history import BRIEF, DEATHS, WILD, History
from simulation.mutants import MUTANTS
from simulation.running import explain, run
from simulation.scale import Head, Work, lines

from dpool.cluster.store import store

# Histories of seeds that nobody has seen, each time. More: more is found. Fewer: the suite is quicker. Another number
# may be set to run as many.
FRESH = int(os.environ.get("DPOOL_SIMULATION_SEEDS", "320"))
# They are run in so many tests, so that one that hangs names a few seeds.
SHARES = 8
# Within so many histories each mutant must be caught.
CAUGHT_WITHIN = 150
# Where to begin, for those that are seldom noticed.
FIRST = {"driver: a lost node is not dismissed": 1800,
         "node: does not send again": 185, "objects: a source that is silent is waited for": 230,
         "node: the last pulse of the dead renews their lease": 455, "head: placements are said once": 1171}
# Seeds that notice a bug that dpool once had, their kind, and what it was.
OLD = {
    (0, BRIEF): "a driver that was stopped for ten seconds gave up all its nodes",
    (59, BRIEF): "a connection that ended for the node alone was waited on for ever",
    (8, WILD): "a driver without a connection turned without a pause",
    (18, WILD): "a node that had been lost was avoided for ever",
    (2202, DEATHS): "a pulse that came after the end of its driver's connection kept the workers for a minute",
}


def _check(seed: int, kind: str | None = None) -> None:
    history = History(seed, kind)
    violation = run(history)
    if violation is not None:
        pytest.fail(explain(history, violation, 60), pytrace=False)


@pytest.mark.parametrize("share", range(SHARES))
def test_fresh_seeds(share: int) -> None:
    for _ in range(FRESH // SHARES):
        _check(random.SystemRandom().randrange(1 << 32))


@pytest.mark.parametrize(("seed", "kind"), OLD)
def test_old_seeds(seed: int, kind: str) -> None:
    _check(seed, kind)


@pytest.mark.parametrize("seed", range(4))
def test_a_seed_replays_exactly(seed: int) -> None:
    first, second = History(seed), History(seed)
    assert run(first) is None and run(second) is None
    assert (first.world.events, first.world.now, list(first.world.trace)) == (
        second.world.events, second.world.now, list(second.world.trace))


def test_what_else_the_process_does_is_not_the_historys() -> None:
    store.current().attach()  # as a group of worker processes does, which joblib's stay warm for instance
    try:
        _check(18, WILD)
    finally:
        store.current().detach()


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: str) -> None:
    kind, first = MUTANTS[mutant].kind, FIRST.get(mutant, 0)
    assert any(run(History(seed, kind), mutant) is not None for seed in range(first, first + CAUGHT_WITHIN)), (
        f"{CAUGHT_WITHIN} histories went well with the bug {mutant!r}")


# -- scale: lines of code that are run, and messages; no time


def _lines_a_batch(nodes: int, tasks: int) -> float:
    work = Work(nodes, tasks)
    count = lines(work.run)
    assert work.told == tasks
    return count / work.batches


def test_a_task_costs_the_same_however_many_there_are() -> None:
    few, many = _lines_a_batch(10, 500), _lines_a_batch(10, 5000)
    assert many < few * 1.1


def test_a_task_costs_hardly_more_with_more_nodes() -> None:
    few, many = _lines_a_batch(10, 2000), _lines_a_batch(300, 2000)
    assert many < few * 1.5


def test_the_heads_traffic_follows_nodes_and_groups_and_not_tasks() -> None:
    def second(nodes: int, groups: int, tasks: int) -> tuple[int, int]:
        head = Head(nodes, groups, tasks)
        head.messages = head.bytes = 0
        head.second(3)
        return head.messages, head.bytes

    messages, nbytes = second(100, 10, 1000)
    assert messages == 2 * (100 + 10)
    assert second(100, 10, 1_000_000)[0] == messages
    assert second(200, 20, 1000)[0] == 2 * messages
    assert second(200, 20, 1000)[1] < 2.1 * nbytes
    assert second(100, 10, 1_000_000)[1] < 1.1 * nbytes


def test_the_heads_work_follows_nodes_and_groups() -> None:
    def second(nodes: int, groups: int) -> int:
        head = Head(nodes, groups)
        return lines(lambda: head.second(3))

    assert second(200, 10) < 2.2 * second(100, 10)
