"""Owns the command line: python -m benchmarks.

It never measures or formats. Called by people.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from pathlib import Path

from benchmarks import picture, report, runner
from benchmarks.registry import load_cases
from benchmarks.targets import PEERS, installed


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure dpool beside the stdlib and, where they are installed, its peers.",
    )
    parser.add_argument("--peers", help="only these beside dpool and the stdlib, comma-separated; 'stdlib': no others")
    parser.add_argument("--cases", help="only these: names or patterns, comma-separated ('pool.*,start.fork')")
    parser.add_argument("--quick", action="store_true", help="smaller counts, one round: to see that it runs")
    parser.add_argument("--rounds", type=int, help="how often each target runs each case (default 5, quick 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the picture here")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="measure nothing: show what this file holds")
    parser.add_argument("--list", action="store_true", help="list the cases and their bars, and stop")
    return parser


def main() -> int:
    parser = options()
    chosen = parser.parse_args()
    cases = load_cases()
    if chosen.cases:
        patterns = chosen.cases.split(",")
        for pattern in patterns:
            if not fnmatch.filter(cases, pattern):
                parser.error(f"no case is called {pattern!r}; --list shows them")
        cases = {n: c for n, c in cases.items() if any(fnmatch.fnmatchcase(n, p) for p in patterns)}
    if chosen.list:
        for case in cases.values():
            bars = "; ".join(f"{b.metric} <= {b.limit:g}" + f" of {b.against}" * bool(b.against) for b in case.bars)
            print(f"{case.name:<24}{case.title:<62}{bars}")
        return 0

    if chosen.from_json:
        run, results = runner.read_run(chosen.from_json)
        for result in results:
            if result.case in cases:
                print("\n".join(report.case_lines(cases[result.case], result)))
    else:
        peers = list(PEERS)
        if chosen.peers is not None:
            named = chosen.peers.split(",")
            unknown = [name for name in named if name not in (*PEERS, "stdlib", "dpool", "")]
            if unknown:
                parser.error(f"no peer is called {unknown[0]!r}; there are stdlib, {', '.join(PEERS)}")
            peers = [p for p in PEERS if p in named or ("stdlib" in named and p == "stdlib-spawn")]
        targets = ["dpool", "stdlib", *(p for p in peers if installed(p))]
        results = []

        def show(result: runner.CaseResult) -> None:
            results.append(result)
            print("\n".join(report.case_lines(cases[result.case], result)), flush=True)

        rounds = chosen.rounds or (1 if chosen.quick else 5)
        print(f"targets: {', '.join(targets)}; {rounds} rounds, by turns", flush=True)
        run = runner.run_all(list(cases.values()), targets, rounds, chosen.quick, show)
    print("\n".join(report.summary_lines(cases, results)))
    if chosen.json:
        chosen.json.write_text(json.dumps(run, indent=1) + "\n")
    if chosen.svg:
        chosen.svg.write_text(picture.draw(cases, results, run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
