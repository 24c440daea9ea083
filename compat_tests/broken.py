"""The negative control: a Pool and a ProcessPoolExecutor that cannot be constructed; other names are the stdlib's.

Raises an exception of its own, which no test expects, so that a test can pass only if it never made a pool.
Called by CPython's tests under `--target broken`, and by the programs they start.
"""

import concurrent.futures
import multiprocessing
from typing import Any, NoReturn


class BrokenOnPurpose(Exception):
    """Raised by every constructor of this module."""


class Pool:
    """Takes the place of multiprocessing.Pool and of multiprocessing.pool.Pool."""

    def __init__(self, *args: object, **kwargs: object) -> NoReturn:
        raise BrokenOnPurpose("this Pool cannot be constructed")


class ProcessPoolExecutor:
    """Takes the place of concurrent.futures.ProcessPoolExecutor."""

    def __init__(self, *args: object, **kwargs: object) -> NoReturn:
        raise BrokenOnPurpose("this ProcessPoolExecutor cannot be constructed")


def __getattr__(name: str) -> Any:
    for module in (multiprocessing, concurrent.futures):
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(name)
