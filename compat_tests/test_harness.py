"""Tests of the harness itself: the stdlib passes everything, a target that cannot be constructed passes nothing.

Tests no dpool. Called by pytest, in CI too.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from compat_tests import child, expected, names, running
from compat_tests.interpreters import others
from compat_tests.interpreters import running as running_interpreter
from compat_tests.substitution import Programs, View
from compat_tests.targets import TARGETS


def _control(target: str, folder: Path) -> list[dict[str, Any]]:
    """Every test against a control, under one start method, in the interpreter with the most complete tests."""
    best = max([running_interpreter(), *others()], key=lambda interpreter: len(interpreter.families))
    path = folder / "report.json"
    command = [best.executable, "-m", "compat_tests", "--target", target, "--context", "fork", "--json", str(path)]
    subprocess.run(command, cwd=running.CHECKOUT, stdout=subprocess.DEVNULL)
    return list(json.loads(path.read_text())["tests"])


def test_the_stdlib_passes_everything(tmp_path: Path) -> None:
    """What fails is run once more, for the stdlib is not without races of its own: 3.13's executor holds its lock while
    it waits for the thread that feeds its queue, which needs that lock to tell of what cannot be pickled."""
    tests = _control("stdlib", tmp_path)
    assert len([test for test in tests if test["verdict"] == "passed"]) > 60
    failed = _failed(tests)
    if failed:
        again = _failed(_control("stdlib", tmp_path))
        assert {name: detail for name, detail in again.items() if name in failed} == {}


def _failed(tests: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    return {(test["suite"], test["test"]): test["detail"] for test in tests
            if test["verdict"] not in ("passed", "skipped")}


def test_a_pool_that_cannot_be_constructed_passes_nothing(tmp_path: Path) -> None:
    tests = _control("broken", tmp_path)
    assert {test["test"] for test in tests if test["verdict"] != "failed"} <= {"test_max_workers_too_large"}
    assert len(tests) > 60


def test_a_test_that_hangs_fails_and_the_others_are_run() -> None:
    outcomes = _stand_in("Hangs", ("test_a", "test_bad", "test_c"), limit_s=2)
    assert {test: o.outcome for test, o in outcomes.items()} == {
        "test_a": "passed",
        "test_bad": "failed",
        "test_c": "passed",
    }
    assert "nothing happened for 2 s" in outcomes["test_bad"].detail
    assert "in test_bad" in outcomes["test_bad"].detail  # the stack where it hung


def test_a_test_that_kills_the_process_fails_and_the_others_are_run() -> None:
    outcomes = _stand_in("Dies", ("test_a", "test_bad", "test_c"))
    assert {test: o.outcome for test, o in outcomes.items()} == {
        "test_a": "passed",
        "test_bad": "failed",
        "test_c": "passed",
    }
    assert "ended with -9" in outcomes["test_bad"].detail


def test_a_left_over_process_in_a_session_of_its_own_is_a_failure_and_is_killed() -> None:
    outcomes = _stand_in("LeavesAProcess", ("test_bad",))
    assert outcomes["test_bad"].outcome == "passed"
    left_over = outcomes[child.AROUND].detail
    assert "left-over-of-test_harness" in left_over
    for line in left_over.splitlines()[1:]:
        assert not _is_alive(line.split(":")[0])


def test_a_program_gets_its_imports_rewritten_and_one_without_is_an_error() -> None:
    programs = Programs(TARGETS["broken"])
    text = programs.rewrite("if 1:\n    from multiprocessing import Pool\n    import multiprocessing.spawn\n")
    assert "; from compat_tests.broken import Pool\n" in text
    assert "import multiprocessing.spawn\n" in text
    with pytest.raises(AssertionError, match="no import of a pool"):
        programs.rewrite("print()")


def test_a_view_replaces_names_for_its_holder_only() -> None:
    view = View(os, getcwd=lambda: "elsewhere")
    assert view.getcwd() == "elsewhere" != os.getcwd()
    assert view.path is os.path
    view.a_new_name = 1
    assert os.__dict__.pop("a_new_name") == 1


def test_every_white_box_test_and_every_difference_is_a_known_test() -> None:
    known = {f"{suite}.{test}" for suite, tests in names.KNOWN.items() for test in tests}
    assert set(names.WHITE_BOX) <= known
    for difference in expected.DIFFERENCES:
        assert difference.reason
        assert any(difference.applies(test, context, (3, minor), difference.engine)
                   for test in known for context in ("fork", "spawn") for minor in range(11, 16))


def _stand_in(name: str, tests: tuple[str, ...], limit_s: float = 30) -> dict[str, running.Outcome]:
    done = running.run(running.Suite("harness", name, "fork", tests), "stdlib", limit_s)
    return {outcome.test: outcome for outcome in done.outcomes}


def _is_alive(pid: str) -> bool:
    """False for a zombie too: its parent is gone, and nobody may be there to reap it."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
