"""Owns the tests of where the head places workers: a model of who takes which CPUs, against what it decides.

Pure: no socket, process or clock. Run by pytest.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dpool.cluster.head.membership import Mail, Membership
from dpool.cluster.wire.messages import (
    Ask,
    DriverState,
    GroupState,
    Inside,
    Leaving,
    NodeState,
    Part,
    Placed,
    Report,
    Versions,
)

VERSIONS = Versions(2, "3.13", "0.1.0")


def key(name: str) -> bytes:
    return name.encode().ljust(16, b"_")


class Cluster:
    """A head, and what nodes and drivers say to it. Drivers follow what they are told at once."""

    def __init__(self) -> None:
        self.head = Membership(key("cluster"), VERSIONS)
        self.numbers = itertools.count(1)
        self.now = 0.0
        self.states: dict[str, DriverState] = {}

    def node(self, name: str, cpus: int, **has: float) -> None:
        state = NodeState(key(name), next(self.numbers), name, ["tcp://host:1"], cpus, VERSIONS, resources=has)
        self._follow(self.head.handle(b"of " + name.encode(), "agent", state, self.now))

    def driver(self, name: str, *groups: GroupState, inside: Inside | None = None) -> None:
        self.states[name] = DriverState(key(name), 0, "host", 1, VERSIONS, list(groups), inside)
        self._say(name)

    def _say(self, name: str) -> None:
        state = self.states[name]
        state = DriverState(state.driver, next(self.numbers), state.host, state.pid, state.versions, state.groups,
                            state.inside)
        self._follow(self.head.handle(name.encode(), "driver", state, self.now))
        self.head.validate()

    def _follow(self, mail: Mail) -> None:
        for connection, message in mail:
            if isinstance(message, Placed):
                name = connection.decode()
                state = self.states[name]
                parts = [Part(member.node, member.workers) for member in message.members]
                groups = [GroupState(one.group, one.wanted, message.epoch, parts, one.avoid, one.needs)
                          if one.group == message.group else one for one in state.groups]
                self.states[name] = DriverState(state.driver, 0, state.host, 1, VERSIONS, groups, state.inside)
                self._say(name)

    def parts(self, name: str) -> dict[str, int]:
        """Where the workers of a driver are, by node."""
        found: dict[str, int] = {}
        for group in self.states[name].groups:
            for part in group.parts:
                node = part.node.rstrip(b"_").decode()
                found[node] = found.get(node, 0) + part.workers
        return found


def group(name: str, wanted: int, **needs: float) -> GroupState:
    return GroupState(key(name), wanted, 0, needs=needs)


@pytest.fixture
def cluster() -> Cluster:
    """A node on which a parent is, one that somebody else's worker is on, with a CPU each."""
    cluster = Cluster()
    cluster.node("a", 1)
    cluster.driver("outer", group("parents", 1))
    cluster.node("b", 1)
    cluster.driver("other", group("others", 1))
    assert (cluster.parts("outer"), cluster.parts("other")) == ({"a": 1}, {"b": 1})
    return cluster


PARENT = Inside(key("a"), key("parents"), 7)


def test_a_parent_s_cpu_is_free_for_the_workers_it_waits_for(cluster: Cluster) -> None:
    cluster.driver("nested", group("nested", 1), inside=PARENT)
    assert cluster.parts("nested") == {"a": 1}
    cluster.driver("second", group("second", 2))  # now each node has one
    assert cluster.parts("second") == {"a": 1, "b": 1}


def test_and_for_those_of_others(cluster: Cluster) -> None:
    cluster.node("c", 4)
    cluster.driver("nested", group("nested", 4), inside=PARENT)
    assert cluster.parts("nested") == {"a": 1, "c": 3}
    cluster.driver("next", group("next", 1))
    assert cluster.parts("next") == {"c": 1}


