"""sympy: integrals and factors computed by workers; symbols must come back as the symbols they were."""

from typing import Any

import sympy

from compat_tests.clients.doors import Doors, worked, workload

x, y = sympy.symbols("x y", positive=True)
_EXPRESSIONS = [x ** n * sympy.exp(-x) * sympy.sin(y) for n in range(5)] + [sympy.log(x) / x, 1 / (1 + x ** 2)]


def integrate(expression: Any) -> Any:
    worked()
    return sympy.integrate(expression, x)


def factor(number: int) -> dict[int, int]:
    worked()
    return dict(sympy.factorint(number))


@workload
def with_pool(doors: Doors) -> Any:
    with doors.Pool() as pool:
        results = pool.map(integrate, _EXPRESSIONS)
    assert all(symbol in (x, y) for result in results for symbol in result.free_symbols)
    return [sympy.srepr(result) for result in results]


@workload
def with_executor(doors: Doors) -> Any:
    with doors.ProcessPoolExecutor() as executor:
        return list(executor.map(factor, range(10 ** 12, 10 ** 12 + 60), chunksize=6))
