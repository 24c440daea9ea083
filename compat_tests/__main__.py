"""The command line: lists the suites, runs them several at a time, compares with what is expected, and prints.

Knows no test by name and runs none in this process. Exit code 0: everything is as expected; 1: something is not;
2: there was nothing to run. Called by people, by pytest (test_compat.py, test_harness.py) and by sid.sh.
"""

import argparse
import json
import os
import platform
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from compat_tests import expected, names, suites
from compat_tests.engines import ENGINES, on_hosts, started
from compat_tests.running import MARK, TEST_LIMIT_S, Outcome, Suite, SuiteRun, end_all, run
from compat_tests.targets import TARGETS

HINT = "not in this interpreter's test package (Debian: apt install libpython3.X-testsuite)"


@dataclass(frozen=True, slots=True)
class Judged:
    """An outcome beside what was expected of it. verdict: passed, failed, skipped or differs (as intended)."""

    suite: str
    context: str
    test: str
    box: str
    verdict: str
    detail: str
    seconds: float


def main() -> int:
    """Parse, run, print; returns the exit code."""
    options = _options()
    code = on_hosts(options.engine, "compat_tests", sys.argv[1:], [options.json.parent] if options.json else [])
    if code is not None:
        return code
    if options.family == "joblib":
        with started(options.engine):
            return _run_joblib(options)
    chosen, missing = _choose(options)
    for family in missing:
        print(f"{family}: {HINT}")
    if not chosen:
        print("nothing to run")
        return 2
    with started(options.engine):
        return _run(chosen, missing, options)


def _run(chosen: list[Suite], missing: list[str], options: argparse.Namespace) -> int:
    title = f"{options.target} on {platform.python_implementation()} {platform.python_version()}"
    if options.engine != "embedded":
        title += f", engine {options.engine}"
    print(f"{title}: {len(chosen)} suites, {options.jobs} at a time", flush=True)

    judged: list[Judged] = []
    threads = ThreadPoolExecutor(options.jobs)
    try:
        for done in threads.map(lambda suite: run(suite, options.target, options.limit), chosen):
            of_suite = [_judge(done.suite, outcome, options) for outcome in done.outcomes]
            judged += of_suite
            _print_suite(done, of_suite, options.verbose)
    except KeyboardInterrupt:
        threads.shutdown(wait=False, cancel_futures=True)
        end_all(MARK)
        os._exit(130)  # the threads that watched what was just killed need not say so
    judged += _print_names(chosen, missing, options)
    if options.json:
        report = {"missing": missing, "tests": [asdict(test) for test in judged]}
        options.json.write_text(json.dumps(report, indent=1))
    _print_summary(judged)
    return 1 if any(test.verdict == "failed" for test in judged) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m compat_tests", description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default="dpool")
    parser.add_argument("--engine", choices=ENGINES, default="embedded",
                        help="cluster: a head and two nodes; hosts: each on a host of its own (namespaces, for root)")
    parser.add_argument("--family", choices=[*suites.FAMILIES, "joblib", "all"], default="all",
                        help="joblib: joblib's own tests, the others are CPython's")
    parser.add_argument("--context", choices=[*suites.CONTEXTS, "all"], default="all", help="the start method")
    parser.add_argument("--only", metavar="PATTERN", action="append", help="family/class/context.test; * is allowed")
    parser.add_argument("--white-box", action="store_true", help="only the tests that look inside the pool")
    parser.add_argument("--black-box", action="store_true", help="only the tests that do not")
    parser.add_argument("--jobs", type=int, default=(os.cpu_count() or 1) + 1, metavar="N", help="suites at a time")
    parser.add_argument("--limit", type=float, default=TEST_LIMIT_S, metavar="S", help="seconds for one test")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write every outcome to this file")
    parser.add_argument("--verbose", action="store_true", help="print the output of suites that failed")
    return parser.parse_args()


def _run_joblib(options: argparse.Namespace) -> int:
    """joblib's own tests; its control is loky, joblib's own backend."""
    from compat_tests.joblib_suite.__main__ import main as joblib_main

    if options.target == "broken":
        print("joblib: no negative control here; see test_joblib_suite.py")
        return 2
    arguments = ["--target", "dpool" if options.target == "dpool" else "loky", "--jobs", str(options.jobs)]
    arguments += [f"--only={part}" for part in options.only or []]
    return joblib_main(arguments + (["--json", str(options.json)] if options.json else []))


