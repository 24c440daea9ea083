"""Owns the histories of what is lent: a driver, nodes and processes that call; links are cut, processes and nodes lost.

A history is steps that a seed has chosen, in lending_world.py, which says what is wrong. Single cases are in
test_things.py.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from random import Random, SystemRandom
from typing import Any
from unittest import mock

import pytest
from lending_world import COUNTER, LARGE, LOCK, READ, READERS, SMALL, WRITE, WRITERS, Process, World

from dpool.cluster.driver.lending import Lending
from dpool.cluster.driver.things import Connection, Relay
from dpool.cluster.node import calls as calls_module
from dpool.cluster.node.calls import Calls
from dpool.cluster.wire import lent, messages, sessions

# Histories that nobody has seen, each time.
FRESH = 400
# Within so many each mutant must be caught.
CAUGHT_WITHIN = 2000


class History:
    """Steps that a seed has chosen, each as often as its weight says."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.world = World()
        steps: dict[Callable[[], None], float] = {
            self.acquire: 6, self.use: 6, self.read_answer: 5, self.hang_up: 1, self.program_locks: 2,
            self.program_goes_on: 5, self.node_reads: 6, self.go_up: 6, self.go_down: 6, self.node_sees: 2,
            self.turn: 4, self.world.threads.run: 1, self.world.go_on: 2, self.cut: 0.7, self.resume: 2,
            self.kill: 0.7, self.kill_parent: 0.1, self.lose: 0.15, self.end_lost: 0.3}
        self.steps, self.weights = list(steps), list(steps.values())

    def run(self) -> None:
        try:
            for _ in range(self.random.choice([20, 60, 150])):
                self.random.choices(self.steps, self.weights)[0]()
                self.world.look()
            self.world.settle()
            self.world.check()
        finally:
            self.world.close()

    def _any(self, among: Iterable[Any]) -> Any:
        found = list(among)
        return self.random.choice(found) if found else None

    # -- what processes do

    def acquire(self) -> None:
        if (process := self._any(one for one in self.world.callers if one.call is None and not +one.holds)) is not None:
            process.begin(lent.ACQUIRE, self.random.choice([LOCK, LOCK, READERS, WRITERS, WRITERS, COUNTER]),
                          self.random.choice([lent.FOR_EVER, lent.FOR_EVER, lent.FOR_EVER, 1.0, 0.0]))

    def use(self) -> None:
        """What it has, or give it back."""
        process = self._any(one for one in self.world.callers if one.call is None and +one.holds)
        if process is None:
            return
        [what] = +process.holds
        if what not in (READERS, WRITERS) or self.random.random() < 0.5:
            process.begin(lent.RELEASE, what)
        elif what == WRITERS:
            process.begin(lent.SEND, WRITE, lent.FOR_EVER, self.world.new_message(self._size()))
        elif self.random.random() < 0.3:
            process.begin(lent.POLL, READ, 1.0)
        else:
            process.begin(lent.RECEIVE, READ, lent.FOR_EVER)

    def _size(self) -> int:
        return self.random.choice([SMALL, LARGE])

    def read_answer(self) -> None:
        if (process := self._any(one for one in self.world.callers if one.call is not None)) is not None:
            process.finish()

    def hang_up(self) -> None:
        """Not in a message, which is spoilt for everybody then, as in the standard library."""
        process = self._any(one for one in self.world.callers if one.call is not None
                            and one.call[0] in (lent.ACQUIRE, lent.POLL, lent.RELEASE))
        if process is not None:
            process.hang_up()

    # -- what the program does

    def program_locks(self) -> None:
        program = self.world.program
        if program.holds and self.random.random() < 0.5:
            program.release(self._any(sorted(program.holds)))
        else:
            program.acquire(self.random.choice([LOCK, READERS, WRITERS, WRITERS, COUNTER]))

    def program_goes_on(self) -> None:
        program = self.world.program
        self.random.choice([lambda: program.write(self._size()), lambda: program.write(self._size()),
                            lambda: program.slip(self._size()), program.read, program.take])()

    # -- what is under way

    def node_reads(self) -> None:
        if (process := self._any(one for one in self.world.processes.values() if one.unread)) is not None:
            self.world.read_call(process)

    def go_up(self) -> None:
        if (node := self._any(one for one in self.world.nodes if one.up)) is not None:
            node.receive_up()

    def go_down(self) -> None:
        if (node := self._any(one for one in self.world.nodes if one.down)) is not None:
            node.receive_down()

    def node_sees(self) -> None:
        if (node := self._any(one for one in self.world.nodes if not one.closed)) is not None:
            node.see_ends()

    def turn(self) -> None:
        self.world.now += self.random.choice([0.0, 0.0, 2.0])
        self.world.turn()

    # -- faults

    def cut(self) -> None:
        self.random.choice(self.world.nodes).cut()

    def resume(self) -> None:
        if (node := self._any(one for one in self.world.nodes if not one.lost)) is not None:
            node.resume(self.random.choice([0, 0, 1, 3]))

    def kill(self) -> None:
        """Most of them in the midst of a call."""
        among = [one for one in self.world.callers if not self._receives_from_above(one)]
        calling = [one for one in among if one.call is not None and self.random.random() < 0.7]
        if (process := self._any(calling or among)) is not None:
            process.kill(is_zombie=self.random.random() < 0.7)

    @staticmethod
    def _receives_from_above(process: Process) -> bool:
        """Who dies so may leave half a message in the pipe: the driver that reads it does not know that somebody has
        died, and is told to release the lock."""
        return process.node.parent is not None and process.call is not None and process.call[0] == lent.RECEIVE

    def kill_parent(self) -> None:
        if self.world.parent.takes_part:
            self.world.parent.kill()

    def lose(self) -> None:
        node = self.random.choice(self.world.nodes)
        if not any(map(self._receives_from_above, node.processes)):
            self.world.lose(node)

    def end_lost(self) -> None:
        """Nodes that were given up learn of it."""
        for node in self.world.nodes:
            if node.lost:
                node.close()


