"""The pytest entry: every known suite, under every start method, on the interpreters of this machine, against dpool.

Judges nothing itself: it starts `python -m compat_tests` once for each interpreter, over the selected tests only, and
reads what that wrote. Called by pytest, in CI too.

The running interpreter runs everything. So does another one with the families that no one before it has; what else
it has runs under one start method, or under all if DPOOL_COMPAT_FULL is set.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from compat_tests import names
from compat_tests.interpreters import Interpreter, Unusable, others, prepared, running
from compat_tests.running import CHECKOUT
from compat_tests.suites import CONTEXTS

ONE_CONTEXT = "spawn"  # the strictest: a worker knows only what was sent to it

Row = tuple[Interpreter, str, str]


def _rows() -> list[Row]:
    rows: list[Row] = []
    covered: set[str] = set()
    for interpreter in [running(), *others()]:
        for suite, context in names.rows():
            family = suite.split("/")[0]
            contexts = CONTEXTS if family not in covered or os.environ.get("DPOOL_COMPAT_FULL") else (ONE_CONTEXT,)
            # The running one gets a row for what it lacks, too: it will be skipped with a hint.
            if context in contexts and (family in interpreter.families or interpreter == running()):
                rows.append((interpreter, suite, context))
        covered.update(interpreter.families)
    return rows


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> "Report":
    """The outcomes of all selected rows; an interpreter is started when its first row is asked for."""
    params = [getattr(item, "callspec", None) for item in request.session.items]
    rows = [param.params["row"] for param in params if param and "row" in param.params]
    return Report(rows, tmp_path_factory.mktemp("compat"))


class Report:
    """Runs each interpreter once, over all its selected rows, several suites at a time."""

    def __init__(self, rows: list[Row], folder: Path) -> None:
        self._rows = rows
        self._folder = folder
        self._reports: dict[Interpreter, dict[str, Any]] = {}

    def of(self, interpreter: Interpreter) -> dict[str, Any]:
        """What `python -m compat_tests --json` wrote for this interpreter."""
        if interpreter not in self._reports:
            path = self._folder / f"{interpreter}.json"
            only = [f"--only={suite}/{context}" for owner, suite, context in self._rows if owner == interpreter]
            engine = os.environ.get("DPOOL_COMPAT_ENGINE", "embedded")
            command = [prepared(interpreter), "-m", "compat_tests", "--engine", engine, "--json", str(path), *only]
            done = subprocess.run(command, cwd=CHECKOUT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            print(done.stdout)
            if path.exists():
                self._reports[interpreter] = json.loads(path.read_text())
            else:
                self._reports[interpreter] = {"missing": [], "tests": [], "output": done.stdout}
        return self._reports[interpreter]


@pytest.mark.parametrize("row", _rows(), ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}")
def test_cpython_suite(row: Row, report: Report) -> None:
    interpreter, suite, context = row
    family = suite.split("/")[0]
    if family not in interpreter.families:
        minor = f"{interpreter.version[0]}.{interpreter.version[1]}"
        pytest.skip(f"no {family} tests in this interpreter (Debian: apt install libpython{minor}-testsuite)")
    try:
        found = report.of(interpreter)
    except Unusable as reason:
        pytest.skip(str(reason))
    tests = [test for test in found["tests"] if (test["suite"], test["context"]) == (suite, context)]
    if not tests and not names.REQUIRED[suite]:
        pytest.skip("not in this release of CPython")
    assert tests, found.get("output", "the suite was not found")
    failed = [f"{test['test']}\n{test['detail']}" for test in tests if test["verdict"] == "failed"]
    assert not failed, "\n\n".join(failed)
    if all(test["verdict"] == "skipped" for test in tests):
        pytest.skip(tests[0]["detail"])
