"""mpmath: numbers of many digits computed by workers whose precision an initializer has set."""

from typing import Any

import mpmath

from compat_tests.clients.doors import Doors, worked, workload


def set_digits(digits: int) -> None:
    mpmath.mp.dps = digits


def zero(n: int) -> Any:
    worked()
    return mpmath.zetazero(n)


def integral(a: Any, b: Any) -> Any:
    worked()
    return mpmath.quad(lambda x: mpmath.exp(-x * x), [a, b])


def _text(values: Any) -> list[str]:
    return [mpmath.nstr(value, 45) for value in values]


@workload
def with_pool(doors: Doors) -> Any:
    with doors.Pool(initializer=set_digits, initargs=(40,)) as pool, mpmath.workdps(50):
        return _text(pool.map(zero, range(1, 7))), _text(pool.starmap(integral, [(0, mpmath.mpf(n)) for n in range(8)]))


@workload
def with_executor(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor(initializer=set_digits, initargs=(30,)) as executor, mpmath.workdps(50):
        return _text(executor.map(integral, [mpmath.mpf(n) / 3 for n in range(9)], [mpmath.inf] * 9))
