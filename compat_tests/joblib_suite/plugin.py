"""The pytest plugin inside one run: which tests it runs, its default backend, a limit for each test, and a report.

Judges nothing: it writes an event a line for __main__.py, which starts pytest with this plugin and with the choice, as
JSON, in the variable CHOICE.
"""

from __future__ import annotations

import faulthandler
import inspect
import json
import os
import re
import time
from typing import Any

import joblib.parallel
import pytest

from compat_tests.joblib_suite.substitution import PARTS

CHOICE = "DPOOL_COMPAT_JOBLIB"

# Parameters that name a backend, and the values that are of no concern here: joblib's other backends.
_PARAMETERS = ("backend", "parent_backend", "child_backend", "outer_backend", "inner_backend")
_OTHERS = {"loky", "multiprocessing", "threading", "sequential", "spawn", "back_compat_backend", "ThreadingBackend",
           "SequentialBackend", "MultiprocessingBackend", "LokyBackend", "SpawnContext"}
_MINE = {"dpool": {"dpool", "DpoolBackend"}, "loky": {"loky", "LokyBackend"}}

_choice: dict[str, Any] = json.loads(os.environ.get(CHOICE, "{}"))


def pytest_configure(config: Any) -> None:
    if _choice["target"] == "dpool":
        import dpool.joblib

        dpool.joblib.register(make_default=True)
        joblib.parallel.DEFAULT_PROCESS_BACKEND = dpool.joblib.NAME


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep this run's share of the tests that are about the target."""
    wanted = [item for item in items if _is_about_target(item)]
    done = set(_choice["done"])
    only = _choice["only"]
    mine = [item for item in wanted[_choice["share"]::_choice["shares"]]
            if item.nodeid not in done and (not only or any(part in item.nodeid for part in only))]
    config.hook.pytest_deselected(items=[item for item in items if item not in mine])
    items[:] = mine
    _report("collected", tests=[item.nodeid for item in mine])


def _is_about_target(item: Any) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    values = [value for name, value in parameters.items() if name in _PARAMETERS]
    names = {value if isinstance(value, str) or value is None else getattr(value, "__name__", type(value).__name__)
             for value in values}
    if values and names <= _OTHERS - _MINE[_choice["target"]]:
        return False
    if item.module.__name__ not in PARTS:
        return True
    return "factory" not in parameters and re.search(r"\bParallel\(", inspect.getsource(item.function)) is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: Any, nextitem: Any) -> Any:
    _report("start", test=item.nodeid)
    faulthandler.dump_traceback_later(_choice["limit_s"], exit=True)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


_started = 0.0
_failures: list[str] = []
_skipped = ""


def pytest_runtest_logreport(report: Any) -> None:
    global _started, _skipped
    if report.when == "setup":
        _started, _skipped = time.monotonic(), ""
        _failures.clear()
    if report.failed:
        _failures.append(report.longreprtext)
    elif report.skipped:
        _skipped = getattr(report, "wasxfail", "") or str(report.longrepr)
    if report.when == "teardown":
        outcome = "failed" if _failures else "skipped" if _skipped else "passed"
        _report("end", test=report.nodeid, outcome=outcome, detail="\n".join(_failures) or _skipped,
                seconds=time.monotonic() - _started)


def _report(event: str, **more: Any) -> None:
    with open(_choice["report"], "a") as file:
        file.write(json.dumps({"event": event, **more}) + "\n")


@pytest.fixture(autouse=True)
def _default_backend() -> Any:
    """Tests that change the default backend put it back; so do those that fail in between."""
    before = joblib.parallel.DEFAULT_BACKEND
    yield
    joblib.parallel.DEFAULT_BACKEND = before