def histories(seeds: Iterable[int]) -> None:
    for seed in seeds:
        try:
            History(seed).run()
        except BaseException as error:
            raise AssertionError(f"history {seed}: {error!r}") from error


def test_histories() -> None:
    """Nobody has a lock twice, nothing is held by who is gone, each message comes whole and once, every call is
    answered once, and no book has anything left in it. To see one again: histories([seed])."""
    gc.collect()  # what other tests have left
    before = len(os.listdir("/proc/self/fd"))
    first = SystemRandom().randrange(1 << 32)
    histories(range(first, first + FRESH))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


_end, _meet, _call = Lending._end, Calls._meet, Lending.call


def _ends_at_once(self: Lending, caller: tuple[bytes, int]) -> None:
    _end(self, caller)
    for token in [token for token, holder in self._holders.items() if holder == caller]:
        self._release_of_the_dead(token)


def _meets_the_dead(self: Calls, process: int) -> bool:
    with mock.patch.object(calls_module, "_is_readable", lambda _: False):
        return _meet(self, process)


def _forgets_no_holder(self: Lending, session: bytes, call: messages.Call) -> None:
    holder = self._holders.get(call.token)
    _call(self, session, call)
    if holder is not None and isinstance(self._things.get(call.token), Relay):
        self._holders[call.token] = holder


def _accepts_all(self: sessions.Session, kind: int, number: int, acknowledged: int) -> bool:
    self.acknowledged(acknowledged)
    self.received = max(self.received, number)
    return True


# Bugs, each of which histories must notice: what is replaced, and by what.
MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "what was got for nobody is not given back": (Lending, "_undo", lambda *_: None),
    "a node that is lost keeps what it has": (Lending, "lost", lambda *_: None),
    "who has ended keeps what it has": (Lending, "ended", lambda *_: None),
    "what reaches nobody is not sent back": (lent, "TAKING", ()),
    "a message that is read by half is left to the next reader": (Connection, "is_in_message", False),
    "half a message does not hold the lock": (Lending, "_end", _ends_at_once),
    "a process that has ended may still call": (Calls, "_meet", _meets_the_dead),
    "a release is known to be done by its answer": (Lending, "call", _forgets_no_holder),
    "what comes again is done again": (sessions.Session, "accept", _accepts_all),
    "nothing is sent again": (sessions.Session, "resume", lambda *_: []),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: str) -> None:
    with mock.patch.object(*MUTANTS[mutant]), pytest.raises(AssertionError, match="history"):
        histories(range(CAUGHT_WITHIN))
