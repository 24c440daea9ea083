"""How the backend's workers are started: from a clean server process, never by forking the program itself.

A program that uses joblib has, as a rule, threads of BLAS or OpenMP, which do not survive a fork, and often no
`if __name__ == "__main__"`, which the standard library's spawn and forkserver ask for. So workers are forked by a fork
server of this module's own, which never imports the program's main module. Used by backend.py as the context of its
groups.
"""

from __future__ import annotations

import io
import multiprocessing
import os
from multiprocessing import context, forkserver, popen_forkserver, reduction, spawn, util

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


# What joblib and NumPy import of the standard library: half of what a worker takes to start. NumPy itself is not among
# them: it reads the worker's environment while it is imported, and may start threads.
_PRELOADED = ("asyncio", "concurrent.futures.process", "ctypes", "decimal", "inspect", "json", "logging",
              "multiprocessing.pool", "pprint", "shutil", "subprocess", "tempfile", "uuid", "random")


class _Server(forkserver.ForkServer):
    """A fork server that has loaded what every worker loads, and nothing of the program."""

    def __init__(self) -> None:
        super().__init__()
        self._preload_modules: list[str] = []

    def preload(self, *modules: str) -> None:
        """Load these modules in the server, if it is not running yet, so that its workers need not."""
        self._preload_modules = list(modules)

    def forget(self) -> None:
        """In a forked child: the server is the parent's; keep no end of it."""
        alive: int | None = self._forkserver_alive_fd  # type: ignore[attr-defined]
        if alive is not None:
            os.close(alive)
        self.__init__()  # type: ignore[misc]


_server = _Server()
os.register_at_fork(after_in_child=_server.forget)


class _Popen(popen_forkserver.Popen):
    """Like the standard library's, but through this module's server, and without the program's main module."""

    def _launch(self, process_obj: Any) -> None:
        preparation = spawn.get_preparation_data(process_obj._name)
        preparation.pop("init_main_from_name", None)
        preparation.pop("init_main_from_path", None)
        if preparation.get("start_method") not in multiprocessing.get_all_start_methods():
            preparation.pop("start_method", None)  # one that joblib's loky has added, in its own processes only
        _server.preload(process_obj._target.__module__, __name__, *_PRELOADED)
        message = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(preparation, message)
            reduction.dump(process_obj, message)
        finally:
            context.set_spawning_popen(None)
        self.sentinel, write_end = _server.connect_to_new_process(self._fds)  # type: ignore[attr-defined]
        # The worker sees this end go, should the program die.
        kept = os.dup(write_end)
        self.finalizer = util.Finalize(self, util.close_fds, (kept, self.sentinel))  # type: ignore[attr-defined]
        with open(write_end, "wb") as pipe:
            pipe.write(message.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


class Process(context.ForkServerProcess):
    """A process of the server's, in the environment that the program has when it starts it."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        return _Popen(process_obj)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (dict(os.environ),), self.__dict__


def _rebuild(environment: dict[str, str]) -> Process:
    # Before anything else of the process object is unpickled: that may import libraries that read the environment.
    os.environ.clear()
    os.environ.update(environment)
    return Process.__new__(Process)


class CleanContext(context.ForkServerContext):
    """The multiprocessing context of groups whose workers share nothing with the program's main module."""

    Process = Process
