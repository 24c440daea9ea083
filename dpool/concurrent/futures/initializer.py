"""What runs in a worker of dpool's ProcessPoolExecutor before its tasks: the user's initializer, its failure logged.

Imports nothing, so that a worker starts fast. Made by process.py, run by the worker.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class LoggedInitializer:
    """Calls an initializer; logs what it raises to the logger `concurrent.futures`, as the standard library does, and
    raises it again, so that the executor breaks."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        try:
            self.function(*args)
        except BaseException:
            import logging

            logging.getLogger("concurrent.futures").critical("Exception in initializer:", exc_info=True)
            raise
