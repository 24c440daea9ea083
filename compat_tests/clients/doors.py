"""What a workload is given: Pool and ProcessPoolExecutor, the standard library's or dpool's, and the swap of imports.

Patches nothing: programs that import a pool themselves find dpool's where their import line would have said so. Made
by child.py, one for each of the two runs.
"""

import functools
import multiprocessing.pool
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

WORKERS = 2
# Names the file to which a worker writes a line for each call; see worked(). A cluster has it from its start.
TALLY = "DPOOL_CLIENTS_TALLY"

_MODULES = {
    "multiprocessing": "dpool.multiprocessing",
    "multiprocessing.pool": "dpool.multiprocessing.pool",
    "concurrent": "dpool.concurrent",
    "concurrent.futures": "dpool.concurrent.futures",
    "concurrent.futures.process": "dpool.concurrent.futures.process",
}
_NAMES = {
    "multiprocessing": ("Pool", "get_context"),
    "multiprocessing.pool": ("Pool",),
    "concurrent.futures": ("ProcessPoolExecutor",),
}

Workload = Callable[["Doors"], Any]


def workload(function: Workload) -> Workload:
    """Mark a function as something to be run with both; it returns what is compared. Its tasks call worked()."""
    function.calls_are_counted = True  # type: ignore[attr-defined]
    return function


def foreign(function: Workload) -> Workload:
    """Like workload(), for one whose tasks are the client's own functions: they cannot call worked()."""
    function.calls_are_counted = False  # type: ignore[attr-defined]
    return function


def worked() -> None:
    """Called by functions that should run in workers, so that a client that calls them at home is noticed."""
    os.write(_tally(os.environ[TALLY]), _here())


def _here() -> bytes:
    """This process, as a line."""
    return f"{os.uname().nodename}:{os.getpid()}\n".encode()


@functools.cache
def _tally(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND)


class Doors:
    """`Pool(processes, ...)` and `ProcessPoolExecutor(max_workers, ...)`, by default with two workers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.modules = {module: import_module(_MODULES[module] if name == "dpool" else module) for module in _MODULES}

    def Pool(self, processes: int = WORKERS, *args: Any, **kwargs: Any) -> Any:
        return self.modules["multiprocessing"].Pool(processes, *args, **kwargs)

    def ProcessPoolExecutor(self, max_workers: int = WORKERS, *args: Any, **kwargs: Any) -> Any:
        return self.modules["concurrent.futures"].ProcessPoolExecutor(max_workers, *args, **kwargs)

    @contextmanager
    def imported(self, *modules: str) -> Iterator[None]:
        """Within this, the modules' import lines, and those inside of functions, have found these doors."""
        if self.name == "stdlib":
            yield
            return
        _load_siblings(self.modules["multiprocessing"])
        saved: list[tuple[dict[str, Any], dict[str, Any]]] = [(sys.modules, {name: sys.modules[name]
                                                                            for name in _MODULES})]
        sys.modules.update(self.modules)
        try:
            for name in modules:
                namespace = vars(import_module(name))
                changed = {key: mine for key, value in namespace.items() if (mine := self._stand_in(value)) is not None}
                if not changed:
                    raise LookupError(f"{name} imports nothing that could be swapped")
                saved.append((namespace, {key: namespace[key] for key in changed}))
                namespace.update(changed)
            yield
        finally:
            for namespace, before in saved:
                namespace.update(before)

    def _stand_in(self, value: Any) -> Any:
        for name, mine in self.modules.items():
            real = _REAL[name]
            if value is real:
                return mine
            for attribute in _NAMES.get(name, ()):
                if value == getattr(real, attribute):
                    return getattr(mine, attribute)
        return None


_REAL: dict[str, ModuleType] = {name: import_module(name) for name in _MODULES}


class Evidence:
    """Which processes multiprocessing started during a run, and how many calls were counted by worked() in them. On a
    cluster: whether a group was opened there."""

    def __init__(self, tally: str) -> None:
        self._file = os.open(tally, os.O_RDONLY | os.O_CREAT)
        os.environ[TALLY] = tally
        self.started: list[str] = []
        if "DPOOL_ADDRESS" in os.environ:
            from dpool.cluster.driver.remote import ClusterPort

            begin = ClusterPort.begin

            def asked(port: Any) -> None:
                self.started.append("dpool.cluster")
                begin(port)

            ClusterPort.begin = asked  # type: ignore[method-assign]
        # Both doors start their workers by this: the pool's own, or what its context makes.
        start = multiprocessing.process.BaseProcess.start
        started = self.started

        def noted(process: Any) -> None:
            started.append(getattr(process._target, "__module__", ""))
            start(process)

        multiprocessing.process.BaseProcess.start = noted  # type: ignore[method-assign]
        self._read_to = os.fstat(self._file).st_size

    def judge(self, name: str, counts: bool) -> str:
        """What is wrong with the run through the doors `name`, an empty text if nothing; begins a new one."""
        lines = os.pread(self._file, 1 << 30, self._read_to)
        self._read_to += len(lines)
        where = set(lines.splitlines(keepends=True))
        dpool = [module for module in self.started if module.startswith("dpool.")]
        stdlib = [module for module in self.started if module.startswith(("multiprocessing.pool", "concurrent."))]
        self.started.clear()
        mine, other = (dpool, stdlib) if name == "dpool" else (stdlib, dpool)
        problems = []
        if not mine:
            problems.append(f"no worker was started by {name}")
        if other:
            problems.append(f"{len(other)} workers were started by the other one")
        if counts and not where - {_here()}:
            problems.append("nothing ran in a worker")
        for process in multiprocessing.active_children():
            process.join(30)
            if process.is_alive():
                problems.append(f"still alive: {process}")
        return "; ".join(problems)


def _load_siblings(ours: ModuleType) -> None:
    """Load every module of the standard library's package that dpool's hands through. While the packages are swapped,
    one that is imported for the first time, as dpool does with what few groups need, is looked for in dpool's."""
    for found in iter_modules(ours.__path__):
        name = f"multiprocessing.{found.name}"
        if find_spec(name) is not None:
            import_module(name)
