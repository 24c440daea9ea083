"""nautilus: nested sampling with a Pool for the likelihood and one for its neural networks."""

from typing import Any

import nautilus

from compat_tests.clients.doors import Doors, worked, workload


def likelihood(parameters: Any) -> float:
    worked()
    return float(-0.5 * sum(((value - 0.5) / 0.1) ** 2 for value in parameters.values()))


@workload
def two_pools(doors: Doors) -> Any:
    prior = nautilus.Prior()
    prior.add_parameter("a")
    prior.add_parameter("b")
    with doors.Pool() as first, doors.Pool() as second:
        sampler = nautilus.Sampler(prior, likelihood, n_live=200, n_networks=1, pool=(first, second), seed=4)
        sampler.run(n_eff=300, discard_exploration=False)
        points, log_w, log_l = sampler.posterior()
        return points, log_w, log_l, float(sampler.log_z)
