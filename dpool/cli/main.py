"""The command line's front door: `dpool run` goes one way, every other command another.

Imports neither until it is known which: a program that is run should find nothing loaded that it did not ask for.
Called as `dpool` and by `python -m dpool`.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. What the program of `dpool run` raises passes through."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["run"]:
        from dpool.cli.run import run

        return run(given[1:])
    from dpool.cli.commands import command

    return command(given)
