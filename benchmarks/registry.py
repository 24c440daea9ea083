"""Owns the vocabulary of the benchmarks and the one table of cases: Metric, Bar, Case, and @case, which enters one.

It never runs or times anything. Filled by the files of cases/; read by runner.py, measure.py and report.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

Sample = dict[str, float]
"""What one run of a case in one fresh process gave: a figure for each metric it has."""

CaseFunction = Callable[[str, bool], Sample]
"""Takes the target's name and whether to be quick. Raises targets.NotHere or targets.CannotDo to be left out."""


@dataclass(frozen=True, slots=True)
class Bar:
    """What dpool has to show: `metric` of dpool at most `limit` times that of `against`.

    `against` is a target's name, or "" for `limit` itself as a plain figure in the metric's unit.
    """

    metric: str
    limit: float
    against: str = "stdlib"


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of a sample. Less is better in all of them."""

    name: str
    title: str
    unit: str
    # False for figures that say something by themselves and not in proportion (a growth of memory, a quotient).
    ratio: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is measured, the same for each target."""

    name: str
    title: str
    run: CaseFunction
    metrics: tuple[Metric, ...]
    bars: tuple[Bar, ...]
    targets: tuple[str, ...]
    reference: str
    # A target that takes longer than this in one process is stopped and reported so.
    limit_s: float = 120.0
    # At most so many rounds; None: as many as the run has.
    rounds: int | None = None

    @property
    def family(self) -> str:
        return self.name.partition(".")[0]


@dataclass(slots=True)
class Registry:
    """All cases, in the order in which they were declared."""

    cases: dict[str, Case] = field(default_factory=dict)

    def add(self, new: Case) -> None:
        if new.name in self.cases:
            raise ValueError(f"two cases are called {new.name!r}")
        known = {m.name for m in new.metrics}
        for bar in new.bars:
            if bar.metric not in known:
                raise ValueError(f"{new.name}: a bar names the metric {bar.metric!r}, which the case has not")
            if bar.against and bar.against not in new.targets:
                raise ValueError(f"{new.name}: a bar is against {bar.against!r}, which the case does not run")
        self.cases[new.name] = new


REGISTRY = Registry()


def case(
    name: str,
    title: str,
    *metrics: Metric,
    targets: tuple[str, ...],
    bars: tuple[Bar, ...] = (),
    reference: str = "stdlib",
    limit_s: float = 120.0,
    rounds: int | None = None,
) -> Callable[[CaseFunction], CaseFunction]:
    """Enter the decorated function as a case."""

    def enter(run: CaseFunction) -> CaseFunction:
        REGISTRY.add(Case(name, title, run, metrics, bars, targets, reference, limit_s, rounds))
        return run

    return enter


def load_cases() -> dict[str, Case]:
    """Import every file of cases/ and return what they declared."""
    package = importlib.import_module("benchmarks.cases")
    for file in package.FILES:
        importlib.import_module(f"benchmarks.cases.{file}")
    return REGISTRY.cases
