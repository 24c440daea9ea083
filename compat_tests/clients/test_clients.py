"""The pytest entry: every client that is installed, with the results of both runs compared; CI runs it.

Judges nothing itself. `python -m compat_tests.clients --install FOLDER` runs those that are not installed here.
"""

import tomllib

import pytest

from compat_tests.clients.__main__ import run
from compat_tests.clients.comparing import difference
from compat_tests.clients.registry import CLIENTS, Client, quick
from compat_tests.running import CHECKOUT


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_results_are_the_stdlibs(client: Client) -> None:
    if client.version is None:
        pytest.skip(f"not installed: {', '.join(client.distributions)}")
    problems = [f"{row.workload}: {row.problem}" for row in run(client) if row.problem]
    assert not problems, "\n".join(problems)


def test_what_is_wrong_is_found() -> None:
    found = {row.workload: row.problem for row in run(Client("wrong"))}
    assert " is not " in found["differs"]
    assert "float 1.0 is not int 1" in found["differs_in_type"]
    assert "nothing ran in a worker" in found["works_at_home"]
    assert "started by the other one" in found["uses_another_door"]
    assert "no worker was started by stdlib" in found["starts_nothing"]
    assert "ValueError: 1 is refused" in found["raises"]
    assert "imports nothing that could be swapped" in found["swaps_nothing"]
    assert "ended with 3" in found["(the process)"]
    assert "kills_the_process" not in found


@pytest.mark.parametrize("pair", [(1, 1.0), ([1], (1,)), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ([1, [2, 3]], [1, [2]]),
                                  (1.0, 1.0 + 2 ** -52), (None, 0), ({"a": [0]}, {"a": [1]})], ids=str)
def test_differences_are_found(pair: tuple[object, object]) -> None:
    assert difference(*pair)
    assert not difference(pair[0], pair[0])


def test_differences_of_arrays_are_found() -> None:
    np = pytest.importorskip("numpy")
    array = np.array([1.0, np.nan, -0.0])
    assert not difference(array, array.copy())
    for other in (array.astype("f4"), array[:2], array.reshape(1, 3), np.array([1.0, np.nan, 0.0]), list(array)):
        assert difference(array, other)


def test_the_extra_has_the_quick_clients() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert sorted(project["optional-dependencies"]["clients"]) == quick()
