"""Owns the arithmetic of a result (medians, ratios, verdicts) and the table.

It never runs anything: the same result always gives the same table. Called by __main__.py and picture.py.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from benchmarks.registry import Bar, Case, Metric
from benchmarks.runner import CaseResult, Outcome


@dataclass(frozen=True, slots=True)
class Verdict:
    """A bar, and how dpool stands to it. `measured` is None when either side has nothing to show."""

    case: str
    bar: Bar
    measured: float | None

    @property
    def word(self) -> str:
        if self.measured is None:
            return "no figure"
        return "PASS" if self.measured <= self.bar.limit else "MISS"


def find(result: CaseResult, target: str) -> Outcome | None:
    return next((o for o in result.outcomes if o.target == target), None)


def figures(outcome: Outcome | None, metric: str) -> dict[int, float]:
    if outcome is None:
        return {}
    return {number: sample[metric] for number, sample in outcome.samples.items() if metric in sample}


def median(outcome: Outcome | None, metric: str) -> float | None:
    values = figures(outcome, metric).values()
    return statistics.median(values) if values else None


def ratio(result: CaseResult, metric: str, target: str, against: str) -> float | None:
    """The median over the rounds of target's figure to against's in the same round.

    Pairs of one round were taken within minutes of each other; a machine that drifts moves both.
    """
    ours, theirs = figures(find(result, target), metric), figures(find(result, against), metric)
    pairs = [ours[number] / theirs[number] for number in ours if theirs.get(number)]
    return statistics.median(pairs) if pairs else None


def verdicts(case: Case, result: CaseResult) -> list[Verdict]:
    found = []
    for bar in case.bars:
        if bar.against:
            measured = ratio(result, bar.metric, "dpool", bar.against)
        else:
            measured = median(find(result, "dpool"), bar.metric)
        found.append(Verdict(case.name, bar, measured))
    return found


def number(value: float) -> str:
    """Three digits that mean something."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"


def bar_words(verdict: Verdict, metric: Metric) -> str:
    bar = verdict.bar
    if bar.against:
        measured = "" if verdict.measured is None else f"{number(verdict.measured)} of {bar.against}; "
        return f"{measured}bar {bar.limit:g} of {bar.against}: {verdict.word}"
    return f"bar {bar.limit:g} {metric.unit}: {verdict.word}"


def case_lines(case: Case, result: CaseResult) -> list[str]:
    """One case as text."""
    lines = [f"{case.name}: {case.title}"]
    found = verdicts(case, result)
    for metric in case.metrics:
        if len(case.metrics) > 1:
            lines.append(f"  {metric.title}")
        for outcome in result.outcomes:
            values = list(figures(outcome, metric.name).values())
            if not values:
                if metric is case.metrics[0]:
                    lines.append(f"  {outcome.target:<16}{outcome.state}: {outcome.why}")
                continue
            spread = f"{number(min(values))} to {number(max(values))}" if len(values) > 1 else ""
            line = f"  {outcome.target:<16}{number(statistics.median(values)):>9} {metric.unit:<6}{spread:<18}"
            times = ratio(result, metric.name, outcome.target, case.reference) if metric.ratio else None
            if outcome.target != "dpool":
                if times is not None and outcome.target != case.reference:
                    line += f"{number(times)} of {case.reference}"
            else:
                words = [bar_words(v, metric) for v in found if v.bar.metric == metric.name]
                if not words and times is not None:
                    words = [f"{number(times)} of {case.reference}; no bar"]
                line += " | ".join(words)
            if outcome.failures:
                line += f"  (failed {outcome.failures} of {outcome.failures + len(values)}: {outcome.why})"
            lines.append(line.rstrip())
    return lines


def summary_lines(cases: dict[str, Case], results: list[CaseResult]) -> list[str]:
    """The verdicts of all bars, the missed ones by name."""
    found = [v for r in results if r.case in cases for v in verdicts(cases[r.case], r)]
    counts = {word: sum(v.word == word for v in found) for word in ("PASS", "MISS", "no figure")}
    lines = [f"{counts['PASS']} bars passed, {counts['MISS']} missed, {counts['no figure']} without a figure"]
    for v in found:
        if v.word == "MISS" and v.measured is not None:
            against = f" of {v.bar.against}" if v.bar.against else ""
            lines.append(f"  missed: {v.case} {v.bar.metric}: {number(v.measured)}{against}, bar {v.bar.limit:g}")
    return lines
