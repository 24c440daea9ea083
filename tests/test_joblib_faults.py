"""Owns the tests of joblib's backend "dpool" under faults: each becomes an exception, what runs is stopped, and nothing
is left.

It asserts no times: only a hang reaches a deadline.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import executor_tasks as deeds
import joblib_tasks as tasks
import pytest
from executor_tasks import Gate, hold
from leftovers import GONE_S, MARK, Census, Watched, marked, new_mark

joblib = pytest.importorskip("joblib")

from joblib import Parallel, delayed, parallel_config  # noqa: E402

from dpool.errors import GroupBroken, RemoteError, WorkerDied  # noqa: E402
from dpool.joblib import warm  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """The fork server is started once, and stays."""
    assert _works()


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    """What stays warm between calls is all that stays."""
    warm.shelf.clear()
    census = Census()
    yield
    gc.collect()
    warm.shelf.clear()
    census.check()


def _works() -> bool:
    """Whether the next call is served."""
    return bool(Parallel(2, backend="dpool")(delayed(tasks.double)(i) for i in range(8)) == [2 * i for i in range(8)])


def _raises(kind: type[BaseException], *calls: Any, **options: Any) -> Any:
    with pytest.raises(kind) as caught:
        Parallel(2, backend="dpool", **options)(calls)
    assert _works()
    return caught.value


# -- exceptions


def test_an_exception_keeps_its_type_arguments_and_traceback() -> None:
    error = _raises(KeyError, delayed(deeds.raise_error)(KeyError, "who", 7))
    assert error.args == ("who", 7)
    assert "the source line" in str(error.__cause__) and "raise_error" in str(error.__cause__)


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt, StopIteration, TimeoutError])
@pytest.mark.parametrize("return_as", ["list", "generator"])
def test_every_kind_of_exception_arrives(kind: type[BaseException], return_as: str) -> None:
    with pytest.raises((kind, RuntimeError)):  # a generator must not raise StopIteration
        list(Parallel(2, backend="dpool", return_as=return_as)([delayed(deeds.raise_error)(kind, "text")]))
    assert _works()


def test_an_exception_that_cannot_be_rebuilt_arrives_as_its_text() -> None:
    error = _raises(RemoteError, delayed(deeds.raise_picky)())
    assert str(error) == "this and that" and error.type_name.endswith("PickyError")
    assert "raise_picky" in str(error.__cause__)


def test_an_exception_of_the_input_is_the_calls() -> None:
    def inputs(kind: type[BaseException]) -> Iterator[Any]:
        yield from [delayed(tasks.double)(1)] * 10
        raise kind("no more")

    for kind in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(kind, match="no more"):
            Parallel(2, backend="dpool", batch_size=1)(inputs(kind))
    assert _works()


# -- what cannot be pickled, or rebuilt


def test_an_argument_that_cannot_be_pickled_is_named_by_its_path() -> None:
    good = [delayed(tasks.double)(1)] * 3
    error = _raises(pickle.PicklingError, *good, delayed(tasks.as_it_is)({"a": [threading.Lock()]}), *good)
    assert "Could not pickle the task" in str(error) and "args[0]['a'][0]: _thread.lock" in str(error)


def test_a_result_that_cannot_be_pickled_is_an_exception() -> None:
    error = _raises(pickle.PicklingError, delayed(deeds.make_lock)())
    assert "results[0]: _thread.lock" in str(error)


def test_an_argument_that_cannot_be_rebuilt_is_an_exception_with_a_note() -> None:
    error = _raises(pickle.UnpicklingError, delayed(tasks.as_it_is)(deeds.BrokenWhenRebuilt()))
    assert "could not be rebuilt in the worker" in error.__notes__[0]


def test_a_result_that_cannot_be_rebuilt_is_an_exception() -> None:
    _raises(pickle.UnpicklingError, delayed(deeds.make)(deeds.BrokenWhenRebuilt))


def test_an_argument_that_ends_the_worker_is_an_exception() -> None:
    _raises(BrokenProcessPool, delayed(tasks.as_it_is)(deeds.DiesWhenRebuilt()))


# -- a worker dies


@pytest.mark.parametrize(("function", "argument", "exitcode", "text"), [
    (deeds.kill_self, signal.SIGKILL, -signal.SIGKILL, "SIGKILL"), (deeds.exit_process, 3, 3, "3"),
    (deeds.kill_self, signal.SIGSEGV, -signal.SIGSEGV, "SIGSEGV"), (deeds.exit_process, 0, 0, "0"),
])
@pytest.mark.parametrize("return_as", ["list", "generator_unordered"])
def test_a_dead_worker_is_an_exception(function: Callable[..., Any], argument: int, exitcode: int, text: str,
                                       return_as: str) -> None:
    with pytest.raises(BrokenProcessPool) as caught:
        list(Parallel(2, backend="dpool", return_as=return_as)(
            [*[delayed(tasks.double)(1)] * 5, delayed(function)(argument), *[delayed(tasks.double)(1)] * 5]))
    error = caught.value
    assert isinstance(error, WorkerDied) and error.exitcode == exitcode and error.pid and text in str(error)
    assert _works()


def test_an_idle_worker_that_dies_is_replaced() -> None:
    for pid in set(Parallel(2, backend="dpool")(delayed(tasks.worker)() for _ in range(8))):
        watched = Watched([pid])
        os.kill(pid, signal.SIGKILL)
        assert watched.left_after(GONE_S) == []
    assert _works()


def test_an_initializer_that_fails_is_an_exception() -> None:
    error = _raises(GroupBroken, delayed(tasks.double)(1), initializer=deeds.fail_to_initialize)
    assert "no initializer today" in f"{error} {error.__cause__!r} {error.__cause__}"


# -- what runs is stopped


class _Held:
    """Two tasks that would run for ever, and what to wait for until they are gone."""

    def __init__(self, folder: Path) -> None:
        self.gates = [Gate(folder, str(number)) for number in range(2)]
        self.calls = [delayed(hold)(gate.started, gate.opened) for gate in self.gates]
        self.watched: Watched | None = None

    def stand(self) -> None:
        """Wait until both run."""
        self.watched = Watched(gate.wait() for gate in self.gates)

    def are_gone(self) -> bool:
        assert self.watched is not None
        return self.watched.left_after(GONE_S) == []


def test_a_timeout_stops_what_runs(tmp_path: Path) -> None:
    held = _Held(tmp_path)
    with Parallel(2, backend="dpool", timeout=3600, batch_size=1) as parallel:
        def lose_patience() -> None:
            held.stand()
            parallel.timeout = 0.001

        waiting = threading.Thread(target=lose_patience)
        waiting.start()
        with pytest.raises(multiprocessing.TimeoutError):
            parallel(held.calls)
        waiting.join()
        assert held.are_gone()
        parallel.timeout = 3600
        assert parallel(delayed(tasks.double)(i) for i in range(4)) == [0, 2, 4, 6]


@pytest.mark.parametrize("return_as", ["list", "generator", "generator_unordered"])
def test_an_error_stops_what_runs(return_as: str, tmp_path: Path) -> None:
    held, last = _Held(tmp_path), Gate(tmp_path, "last")
    with Parallel(3, backend="dpool", batch_size=1, return_as=return_as) as parallel:
        def fail() -> None:
            held.stand()
            last.wait()
            last.open()

        waiting = threading.Thread(target=fail)
        waiting.start()
        bad = delayed(deeds.hold_and_call)(last.started, last.opened, deeds.raise_error, ValueError, "bad")
        with pytest.raises(ValueError, match="bad"):
            list(parallel([*held.calls, bad]))
        waiting.join()
        assert held.are_gone()
        assert sorted(parallel(delayed(tasks.double)(i) for i in range(4))) == [0, 2, 4, 6]


@pytest.mark.parametrize("return_as", ["generator", "generator_unordered"])
@pytest.mark.filterwarnings("ignore:.*have been cancelled.*:UserWarning", "ignore:.*not used.*:UserWarning")
def test_a_dropped_generator_stops_what_runs(return_as: str, tmp_path: Path) -> None:
    held = _Held(tmp_path)
    results = Parallel(2, backend="dpool", batch_size=1, return_as=return_as)(
        [*held.calls, *[delayed(deeds.mark)(str(tmp_path / "marks"))] * 20])
    held.stand()
    del results
    gc.collect()
    assert held.are_gone()
    assert deeds.marks(tmp_path / "marks") == 0
    assert _works()


@pytest.mark.parametrize("return_as", ["list", "generator"])
def test_ctrl_c_stops_what_runs(return_as: str, tmp_path: Path) -> None:
    held = _Held(tmp_path)

    def interrupt() -> None:
        held.stand()
        os.kill(os.getpid(), signal.SIGINT)

    waiting = threading.Thread(target=interrupt)
    waiting.start()
    with pytest.raises(KeyboardInterrupt):
        list(Parallel(2, backend="dpool", return_as=return_as)(held.calls))
    waiting.join()
    assert held.are_gone()
    assert _works()


def test_another_calls_tasks_are_not_stopped(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    with parallel_config(backend="dpool", n_jobs=2):
        other = Parallel(return_as="generator")([delayed(hold)(gate.started, gate.opened, "mine")])
        gate.wait()
        with pytest.raises(ValueError, match="bad"):
            Parallel()([delayed(deeds.raise_error)(ValueError, "bad")] * 3)
        gate.open()
        assert list(other) == ["mine"]


# -- programs


def _program(text: str, tmp_path: Path, mark: str) -> subprocess.Popen[str]:
    file = tmp_path / "program.py"
    file.write_text(text)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen([sys.executable, str(file)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env={**os.environ, "PYTHONPATH": path, MARK: mark})


PROGRAM = """
import sys
import dpool
from joblib import Parallel, delayed
from executor_tasks import hold
from joblib_tasks import double

