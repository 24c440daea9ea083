"""nevergrad: an optimizer that submits its candidates to an executor, in batches."""

import warnings
from typing import Any

import nevergrad as ng
import numpy as np

from compat_tests.clients.doors import Doors, worked, workload

warnings.simplefilter("ignore")


def loss(x: Any, scale: float) -> float:
    worked()
    return float(np.sum((x - 0.5) ** 2) * scale)


@workload
def batches(doors: Doors) -> Any:
    parameters = ng.p.Instrumentation(x=ng.p.Array(shape=(3,)), scale=ng.p.Log(lower=0.1, upper=10.0))
    parameters.random_state.seed(12)
    optimizer = ng.optimizers.OnePlusOne(parametrization=parameters, budget=60, num_workers=5)
    with doors.ProcessPoolExecutor() as executor:
        best = optimizer.minimize(loss, executor=executor, batch_mode=True)
    return best.kwargs, best.loss
