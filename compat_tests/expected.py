"""The intended differences: tests that dpool does not pass, each with the reason why it does not mean to.

Nothing that dpool should pass belongs here: a missing feature is a failure until it works. A test that passes though
listed here fails the run, so the list cannot go stale. Called by __main__.py, for the target dpool only.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Difference:
    """One line: the test as family/class.test (with * allowed), why it fails, and where if not everywhere."""

    test: str
    reason: str
    contexts: tuple[str, ...] = ()
    since: tuple[int, int] = (3, 11)
    until: tuple[int, int] = (4, 0)
    engine: str = ""  # "cluster" includes "hosts"
    runs: bool = True  # False: it is left out, for when it fails it leaves behind what its process then waits for

    def applies(self, test: str, context: str, version: tuple[int, int], engine: str) -> bool:
        """Whether this is about `test` under this start method, Python version (until: the first one without) and
        engine."""
        engines = ("", engine, "cluster") if engine == "hosts" else ("", engine)
        here = (not self.contexts or context in self.contexts) and self.engine in engines
        return here and self.since <= version < self.until and fnmatchcase(test, self.test)


_FOUND_AT_ONCE = (
    "white-box: its semaphore cannot be pickled. The stdlib has started a worker for each call before it finds out; "
    "dpool finds out first, and starts none"
)

_FINISHED = (
    "when the last worker of an executor that nobody refers to any more has run its max_tasks_per_child, the stdlib "
    "gives up the calls that wait; dpool replaces that worker and finishes them"
)

DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        "pool/TestPoolNotLeakOnFailure.test_release_unused_processes",
        "white-box: makes the start of a process of this program fail; the workers are started by the nodes",
        engine="cluster",
    ),
    Difference("executor/ProcessPoolExecutorTest.test_saturation", _FOUND_AT_ONCE, ("spawn", "forkserver")),
    Difference("executor/ProcessPoolShutdownTest.test_processes_terminate", _FOUND_AT_ONCE, ("spawn", "forkserver")),
    Difference(
        "executor/ProcessPoolExecutorTest.test_python_finalization_error",
        "white-box: lets one thread start and expects a second one, of a call queue, to fail; dpool starts one only",
    ),
    Difference("executor/ProcessPoolExecutorTest.test_gc_during_max_tasks_worker_exit_gh152967", _FINISHED,
               ("spawn", "forkserver")),
    Difference("executor/ProcessPoolExecutorTest.test_shutdown_no_wait_max_tasks_gh119592", _FINISHED,
               ("spawn", "forkserver")),
    Difference(
        "executor/ProcessPoolExecutorTest.test_failed_worker_replacement_breaks_pool",
        "white-box: makes the stdlib's private _spawn_worker fail; dpool's workers are started by another function",
        ("spawn", "forkserver"),
    ),
    Difference(
        "executor/ProcessPoolExecutorTest.test_force_shutdown_during_max_tasks_worker_exit",
        "white-box: sets the flag that terminate_workers() sets in the stdlib, instead of calling it; dpool has none",
        ("spawn", "forkserver"),
    ),
)


def reason(test: str, context: str, version: tuple[int, int], engine: str = "embedded") -> str | None:
    """Why `test` is meant to fail, or None if it is meant to pass."""
    return next((d.reason for d in DIFFERENCES if d.applies(test, context, version, engine)), None)


def left_out(test: str, context: str, version: tuple[int, int], engine: str) -> bool:
    """Whether `test` is not even run."""
    return any(not d.runs and d.applies(test, context, version, engine) for d in DIFFERENCES)
