"""Owns the tests of the store's books: a model of who can see which segment, against what the ledger decides.

Pure: no memory, process or clock. Run by pytest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dpool.cluster.store.ledger import (
    LENT,
    MAX_WASTE,
    MIN_SEGMENT_BYTES,
    OBJECT,
    VIEWED,
    WARM,
    WARM_FOR_S,
    WRITING,
    Ledger,
    size_class,
)
from dpool.errors import ObjectStoreFull

KB64 = 64 * 1024
SIZES = st.sampled_from([1, KB64, KB64 + 1, 3 * KB64, 5 * KB64, 8 * KB64, 11 * KB64])
WORKERS = ("one", "two")


class Object:
    """What the model knows of an object: its handles, who has it mapped, who may have its descriptor."""

    def __init__(self, nbytes: int, number: int) -> None:
        self.nbytes = nbytes
        self.number: int | None = number  # None: on disk
        self.refs = 1
        self.views = 0
        self.abroad = False


class Books(RuleBasedStateMachine):
    """The world as it is: which segments the kernel keeps, and who can see each. The ledger is told what happens and
    says what to do; it must never deal out what somebody sees, and never keep what nobody needs."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.names = itertools.count(1)

    @initialize(limit=st.integers(8, 40), warm=st.integers(0, 20))
    def open(self, limit: int, warm: int) -> None:
        self.ledger = Ledger(limit * KB64, warm * KB64)
        self.size: dict[int, int] = {}  # every segment that is on the books
        self.eyes: dict[int, set[str]] = {}  # who looks at it, but for this process's writing
        self.objects: dict[bytes, Object] = {}
        self.batches: dict[str, list[int]] = {}  # what a batch in flight was sent
        self.kept: dict[str, list[int]] = {worker: [] for worker in WORKERS}  # what its tasks hold on to
        self.results: list[int] = []  # segments of results that this process looks at
        self.warm: dict[int, float] = {}  # since when

    # -- what the ledger says is done

    def dealt(self, number: int) -> None:
        """A segment is to be written: nobody may see it."""
        assert not self.eyes[number], f"segment {number} is dealt out while {self.eyes[number]} can see it"

    def gone(self, number: int) -> None:
        del self.size[number], self.eyes[number]
        self.warm.pop(number, None)

    def retired(self, number: int, kept: bool) -> None:
        assert not self.eyes[number]
        size = self.size[number]
        counted = sum(self.size.values()) - sum(self.size[other] for other in self.viewed())
        fits = sum(self.size[other] for other in self.warm) + size <= self.ledger.warm_limit
        assert kept == (fits and counted <= self.ledger.limit)
        if kept:
            self.warm[number] = self.now
        else:
            self.gone(number)

    def room(self, nbytes: int) -> int | None:
        """Reserve, and do what that says; None if there is no room, which must be true then."""
        counted = sum(self.size.values()) - sum(self.size[number] for number in self.viewed())
        free = sum(self.size[number] for number in self.warm)
        idle = {key: entry for key, entry in self.objects.items() if entry.number is not None and not entry.views}
        spillable = sum(self.size[entry.number] for entry in idle.values() if entry.number is not None)
        fits = [n for n in self.warm if nbytes <= self.size[n] <= size_class(nbytes) * MAX_WASTE]
        before = repr(self.ledger.__dict__)
        try:
            plan = self.ledger.reserve(nbytes, self.now)
        except ObjectStoreFull as full:
            assert not fits
            assert counted - free - spillable + size_class(nbytes) > self.ledger.limit, "there was room"
            assert repr(self.ledger.__dict__) == before, "the books were changed"
            assert (full.needed, full.held, full.limit) == (nbytes, counted, self.ledger.limit)
            return None
        if plan.reuse:
            assert plan.number in fits and not plan.trim and not plan.spill
            del self.warm[plan.number]
            self.dealt(plan.number)
            return plan.number
        assert not fits, "a warm segment would have done"
        for number in plan.trim:
            assert number in self.warm
            self.gone(number)
        ages = [self.ledger.entries[key].used for key in plan.spill]
        left = [self.ledger.entries[key].used for key in idle if key not in plan.spill]
        assert not ages or not left or max(ages) <= min(left), "not the least recently used"
        for key in plan.spill:
            assert key in idle, "an object that somebody looks at"
            self.gone(self.ledger.spilled(key))
            self.objects[key].number = None
        assert plan.number not in self.size
        self.size[plan.number], self.eyes[plan.number] = plan.size, set()
        assert plan.size >= nbytes
        assert sum(self.size.values()) - sum(self.size[n] for n in self.viewed()) <= self.ledger.limit
        return plan.number

    def viewed(self) -> list[int]:
        return self.results + [number for kept in self.kept.values() for number in kept]

    def unlook(self, number: int, who: str) -> None:
        self.eyes[number].discard(who)

    # -- objects

    @rule(nbytes=SIZES)
    def put(self, nbytes: int) -> None:
        self.now += 1
        number = self.room(nbytes)
        if number is not None:
            key = next(self.names).to_bytes(16, "little")
            self.ledger.put(key, number, nbytes, self.now)
            self.objects[key] = Object(nbytes, number)

    @rule(nbytes=SIZES)
    def write_fails(self, nbytes: int) -> None:
        number = self.room(nbytes)
        if number is not None:
            self.ledger.discard(number)
            self.gone(number)

    @precondition(lambda self: self.objects)
    @rule(data=st.data())
    def ref(self, data: st.DataObject) -> None:
        self.objects[data.draw(st.sampled_from(sorted(self.objects)))].refs += 1

    @precondition(lambda self: self.objects)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.objects)))
        entry = self.objects[key]
        entry.refs -= 1
        if entry.refs:
            return
        del self.objects[key]
        number, kept = self.ledger.free(key, self.now)
        assert number == entry.number
        if number is None:
            return
        seen = bool(entry.views or entry.abroad)
        if seen:
            assert not kept, "kept for use while somebody may see it"
            self.gone(number)
        else:
            self.retired(number, kept)

    @precondition(lambda self: self.objects)
    @rule(data=st.data())
    def open_view(self, data: st.DataObject) -> None:
        self.now += 1
        key = data.draw(st.sampled_from(sorted(self.objects)))
        if self.present(key):
            self.objects[key].views += 1
            self.ledger.view(key, 1, self.now)

    @precondition(lambda self: any(entry.views for entry in self.objects.values()))
    @rule(data=st.data())
    def view_dies(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(key for key, entry in self.objects.items() if entry.views)))
        self.objects[key].views -= 1
        self.ledger.view(key, -1, self.now)

    @rule(key=st.binary(min_size=3, max_size=3))
    def view_of_what_is_freed_dies(self, key: bytes) -> None:
        self.ledger.view(key, -1, self.now)

    @precondition(lambda self: self.objects)
    @rule(data=st.data())
    def task_takes(self, data: st.DataObject) -> None:
        self.now += 1
        key = data.draw(st.sampled_from(sorted(self.objects)))
        if self.present(key):
            self.ledger.share(key, self.now)
            self.objects[key].abroad = True

    @rule()
    def fork(self) -> None:
        self.ledger.forked()
        for entry in self.objects.values():
            entry.abroad = True

    def present(self, key: bytes) -> bool:
        """Bring an object back from disk; whether there was room."""
        entry = self.objects[key]
        if entry.number is None:
            number = self.room(entry.nbytes)
            if number is None:
                return False
            self.ledger.restored(key, number, self.now)
            entry.number, entry.views = number, 0
            entry.abroad = False  # those who had it have the segment of before
        return True

    # -- what travels with batches

    @rule(nbytes=SIZES, worker=st.sampled_from(WORKERS))
    def send(self, nbytes: int, worker: str) -> None:
        self.now += 1
        number = self.room(nbytes)
        if number is not None:
            self.lent(number, worker)
            self.ledger.lend(number, self.batch)

    @rule(nbytes=SIZES, worker=st.sampled_from(WORKERS))
    def send_spare(self, nbytes: int, worker: str) -> None:
        number = self.ledger.spare(nbytes, f"batch {next(self.names)}")
        fits = [n for n in self.warm if nbytes <= self.size[n] <= size_class(nbytes) * MAX_WASTE]
        assert (number is None) == (not fits)
        if number is not None:
            del self.warm[number]
            self.dealt(number)
            batch = str(self.ledger.segments[number].holder)
            self.batches[batch] = [number]
            self.eyes[number].add(worker)
            self.workers[batch] = worker

    @initialize()
    def no_workers(self) -> None:
        self.workers: dict[str, str] = {}

    def lent(self, number: int, worker: str) -> None:
        self.batch = f"batch {next(self.names)}"
        self.batches[self.batch] = [number]
        self.workers[self.batch] = worker
        self.eyes[number].add(worker)

    def end_of(self, data: st.DataObject) -> tuple[str, str, list[int]]:
        batch = data.draw(st.sampled_from(sorted(self.batches)))
        numbers = self.batches.pop(batch)
        assert sorted(self.ledger.lent_to(batch)) == sorted(numbers)
        return batch, self.workers.pop(batch), numbers

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), keeps=st.booleans())
    def done(self, data: st.DataObject, keeps: bool) -> None:
        """A batch has ended. The worker holds on to what it got, or says that it does not."""
        batch, worker, numbers = self.end_of(data)
        self.ledger.pass_on(batch, worker)
        self.kept[worker] += numbers
        if not keeps:
            for number in numbers:
                self.let_go(worker, number)

    @precondition(lambda self: any(self.kept.values()))
    @rule(data=st.data())
    def worker_lets_go(self, data: st.DataObject) -> None:
        worker, number = data.draw(st.sampled_from([(w, n) for w, kept in self.kept.items() for n in kept]))
        self.let_go(worker, number)

    def let_go(self, worker: str, number: int) -> None:
        self.kept[worker].remove(number)
        self.unlook(number, worker)
        self.retired(number, self.ledger.retire(number, self.now))

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def comes_back_as_a_result(self, data: st.DataObject) -> None:
        _, worker, (number,) = self.end_of(data)
        self.ledger.arrived(number)
        self.unlook(number, worker)
        self.eyes[number].add("me")
        self.results.append(number)

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def unsent(self, data: st.DataObject) -> None:
        batch, worker, numbers = self.end_of(data)
        for number in self.ledger.lent_to(batch) or numbers:
            self.unlook(number, worker)
            self.retired(number, self.ledger.retire(number, self.now))

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def lost(self, data: st.DataObject) -> None:
        _, _, numbers = self.end_of(data)
        for number in numbers:
            self.ledger.discard(number)
            self.gone(number)

    @rule(worker=st.sampled_from(WORKERS))
    def worker_dies(self, worker: str) -> None:
        assert sorted(self.ledger.lent_to(worker)) == sorted(self.kept[worker])
        for number in self.ledger.lent_to(worker):
            self.ledger.discard(number)
            self.gone(number)
        self.kept[worker].clear()

    # -- results

    @rule(nbytes=SIZES)
    def adopt(self, nbytes: int) -> None:
        number = self.ledger.adopt(nbytes, self.now)
        self.size[number], self.eyes[number] = nbytes, {"me"}
        self.results.append(number)

    @precondition(lambda self: self.results)
    @rule(data=st.data(), forked=st.booleans())
    def result_dies(self, data: st.DataObject, forked: bool) -> None:
        number = data.draw(st.sampled_from(self.results))
        self.results.remove(number)
        if forked:  # a child may still see it
            self.ledger.discard(number)
            self.gone(number)
        else:
            self.unlook(number, "me")
            self.retired(number, self.ledger.retire(number, self.now))

    # -- time

    @rule(seconds=st.sampled_from([1.0, WARM_FOR_S / 2, WARM_FOR_S, 100.0]))
    def cool(self, seconds: float) -> None:
        self.now += seconds
        cold = [number for number, since in self.warm.items() if self.now - since >= WARM_FOR_S]
        assert sorted(self.ledger.cool(self.now)) == sorted(cold)
        for number in cold:
            self.gone(number)

    # -- always

    @invariant()
    def totals_are_right(self) -> None:
        self.ledger.validate()
        assert self.ledger.total == sum(self.size.values())
        assert self.ledger.warm == sum(self.size[number] for number in self.warm) <= self.ledger.warm_limit
        assert self.ledger.viewed == sum(self.size[number] for number in self.viewed())

    @invariant()
    def nothing_is_kept_that_nobody_needs(self) -> None:
        of_objects = [entry.number for entry in self.objects.values() if entry.number is not None]
        in_flight = [number for numbers in self.batches.values() for number in numbers]
        needed = [*of_objects, *in_flight, *self.viewed(), *self.warm]
        assert len(set(needed)) == len(needed)
        assert set(self.ledger.segments) == set(needed) == set(self.size)
        assert set(self.ledger.entries) == set(self.objects)

    @invariant()
    def states_are_what_they_are(self) -> None:
        for key, entry in self.objects.items():
            books = self.ledger.entries[key]
            assert (books.segment, books.views, books.shared) == (entry.number, entry.views, entry.abroad)
        states = {number: segment.state for number, segment in self.ledger.segments.items()}
        assert {number for number, state in states.items() if state == WARM} == set(self.warm)
        assert {number for number, state in states.items() if state == VIEWED} == set(self.viewed())
        assert WRITING not in states.values()
        assert {number for number, state in states.items() if state == LENT} == \
            {number for numbers in self.batches.values() for number in numbers}
        assert {number for number, state in states.items() if state == OBJECT} == \
            {entry.number for entry in self.objects.values() if entry.number is not None}


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("nbytes", [0, 1, MIN_SEGMENT_BYTES, MIN_SEGMENT_BYTES + 1, 10**6, 2**26 - 1, 2**26, 2**26 + 1])
def test_a_size_class_holds_what_it_is_for_and_wastes_little(nbytes: int) -> None:
    assert nbytes <= size_class(nbytes) <= max(nbytes * 1.26, MIN_SEGMENT_BYTES)
    assert size_class(size_class(nbytes)) == size_class(nbytes)
    assert size_class(nbytes) % 4096 == 0


