"""Ctrl-C at a place of one's choice: for tests that interrupt each step of a call in turn."""

from __future__ import annotations

import dis
import sys
from functools import cache
from types import CodeType
from typing import Any

# The files whose steps are interrupted: dpool's, and those of the standard library through which its doors go.
WHERE = ("/dpool/", "/concurrent/futures/_base.py", "/multiprocessing/pool.py")

# Earlier versions raise what they see at the jump's target.
LOOKS_BEFORE_IT_JUMPS = sys.version_info >= (3, 13)


class Interrupt:
    """Raises KeyboardInterrupt in this thread, at the `at`th place where Python looks for signals: when a function
    begins, after a call, and where a loop goes back.

    After a call it is raised at the next instruction, which is not always the same: where a `with` or `try` ends with a
    call, that call belongs to it, and the next instruction does not. Such places are left out.
    """

    def __init__(self, at: int) -> None:
        self.left = at
        self._calls: dict[Any, int] = {}  # frames whose last instruction was a call -> where that is

    def __enter__(self) -> Interrupt:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        self._calls.clear()

    def _enter(self, frame: Any, event: str, _: object) -> Any:
        self._calls.pop(frame.f_back, None)  # it has called a function of Python's, after which nobody looks
        if not any(name in frame.f_code.co_filename for name in WHERE):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._step

    def _step(self, frame: Any, event: str, _: object) -> Any:
        if event == "opcode":
            code, at = frame.f_code, frame.f_lasti
            name = dis.opname[code.co_code[at]]
            called = self._calls.pop(frame, None)
            if name == "RESUME" or name == "JUMP_BACKWARD" and LOOKS_BEFORE_IT_JUMPS or (
                    called is not None and handler_of(code, called) == handler_of(code, at)):
                self.left -= 1
                if not self.left:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            if name.startswith("CALL"):
                self._calls[frame] = at
        return self._step


@cache
def _table(code: CodeType) -> list[Any]:
    return dis._parse_exception_table(code)  # type: ignore[attr-defined,no-any-return]


def handler_of(code: CodeType, at: int) -> int | None:
    """Where what is raised at this instruction is handled."""
    return next((entry.target for entry in reversed(_table(code)) if entry.start <= at < entry.end), None)
