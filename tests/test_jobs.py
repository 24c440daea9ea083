"""Owns the tests of `dpool run` in a batch job: the processes of one, with the variables of Slurm or Open MPI, on this
machine.

They end what they have started, and count what is left. What else `dpool run` does is in test_run.py.
"""

from __future__ import annotations

import os
import re
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from clusters import Process, children_of, until
from leftovers import MARK, Watched, marked, new_mark

from dpool.cli.jobs import Job, job_of
from dpool.cluster.wire.keys import Keys, write

ROOT = Path(__file__).resolve().parent.parent


class Step:
    """The processes of one srun, each with a machine's name of its own."""

    def __init__(self, directory: Path, size: int) -> None:
        self.directory = directory
        self.size = size
        self.mark = new_mark()
        self.processes: list[Process] = []
        self.config = directory / "config" / "dpool"

    def environment(self, rank: int) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        return kept | {
            "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", MARK: self.mark,
            "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
            "XDG_CONFIG_HOME": str(self.directory / "config"),
            "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank),
            "SLURM_STEP_NUM_TASKS": str(self.size), "SLURM_STEP_NUM_NODES": str(self.size),
            "SLURM_STEP_TASKS_PER_NODE": f"1(x{self.size})", "SLURM_CPUS_PER_TASK": "2", "SLURM_CPUS_ON_NODE": "2",
            "SLURMD_NODENAME": "127.0.0.1", "SLURM_JOB_NODELIST": f"n[1-{self.size}]"}

    def start(self, rank: int, *command: str, before: str = "", **more: str) -> Process:
        """One process; `before` is code that it runs first."""
        how = ["-c", f"{before}\nimport sys\nfrom dpool.cli.main import main\nsys.exit(main(sys.argv[1:]))"]
        process = Process([sys.executable, *(how if before else ["-m", "dpool"]), "run", *command],
                          self.environment(rank) | more, self.directory)
        self.processes.append(process)
        return process

    def start_all(self, *command: str) -> Process:
        """All processes, the others first; returns the first one."""
        for rank in range(1, self.size):
            self.start(rank, *command)
        return self.start(0, *command)

    def left(self) -> list[str]:
        """The processes of the step that do not end."""
        return Watched(marked(self.mark)).left_after(30)

    def end(self) -> None:
        for pid in marked(self.mark):
            os.kill(pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()


@pytest.fixture
def step(tmp_path: Path) -> Iterator[Step]:
    step = Step(tmp_path, 3)
    yield step
    step.end()


def program(directory: Path, text: str) -> str:
    (directory / "program.py").write_text(dedent(text))
    return "program.py"


SPANNING = """
    import multiprocessing, os, sys, time

    def meet(directory):
        # Every node's workers are at it before the first returns.
        open(f"{directory}/{os.getppid()}", "w").close()
        while len(os.listdir(directory)) < 3:
            time.sleep(0.01)
        return os.getppid()

    if __name__ == "__main__":
        os.mkdir("meeting")
        with multiprocessing.Pool() as pool:
            parents = pool.map(meet, [os.path.abspath("meeting")] * 6, chunksize=1)
            print("nodes:", len(set(parents)), "workers:", len(pool._pool), flush=True)
        sys.exit(int(sys.argv[1]))
"""


def test_the_first_process_runs_the_program_on_all(step: Step) -> None:
    first = step.start_all("--", "python", program(step.directory, SPANNING), "7")
    assert first.wait() == 7
    cpus = min(2, len(os.sched_getaffinity(0)))
    assert [line for line in first.lines if line.startswith("nodes")] == [f"nodes: 3 workers: {3 * cpus}"]
    assert [process.wait() for process in step.processes[:-1]] == [0, 0]
    assert not step.left()
    assert os.listdir(step.config) == ["key"]
    assert stat.S_IMODE(os.stat(step.config / "key").st_mode) == 0o600


def test_a_key_that_is_there_is_used_and_nobody_tells_it(step: Step) -> None:
    keys = Keys.new()
    write(step.directory / "secret" / "mine", keys)
    first = step.start_all("--key", "secret/mine", program(step.directory, """
        import multiprocessing, sys
        if __name__ == "__main__":
            with multiprocessing.Pool() as pool:
                pool.map(abs, range(100))
                print("ready", flush=True)
                sys.stdin.close()
                while not __import__("os").path.exists("go"):
                    __import__("time").sleep(0.01)
    """))
    first.expect("ready")
    secret = keys.text().split(":")[1].encode()
    found = marked(step.mark)
    assert len(found) >= 3 + 1 + 3 + 3  # processes, companion, zygotes, workers
    for pid in found:
        for name in ("environ", "cmdline"):
            assert secret not in Path(f"/proc/{pid}/{name}").read_bytes()
    assert sorted(os.listdir(step.directory / "secret")) == ["mine", "run-slurm-4711.0.0"]
    (step.directory / "go").touch()
    assert [process.wait() for process in step.processes] == [0, 0, 0]
    assert not step.left()
    assert os.listdir(step.directory / "secret") == ["mine"] and not step.config.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_first_process_dies_all_end(number: int, step: Step) -> None:
    first = step.start_all(program(step.directory, """
        import multiprocessing, time
        if __name__ == "__main__":
            pool = multiprocessing.Pool()
            print(pool.map(abs, [-1]), flush=True)
            time.sleep(600)
    """))
    first.expect(r"\[1\]")
    assert first.end(number) == -number
    assert not step.left()
    assert os.listdir(step.config) == ["key"]


def test_when_the_companion_dies_with_it_the_others_end_by_themselves(step: Step) -> None:
    name = program(step.directory, "import time\nprint('ready', flush=True)\ntime.sleep(600)\n")
    for rank in (1, 2):
        step.start(rank, name, before="from dpool.cli import batch; batch.ORPHAN_AFTER_S = 0.2")
    first = step.start(0, name)
    first.expect("ready")
    others = {process.pid for process in step.processes[:2]}
    [companion] = children_of(first.pid)
    os.kill(companion, signal.SIGKILL)
    first.end(signal.SIGKILL)
    assert not step.left()
    assert {process.pid for process in step.processes[:2] if process.wait() == 0} == others
    assert os.listdir(step.config) == ["key"]


def test_the_program_goes_on_without_those_that_do_not_come(step: Step) -> None:
    first = step.start(0, program(step.directory, "print('runs')"),
                       before="from dpool.cli import batch; batch.OTHERS_WITHIN_S = 0.1")
    assert first.wait() == 0
    assert any(re.match(r"dpool: [01] of this job's 3 processes have joined within", line) for line in first.lines)
    assert "runs" in first.lines
    assert not step.left()


def test_the_others_do_not_wait_for_ever(step: Step) -> None:
    other = step.start(1, program(step.directory, "print('runs')"),
                       before="from dpool.cli import batch; batch.FIRST_WITHIN_S = 0.1")
    assert other.wait() == 1
    assert "the first process of this job has not begun" in other.lines[0]


def test_another_key_is_said(step: Step) -> None:
    name = program(step.directory, "print('ready', flush=True)\nimport time\ntime.sleep(600)\n")
    write(step.config / "key", Keys.new())
    (step.directory / "away").mkdir()
    write(step.directory / "away" / "key", Keys.new())
    first = step.start(0, name)
    until(lambda: (step.config / "run-slurm-4711.0.0").exists(), "the first process is there")
    (step.directory / "away" / "run-slurm-4711.0.0").write_text((step.config / "run-slurm-4711.0.0").read_text())
    other = step.start(1, name, DPOOL_KEY_FILE=str(step.directory / "away" / "key"))
    assert other.wait() == 1
    assert "all need the same key file" in other.lines[0]
    first.end(signal.SIGKILL)
    assert not step.left()


def test_a_bad_key_file_ends_the_first_process_with_a_sentence(step: Step) -> None:
    step.config.mkdir(parents=True)
    (step.config / "key").write_text("nonsense\n")
    (step.config / "key").chmod(0o600)
    first = step.start(0, program(step.directory, "print('runs')"),
                       before="from dpool.cli import batch; batch.FAILED_FOR_S = 0")
    assert first.wait() == 1
    assert len(first.lines) == 2 and "holds no dpool key" in first.lines[0]


def test_the_others_hear_that_the_first_process_has_failed(step: Step) -> None:
    name = program(step.directory, "print('runs')")
    other = step.start(1, name)
    first = step.start(0, name, SLURMD_NODENAME="no-such-machine.invalid")
    assert other.wait() == 1
    assert "the first process of this job could not start the cluster: this machine is called" in other.lines[0]
    assert first.wait() == 1
    assert "no-such-machine.invalid, which has no address here" in "".join(first.lines)
    assert [entry for entry in os.listdir(step.config) if entry != "key"] == []


# -- which job


def slurm(**more: str) -> dict[str, str]:
    return {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4",
            "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_NODEID": "0",
            "SLURMD_NODENAME": "n1", "SLURM_CPUS_ON_NODE": "12", **more}


def test_slurm_s_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert job_of(slurm()) == Job("slurm-12.3.0", 2, 4, "n1", True, 4)
    assert job_of(slurm(SLURM_NODEID="1")) == Job("slurm-12.3.0", 2, 4, "n1", True, 12)
    assert job_of(slurm(SLURM_CPUS_PER_TASK="2", SLURM_RESTART_COUNT="1")) == Job("slurm-12.3.1", 2, 4, "n1", True, 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5})
    assert job_of(slurm(SLURM_STEP_NUM_NODES="1")) == Job("slurm-12.3.0", 2, 4, "n1", False, 2)
    assert job_of(slurm(SLURM_CPUS_PER_TASK="8")) == Job("slurm-12.3.0", 2, 4, "n1", True, 2)


def test_open_mpi_s_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    given = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
             "PMIX_NAMESPACE": "prterun-n1-99@1"}
    assert job_of(given) == Job("ompi-prterun-n1-99_1", 1, 4, "", True, 4)


@pytest.mark.parametrize("given", [
    {}, {"SLURM_JOB_ID": "12", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, slurm(SLURM_STEP_NUM_TASKS="1"),
    {"OMPI_COMM_WORLD_RANK": "0"}], ids=["none", "the batch script", "one task", "half of Open MPI"])
def test_a_process_that_is_alone(given: dict[str, str]) -> None:
    assert job_of(given) is None


def test_variables_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="KeyError: 'SLURM_STEP_ID'.*--local"):
        job_of({name: value for name, value in slurm().items() if name != "SLURM_STEP_ID"})
