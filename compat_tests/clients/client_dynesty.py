"""dynesty: nested sampling with a Pool, an executor, and its own pool, which makes a Pool of a spawn context."""

from typing import Any

import dynesty
import dynesty.pool
import numpy as np

from compat_tests.clients.doors import WORKERS, Doors, worked, workload


def log_likelihood(x: Any) -> float:
    worked()
    return float(-0.5 * np.sum(x * x) / 0.04)


def prior_transform(u: Any) -> Any:
    return 2.0 * u - 1.0


def _sample(pool: Any, likelihood: Any = log_likelihood, transform: Any = prior_transform) -> Any:
    sampler = dynesty.NestedSampler(likelihood, transform, 3, nlive=60, pool=pool, queue_size=WORKERS,
                                    rstate=np.random.default_rng(3), sample="rwalk")
    sampler.run_nested(dlogz=1.0, print_progress=False)
    results = sampler.results
    return results.samples, results.logz, results.ncall


@workload
def with_pool(doors: Doors) -> Any:
    with doors.Pool() as pool:
        return _sample(pool)


@workload
def with_executor(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor:
        return _sample(executor)


@workload
def its_own_pool(doors: Doors) -> Any:
    with (doors.imported("dynesty.pool"),
          dynesty.pool.Pool(WORKERS, log_likelihood, prior_transform) as pool):
        return _sample(pool, pool.loglike, pool.prior_transform)


@workload
def dynamic(doors: Doors) -> Any:
    with doors.Pool() as pool:
        sampler = dynesty.DynamicNestedSampler(log_likelihood, prior_transform, 2, pool=pool, queue_size=WORKERS,
                                               rstate=np.random.default_rng(4), use_pool={"prior_transform": False})
        sampler.run_nested(nlive_init=40, maxiter=150, print_progress=False)
        return sampler.results.samples, sampler.results.logl
