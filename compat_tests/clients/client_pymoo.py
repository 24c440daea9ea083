"""pymoo: elementwise problems through StarmapParallelization, with one and several objectives."""

from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.soo.nonconvex.ga import GA
from pymoo.core.problem import ElementwiseProblem
from pymoo.optimize import minimize
from pymoo.parallelization.starmap import StarmapParallelization

from compat_tests.clients.doors import Doors, worked, workload


class Constrained(ElementwiseProblem):
    """Two objectives and a constraint."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(n_var=4, n_obj=2, n_ieq_constr=1, xl=-2.0, xu=2.0, **kwargs)

    def _evaluate(self, x: Any, out: Any, *args: Any, **kwargs: Any) -> None:
        worked()
        out["F"] = [float((x ** 2).sum()), float(((x - 1) ** 2).sum())]
        out["G"] = [float(0.2 - x[0])]


class Sphere(ElementwiseProblem):
    """One objective."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(n_var=5, n_obj=1, xl=-1.0, xu=1.0, **kwargs)

    def _evaluate(self, x: Any, out: Any, *args: Any, **kwargs: Any) -> None:
        worked()
        out["F"] = float((x ** 2).sum())


@workload
def two_objectives(doors: Doors) -> Any:
    with doors.Pool() as pool:
        problem = Constrained(elementwise_runner=StarmapParallelization(pool.starmap))
        result = minimize(problem, NSGA2(pop_size=20), ("n_gen", 8), seed=1)
    return result.F, result.X, result.G


@workload
def one_objective(doors: Doors) -> Any:
    with doors.Pool() as pool:
        problem = Sphere(elementwise_runner=StarmapParallelization(pool.starmap))
        result = minimize(problem, GA(pop_size=20), ("n_gen", 8), seed=1)
    return np.asarray(result.F), np.asarray(result.X)