def warm(*sizes: int) -> Ledger:
    """Books with these segments warm, in this order."""
    ledger = Ledger(1000 * KB64, 1000 * KB64)
    for size in sizes:
        number = ledger.adopt(size, 0.0)
        assert ledger.retire(number, float(number))
    return ledger


def test_the_smallest_warm_segment_that_serves_is_taken() -> None:
    ledger = warm(8 * KB64, 5 * KB64, 6 * KB64, 20 * KB64)
    assert ledger.reserve(5 * KB64 + 1, 9.0).number == 3
    assert ledger.reserve(5 * KB64, 9.0).number == 2
    assert ledger.reserve(KB64, 9.0).reuse is False  # all too large
    ledger.validate()


def test_a_segment_of_a_worker_is_taken_for_a_value_of_the_same_size() -> None:
    assert warm(5 * KB64 + 64).reserve(5 * KB64 + 64, 9.0).reuse  # though the size class is larger


@pytest.mark.parametrize("wrong", [
    lambda ledger: ledger.lend(1, "holder"),  # it is warm
    lambda ledger: ledger.arrived(1),
    lambda ledger: ledger.put(b"key", 1, 5, 0.0),
    lambda ledger: ledger.free(b"key", 0.0),
    lambda ledger: ledger.share(b"key", 0.0),
    lambda ledger: ledger.discard(7),
    lambda ledger: ledger.retire(7, 0.0),
])
def test_what_cannot_be_is_refused_and_changes_nothing(wrong: Callable[[Ledger], object]) -> None:
    ledger = warm(KB64)
    with pytest.raises((AssertionError, KeyError)):
        wrong(ledger)
    ledger.validate()
    assert (ledger.total, ledger.warm, ledger.viewed) == (KB64, KB64, 0)
