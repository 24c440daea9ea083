"""The command line of joblib's own tests: runs them in several pytest processes, compares with expected.py, prints.

Knows no test by name and runs none in this process. Exit code 0: everything is as expected; 1: something is not; 2:
joblib or its tests are not there. Called by people, by `python -m compat_tests --family joblib` and by pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compat_tests.joblib_suite import expected, substitution
from compat_tests.running import CHECKOUT, LEFT_OVER_GRACE_S, MARK, OUTPUT_SHOWN, end_all

AROUND = "(around the tests)"
# For one test. Longer: a hang costs more time. Shorter: a busy machine is taken for a hang. The longest take 20 s.
LIMIT_S = 120.0
# For the time before the first test, and after the last.
AROUND_LIMIT_S = 120.0
TARGETS = ("dpool", "loky")


@dataclass(frozen=True, slots=True)
class Judged:
    """An outcome beside what was expected of it. verdict: passed, failed, skipped or differs (as intended)."""

    test: str
    verdict: str
    detail: str
    seconds: float


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m compat_tests.joblib_suite", description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default="dpool", help="loky is the positive control")
    parser.add_argument("--only", metavar="TEXT", action="append", help="a part of file::test[parameters]")
    parser.add_argument("--jobs", type=int, default=(os.cpu_count() or 1) + 1, metavar="N", help="processes at a time")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write every outcome to this file")
    options = parser.parse_args(arguments)
    if not available():
        print("joblib: not installed, or without its tests")
        return 2
    import joblib

    print(f"joblib {joblib.__version__}'s tests against {options.target}, {options.jobs} processes", flush=True)
    started = time.monotonic()
    judged = run(options.target, options.only or [], options.jobs)
    for test in judged:
        if test.verdict == "failed":
            print(f"  FAILED {test.test}\n" + "\n".join(f"    | {line}" for line in test.detail.rstrip().splitlines()))
        elif test.verdict == "differs":
            print(f"  differs {test.test}: {test.detail}")
    if options.json:
        options.json.write_text(json.dumps([asdict(test) for test in judged], indent=1))
    counts = Counter(test.verdict for test in judged)
    text = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("passed", "failed", "skipped"))
    print(f"joblib: {text}, {counts['differs']} differ as intended ({time.monotonic() - started:.0f} s)")
    return 1 if counts["failed"] else 0


def available() -> bool:
    """Whether joblib is installed with its tests, and pytest to run them."""
    return all(find_spec(name) for name in ("joblib", "pytest")) and find_spec("joblib.test.test_parallel") is not None


def run(target: str, only: list[str], jobs: int, every: int = 1) -> list[Judged]:
    """The tests that are about the target, judged: those whose name has one of `only` in it, if that is not empty, and
    of these one in so many as `every` says."""
    with tempfile.TemporaryDirectory(prefix="compat_tests-joblib-") as folder:
        names = substitution.write(Path(folder), target)
        shares = [Share(Path(folder), names, target, only, share * every, jobs * every) for share in range(jobs)]
        with ThreadPoolExecutor(jobs) as threads:
            outcomes = [outcome for share in threads.map(Share.run, shares) for outcome in share]
    return [_judge(outcome, target) for outcome in outcomes]


def _judge(outcome: Judged, target: str) -> Judged:
    why = expected.reason(outcome.test) if target == "dpool" else None
    if why and outcome.verdict == "failed":
        return Judged(outcome.test, "differs", why, outcome.seconds)
    if why and outcome.verdict == "passed":
        return Judged(outcome.test, "failed", f"passed, though expected.py says: {why}", outcome.seconds)
    return outcome


class Share:
    """Every so-many-th test, in a pytest process of its own; one that hangs or kills it is left out in the next."""

    def __init__(self, folder: Path, names: list[str], target: str, only: list[str], share: int, shares: int) -> None:
        self._folder = folder
        self._names = names
        self._choice: dict[str, Any] = {"target": target, "only": only, "share": share, "shares": shares,
                                        "limit_s": LIMIT_S}
        self._outcomes: list[Judged] = []

    def run(self) -> list[Judged]:
        """The outcomes: verdicts are passed, failed and skipped."""
        while self._run_once():
            pass
        return self._outcomes

    def _run_once(self) -> bool:
        """One pytest process over what has no outcome yet; whether another is needed."""
        from compat_tests.joblib_suite.plugin import CHOICE

        share, number = self._choice["share"], len(self._outcomes)
        report = self._folder / f"report-{share}-{number}"
        scratch = self._folder / f"scratch-{share}-{number}"
        choice = self._choice | {"report": str(report), "done": [outcome.test for outcome in self._outcomes]}
        mark = f"{MARK}{uuid.uuid4()}"
        variable, _, value = mark.partition("=")
        # The folder of the tests comes first: its sitecustomize is what scripts find, and testutils what workers do.
        environment = os.environ | {"PYTHONPATH": f"{self._folder}{os.pathsep}{CHECKOUT}", variable: value,
                                    CHOICE: json.dumps(choice)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "compat_tests.joblib_suite.plugin",
                   "-p", "no:cacheprovider", f"--basetemp={scratch}", *self._names]
        process = subprocess.Popen(command, cwd=self._folder, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        output = _read(process, report)
        left_over = end_all(mark, LEFT_OVER_GRACE_S if process.returncode in (0, 1, 5) else 0)
        waiting, running = self._take(report)
        text = output.decode(errors="replace")[-OUTPUT_SHOWN:]
        if running is not None:
            self._outcomes.append(Judged(running, "failed", f"the process ended with {process.returncode}, or hung:\n"
                                         + text, 0.0))
            return bool(waiting)
        if left_over:
            self._outcomes.append(Judged(AROUND, "failed", "left-over processes:\n" + "\n".join(left_over), 0.0))
        if waiting or process.returncode not in (0, 1, 5):
            self._outcomes.append(Judged(AROUND, "failed", f"pytest ended with {process.returncode}:\n{text}", 0.0))
        return False

    def _take(self, report: Path) -> tuple[set[str], str | None]:
        """Read a report: the tests that were not run, and the one that was running at its end."""
        waiting: set[str] = set()
        running: str | None = None
        for event in map(json.loads, report.read_text().splitlines() if report.exists() else []):
            if event["event"] == "collected":
                waiting = set(event["tests"])
            elif event["event"] == "start":
                running = event["test"]
                waiting.discard(running)
            else:
                running = None
                self._outcomes.append(Judged(event["test"], event["outcome"], event["detail"], event["seconds"]))
        return waiting, running


def _read(process: subprocess.Popen[bytes], report: Path) -> bytes:
    """The output of pytest until it ends. It limits each test itself; this ends it if it does nothing outside them."""
    output = bytearray()
    silent_since, size = time.monotonic(), -1
    while True:
        try:
            more, _ = process.communicate(timeout=5)
            output += more
            return bytes(output)
        except subprocess.TimeoutExpired:
            now, new_size = time.monotonic(), report.stat().st_size if report.exists() else 0
            if new_size != size:
                silent_since, size = now, new_size
            elif now - silent_since > LIMIT_S + AROUND_LIMIT_S:
                process.kill()


if __name__ == "__main__":
    sys.exit(main())
