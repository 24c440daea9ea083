"""Owns the limit of time of every test here: one that hangs fails, and the others go on. Loaded by pytest."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

# More than any two waits of a test together: a test's own deadlines come first, and say more.
TEST_LIMIT_S = 150


def _late(*_: object) -> None:
    raise TimeoutError(f"the test has taken more than {TEST_LIMIT_S} s")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """A hang ends as TimeoutError in the main thread. Timers are not inherited by processes."""
    before = signal.signal(signal.SIGALRM, _late)
    signal.alarm(TEST_LIMIT_S)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