print(Parallel(2, backend="dpool")(delayed(double)(i) for i in range(4)), flush=True)
"""


def test_a_program_needs_no_main_guard_ends_by_itself_and_leaves_nothing(tmp_path: Path) -> None:
    mark = new_mark()
    program = _program(PROGRAM + "print(Parallel(2, backend='dpool')(delayed(lambda x: x + 1)(i) for i in range(3)))",
                       tmp_path, mark)
    out, error = program.communicate(timeout=120)
    assert (out, error, program.returncode) == ("[0, 2, 4, 6]\n[1, 2, 3]\n", "", 0)
    assert Watched(marked(mark)).left_after(GONE_S) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_program_that_is_ended_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    gate, mark = Gate(tmp_path), new_mark()
    held = f"delayed(hold)({gate.started!r}, {gate.opened!r})"
    program = _program(PROGRAM + f"Parallel(2, backend='dpool')([{held}])", tmp_path, mark)
    gate.wait()
    watched = Watched(marked(mark))
    os.killpg(program.pid, number)
    out, error = program.communicate(timeout=120)
    assert out == "[0, 2, 4, 6]\n" and program.returncode == -number
    assert watched.left_after(GONE_S) == []
    # The program's own traceback, and no worker's.
    assert error.count("Traceback") == (1 if number == signal.SIGINT else 0), error


def _in_a_child(writer: Any) -> None:
    writer.send(_works())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_has_workers_of_its_own(method: str) -> None:
    assert _works()  # the parent has some, which are not the child's
    context = multiprocessing.get_context(method)
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_in_a_child, args=(writer,))  # type: ignore[attr-defined]
    child.start()
    writer.close()
    assert reader.recv() is True
    reader.close()
    child.join()
    assert child.exitcode == 0
    child.close()
    assert _works()


# -- leaks


def test_many_calls_leave_nothing_more_than_one() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros(1 << 18)

    def call() -> None:
        with parallel_config(backend="dpool", n_jobs=2):
            assert Parallel()(delayed(tasks.first)(array) for _ in range(4)) == [0] * 4
            assert len(Parallel()(delayed(tasks.as_it_is)(array) for _ in range(2))) == 2
            assert next(Parallel(return_as="generator", pre_dispatch=1)(delayed(tasks.first)(array)
                                                                        for _ in range(1))) == 0
            with pytest.raises(ValueError, match="bad"):
                Parallel()([delayed(deeds.raise_error)(ValueError, "bad")])

    call()
    # The groups that stay warm are the same ones, or as many.
    workers = len(warm.shelf.idle)
    census = Census()
    for _ in range(10):
        call()
    assert len(warm.shelf.idle) <= max(workers, warm.MAX_IDLE)
    warm.shelf.clear()
    census.check()


def test_idle_workers_end_after_their_time() -> None:
    options = {"idle_worker_timeout": 0.01}
    pids = set(Parallel(2, backend="dpool", **options)(delayed(tasks.worker)() for _ in range(4)))
    watched = Watched(pids)
    assert watched.left_after(60) == []
    assert warm.shelf.idle == []
