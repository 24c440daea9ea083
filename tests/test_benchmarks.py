"""Owns the tests of the benchmarks' own machinery: that bars are judged rightly and that no target breaks a run.

It never asserts a time and never measures dpool. Run by pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import picture, processes, report, runner
from benchmarks.registry import Bar, Case, Metric, Registry, load_cases

ROOT = Path(__file__).resolve().parent.parent
SECONDS = Metric("s", "in all", "s")


def a_case(*bars: Bar, name: str = "pool.made_up") -> Case:
    return Case(name, "made up", lambda target, quick: {}, (SECONDS,), bars, ("dpool", "stdlib"), "stdlib")


def a_result(dpool: dict[int, float], stdlib: dict[int, float]) -> runner.CaseResult:
    outcomes = [
        runner.Outcome("dpool", {number: {"s": value} for number, value in dpool.items()}),
        runner.Outcome("stdlib", {number: {"s": value} for number, value in stdlib.items()}),
    ]
    return runner.CaseResult("pool.made_up", outcomes)


def test_a_ratio_pairs_figures_of_the_same_round() -> None:
    # The machine is ten times slower in round 1: medians of each side alone would say something else.
    result = a_result({0: 1.0, 1: 10.0, 2: 1.0}, {0: 2.0, 1: 20.0})
    assert report.ratio(result, "s", "dpool", "stdlib") == 0.5


@pytest.mark.parametrize(
    ("bar", "word"),
    [
        (Bar("s", 0.5), "PASS"),
        (Bar("s", 0.49), "MISS"),
        (Bar("s", 1.0, against=""), "PASS"),
        (Bar("s", 0.9, against=""), "MISS"),
    ],
)
def test_a_bar_is_passed_at_its_limit_and_missed_above_it(bar: Bar, word: str) -> None:
    assert [v.word for v in report.verdicts(a_case(bar), a_result({0: 1.0}, {0: 2.0}))] == [word]


def test_a_bar_without_figures_is_neither_passed_nor_missed() -> None:
    assert [v.word for v in report.verdicts(a_case(Bar("s", 1.0)), a_result({}, {0: 2.0}))] == ["no figure"]
    assert [v.word for v in report.verdicts(a_case(Bar("s", 1.0)), a_result({0: 1.0}, {1: 2.0}))] == ["no figure"]


def test_every_case_has_a_function_a_worker_can_import_and_a_reference_it_runs() -> None:
    for case in load_cases().values():
        assert case.reference in case.targets, case.name
        assert "dpool" in case.targets, case.name
        assert case.run.__module__.startswith("benchmarks.cases."), case.name


def test_a_bar_against_a_target_that_does_not_run_is_refused() -> None:
    with pytest.raises(ValueError, match="does not run"):
        Registry().add(a_case(Bar("s", 1.0, against="ray")))
    with pytest.raises(ValueError, match="has not"):
        Registry().add(a_case(Bar("ms", 1.0)))


def test_the_picture_is_well_formed_and_shows_dpool() -> None:
    case = a_case(Bar("s", 1.0), name="pool.made_up")
    run = {"about": {"date": "2026-01-01", "python": "3.11", "cpus": 2}, "rounds": 1, "quick": False}
    drawn = picture.draw({case.name: case}, [a_result({0: 1.0}, {0: 2.0})], run)
    root = ElementTree.fromstring(drawn)
    assert root.tag.endswith("svg")
    assert "2.00×" in drawn


def test_a_target_that_cannot_even_start_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"dpool": ("failed", None, "exit code -9", "Killed"), "stdlib": ("ok", {"s": 1.0}, "", "")}
    monkeypatch.setattr(runner, "run_once", lambda case, target, quick: said[target])
    result = runner.run_case(a_case(Bar("s", 1.0)), ["dpool", "stdlib"], rounds=3, quick=True)
    assert [(o.target, len(o.samples), o.failures) for o in result.outcomes] == [("dpool", 0, 3), ("stdlib", 3, 0)]
    assert "exit code -9" in "\n".join(report.case_lines(a_case(), result))


def test_a_target_that_hangs_is_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run_once(case: Case, target: str, quick: bool) -> tuple[str, None, str, str]:
        asked.append(target)
        return "too slow", None, "not done within 1 s", ""

    monkeypatch.setattr(runner, "run_once", run_once)
    runner.run_case(a_case(), ["dpool", "stdlib"], rounds=5, quick=True)
    assert sorted(asked) == ["dpool", "stdlib"]


def test_a_hanging_process_and_its_orphans_are_ended() -> None:
    # In a process of its own: the runner adopts and ends all descendants, and pytest has some that are not its.
    program = """
import subprocess, sys, time
from benchmarks.processes import adopt_orphans, descendants, end_descendants
import os
adopt_orphans()
nested = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], " \\
         "start_new_session=True)"
subprocess.run([sys.executable, "-c", nested], check=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
assert len(descendants(os.getpid())) == 2
assert end_descendants() == 2
assert descendants(os.getpid()) == []
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
    assert os.getpid() not in processes.descendants(os.getpid())


def test_a_real_case_runs_in_a_fresh_process(tmp_path: Path) -> None:
    # In a process of its own, for the same reason.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--peers", "stdlib", "--cases", "start.fork"]
        + ["--json", str(tmp_path / "run.json"), "--svg", str(tmp_path / "run.svg")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    run, (result,) = runner.read_run(tmp_path / "run.json")
    assert run["quick"] is True
    stdlib = report.find(result, "stdlib")
    assert stdlib is not None and stdlib.samples[0]["ms"] > 0
    ElementTree.parse(tmp_path / "run.svg")
