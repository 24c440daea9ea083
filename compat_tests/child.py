"""Runs some tests of one class and writes each start and outcome as a line of JSON to a descriptor.

Judges nothing and limits nothing: running.py watches it from outside, since a test may hang or kill the process.
Called by running.py as `python -c "from compat_tests.child import main; main(...)"`, so that __main__ is empty.
"""

import faulthandler
import io
import json
import os
import time
import traceback
import unittest
from importlib import import_module
from typing import Any

from compat_tests import suites
from compat_tests.targets import TARGETS

# The name under which what happens around the tests is reported: fixtures of class and module, exit, left-overs.
AROUND = "(around the tests)"
# How long nothing may happen while no test runs. Longer than any fixture takes, and than an orderly exit.
AROUND_LIMIT_S = 30.0


def main(channel: int, target: str, family: str, name: str, context: str, tests: list[str], limit_s: float) -> None:
    """Run `tests` of the suite and write to the descriptor `channel`; it is closed when this process ends."""
    result = _Reporter(channel, limit_s)
    if target == "dpool" and "DPOOL_ADDRESS" in os.environ:
        # As a program that begins with dpool.init(): its one thread is there before CPython's tests count threads.
        import_module("dpool.session").current()
    try:
        cls, _ = suites.find(family, context, TARGETS[target])[name]
    except Exception:
        result.report(AROUND, "failed", f"the target cannot be put in:\n{traceback.format_exc()}")
        return
    unittest.TestSuite(map(cls, tests)).run(result)
    result.report_environment(AROUND)
    faulthandler.dump_traceback_later(AROUND_LIMIT_S * 0.9)  # in case the exit hangs


class _Reporter(unittest.TestResult):
    def __init__(self, channel: int, limit_s: float) -> None:
        super().__init__()
        self._support: Any = import_module("test.support")
        self._channel = channel
        self._limit_s = limit_s
        self._started = time.monotonic()
        self._outcome = ("passed", "")
        # CPython's tests warn of dangling threads and processes here, beside setting environment_altered.
        self._warnings = self._support.print_warning.orig_stderr = io.StringIO()

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._outcome = ("passed", "")
        self._started = time.monotonic()
        # Shows where it hung, shortly before running.py gives up on it.
        faulthandler.dump_traceback_later(self._limit_s * 0.95)
        self._write(event="start", test=test._testMethodName)

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        faulthandler.cancel_dump_traceback_later()
        name = test._testMethodName
        if not self.report_environment(name):
            self.report(name, *self._outcome)

    def addError(self, test: Any, err: Any) -> None:
        super().addError(test, err)
        self._settle(test, "failed", self._text(test, err))

    def addFailure(self, test: Any, err: Any) -> None:
        super().addFailure(test, err)
        self._settle(test, "failed", self._text(test, err))

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._settle(test, "failed", self._text(test, err))

    def addUnexpectedSuccess(self, test: Any) -> None:
        super().addUnexpectedSuccess(test)
        self._settle(test, "failed", "passed, though marked as an expected failure")

    def addSkip(self, test: Any, reason: str) -> None:
        super().addSkip(test, reason)
        self._settle(test, "skipped", reason)

    def report_environment(self, name: str) -> bool:
        """Report a failure if CPython's helpers saw threads or processes left behind; True if so."""
        altered = self._support.environment_altered
        if altered:
            before = f"{self._outcome[1]}\n" if self._outcome[1] else ""
            self.report(name, "failed", f"{before}environment altered:\n{self._warnings.getvalue()}")
        self._support.environment_altered = False
        self._warnings.truncate(self._warnings.seek(0))
        return bool(altered)

    def report(self, name: str, outcome: str, detail: str) -> None:
        """Write one outcome."""
        self._write(event="end", test=name, outcome=outcome, detail=detail, seconds=time.monotonic() - self._started)

    def _settle(self, test: Any, outcome: str, detail: str) -> None:
        if not isinstance(test, unittest.TestCase):  # a fixture of the class or the module
            self.report(AROUND, outcome, detail)
        elif self._outcome[0] != "failed":
            self._outcome = (outcome, detail)

    @staticmethod
    def _text(test: Any, err: Any) -> str:
        return "".join(traceback.format_exception(*err))

    def _write(self, **event: object) -> None:
        os.write(self._channel, json.dumps(event).encode() + b"\n")
