"""emcee: an ensemble of walkers samples a Gaussian; its `pool` may be a Pool or an executor."""

from typing import Any

import emcee
import numpy as np

from compat_tests.clients.doors import Doors, worked, workload

_COVARIANCE = np.array([[2.0, 0.3, 0.1], [0.3, 1.0, 0.2], [0.1, 0.2, 0.5]])
_INVERSE = np.linalg.inv(_COVARIANCE)


def log_prob(theta: Any, inverse: Any) -> tuple[float, float]:
    worked()
    return -0.5 * float(theta @ inverse @ theta), float(theta.sum())


def _sample(pool: Any) -> Any:
    np.random.seed(5)
    start = np.random.randn(24, 3)
    sampler = emcee.EnsembleSampler(24, 3, log_prob, args=(_INVERSE,), pool=pool)
    sampler.run_mcmc(start, 60)
    return sampler.get_chain(), sampler.get_log_prob(), sampler.get_blobs(), sampler.acceptance_fraction


@workload
def with_pool(doors: Doors) -> Any:
    with doors.Pool() as pool:
        return _sample(pool)


@workload
def with_executor(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor:
        return _sample(executor)


@workload
def moves(doors: Doors) -> Any:
    np.random.seed(6)
    mixed = [(emcee.moves.DEMove(), 0.8), (emcee.moves.DESnookerMove(), 0.2)]
    with doors.Pool() as pool:
        sampler = emcee.EnsembleSampler(24, 3, log_prob, args=(_INVERSE,), pool=pool, moves=mixed)
        state = sampler.run_mcmc(np.random.randn(24, 3), 20)
        sampler.reset()
        sampler.run_mcmc(state, 20)
        return sampler.get_chain(flat=True)
