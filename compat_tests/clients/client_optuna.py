"""optuna: ask and tell, with the trials of a round evaluated by an executor, and studies run by workers."""

import tempfile
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from compat_tests.clients.doors import Doors, worked, workload

optuna.logging.set_verbosity(optuna.logging.ERROR)


def parabola(x: float, y: int) -> float:
    worked()
    return (x - 2) ** 2 + y


def evaluate(path: str, numbers: list[int]) -> None:
    """What a worker does: some trials of a study that all workers share."""
    worked()
    study = optuna.load_study(study_name="shared", storage=JournalStorage(JournalFileBackend(path)))
    for number in numbers:
        study.add_trial(optuna.trial.create_trial(
            params={"n": number}, distributions={"n": optuna.distributions.IntDistribution(0, 11)},
            value=float(number ** 2)))


@workload
def ask_and_tell(doors: Doors) -> Any:
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=4, n_startup_trials=8))
    with doors.ProcessPoolExecutor() as executor:
        for _ in range(6):
            trials = [study.ask() for _ in range(5)]
            futures = [executor.submit(parabola, trial.suggest_float("x", -5, 5), trial.suggest_int("y", 0, 3))
                       for trial in trials]
            for trial, future in zip(trials, futures, strict=True):
                study.tell(trial, future.result())
    return [(trial.params, trial.value) for trial in study.trials]


@workload
def shared_study(doors: Doors) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "journal"))
        study = optuna.create_study(study_name="shared", storage=JournalStorage(JournalFileBackend(path)))
        with doors.Pool() as pool:
            pool.starmap(evaluate, [(path, [n, n + 6]) for n in range(6)])
        return sorted((trial.params["n"], trial.value) for trial in study.trials), study.best_value
