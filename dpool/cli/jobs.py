"""Which batch job this process belongs to, and which of the job's processes it is: Slurm's srun, or Open MPI's mpirun.

Reads the variables that these set; opens nothing, and starts nothing. Called by cli/run.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Job:
    """One start of a program in several processes.

    `name` is the same in all of them, and no other start has it; `host` is what other machines call this one, "" if
    that was not said; `scattered`: they are on more than one machine; `cpus`: how many CPUs are this process's.
    """

    name: str
    rank: int
    size: int
    host: str
    scattered: bool
    cpus: int


def job_of(environment: Mapping[str, str]) -> Job | None:
    """The job, None if this process is alone. Raises ValueError if the variables do not fit together."""
    try:
        # srun's. In the batch script itself, which one machine runs, there are no tasks of a step.
        if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
            return _slurm(environment)
        if "OMPI_COMM_WORLD_RANK" in environment and "PMIX_NAMESPACE" in environment:
            return _open_mpi(environment)
    except (KeyError, ValueError) as error:
        raise ValueError(f"this looks like a process of a batch job, but its variables do not fit together "
                         f"({type(error).__name__}: {error}): --local runs the program here alone") from None
    return None


def _slurm(environment: Mapping[str, str]) -> Job | None:
    rank, size = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
    if size == 1:
        return None
    machines = int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
    here = _tasks_here(environment.get("SLURM_STEP_TASKS_PER_NODE", ""), int(environment.get("SLURM_NODEID", "0")))
    whole = int(environment.get("SLURM_CPUS_ON_NODE") or os.cpu_count() or 1)
    # What srun binds it to is what it has: the variable may be the batch script's, and srun not have been told.
    given = environment.get("SLURM_CPUS_PER_TASK")
    parts = (environment["SLURM_JOB_ID"], environment["SLURM_STEP_ID"], environment.get("SLURM_RESTART_COUNT", "0"))
    return Job(f"slurm-{'.'.join(parts)}", rank, size, environment.get("SLURMD_NODENAME", ""), machines > 1,
               min(int(given), len(os.sched_getaffinity(0))) if given else _share(whole, here))


def _open_mpi(environment: Mapping[str, str]) -> Job | None:
    rank, size = int(environment["OMPI_COMM_WORLD_RANK"]), int(environment["OMPI_COMM_WORLD_SIZE"])
    if size == 1:
        return None
    here = int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"])
    name = re.sub(r"[^\w.-]", "_", environment["PMIX_NAMESPACE"])
    return Job(f"ompi-{name}", rank, size, "", here < size, _share(os.cpu_count() or 1, here))


def _tasks_here(text: str, node: int) -> int:
    """How many tasks are on a node, of a text like 2(x3),1."""
    counts: list[int] = []
    for match in re.finditer(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node] if node < len(counts) else 1


def _share(whole: int, processes: int) -> int:
    """The CPUs of one of the processes on this machine: those it is bound to, or its part of what all have."""
    bound = len(os.sched_getaffinity(0))
    return bound if bound < whole else max(bound // processes, 1)