def test_a_driver_in_a_worker_that_has_no_group_waits_for_nothing(cluster: Cluster) -> None:
    cluster.driver("nested", inside=PARENT)
    cluster.node("c", 1)
    cluster.driver("next", group("next", 1))
    assert cluster.parts("next") == {"c": 1}


def test_a_worker_gives_its_cpu_up_once_however_many_drivers_are_in_it() -> None:
    """Processes that its task has forked, each with pools."""
    cluster = Cluster()
    cluster.node("a", 2)
    cluster.driver("outer", group("parents", 2))
    cluster.node("b", 2)
    for name in ("one", "two", "three"):
        cluster.driver(name, group(name, 1), inside=Inside(key("a"), key("parents"), 7))
    # One of two parents is busy: of the three workers of their pools one fits beside it.
    taken = [cluster.parts(name) for name in ("one", "two", "three")]
    assert sum("a" in part for part in taken) == 1 and sum("b" in part for part in taken) == 2
    cluster.driver("four", group("four", 1), inside=Inside(key("a"), key("parents"), 8))
    assert cluster.parts("four") == {"a": 1}


def test_what_is_said_of_a_group_that_is_not_there_frees_nothing(cluster: Cluster) -> None:
    cluster.driver("nested", group("nested", 1), inside=Inside(key("b"), key("nobody's"), 7))
    cluster.driver("more", group("more", 1), inside=Inside(key("b"), key("parents"), 7))
    # As without it: one on each.
    assert {*cluster.parts("nested"), *cluster.parts("more")} == {"a", "b"}
    # And no more than there are workers.
    for pid in range(5):
        cluster.driver(f"liar {pid}", group(f"lie {pid}", 1), inside=Inside(key("a"), key("parents"), pid))
    cluster.driver("last", group("last", 4))
    loads = {node: sum(cluster.parts(name).get(node, 0) for name in cluster.states) for node in ("a", "b")}
    assert abs(loads["a"] - 1 - loads["b"]) <= 1


def test_when_the_parent_is_gone_so_is_what_it_gave_up(cluster: Cluster) -> None:
    cluster.driver("nested", group("nested", 1), inside=PARENT)
    assert cluster.parts("nested") == {"a": 1}
    cluster.head.ended(b"nested", cluster.now)
    cluster.now += 1.0
    cluster.head.tick(cluster.now)
    del cluster.states["nested"]
    cluster.node("c", 1)
    cluster.driver("next", group("next", 1))
    assert cluster.parts("next") == {"c": 1}


def test_a_group_s_own_parents_have_given_up_theirs_when_it_grows() -> None:
    cluster = Cluster()
    cluster.node("a", 1)
    cluster.driver("outer", group("parents", 1))
    cluster.node("b", 1)
    cluster.head.handle(b"of a", "agent", Leaving(key("a")), cluster.now)
    cluster.node("a", 1)  # now it is the last one, to which nothing goes that may as well go elsewhere
    nested = GroupState(key("nested"), 1, 0, avoid=[key("a")])
    cluster.driver("nested", nested, inside=PARENT)
    assert cluster.parts("nested") == {"b": 1}
    cluster.driver("outer", GroupState(key("parents"), 2, 1, [Part(key("a"), 1)]))
    assert cluster.parts("outer") == {"a": 2}


def test_a_parent_gives_up_as_many_cpus_as_it_has() -> None:
    cluster = Cluster()
    cluster.node("a", 4)
    cluster.driver("outer", group("parents", 1, cpus=4.0))
    cluster.node("b", 3)
    cluster.driver("nested", group("nested", 4), inside=PARENT)
    assert cluster.parts("nested") == {"a": 2, "b": 2}


def test_and_nothing_else_that_it_has() -> None:
    cluster = Cluster()
    cluster.node("a", 1, gpus=1.0)
    cluster.driver("outer", group("parents", 1, gpus=1.0))
    cluster.driver("nested", group("nested", 1, gpus=1.0), inside=PARENT)
    assert cluster.parts("nested") == {}
    cluster.driver("nested", group("again", 1), inside=PARENT)
    assert cluster.parts("nested") == {"a": 1}


