"""The pytest entry of joblib's own tests: all of them against dpool, and the control against loky, joblib's own.

Judges nothing itself: see joblib_suite. Tests of dpool's own are in tests/test_joblib.py. Called by pytest, in CI too.

The control runs over every eighth test, or over all if DPOOL_COMPAT_FULL is set.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("joblib.test.test_parallel")

from compat_tests.joblib_suite import __main__ as suite  # noqa: E402
from compat_tests.joblib_suite import expected  # noqa: E402

JOBS = (os.cpu_count() or 1) + 1


def _failed(judged: list[suite.Judged]) -> str:
    return "\n\n".join(f"{test.test}\n{test.detail}" for test in judged if test.verdict == "failed")


def test_dpool_passes_joblibs_own_tests() -> None:
    judged = suite.run("dpool", [], JOBS)
    assert not _failed(judged), _failed(judged)
    assert len([test for test in judged if test.verdict == "passed"]) > 256  # what loky passes of joblib 1.4
    names = {test.test.partition("::")[2] for test in judged}
    assert {name for name, _ in expected.DIFFERENCES} <= names


def test_loky_passes_them_unmodified() -> None:
    judged = suite.run("loky", [], JOBS, every=1 if os.environ.get("DPOOL_COMPAT_FULL") else 8)
    assert not _failed(judged), _failed(judged)
    assert len([test for test in judged if test.verdict == "passed"]) > 30


def test_a_backend_that_cannot_run_anything_passes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: what is rewritten runs on the target, and on nothing else."""
    monkeypatch.setenv("DPOOL_ADDRESS", "no address at all")
    judged = suite.run("dpool", ["test_error_capture[dpool]", "test_lambda_expression"], 1)
    assert {test.verdict for test in judged} == {"failed"}
