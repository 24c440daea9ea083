"""scikit-learn as a client of joblib's: the same results through dpool as without, and its own tests of n_jobs.

Skipped where scikit-learn is not installed. Called by pytest, in CI too.

Its own tests are those whose text speaks of n_jobs, with dpool as joblib's default backend and in loky's place. A part
of the modules is run, or all if DPOOL_COMPAT_FULL is set.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

sklearn = pytest.importorskip("sklearn")
pytest.importorskip("joblib")

import numpy as np  # noqa: E402
from joblib import parallel_config  # noqa: E402
from sklearn.compose import ColumnTransformer  # noqa: E402
from sklearn.datasets import make_classification  # noqa: E402
from sklearn.decomposition import PCA  # noqa: E402
from sklearn.ensemble import BaggingClassifier, RandomForestClassifier  # noqa: E402
from sklearn.inspection import permutation_importance  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_val_score, learning_curve  # noqa: E402
from sklearn.multiclass import OneVsRestClassifier  # noqa: E402
from sklearn.pipeline import FeatureUnion, make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from threadpoolctl import threadpool_limits  # noqa: E402

import dpool  # noqa: E402, F401
from compat_tests.running import CHECKOUT  # noqa: E402

# Modules with tests of processes that are done quickly.
SOME = ("test_parallel", "test_search", "test_validation", "test_permutation_importance", "test_rfe", "test_pipeline",
        "test_multioutput", "test_bagging", "test_iforest", "test_calibration", "test_coordinate_descent")

# Enough for a large array: joblib maps it read-only into the workers.
X, Y = make_classification(3000, 60, n_informative=20, n_classes=3, random_state=0)
SMALL = slice(0, 300)


def _cross_validation(n_jobs: int) -> Any:
    return cross_val_score(LogisticRegression(max_iter=200), X[SMALL], Y[SMALL], cv=4, n_jobs=n_jobs)


def _cross_prediction(n_jobs: int) -> Any:
    return cross_val_predict(LogisticRegression(max_iter=50), X, Y, cv=3, n_jobs=n_jobs, method="predict_proba")


def _grid_search(n_jobs: int) -> Any:
    pipeline = make_pipeline(StandardScaler(), PCA(random_state=0), LogisticRegression(max_iter=200))
    grid = {"pca__n_components": [5, 10], "logisticregression__C": [0.1, 1.0]}
    search = GridSearchCV(pipeline, grid, cv=3, n_jobs=n_jobs).fit(X[SMALL], Y[SMALL])
    return [search.cv_results_["mean_test_score"], search.best_estimator_.predict(X)]


def _nested_search(n_jobs: int) -> Any:
    search = GridSearchCV(RandomForestClassifier(5, n_jobs=n_jobs, random_state=0), {"max_depth": [2, 4]}, cv=2,
                          n_jobs=n_jobs)
    return cross_val_score(search, X[SMALL], Y[SMALL], cv=2, n_jobs=n_jobs)


def _forest(n_jobs: int) -> Any:
    forest = RandomForestClassifier(20, n_jobs=n_jobs, random_state=0).fit(X, Y)
    return [forest.predict_proba(X), forest.feature_importances_]


def _bagging(n_jobs: int) -> Any:
    bagging = BaggingClassifier(LogisticRegression(max_iter=50), 4, n_jobs=n_jobs, random_state=0)
    bagging.fit(X[SMALL], Y[SMALL])
    # Not its probabilities: with two jobs they are added up in another order.
    return [bagging.predict(X), *(model.coef_ for model in bagging.estimators_)]


def _importance(n_jobs: int) -> Any:
    model = LogisticRegression(max_iter=200).fit(X[SMALL], Y[SMALL])
    return permutation_importance(model, X, Y, n_repeats=2, random_state=0, n_jobs=n_jobs).importances


def _union(n_jobs: int) -> Any:
    union = FeatureUnion([("pca", PCA(3, random_state=0)), ("scaled", StandardScaler())], n_jobs=n_jobs)
    columns = ColumnTransformer([("a", StandardScaler(), slice(0, 9)), ("b", PCA(2, random_state=0), slice(9, 60))],
                                n_jobs=n_jobs)
    return [union.fit_transform(X), columns.fit_transform(X)]


def _one_vs_rest(n_jobs: int) -> Any:
    return OneVsRestClassifier(LogisticRegression(max_iter=100), n_jobs=n_jobs).fit(X[SMALL], Y[SMALL]).predict(X)


def _learning_curve(n_jobs: int) -> Any:
    return list(learning_curve(LogisticRegression(max_iter=100), X[SMALL], Y[SMALL], cv=3, n_jobs=n_jobs))


WORK = (_cross_validation, _cross_prediction, _grid_search, _nested_search, _forest, _bagging, _importance, _union,
        _one_vs_rest, _learning_curve)


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__.strip("_"))
def test_results_are_those_of_a_sequential_run(work: Any) -> None:
    with parallel_config(backend="dpool", inner_max_num_threads=1):
        through_dpool = work(2)
    with threadpool_limits(1):  # as in the workers: BLAS with another number of threads sums in another order
        sequential = work(1)
    np.testing.assert_equal(through_dpool, sequential)


def test_scikit_learns_own_tests_of_n_jobs(tmp_path: Path) -> None:
    names = _modules()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "compat_tests.joblib_suite.default", "-W", "ignore",
               "-p", "no:cacheprovider", "-o", "faulthandler_timeout=100", "--pyargs", *names]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 40, done.stdout


def _modules() -> list[str]:
    """scikit-learn's test modules that speak of n_jobs, by dotted name."""
    root = Path(str(resources.files("sklearn")))
    names = []
    for path in sorted(root.rglob("tests/test_*.py")):
        if (os.environ.get("DPOOL_COMPAT_FULL") or path.stem in SOME) and "n_jobs" in path.read_text():
            names.append(".".join(("sklearn", *path.relative_to(root).with_suffix("").parts)))
    return names
