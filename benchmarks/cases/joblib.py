"""Owns the cases of the joblib door, in proportion to loky, joblib's own backend.

Workers are warm in all of them: the first call is not counted, where a backend keeps its workers at all.
Loaded by the registry.
"""

from __future__ import annotations

import warnings
from typing import Any

from benchmarks import tasks
from benchmarks.clock import expect, seconds
from benchmarks.registry import Bar, Metric, Sample, case
from benchmarks.targets import JOBLIB, joblib_backend, module


@case(
    "joblib.tiny_call",
    "Parallel() of 4 no-ops, one call",
    Metric("ms", "a call", "ms"),
    targets=JOBLIB,
    reference="loky",
)
def tiny_call(target: str, quick: bool) -> Sample:
    delayed = module("joblib").delayed(tasks.noop)
    with joblib_backend(target) as parallel:
        expect([0, 1, 2, 3], parallel()(delayed(i) for i in range(4)))
        return {"ms": seconds(lambda: [parallel()(delayed(i) for i in range(4)) for _ in range(10)], quick) / 10 * 1e3}


@case(
    "joblib.many",
    "Parallel() of 10k no-ops",
    Metric("us", "a task", "µs"),
    targets=JOBLIB,
    reference="loky",
    bars=(Bar("us", 0.5, against="loky"),),
)
def many_tasks(target: str, quick: bool) -> Sample:
    count = 2_000 if quick else 10_000
    delayed = module("joblib").delayed(tasks.noop)
    with joblib_backend(target) as parallel:
        expect(list(range(100)), parallel()(delayed(i) for i in range(100)))
        return {"us": seconds(lambda: parallel()(delayed(i) for i in range(count)), quick) / count * 1e6}


@case(
    "joblib.array",
    "Parallel() of 32 tasks with one array of 64 MB",
    Metric("ms", "a call", "ms"),
    targets=JOBLIB,
    reference="loky",
)
def one_array(target: str, quick: bool) -> Sample:
    """A new array for each call, as a program has it that computes between its calls."""
    numpy = module("numpy")
    delayed = module("joblib").delayed(tasks.last_byte)
    size = (16 if quick else 64) * tasks.MEGABYTE
    with joblib_backend(target) as parallel:

        def call() -> Any:
            array = numpy.full(size, 7, dtype="u1")
            return parallel()(delayed(array) for _ in range(32))

        expect([7] * 32, call())
        return {"ms": seconds(call, quick) * 1e3}


@case(
    "joblib.grid_search",
    "GridSearchCV of 12 SVCs, 3 folds",
    Metric("s", "the fit", "s"),
    targets=("dpool", "loky", "multiprocessing"),
    reference="loky",
    bars=(Bar("s", 1.0, against="loky"),),
)
def grid_search(target: str, quick: bool) -> Sample:
    selection = module("sklearn.model_selection")
    digits = module("sklearn.datasets").load_digits()
    grid = {"C": [0.1, 1.0, 10.0] if quick else [0.1, 1.0, 10.0, 100.0], "gamma": [0.0001, 0.001, 0.01]}

    def fit() -> Any:
        search = selection.GridSearchCV(module("sklearn.svm").SVC(), grid, cv=3, refit=False)
        return search.fit(digits.data, digits.target).best_params_

    with joblib_backend(target), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expect({"C": 10.0, "gamma": 0.001}, fit())
        return {"s": seconds(fit, quick)}
