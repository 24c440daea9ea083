"""Finds modules of the driver's that are not installed here: asks the node, which asks the driver.

Looks only after every other finder has failed. Never asks for what the standard library would hold; the driver answers
for its program's own modules alone. Installed by the zygote in each worker of a cluster.
"""

from __future__ import annotations

import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

# A driver whose I/O thread is held up by a callback answers late.
ANSWER_TIMEOUT_S = 30.0


def install(descriptor: int) -> None:
    """From now on `import` also asks over this socket."""
    sys.meta_path.append(Finder(socket.socket(fileno=descriptor)))


class Finder:
    """The last of the finders of this worker."""

    def __init__(self, asks: socket.socket) -> None:
        self._asks = asks
        self._missing: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
                  ) -> ModuleSpec | None:
        """See importlib.abc.MetaPathFinder."""
        if name in self._missing or name.partition(".")[0] in sys.stdlib_module_names:
            return None
        data = self._ask(name)
        if data is None:
            self._missing.add(name)
            return None
        import importlib.util
        import json

        header, _, source = data.partition(b"\n")
        described = json.loads(header)
        loader: Any = Loader(source, described["file"], described["package"])
        return importlib.util.spec_from_loader(name, loader, origin=described["file"], is_package=described["package"])

    def _ask(self, name: str) -> bytes | None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            try:
                with theirs:
                    socket.send_fds(self._asks, [name.encode()], [theirs.fileno()])
                ours.settimeout(ANSWER_TIMEOUT_S)
                _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
            except OSError:
                return None
        if not descriptors:
            return None
        with open(descriptors[0], "rb") as file:
            return file.read()


class Loader:
    """One module, from its source."""

    def __init__(self, source: bytes, file: str, package: bool) -> None:
        self._source = source
        self._file = file
        self._package = package

    def create_module(self, spec: ModuleSpec) -> None:
        """As modules are made by default."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the source. Raises what it raises."""
        if self._file:
            module.__file__ = self._file
        exec(compile(self._source, self._file or "<namespace>", "exec", dont_inherit=True), module.__dict__)

    def get_source(self, name: str) -> str:
        """For tracebacks."""
        from importlib.util import decode_source

        return decode_source(self._source)

    def is_package(self, name: str) -> bool:
        return self._package
