"""Runs one suite in child processes, with a limit for each test, and sees to it that nothing of it stays behind.

Every process of a run carries a mark in its environment, which its descendants inherit whatever session or group
they move to: what still has the mark when the child has ended was left over. Called by __main__.py, in threads.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compat_tests.child import AROUND, AROUND_LIMIT_S

CHECKOUT = Path(__file__).resolve().parent.parent

# Longer: a hang costs more time. Shorter: a slow machine is taken for a hang. CPython's tests take up to 15 s each.
TEST_LIMIT_S = 120.0
# What the stdlib itself leaves running for a moment (resource tracker, fork server) ends by then.
LEFT_OVER_GRACE_S = 3.0
# Characters of a dead or hanging child's output that are shown: enough for the stacks of a dozen threads.
OUTPUT_SHOWN = 6000

# Begins the mark of every process that this one started, down to the last descendant.
MARK = f"DPOOL_COMPAT_MARK={os.getpid()}-"


@dataclass(frozen=True, slots=True)
class Suite:
    """A class of tests under a start method."""

    family: str
    name: str
    context: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.family}/{self.name}/{self.context}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one test: passed, failed or skipped."""

    test: str
    outcome: str
    detail: str = ""
    seconds: float = 0.0


@dataclass(slots=True)
class SuiteRun:
    """The outcomes of a suite, one for each test, and one more for each thing that went wrong around them."""

    suite: Suite
    outcomes: list[Outcome] = field(default_factory=list)
    output: str = ""
    seconds: float = 0.0

    def waiting(self) -> list[str]:
        """The tests that have no outcome yet."""
        known = {outcome.test for outcome in self.outcomes}
        return [test for test in self.suite.tests if test not in known]


def run(suite: Suite, target: str, limit_s: float = TEST_LIMIT_S) -> SuiteRun:
    """Run a suite to its end. A test that hangs or kills the process fails, and the others are run without it."""
    done = SuiteRun(suite)
    started = time.monotonic()
    while waiting := done.waiting():
        with tempfile.TemporaryDirectory(prefix="compat_tests-") as folder:
            _run_child(done, waiting, target, limit_s, Path(folder))
    done.seconds = time.monotonic() - started
    return done


def _run_child(done: SuiteRun, tests: list[str], target: str, limit_s: float, folder: Path) -> None:
    """One child over `tests`; afterwards at least one of them has an outcome."""
    suite = done.suite
    arguments = (target, suite.family, suite.name, suite.context, tests, limit_s)
    mark = f"{MARK}{uuid.uuid4()}"
    variable, _, value = mark.partition("=")
    reading, writing = os.pipe()
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), variable: value}
    # A folder of its own: CPython's tests write into the current one.
    with open(folder / "output", "w+b") as output, open(reading, "rb", buffering=0) as channel:
        child = subprocess.Popen(
            [sys.executable, "-c", f"from compat_tests.child import main; main({writing}, *{arguments!r})"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        running: str | None = None
        around: Outcome | None = None
        try:
            for event in _events(child, channel, limit_s):
                running = event["test"] if event["event"] == "start" else None
                if event["event"] == "end":
                    outcome = Outcome(event["test"], event["outcome"], event["detail"], event["seconds"])
                    if outcome.test == AROUND:
                        around = around or outcome
                    if outcome.test != AROUND or outcome.outcome == "failed":
                        done.outcomes.append(outcome)
            ending = f"the process ended with {child.returncode}" if child.returncode else ""
        except TimeoutError:
            ending = f"nothing happened for {limit_s if running else AROUND_LIMIT_S:.0f} s"
        left_over = end_all(mark, 0 if ending else LEFT_OVER_GRACE_S)
        child.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
        done.output += text

    if ending:
        detail = f"{ending}; the end of the output:\n{text[-OUTPUT_SHOWN:]}"
        done.outcomes.append(Outcome(running or AROUND, "failed", detail))
    elif left_over:
        done.outcomes.append(Outcome(AROUND, "failed", "left-over processes:\n" + "\n".join(left_over)))
    if not running and (waiting := [test for test in tests if test in done.waiting()]):
        # The child ended between two tests, so starting over would end the same way.
        reason = around or Outcome(AROUND, "failed", ending or "the test was not run")
        done.outcomes.extend(Outcome(test, reason.outcome, reason.detail) for test in waiting)


def _events(child: subprocess.Popen[bytes], channel: Any, limit_s: float) -> Iterator[dict[str, Any]]:
    """The child's events until it ends. Raises TimeoutError if a test, or what is around them, exceeds its limit.

    Forked workers hold the writing end too, so the end is seen by the child's own descriptor, not by end-of-file.
    """
    os.set_blocking(channel.fileno(), False)
    pending = b""
    wait_s = AROUND_LIMIT_S
    with _pidfd(child.pid) as process:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        poll.register(channel, select.POLLIN)
        while True:
            ready = [descriptor for descriptor, _ in poll.poll(wait_s * 1000)]
            if not ready:
                raise TimeoutError
            while data := channel.read(65536):
                *lines, pending = (pending + data).split(b"\n")
                for event in map(json.loads, lines):
                    wait_s = limit_s if event["event"] == "start" else AROUND_LIMIT_S
                    yield event
            if data == b"" and channel.fileno() in ready:
                poll.unregister(channel)  # everyone has closed it: only the end of the process is left to wait for
            if process in ready:
                child.wait()
                return


@contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def end_all(mark: str, grace_s: float = 0) -> list[str]:
    """Kill every process whose mark begins so, after giving it `grace_s` to go; returns what had to be killed."""
    deadline = time.monotonic() + grace_s
    while (marked := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)  # they are not our children: there is nothing to wait on
    killed = []
    # Several rounds: one that is being killed may just have forked.
    while marked:
        for pid, command in marked.items():
            killed.append(f"{pid}: {command}")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        marked = _marked(mark)
    return killed


def _marked(mark: str) -> dict[int, str]:
    """The living processes whose mark begins so, with their command lines. The dead have no environment."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with suppress(OSError):
                environment = Path(entry.path, "environ").read_bytes()
                if any(variable.startswith(mark.encode()) for variable in environment.split(b"\0")):
                    command = Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(entry.name)] = command.decode(errors="replace")[:200]
    return found
