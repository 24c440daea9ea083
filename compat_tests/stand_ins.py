"""Classes that misbehave in the ways running.py must cope with, in place of CPython's.

Test no pool and pass nothing on. Called by test_harness.py, through the family "harness" of suites.find().
"""

import os
import signal
import subprocess
import time
import unittest


class _Neighbours:
    """What must still be run when test_bad does its worst between them."""

    def test_a(self) -> None:
        """Runs before."""

    def test_c(self) -> None:
        """Runs after."""


class Hangs(_Neighbours, unittest.TestCase):
    """One test never returns."""

    def test_bad(self) -> None:
        """Hang."""
        time.sleep(600)


class Dies(_Neighbours, unittest.TestCase):
    """One test kills its process."""

    def test_bad(self) -> None:
        """Die."""
        os.kill(os.getpid(), signal.SIGKILL)


class LeavesAProcess(unittest.TestCase):
    """One test leaves a process behind, in a session of its own."""

    def test_bad(self) -> None:
        """Leave it."""
        command = ["sh", "-c", "sleep 600; : left-over-of-test_harness"]
        subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
