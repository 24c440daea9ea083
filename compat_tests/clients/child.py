"""Runs all workloads of one client, each with the standard library's doors and then with dpool's, and compares.

Writes a line of JSON for each to a file; limits nothing, __main__.py does. Called as
`python -c "from compat_tests.clients.child import main; main(...)"`, so that __main__ is empty.
"""

import faulthandler
import json
import multiprocessing
import os
import time
import traceback
from importlib import import_module

from compat_tests.clients.comparing import difference
from compat_tests.clients.doors import TALLY, Doors, Evidence


def main(client: str, path: str, method: str | None, limit_s: float) -> None:
    """Run the workloads of the module `client`; `method` is the start method, None for Python's own choice."""
    faulthandler.dump_traceback_later(limit_s * 0.95)
    if method is not None:
        multiprocessing.set_start_method(method)
    module = import_module(client)
    evidence = Evidence(os.environ.get(TALLY) or f"{path}.tally")
    workloads = [value for value in vars(module).values() if hasattr(value, "calls_are_counted")]
    with open(path, "w") as file:
        for function in workloads:
            results, seconds, problems = [], [], []
            for doors in (Doors("stdlib"), Doors("dpool")):
                started = time.perf_counter()
                try:
                    results.append(function(doors))
                except Exception:
                    problems.append(f"with {doors.name}: {traceback.format_exc()}")
                seconds.append(time.perf_counter() - started)
                if not problems and (wrong := evidence.judge(doors.name, function.calls_are_counted)):
                    problems.append(f"with {doors.name}: {wrong}")
                if problems:
                    break
            if not problems and (differs := difference(*results)):
                problems.append(differs)
            print(json.dumps({"workload": function.__name__, "seconds": seconds, "problem": "\n".join(problems)}),
                  file=file, flush=True)
