"""Finds loops whose jump back is not in the `with` that they are in, as the compiler counts; run by the interpreter
whose compiler is meant.

    python tests/loops.py folder     # prints the name of each function that has one

CPython 3.13 looks for a Ctrl-C at the jump at the end of a loop. Where it counts that jump, as it does conditional
ones, as outside of the `with` around the loop, what it raises there leaves a lock held for ever.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType

from interrupts import handler_of


def functions(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from functions(constant)


@cache
def with_handlers(code: CodeType) -> frozenset[int]:
    """Where what is raised in a `with` goes."""
    names = [(instruction.offset, instruction.opname) for instruction in dis.get_instructions(code)]
    return frozenset(names[index - 1][0] for index, (_, name) in enumerate(names) if name == "WITH_EXCEPT_START")


def withs_of(code: CodeType, at: int) -> set[int]:
    """The handlers of every `with` that an instruction is in."""
    found: set[int] = set()
    handler = handler_of(code, at)
    while handler is not None and handler not in found:
        found.add(handler)
        handler = handler_of(code, handler)
    return found & with_handlers(code)


def loops(path: Path) -> Iterator[str]:
    for code in functions(compile(path.read_text(), str(path), "exec")):
        if any(withs_of(code, jump.argval) - withs_of(code, jump.offset)
               for jump in dis.get_instructions(code) if jump.opname == "JUMP_BACKWARD"):
            yield code.co_qualname


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).rglob("*.py")):
        for name in loops(path):
            print(name)
