"""Owns the limit of time of every test: one that hangs fails, and the others go on. Loaded by pytest.

A test that is long by design is marked with a limit of its own: @pytest.mark.limit(seconds).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# More than any two waits of a test together: a test's own deadlines come first, and say more.
TEST_LIMIT_S = 150
# For a test of compat_tests, which is a whole suite: it limits each of its tests itself. With both cores of a small
# machine busy with other things one took three minutes.
SUITE_LIMIT_S = 1200


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell without job control starts what it runs in the background so, and every program would inherit it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "limit(seconds): how long the test may take, if it is long by design")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A hang ends as TimeoutError in the main thread. Timers are not inherited by processes."""
    own = item.get_closest_marker("limit")
    usual = TEST_LIMIT_S if item.path.is_relative_to(Path(__file__).parent) else SUITE_LIMIT_S
    limit = int(own.args[0]) if own is not None else usual

    def late(*_: object) -> None:
        raise TimeoutError(f"the test has taken more than {limit} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(limit)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
