"""Runs one program with the stdlib's Pool and with dpool's, compares what it prints and shows both times.

It never measures the first reading of the files from disk: it reads them once before, so that neither run pays.
Called by examples/run, which has set up the environment.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

PROGRAM = Path(__file__).with_name("stdlib_census.py")
BEFORE = "from multiprocessing import Pool\n"
AFTER = "from dpool.multiprocessing import Pool\n"


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of the program gave."""

    exit_code: int
    output: str
    errors: str
    # Step to (how many tasks, how long), as the program itself tells with --times.
    steps: dict[str, tuple[int, float]]
    total_s: float
    cpu_s: float


def cpu_of_children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(program: Path, arguments: list[str]) -> Run:
    cpu_before, start = cpu_of_children_s(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(program), "--times", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    total_s, cpu_s = time.perf_counter() - start, cpu_of_children_s() - cpu_before
    steps: dict[str, tuple[int, float]] = {}
    errors: list[str] = []
    for line in done.stderr.splitlines():
        words = line.split()
        if len(words) == 3 and words[0] in ("files", "functions"):
            steps[words[0]] = (int(words[1]), float(words[2]))
        else:
            errors.append(line)
    return Run(done.returncode, done.stdout, "\n".join(errors), steps, total_s, cpu_s)


def step_s(step: str, one: Run) -> float:
    return one.steps[step][1]


def read_files_once() -> None:
    for folder, _, names in os.walk(sysconfig.get_paths()["stdlib"]):
        for name in names:
            if name.endswith(".py"):
                Path(folder, name).read_bytes()


def compare(stdlib: list[Run], dpool: list[Run]) -> None:
    """Print the times side by side: medians, where there are several rounds."""

    def row(title: str, figure: Callable[[Run], float]) -> None:
        theirs, ours = (statistics.median(map(figure, runs)) for runs in (stdlib, dpool))
        print(f"{title:40}{theirs:>8.2f} s{ours:>8.2f} s   dpool takes {ours / theirs:.2f} of the stdlib's time")

    print(f"{'':40}{'stdlib':>10}{'dpool':>10}")
    for step, (count, _) in stdlib[0].steps.items():
        row(f"{step}, {count:,} tasks, one each", partial(step_s, step))
    row("the whole program", lambda one: one.total_s)
    row("processor time, all processes", lambda one: one.cpu_s)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog="The rest goes to the program.")
    options.add_argument("--rounds", type=int, default=1, help="how often each runs, by turns (default 1)")
    chosen, arguments = options.parse_known_args()
    text = PROGRAM.read_text()
    if text.count(BEFORE) != 1:
        print(f"{PROGRAM.name} should hold the line {BEFORE.strip()!r} exactly once", file=sys.stderr)
        return 1

    read_files_once()
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    runs: dict[str, list[Run]] = {"stdlib": [], "dpool": []}
    with tempfile.TemporaryDirectory() as folder:
        swapped = Path(folder, PROGRAM.name)
        swapped.write_text(text.replace(BEFORE, AFTER))
        for _ in range(chosen.rounds):
            for who, program, line in (("stdlib", PROGRAM, BEFORE), ("dpool", swapped, AFTER)):
                print(f"running {PROGRAM.name} with: {line.strip()}", file=sys.stderr, flush=True)
                one = run(program, arguments)
                if one.errors:
                    print(f"the run with {who} said:\n{one.errors}", file=sys.stderr)
                if one.exit_code:
                    print(f"the run with {who} failed, exit code {one.exit_code}", file=sys.stderr)
                    return 1
                runs[who].append(one)

    print(runs["dpool"][0].output)
    compare(runs["stdlib"], runs["dpool"])
    if load > 0.5 * cpus:
        print(f"Other programs keep this machine busy (load {load:.1f}, {cpus} processors): take the times with care.")
    same = len({one.output for both in runs.values() for one in both}) == 1
    lines = len(text.splitlines())
    print(f"same output: {'yes' if same else 'NO'}; one line of {lines} changed; rounds: {chosen.rounds}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