def test_the_report_says_who_is_in_a_worker(cluster: Cluster) -> None:
    cluster.driver("nested", inside=PARENT)
    [(_, report)] = cluster.head.handle(b"asks", "driver", Ask(), cluster.now)
    assert isinstance(report, Report)
    assert {driver.driver: driver.inside for driver in report.drivers} == {
        key("outer").hex(): "", key("other").hex(): "", key("nested").hex(): key("parents").hex()}


# -- the model


class Group:
    """A group as the model has it. `said`: its parts as its driver said last; `told`: as the head has placed it."""

    def __init__(self, name: bytes, wanted: int, share: float) -> None:
        self.name = name
        self.wanted = wanted
        self.share = share
        self.epoch = 0
        self.said: dict[bytes, int] = {}
        self.told: dict[bytes, int] = {}
        self.told_epoch = 0

    def state(self) -> GroupState:
        needs = {"cpus": self.share} if self.share != 1.0 else {}
        return GroupState(self.name, self.wanted, self.epoch, [Part(*one) for one in self.said.items()], [], needs)


class Placements(RuleBasedStateMachine):
    """Nodes come and go, drivers open groups and follow placements when they like, some in workers of others. Every
    group has as many workers as it wants, each where the fewest CPUs were taken by those who do not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Membership(key("cluster"), VERSIONS)
        self.names = itertools.count(1)
        self.now = 0.0
        self.nodes: dict[bytes, int] = {}  # CPUs
        self.drivers: dict[bytes, tuple[Inside | None, list[Group]]] = {}

    def name(self) -> bytes:
        return next(self.names).to_bytes(16, "big")

    # -- what the head says

    def busy(self, node: bytes, besides: Group) -> float:
        """CPUs that are taken on a node, if one group is left out."""
        inside = {one for one, groups in self.drivers.values() if groups and one is not None}
        taken = 0.0
        for _, groups in self.drivers.values():
            for other in groups:
                if other is not besides:
                    waiting = sum(one.node == node and one.group == other.name for one in inside)
                    taken += max(other.told.get(node, 0) - waiting, 0) * other.share
        return taken

    def own(self, node: bytes, mine: Group) -> int:
        """Workers of a group's on a node that do not wait."""
        inside = {one for one, groups in self.drivers.values() if groups and one is not None}
        waiting = sum(one.node == node and one.group == mine.name for one in inside)
        return max(mine.said.get(node, 0) - waiting, 0)

    def read(self, mail: Mail) -> None:
        for _, message in mail:
            if not isinstance(message, Placed):
                continue
            [mine] = [one for _, groups in self.drivers.values() for one in groups if one.name == message.group]
            placed = {member.node: member.workers for member in message.members}
            if message.epoch != mine.told_epoch:
                assert message.epoch > max(mine.epoch, mine.told_epoch)
                self.check(mine, placed)
                mine.told, mine.told_epoch = placed, message.epoch
            assert placed == mine.told

    def check(self, mine: Group, placed: dict[bytes, int]) -> None:
        """Nobody loses a worker, and each that is new went where most was free."""
        assert all(placed.get(node, 0) >= workers for node, workers in mine.said.items())
        if not mine.wanted:
            assert all(placed[node] >= max(int(cpus / mine.share), 1) for node, cpus in self.nodes.items())
            return
        assert sum(placed.values()) == mine.wanted
        cost = {}
        for node, cpus in self.nodes.items():
            new = placed.get(node, 0) - mine.said.get(node, 0)
            there = self.own(node, mine) + new
            cost[node] = new, self.busy(node, mine) + there * mine.share, cpus
        for new, taken, cpus in cost.values():
            if new:
                before = (taken - mine.share) / cpus
                assert all(before <= other / many + 1e-9 for _, other, many in cost.values())

    def say(self, driver: bytes) -> None:
        inside, groups = self.drivers[driver]
        for mine in groups:
            if mine.told_epoch <= mine.epoch:
                mine.told = mine.said
        state = DriverState(driver, next(self.names), "host", 1, VERSIONS, [one.state() for one in groups], inside)
        self.read(self.head.handle(driver, "driver", state, self.now))

    # -- what happens

    @rule(cpus=st.integers(1, 4))
    def node_joins(self, cpus: int) -> None:
        node = self.name()
        self.nodes[node] = cpus
        self.node_says(node, cpus)

    def node_says(self, node: bytes, cpus: int) -> None:
        state = NodeState(node, next(self.names), "host", ["tcp://host:1"], cpus, VERSIONS)
        self.read(self.head.handle(node, "agent", state, self.now))

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def node_leaves(self, data: Any) -> None:
        node = data.draw(st.sampled_from(list(self.nodes)))
        del self.nodes[node]
        self.read(self.head.handle(node, "agent", Leaving(node), self.now))

    @precondition(lambda self: len(self.drivers) < 6)
    @rule(data=st.data(), pid=st.integers(1, 2))
    def driver_joins(self, data: Any, pid: int) -> None:
        workers = [(node, one.name) for _, groups in self.drivers.values() for one in groups for node in one.told]
        inside = data.draw(st.sampled_from([*workers, None, (self.name(), self.name())]))
        driver = self.name()
        self.drivers[driver] = (Inside(inside[0], inside[1], pid) if inside is not None else None, [])
        self.say(driver)

    @precondition(lambda self: self.drivers)
    @rule(data=st.data(), wanted=st.integers(0, 5), share=st.sampled_from([1.0, 1.0, 0.5, 2.0]))
    def group_opens(self, data: Any, wanted: int, share: float) -> None:
        driver = data.draw(st.sampled_from(list(self.drivers)))
        if len(self.drivers[driver][1]) < 2:
            self.drivers[driver][1].append(Group(self.name(), wanted, share))
            self.say(driver)

    @precondition(lambda self: any(groups for _, groups in self.drivers.values()))
    @rule(data=st.data())
    def group_closes(self, data: Any) -> None:
        driver = data.draw(st.sampled_from([id for id, (_, groups) in self.drivers.items() if groups]))
        groups = self.drivers[driver][1]
        groups.remove(data.draw(st.sampled_from(groups)))
        self.say(driver)

    @precondition(lambda self: self.drivers)
    @rule(data=st.data(), without_the_gone=st.booleans())
    def driver_follows(self, data: Any, without_the_gone: bool) -> None:
        driver = data.draw(st.sampled_from(list(self.drivers)))
        for mine in self.drivers[driver][1]:
            if mine.told_epoch > mine.epoch:
                mine.epoch, mine.said = mine.told_epoch, dict(mine.told)
            if without_the_gone:
                mine.said = {node: workers for node, workers in mine.said.items() if node in self.nodes}
        self.say(driver)

    @precondition(lambda self: self.drivers)
    @rule(data=st.data(), orderly=st.booleans())
    def driver_ends(self, data: Any, orderly: bool) -> None:
        driver = data.draw(st.sampled_from(list(self.drivers)))
        del self.drivers[driver]
        if orderly:
            self.read(self.head.handle(driver, "driver", Leaving(driver), self.now))
        else:
            self.head.ended(driver, self.now)
            self.now += 1.0
            self.read(self.head.tick(self.now))
            assert driver not in self.head.drivers
            for node, cpus in self.nodes.items():
                self.node_says(node, cpus)
            for other in self.drivers:
                self.say(other)

    @invariant()
    def books_agree(self) -> None:
        self.head.validate()

    @invariant()
    def every_group_has_what_it_wants(self) -> None:
        """However many CPUs are taken."""
        for _, groups in self.drivers.values():
            for mine in groups:
                if self.nodes and mine.wanted:
                    assert sum(mine.told.values()) >= mine.wanted or set(mine.told) - set(self.nodes)


Placements.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPlacements = Placements.TestCase
