"""A minute of soak.py: ordinary work mixed with the faults of one machine, after which nothing may be left.

Owns nothing: the deeds, the seed's order and the count are soak.py's, which runs longer by hand.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Beyond its minute: what comes before it, and one deed that hangs until soak.py ends it with every traceback.
LIMIT_S = 420


@pytest.mark.limit(LIMIT_S + 30)
def test_a_minute_of_work_and_faults_leaves_nothing() -> None:
    command = [sys.executable, str(HERE / "soak.py"), "--minutes", "1", "--seed", "7"]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.endswith("nothing is left\n")
