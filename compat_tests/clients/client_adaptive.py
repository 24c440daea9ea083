"""adaptive: its runners, blocking and asynchronous, with an executor."""

import asyncio
import warnings
from typing import Any

import adaptive

from compat_tests.clients.doors import Doors, worked, workload

warnings.filterwarnings("ignore", category=DeprecationWarning)


def peak(x: float) -> float:
    worked()
    return x + 0.01 / (0.01 + x * x)


def cube(x: int) -> int:
    worked()
    return x ** 3


@workload
def learner_1d(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor:
        learner = adaptive.Learner1D(peak, (-1, 1))
        # With one point at a time the order does not depend on how fast each is.
        adaptive.BlockingRunner(learner, npoints_goal=40, executor=executor, ntasks=1)
        return sorted(learner.data.items())


@workload
def asynchronous(doors: Doors) -> Any:
    async def sequence(executor: Any) -> Any:
        learner = adaptive.SequenceLearner(cube, range(60))
        runner = adaptive.AsyncRunner(learner, goal=adaptive.SequenceLearner.done, executor=executor)
        await runner.task
        return list(learner.result())

    with doors.ProcessPoolExecutor() as executor:
        return asyncio.run(sequence(executor))


@workload
def integrator(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor:
        learner = adaptive.IntegratorLearner(peak, bounds=(-1, 1), tol=1e-6)
        adaptive.BlockingRunner(learner, goal=adaptive.IntegratorLearner.done, executor=executor, ntasks=1)
        return float(learner.igral)
