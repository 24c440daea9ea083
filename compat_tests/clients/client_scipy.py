"""scipy: everything that takes `workers`, given a pool's map, and with a number, for which it makes a Pool itself."""

from typing import Any

import numpy as np
from scipy import integrate, optimize, stats

from compat_tests.clients.doors import WORKERS, Doors, foreign, worked, workload

_BOUNDS = [(-3.0, 3.0)] * 3


def rosenbrock(x: Any) -> float:
    worked()
    return float(optimize.rosen(x))


def oscillating(x: float) -> Any:
    worked()
    return np.array([np.sin(x), np.cos(3 * x), np.exp(-x)])


def residuals(x: Any) -> Any:
    worked()
    return np.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def _fields(result: Any) -> Any:
    return {key: result[key] for key in ("x", "fun", "nfev") if key in result}


def _evolve(workers: Any) -> Any:
    return _fields(optimize.differential_evolution(rosenbrock, _BOUNDS, rng=np.random.default_rng(1), maxiter=15,
                                                   updating="deferred", workers=workers))


@workload
def differential_evolution(doors: Doors) -> Any:
    with doors.Pool() as pool:
        return _evolve(pool.map)


@workload
def evolution_executor(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor:
        return _evolve(executor.map)


@workload
def workers_a_number(doors: Doors) -> Any:
    with doors.imported():
        return _evolve(WORKERS)


@workload
def brute(doors: Doors) -> Any:
    with doors.Pool() as pool:
        return optimize.brute(rosenbrock, ((-1, 1, 0.25), (-1, 1, 0.25)), full_output=True, finish=None,
                              workers=pool.map)


@workload
def quad_vec(doors: Doors) -> Any:
    with doors.Pool() as pool:
        return integrate.quad_vec(oscillating, 0, 20, workers=pool.map)[:2]


@workload
def shgo(doors: Doors) -> Any:
    with doors.Pool() as pool:
        return _fields(optimize.shgo(rosenbrock, _BOUNDS, n=32, iters=1, sampling_method="sobol", workers=pool.map))


@workload
def least_squares(doors: Doors) -> Any:
    with doors.Pool() as pool:
        return _fields(optimize.least_squares(residuals, [2.0, 2.0], workers=pool.map))


@workload
def minimize(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor:
        return _fields(optimize.minimize(rosenbrock, [1.3, 0.7, 0.8], method="L-BFGS-B",
                                         options={"workers": executor.map}))


@foreign
def graph_correlation(doors: Doors) -> Any:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(30, 1))
    with doors.Pool() as pool:
        result = stats.multiscale_graphcorr(x, x ** 2 + rng.normal(size=(30, 1)), reps=20, workers=pool.map,
                                            random_state=3)
    return float(result.statistic), float(result.pvalue), result.mgc_dict["null_dist"]
