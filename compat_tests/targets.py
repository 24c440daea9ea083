"""Names the modules that can take the place of multiprocessing and concurrent.futures in CPython's tests.

Only names them: nothing is imported before load() is called, so listing tests never needs a working target.
Called by substitution.py in the process that runs a class, and by __main__.py for the choices of --target.
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True, slots=True)
class Target:
    """Where a drop-in lives: the dotted names a user would write in place of the stdlib's."""

    name: str
    multiprocessing: str
    pool: str
    futures: str

    def load_multiprocessing(self) -> tuple[ModuleType, ModuleType]:
        """The stand-ins of `multiprocessing` and of `multiprocessing.pool`."""
        return import_module(self.multiprocessing), import_module(self.pool)

    def load_futures(self) -> ModuleType:
        """The stand-in of `concurrent.futures`."""
        return import_module(self.futures)


TARGETS = {
    target.name: target
    for target in (
        Target("dpool", "dpool.multiprocessing", "dpool.multiprocessing.pool", "dpool.concurrent.futures"),
        # The positive control: whatever fails here is the harness's fault.
        Target("stdlib", "multiprocessing", "multiprocessing.pool", "concurrent.futures"),
        # The negative control: whatever passes here does not test the target.
        Target("broken", "compat_tests.broken", "compat_tests.broken", "compat_tests.broken"),
    )
}