def _choose(options: argparse.Namespace) -> tuple[list[Suite], list[str]]:
    """The suites to run, and the families this interpreter lacks."""
    chosen, missing = [], []
    for family in suites.FAMILIES if options.family == "all" else [options.family]:
        for context in suites.CONTEXTS if options.context == "all" else [options.context]:
            try:
                found = suites.find(family, context)
            except ModuleNotFoundError as error:
                if not (error.name or "").startswith("test"):
                    raise
                missing.append(family)
                break
            for name, (_, tests) in found.items():
                kept = tuple(test for test in tests if _wanted(f"{family}/{name}", context, test, options))
                if kept:
                    chosen.append(Suite(family, name, context, kept))
    return chosen, missing


def _wanted(suite: str, context: str, test: str, options: argparse.Namespace) -> bool:
    if options.white_box != options.black_box and options.white_box != (f"{suite}.{test}" in names.WHITE_BOX):
        return False
    version = sys.version_info[:2]
    if options.target == "dpool" and expected.left_out(f"{suite}.{test}", context, version, options.engine):
        return False
    known_as = f"{suite}/{context}.{test}"
    return not options.only or any(fnmatchcase(known_as, pattern) or pattern in known_as for pattern in options.only)


def _judge(suite: Suite, outcome: Outcome, options: argparse.Namespace) -> Judged:
    """Compare an outcome with expected.py; the controls are expected to have no differences."""
    name = f"{suite.family}/{suite.name}"
    test = f"{name}.{outcome.test}"
    box = "white" if test in names.WHITE_BOX else "black"
    reason = None
    if options.target == "dpool":
        reason = expected.reason(test, suite.context, sys.version_info[:2], options.engine)
    verdict, detail = outcome.outcome, outcome.detail
    if reason and verdict == "failed":
        verdict, detail = "differs", reason
    elif reason and verdict == "passed":
        verdict, detail = "failed", f"passed, though expected.py says: {reason}"
    return Judged(name, suite.context, outcome.test, box, verdict, detail, outcome.seconds)


def _print_suite(done: SuiteRun, judged: list[Judged], verbose: bool) -> None:
    counts = "; ".join(
        f"{box}-box {_count([test for test in judged if test.box == box])}"
        for box in ("black", "white")
        if any(test.box == box for test in judged)
    )
    print(f"{done.suite!s:<60} {counts} ({done.seconds:.1f} s)")
    for test in judged:
        if test.verdict == "failed":
            print(f"  FAILED {test.test}\n" + _indent(test.detail))
        elif test.verdict == "differs":
            print(f"  differs {test.test}: {test.detail}")
    if verbose and any(test.verdict == "failed" for test in judged):
        print("  output of the suite:\n" + _indent(done.output))
    sys.stdout.flush()


def _print_names(chosen: list[Suite], missing: list[str], options: argparse.Namespace) -> list[Judged]:
    """Report the tests that names.py does not know, and fail those it knows that were not found."""
    for suite in chosen:
        new = set(suite.tests) - names.KNOWN.get(f"{suite.family}/{suite.name}", frozenset())
        if new:
            print(f"NEW in {suite}, to be sorted into names.py: {' '.join(sorted(new))}")
    found = {(str(suite), test) for suite in chosen for test in suite.tests}
    lost = []
    for name, context in names.rows():
        family = name.split("/")[0]
        if family in missing or options.family not in (family, "all") or options.context not in (context, "all"):
            continue
        for test in sorted(names.REQUIRED[name]):
            if _wanted(name, context, test, options) and (f"{name}/{context}", test) not in found:
                lost.append(Judged(name, context, test, "black", "failed", "in names.py, but not found", 0.0))
                print(f"LOST: {name}/{context}.{test} is in names.py, but was not found")
    return lost


def _print_summary(judged: list[Judged]) -> None:
    for box in ("black", "white"):
        print(f"{box}-box: {_count([test for test in judged if test.box == box])}")
    print(_count(judged))


def _count(judged: list[Judged]) -> str:
    counts = Counter(test.verdict for test in judged)
    text = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("passed", "failed", "skipped"))
    return text + (f", {counts['differs']} differ as intended" if counts["differs"] else "")


def _indent(text: str) -> str:
    return "\n".join(f"    | {line}" for line in text.rstrip().splitlines())


if __name__ == "__main__":
    sys.exit(main())
