"""The command line: runs the clients that are installed, each in a process of its own, and prints a table.

Exit code 0: all results were the same; 1: one was not, or something went wrong; 2: there was nothing to run. run() is
called by test_clients.py too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import uuid
import venv
from dataclasses import dataclass
from pathlib import Path

from compat_tests.clients.doors import TALLY
from compat_tests.clients.registry import CLIENTS, Client
from compat_tests.engines import ENGINES, on_hosts, started
from compat_tests.running import CHECKOUT, LEFT_OVER_GRACE_S, MARK, OUTPUT_SHOWN, end_all

# For all workloads of a client, both runs.
LIMIT_S = 180.0
REQUIREMENTS = ("cloudpickle", "pyzmq", "msgspec")


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a workload. `problem` is empty if both results are the same and nothing else was wrong."""

    workload: str
    seconds: tuple[float, ...]  # with the standard library, with dpool; fewer if it did not come so far
    problem: str


def run(client: Client, method: str | None = None, limit_s: float = LIMIT_S) -> list[Row]:
    """Run a client's workloads in a process of its own; a row for each, and one more if the process went wrong."""
    mark = f"{MARK}{uuid.uuid4()}"
    variable, _, value = mark.partition("=")
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), variable: value}
    with tempfile.TemporaryDirectory(prefix="compat_clients-") as folder, open(Path(folder, "output"), "w+b") as output:
        report = Path(folder, "report")
        arguments = (client.module, str(report), method, limit_s)
        child = subprocess.Popen(
            [sys.executable, "-c", f"from compat_tests.clients.child import main; main(*{arguments!r})"],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environment,
            start_new_session=True)
        try:
            code = child.wait(limit_s)
            ending = f"the process ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            ending = f"not finished after {limit_s:.0f} s"
        left_over = end_all(mark, 0 if ending else LEFT_OVER_GRACE_S)
        child.wait()
        rows = []
        for line in report.read_text().splitlines() if report.exists() else ():
            row = json.loads(line)
            rows.append(Row(row["workload"], tuple(row["seconds"]), row["problem"]))
        output.seek(0)
        text = output.read().decode(errors="replace")[-OUTPUT_SHOWN:]
    if ending:
        rows.append(Row("(the process)", (), f"{ending}; the end of the output:\n{text}"))
    elif left_over:
        rows.append(Row("(the process)", (), "left-over processes:\n" + "\n".join(left_over)))
    elif not rows:
        rows.append(Row("(the process)", (), f"no workloads; the end of the output:\n{text}"))
    return rows


def main() -> int:
    """Parse, run, print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m compat_tests.clients", description=__doc__.splitlines()[0])
    parser.add_argument("client", nargs="*", choices=[[], *(client.name for client in CLIENTS)],
                        help="default: all that are installed")
    parser.add_argument("--quick", action="store_true", help='only those of the extra "clients"')
    parser.add_argument("--method", choices=["fork", "spawn", "forkserver"], help="the start method")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="S", help="seconds for one client")
    parser.add_argument("--install", type=Path, metavar="FOLDER",
                        help="install what is missing into a virtual environment in FOLDER, and run there")
    parser.add_argument("--engine", choices=ENGINES, default="embedded",
                        help="cluster: a head and two nodes; hosts: each on a host of its own (namespaces, for root)")
    options = parser.parse_args()
    if options.engine != "embedded" and TALLY not in os.environ:
        # Before the nodes are started, for their workers have it from them.
        with tempfile.TemporaryDirectory(prefix="compat_clients-") as folder:
            os.environ[TALLY] = os.path.join(folder, "tally")
            os.environ["TMPDIR"] = folder  # what is written there every machine sees, as on a shared file system
            code = on_hosts(options.engine, "compat_tests.clients", sys.argv[1:], [Path(folder)])
            return _run(options) if code is None else code
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    chosen = [client for client in CLIENTS
              if (not options.client or client.name in options.client) and (client.quick or not options.quick)]
    if options.install:
        _run_in(options.install, chosen, [argument for argument in sys.argv[1:]])
    with started(options.engine):
        return _run_all(chosen, options)


def _run_all(chosen: list[Client], options: argparse.Namespace) -> int:
    print(f"{'client':12} {'version':10} {'workload':24} {'same result':12} {'stdlib s':>9} {'dpool s':>9}")
    problems = ran = 0
    for client in chosen:
        if client.version is None:
            print(f"{client.name:12} {'-':10} not installed")
            continue
        ran += 1
        for row in run(client, options.method, options.limit):
            seconds = "".join(f" {value:9.2f}" for value in row.seconds)
            same = "NO" if row.problem else "yes"
            print(f"{client.name:12} {client.version:10.10} {row.workload:24} {same:12}{seconds}", flush=True)
            if row.problem:
                problems += 1
                print(textwrap.indent(row.problem, "    "), flush=True)
    if not ran:
        print("nothing to run: install the extra \"clients\", or see --install")
        return 2
    return 1 if problems else 0


def _run_in(folder: Path, clients: list[Client], arguments: list[str]) -> None:
    """Start over in the virtual environment, with everything installed there. Does not return."""
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    wanted = sorted({*REQUIREMENTS, *(name for client in clients for name in client.distributions)})
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    at = next(index for index, argument in enumerate(arguments) if argument.startswith("--install"))
    del arguments[at:at + (1 if "=" in arguments[at] else 2)]
    os.environ["PYTHONPATH"] = str(CHECKOUT)
    os.execv(python, [str(python), "-m", "compat_tests.clients", *arguments])


if __name__ == "__main__":
    sys.exit(main())
