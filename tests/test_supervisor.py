"""The supervisor, driven directly: how many workers a group should have, whatever order they come and go in."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dpool.cluster.node.supervisor import MAX_FAILED_STARTS, Supervisor


def test_all_workers_are_wanted_at_once() -> None:
    supervisor = Supervisor(3, on_demand=False)
    assert supervisor.to_start() == [0, 1, 2]
    assert supervisor.to_start() == []


def test_on_demand_none_is_wanted_before_there_is_work() -> None:
    supervisor = Supervisor(3, on_demand=True)
    assert supervisor.to_start() == []
    supervisor.demand(queued=1, inflight=1)
    assert supervisor.to_start() == [0, 1]
    supervisor.demand(queued=100, inflight=0)
    assert supervisor.to_start() == [2]


def test_what_was_wanted_once_stays_wanted() -> None:
    supervisor = Supervisor(3, on_demand=True)
    supervisor.demand(2, 0)
    supervisor.to_start()
    supervisor.demand(0, 0)
    supervisor.ended(0, was_ready=True)
    assert supervisor.to_start() == [0]


def test_a_worker_that_ended_is_replaced_in_its_own_slot() -> None:
    supervisor = Supervisor(3, on_demand=False)
    supervisor.to_start()
    supervisor.ended(1, was_ready=True)
    assert supervisor.to_start() == [1]


def test_nothing_is_started_while_closing() -> None:
    supervisor = Supervisor(2, on_demand=False)
    supervisor.to_start()
    supervisor.closing = True
    supervisor.ended(0, was_ready=True)
    assert supervisor.to_start() == []


@pytest.mark.parametrize("rescue", [False, True])
def test_only_failures_in_a_row_are_hopeless(rescue: bool) -> None:
    supervisor = Supervisor(1, on_demand=False)
    for number in range(MAX_FAILED_STARTS):
        assert not supervisor.hopeless
        assert supervisor.to_start() == [0]
        supervisor.ended(0, was_ready=rescue and number == MAX_FAILED_STARTS // 2)
    assert supervisor.hopeless == (not rescue)


class Slots(RuleBasedStateMachine):
    """Any order of demands, starts and ends, beside a set of living slots."""

    @initialize(most=st.integers(1, 5), on_demand=st.booleans())
    def open(self, most: int, on_demand: bool) -> None:
        self.supervisor = Supervisor(most, on_demand)
        self.most = most
        self.wanted = 0 if on_demand else most
        self.living: set[int] = set()
        self.failed = 0

    @rule(queued=st.integers(0, 10), inflight=st.integers(0, 10))
    def demand(self, queued: int, inflight: int) -> None:
        self.supervisor.demand(queued, inflight)
        self.wanted = max(self.wanted, min(self.most, queued + inflight))

    @rule()
    def start(self) -> None:
        slots = self.supervisor.to_start()
        assert len(set(slots)) == len(slots) and not set(slots) & self.living
        self.living |= set(slots)
        if self.supervisor.closing:
            assert not slots
        else:
            assert len(self.living) == self.wanted

    @precondition(lambda self: self.living)
    @rule(data=st.data(), was_ready=st.booleans())
    def end(self, data: st.DataObject, was_ready: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.living)))
        self.supervisor.ended(slot, was_ready)
        self.living.discard(slot)
        self.failed = 0 if was_ready else self.failed + 1

    @rule()
    def close(self) -> None:
        self.supervisor.closing = True

    @invariant()
    def books_agree(self) -> None:
        self.supervisor.validate()
        assert self.supervisor.living == self.living
        assert len(self.living) <= self.wanted <= self.most
        assert self.supervisor.hopeless == (self.failed >= MAX_FAILED_STARTS)


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
