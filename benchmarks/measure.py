"""Owns one fresh process: runs one case once for one target, and writes what came of it to a file as JSON.

It never repeats or compares. Started by runner.py: python -m benchmarks.measure CASE TARGET FILE [quick].
"""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
import traceback

# Only the stdlib up here: workers that are spawned import this file again, as the main module.


def main() -> int:
    name, target, file = sys.argv[1:4]
    quick = "quick" in sys.argv[4:]
    # The runner asks with it where this process hangs, before it ends it. Forked workers answer, too.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    from benchmarks.registry import load_cases
    from benchmarks.targets import CannotDo, NotHere

    outcome: dict[str, object]
    try:
        outcome = {"state": "ok", "sample": load_cases()[name].run(target, quick)}
    except NotHere as error:
        outcome = {"state": "not here", "why": str(error)}
    except CannotDo as error:
        outcome = {"state": "cannot", "why": str(error)}
    except BaseException as error:
        traceback.print_exc()
        outcome = {"state": "failed", "why": f"{type(error).__name__}: {error}"}
    with open(file, "w") as out:
        json.dump(outcome, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
