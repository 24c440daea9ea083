"""Runs histories by hand: `python -m tests.simulation --seeds 1000 --start 0`, and the curves of `--scale`.

Prints each seed that fails, and how to see it again. Asserts nothing itself.
"""

from __future__ import annotations

import argparse
import sys
import time

from .history import History
from .running import explain, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", type=int, default=100, help="how many histories")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--trace", action="store_true", help="print what happened in each")
    parser.add_argument("--mutant", help="with this bug")
    parser.add_argument("--scale", choices=("tasks", "nodes", "both", "head"), help="print how costs grow, instead")
    parser.add_argument("--nodes", type=int, default=2000)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    options = parser.parse_args()
    if options.scale:
        from . import scale

        scale.curves(options.nodes, options.tasks, options.scale)
        return 0
    started = time.perf_counter()
    failed = 0
    simulated = events = 0.0
    for seed in range(options.start, options.start + options.seeds):
        history = History(seed)
        violation = run(history, options.mutant)
        simulated += history.world.now
        events += history.world.events
        if violation is not None:
            failed += 1
            print(explain(history, violation, 25), flush=True)
        if options.trace:
            for when, what in history.world.trace:
                print(f"{when:10.4f}  {what}")
    seconds = time.perf_counter() - started
    print(f"{options.seeds} histories, {simulated:,.0f} simulated seconds, {events:,.0f} events in {seconds:.1f} s; "
          f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
