"""A pytest plugin for tests of a client of joblib's: dpool is the default backend, and only tests with n_jobs are run.

Called by ../test_sklearn.py, through pytest's -p.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import joblib.parallel
import pytest

import dpool.joblib

_SEVERAL_JOBS = re.compile(r"\bn_jobs\b")
# Tests that are meant to fail, with the reason. One that passes all the same fails the run.
DIFFERENCES = {
    "test_backend_respected": "counts calls in an instance of a backend: with dpool, each Parallel has one of its own",
}


def pytest_configure(config: Any) -> None:
    dpool.joblib.register(make_default=True)
    joblib.parallel.DEFAULT_PROCESS_BACKEND = dpool.joblib.NAME
    # What a test asks of loky, it asks of dpool.
    joblib.parallel.BACKENDS["loky"] = joblib.parallel.BACKENDS[dpool.joblib.NAME]


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    kept = [item for item in items if _SEVERAL_JOBS.search(inspect.getsource(item.function))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    for item in kept:
        if item.name in DIFFERENCES:
            item.add_marker(pytest.mark.xfail(reason=DIFFERENCES[item.name], strict=True))
    items[:] = kept
