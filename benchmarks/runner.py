"""Owns the order of a run and its processes: rounds, targets by turns, time limits, and the clearing away of leftovers.

It never times anything itself, and no target can break it: what fails or hangs is a result like any other.
Called by __main__.py; starts measure.py.
"""

from __future__ import annotations

import compileall
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import adopt_orphans, end_descendants
from benchmarks.registry import Case, Sample

ROOT = Path(__file__).resolve().parent.parent
# Peers are there for the picture, and some are a hundred times slower: they need not run as often.
PEER_ROUNDS = 3
OWN_TARGETS = ("dpool", "stdlib")
# How long a process that is too slow has for saying where it is, and how much of it is kept.
ANSWER_S = 0.5
SAID_CHARACTERS = 8000


@dataclass(slots=True)
class Outcome:
    """What became of one target in one case."""

    target: str
    # Round number to what it measured. Rounds that failed are not in it.
    samples: dict[int, Sample] = field(default_factory=dict)
    # "ok", or why there is nothing (more) to show: "not here", "cannot", "failed", "too slow".
    state: str = "ok"
    why: str = ""
    failures: int = 0
    # The end of what the last process that gave no figure printed: its traceback, or where it hung.
    said: str = ""

    def note(self, number: int, state: str, sample: Sample | None, why: str, said: str) -> None:
        if sample is not None:
            self.samples[number] = sample
        else:
            self.state, self.why, self.said = state, why, said
            self.failures += state in ("failed", "too slow")

    @property
    def worth_another_try(self) -> bool:
        """A crash may be rare and another round says how rare; a hang costs the whole limit again."""
        return self.state in ("ok", "failed")


@dataclass(slots=True)
class CaseResult:
    """Every target's outcome in one case."""

    case: str
    outcomes: list[Outcome]


def without_paths(text: str) -> str:
    """Tracebacks without where this checkout and this Python lie: a result may be published."""
    for folder, name in ((str(ROOT) + "/", ""), (sys.prefix, "(venv)"), (sys.base_prefix, "(python)")):
        text = text.replace(folder, name)
    return text


def run_once(case: Case, target: str, quick: bool) -> tuple[str, Sample | None, str, str]:
    """Run one case for one target in a fresh process: (state, sample, why not, the last it printed)."""
    with tempfile.TemporaryDirectory() as folder:
        result, said = Path(folder, "result"), Path(folder, "said")
        command = [sys.executable, "-m", "benchmarks.measure", case.name, target, str(result)]
        # A file, not a pipe: daemons of a peer may outlive their driver, and would hold a pipe open.
        with open(said, "wb") as out:
            process = subprocess.Popen(
                command + (["quick"] if quick else []),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
                start_new_session=True,
            )
            late = False
            try:
                process.wait(case.limit_s)
            except subprocess.TimeoutExpired:
                late = True
                os.killpg(process.pid, signal.SIGUSR1)
                time.sleep(ANSWER_S)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                end_descendants()
        printed = without_paths(said.read_text(errors="replace").strip())[-SAID_CHARACTERS:]
        if result.exists():
            try:
                outcome = json.loads(result.read_text())
            except ValueError:
                outcome = {"state": "failed", "why": "its result is not whole"}
            if outcome["state"] == "ok" and late:
                return "failed", None, f"measured, then did not exit within {case.limit_s:.0f} s", printed
            return outcome["state"], outcome.get("sample"), outcome.get("why", ""), printed
        if late:
            return "too slow", None, f"not done within {case.limit_s:.0f} s", printed
        last = printed.splitlines()[-1:]
        return "failed", None, f"exit code {process.returncode}" + (f": {last[0][:200]}" if last else ""), printed


def run_case(case: Case, targets: list[str], rounds: int, quick: bool) -> CaseResult:
    """Run one case for each target it has among `targets`, by turns."""
    outcomes = [Outcome(t) for t in case.targets if t in targets]
    rounds = min(rounds, case.rounds or rounds)
    for number in range(rounds):
        # Each round begins with another target, and every second one goes backwards: nobody is always first.
        turn = number % len(outcomes) if outcomes else 0
        order = outcomes[turn:] + outcomes[:turn]
        for outcome in order if number % 2 == 0 else reversed(order):
            own = outcome.target in OWN_TARGETS or outcome.target == case.reference
            if outcome.worth_another_try and (own or number < PEER_ROUNDS):
                outcome.note(number, *run_once(case, outcome.target, quick))
    return CaseResult(case.name, outcomes)


def surroundings(targets: list[str]) -> dict[str, Any]:
    """What a reader needs to know of the machine and the versions, and nothing that names the machine."""
    versions = {}
    for package in ("dpool", "numpy", "loky", "mpire", "ray", "distributed", "joblib", "scikit-learn"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
        "cpus": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        "targets": targets,
        "versions": versions,
    }


def run_all(
    cases: list[Case],
    targets: list[str],
    rounds: int,
    quick: bool,
    done: Callable[[CaseResult], None],
) -> dict[str, Any]:
    """Run the cases one after the other, calling `done` after each, and return everything as plain data for JSON."""
    adopt_orphans()
    # The stdlib and the peers come compiled. A checkout may not be, and then its import takes three times as long.
    for package in ("dpool", "benchmarks"):
        compileall.compile_dir(ROOT / package, quiet=2)
    start = time.monotonic()
    run: dict[str, Any] = {"about": surroundings(targets), "quick": quick, "rounds": rounds, "cases": []}
    try:
        for case in cases:
            result = run_case(case, targets, rounds, quick)
            run["cases"].append(asdict(result))
            done(result)
    except KeyboardInterrupt:
        # What was measured so far is worth showing.
        print("interrupted", file=sys.stderr)
    run["about"]["load_after"] = round(os.getloadavg()[0], 2)
    run["took_s"] = round(time.monotonic() - start, 1)
    return run


def read_run(file: Path) -> tuple[dict[str, Any], list[CaseResult]]:
    """A run as it was written as JSON."""
    run = json.loads(file.read_text())
    return run, [case_result(plain) for plain in run["cases"]]


def case_result(plain: dict[str, Any]) -> CaseResult:
    outcomes = []
    for outcome in plain["outcomes"]:
        samples = {int(number): sample for number, sample in outcome["samples"].items()}
        outcomes.append(Outcome(**{**outcome, "samples": samples}))
    return CaseResult(plain["case"], outcomes)
