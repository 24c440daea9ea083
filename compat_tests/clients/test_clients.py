"""The pytest entry: every client that is installed, with the results of both runs compared; CI runs it.

Judges nothing itself. `python -m compat_tests.clients --install FOLDER` runs those that are not installed here.
"""

import pytest

from compat_tests.clients.__main__ import run
from compat_tests.clients.registry import CLIENTS, Client


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_results_are_the_stdlibs(client: Client) -> None:
    if client.version is None:
        pytest.skip(f"not installed: {', '.join(client.distributions)}")
    problems = [f"{row.workload}: {row.problem}" for row in run(client) if row.problem]
    assert not problems, "\n".join(problems)
