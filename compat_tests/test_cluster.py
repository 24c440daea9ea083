"""CPython's Pool and executor tests, joblib's own, and the clients, with the doors on a cluster: a head and two nodes,
on hosts of their own for root.

Judges nothing itself: it starts `python -m compat_tests` on the running interpreter, and on the first other one that
has families which that one lacks. Called by pytest, in CI too.
"""

import subprocess
import sys

import pytest

from compat_tests.interpreters import Interpreter, Unusable, others, prepared, running
from compat_tests.running import CHECKOUT

sys.path.insert(0, str(CHECKOUT / "tests"))


def _interpreters() -> list[Interpreter]:
    mine = running()
    more = next((other for other in others() if set(other.families) - set(mine.families)), None)
    return [mine, more] if more is not None else [mine]


def _engine() -> str:
    return "hosts" if __import__("hosts").possible() else "cluster"


@pytest.mark.parametrize("what", [["compat_tests.clients", "--quick"], ["compat_tests", "--family", "joblib"]],
                         ids=["clients", "joblib"])
def test_others_on_a_cluster(what: list[str]) -> None:
    if "joblib" in what and _engine() != "hosts":
        pytest.skip("which of joblib's tests cannot pass is listed for machines that share no files")
    command = [sys.executable, "-m", *what, "--engine", _engine()]
    done = subprocess.run(command, cwd=CHECKOUT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("interpreter", _interpreters(), ids=str)
def test_cpython_s_tests_on_a_cluster(interpreter: Interpreter) -> None:
    engine = _engine()
    # Workers are started by nodes, whatever the start method: what it changes is the driver's side.
    method = "all" if interpreter == running() else "spawn"
    try:
        python = prepared(interpreter)
    except Unusable as reason:
        pytest.skip(str(reason))
    command = [python, "-m", "compat_tests", "--engine", engine, "--context", method, "--verbose"]
    done = subprocess.run(command, cwd=CHECKOUT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
