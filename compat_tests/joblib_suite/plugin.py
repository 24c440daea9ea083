"""The pytest plugin of the rewritten tests: dpool is joblib's default backend, and only what is about dpool is run.

Judges nothing. Loaded by the conftest.py that substitution.py writes.
"""

from __future__ import annotations

from typing import Any

import joblib.parallel
import pytest

import dpool.joblib

OTHERS = {"multiprocessing", "threading", "sequential", "spawn", "back_compat_backend"}
_PARAMETERS = ("backend", "parent_backend", "child_backend", "outer_backend", "inner_backend")


def pytest_configure(config: Any) -> None:
    dpool.joblib.register(make_default=True)
    joblib.parallel.DEFAULT_PROCESS_BACKEND = dpool.joblib.NAME


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Drop the parameter sets that name joblib's own backends only: they do not test dpool."""
    kept, dropped = [], []
    for item in items:
        values = [value for name, value in getattr(getattr(item, "callspec", None), "params", {}).items()
                  if name in _PARAMETERS]
        names = {value if isinstance(value, str) or value is None else type(value).__name__ for value in values}
        other = values and all(name in OTHERS or name in _CLASSES for name in names)
        (dropped if other else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


_CLASSES = {"ThreadingBackend", "SequentialBackend", "MultiprocessingBackend", "LokyBackend", "SpawnContext"}


@pytest.fixture(autouse=True)
def _default_backend() -> Any:
    """Tests that change the default backend put it back; so do those that fail in between."""
    yield
    joblib.parallel.DEFAULT_BACKEND = dpool.joblib.NAME
