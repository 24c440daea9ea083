"""Platypus: multi-objective evolution with its evaluators: a Pool given, a Pool of its own, an executor of its own."""

import random
from typing import Any

from platypus import (
    NSGAII,
    MultiprocessingEvaluator,
    PoolEvaluator,
    Problem,
    ProcessPoolEvaluator,
    Real,
)

from compat_tests.clients.doors import WORKERS, Doors, worked, workload


def schaffer(variables: Any) -> list[float]:
    worked()
    return [variables[0] ** 2, (variables[0] - 2) ** 2]


def _evolve(evaluator: Any) -> Any:
    random.seed(8)
    problem = Problem(1, 2)
    problem.types[:] = Real(-10, 10)
    problem.function = schaffer
    with evaluator:
        algorithm = NSGAII(problem, population_size=40, evaluator=evaluator)
        algorithm.run(400)
    return [(list(solution.variables), list(solution.objectives)) for solution in algorithm.result]


@workload
def with_pool(doors: Doors) -> Any:
    return _evolve(PoolEvaluator(doors.Pool()))


@workload
def its_own_pool(doors: Doors) -> Any:
    with doors.imported():
        return _evolve(MultiprocessingEvaluator(WORKERS))


@workload
def its_own_executor(doors: Doors) -> Any:
    with doors.imported():
        return _evolve(ProcessPoolEvaluator(WORKERS))
