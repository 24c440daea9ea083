"""Owns the tests of the example: it runs with either Pool, and the one line that the comparison swaps is there.

It never asserts a time. Run by pytest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_census_prints_the_same_with_the_stdlib_and_with_dpool() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "swap_and_compare.py"), "--processes", "2", "--limit", "60"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "60 files" in done.stdout
    assert "same output: yes" in done.stdout
