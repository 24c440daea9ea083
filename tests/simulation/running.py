"""Runs histories for whoever asks, with a mutant or without, and says what is to be said of one that fails.

Judges nothing itself. Used by tests/test_simulation.py and by `python -m tests.simulation`.
"""

from __future__ import annotations

from contextlib import nullcontext

from .clock import Violation
from .history import History
from .mutants import MUTANTS


def run(history: History, mutant: str | None = None) -> Violation | None:
    """Run a history, with the mutant of that name if one is named; what is wrong, if anything is."""
    with MUTANTS[mutant].apply() if mutant else nullcontext():
        try:
            history.run()
        except Violation as violation:
            return violation
    return None


def explain(history: History, violation: Violation, lines: int) -> str:
    """What went wrong, the end of what happened before, and how to see it again."""
    trace = "\n".join(f"  {when:10.4f}  {what}" for when, what in list(history.world.trace)[-lines:])
    return (f"seed {history.seed}, a {history.kind} history, at {history.world.now:.3f} s: {violation}\n{trace}\n"
            f"again: python -m tests.simulation --seeds 1 --start {history.seed} --trace")
