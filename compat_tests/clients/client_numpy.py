"""numpy: random streams of one seed in workers, and blocks of a product, by every way a Pool and an executor have."""

from concurrent.futures import as_completed
from typing import Any

import numpy as np

from compat_tests.clients.doors import Doors, worked, workload

_seen: Any = None


def draw(seed: Any) -> Any:
    worked()
    return np.random.default_rng(seed).normal(size=2000)


def keep(matrix: Any) -> None:
    global _seen
    _seen = matrix


def multiply(rows: Any) -> Any:
    worked()
    return rows @ _seen


def eigenvalues(matrix: Any) -> Any:
    worked()
    return np.linalg.eigvalsh(matrix + matrix.T)


@workload
def random_streams(doors: Doors) -> Any:
    seeds = np.random.SeedSequence(2024).spawn(40)
    with doors.Pool() as pool:
        return pool.map(draw, seeds), list(pool.imap(draw, seeds, chunksize=3)), pool.map_async(draw, seeds).get()


@workload
def blocks(doors: Doors) -> Any:
    matrix = np.arange(90_000.0).reshape(300, 300)
    with doors.Pool(initializer=keep, initargs=(matrix,)) as pool:
        product = np.vstack(pool.map(multiply, np.array_split(matrix, 7)))
        handles = [pool.apply_async(multiply, (matrix[row],)) for row in range(20)]
        return product, [handle.get() for handle in handles]


@workload
def futures(doors: Doors) -> Any:
    rng = np.random.default_rng(1)
    with doors.ProcessPoolExecutor() as executor:
        numbers = {executor.submit(eigenvalues, rng.normal(size=(40, 40))): number for number in range(25)}
        return sorted((numbers[future], future.result().tobytes()) for future in as_completed(numbers))
