"""Runs one program twice, with the stdlib's Pool and with dpool's, compares what it prints and shows both times.

It never measures the first reading of the files from disk: it reads them once before, so that neither run pays.
Called by examples/run, which has set up the environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
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
    steps: dict[str, tuple[int, float]]
    total_s: float


def run(program: Path, arguments: list[str]) -> Run:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(program), "--times", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    total_s = time.perf_counter() - start
    steps: dict[str, tuple[int, float]] = {}
    errors: list[str] = []
    for line in done.stderr.splitlines():
        words = line.split()
        if len(words) == 3 and words[0] in ("files", "functions"):
            steps[words[0]] = (int(words[1]), float(words[2]))
        else:
            errors.append(line)
    return Run(done.returncode, done.stdout, "\n".join(errors), steps, total_s)


def read_files_once() -> None:
    for folder, _, names in os.walk(sysconfig.get_paths()["stdlib"]):
        for name in names:
            if name.endswith(".py"):
                Path(folder, name).read_bytes()


def main() -> int:
    text = PROGRAM.read_text()
    if text.count(BEFORE) != 1:
        print(f"{PROGRAM.name} should hold the line {BEFORE.strip()!r} exactly once", file=sys.stderr)
        return 1
    arguments = sys.argv[1:]
    read_files_once()
    with tempfile.TemporaryDirectory() as folder:
        swapped = Path(folder, PROGRAM.name)
        swapped.write_text(text.replace(BEFORE, AFTER))
        runs: dict[str, Run] = {}
        for who, program, line in (("stdlib", PROGRAM, BEFORE), ("dpool", swapped, AFTER)):
            print(f"running {PROGRAM.name} with: {line.strip()}", file=sys.stderr, flush=True)
            runs[who] = run(program, arguments)
            if runs[who].exit_code:
                print(runs[who].errors, file=sys.stderr)
                print(f"the run with {who} failed, exit code {runs[who].exit_code}", file=sys.stderr)
                return 1
    stdlib, dpool = runs["stdlib"], runs["dpool"]
    print(dpool.output)
    for who, one in runs.items():
        if one.errors:
            print(f"the run with {who} also said:\n{one.errors}", file=sys.stderr)
    same = stdlib.output == dpool.output
    print(f"{'':36}{'stdlib':>9}{'dpool':>9}")
    rows = [
        (f"{what}, one task each ({stdlib.steps[what][0]:,})", stdlib.steps[what][1], dpool.steps[what][1])
        for what in stdlib.steps
    ]
    rows.append(("the whole program", stdlib.total_s, dpool.total_s))
    for title, theirs, ours in rows:
        print(f"{title:36}{theirs:>7.2f} s{ours:>7.2f} s   {theirs / ours:.2f} times as fast")
    print(f"same output: {'yes' if same else 'NO'}; one line of {len(text.splitlines())} changed; one run each")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
