"""Finds modules of the driver's that are not installed here, and their data files: asks the node, that asks the driver.

Looks only after every other finder has failed. Never asks for what the standard library would hold; the driver answers
for its program's own modules alone. Installed by the zygote in each worker of a cluster.
"""

from __future__ import annotations

import os
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType
    from typing import Any

# A driver whose I/O thread is held up by a callback answers late.
ANSWER_TIMEOUT_S = 30.0

_finder: Finder | None = None


def install(descriptor: int) -> socket.socket:
    """From now on `import` also asks over this socket."""
    global _finder
    asks = socket.socket(fileno=descriptor)
    _finder = Finder(asks)
    sys.meta_path.append(_finder)
    return asks


def finder() -> Finder | None:
    """That of this worker, or of the worker that this process was forked from; None in any other process."""
    return _finder


def explain(error: ModuleNotFoundError) -> None:
    """Say what is to be done, where the driver has a module that it does not send."""
    why = _finder.refused.get(error.name or "") if _finder is not None else None
    if why is not None:
        version = ".".join(map(str, sys.version_info[:3]))
        error.msg = (f"No module named {error.name!r} on the node {socket.gethostname()}: it {why}, and such modules "
                     f"are not sent; install it there for Python {version} ({sys.executable})")
        error.args = (error.msg,)


class Finder:
    """The last of the finders of this worker."""

    def __init__(self, asks: socket.socket) -> None:
        self._asks = asks
        self.pid = os.getpid()
        self._missing: set[str] = set()
        self.refused: dict[str, str] = {}  # modules that are where the program runs, and why they are not sent

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
                  ) -> ModuleSpec | None:
        """See importlib.abc.MetaPathFinder."""
        if name in self._missing or name.partition(".")[0] in sys.stdlib_module_names:
            return None
        header, content = self.ask(name)
        if "package" not in header:
            if "refused" in header:
                self.refused[name] = header["refused"]
            else:
                self._missing.add(name)
            return None
        import importlib.util

        loader: Any = Loader(self, name, content, **header)
        return importlib.util.spec_from_loader(name, loader, origin=header["file"], is_package=header["package"])

    def ask(self, question: str) -> tuple[dict[str, Any], bytes]:
        """What the driver says of a question, and what belongs to it; nothing if it has no answer."""
        answer = self.fetch(question)
        if answer is None:
            return {}, b""
        import json

        header, _, content = answer.partition(b"\n")
        return json.loads(header), content

    def fetch(self, question: str) -> bytes | None:
        """The answer as it is. Any thread may ask, and any process that was forked from the worker."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            try:
                with theirs:
                    socket.send_fds(self._asks, [question.encode()], [theirs.fileno()])
                ours.settimeout(ANSWER_TIMEOUT_S)
                _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
            except OSError:
                return None
        if not descriptors:
            return None
        with open(descriptors[0], "rb") as file:
            return file.read()


class Loader:
    """One module, from its source, or from its code where the driver has that alone."""

    def __init__(self, finder: Finder, name: str, content: bytes, file: str, package: bool, code: bool = False) -> None:
        self._finder = finder
        self._name = name
        self._content = content
        self._file = file
        self._package = package
        self._is_code = code

    def create_module(self, spec: ModuleSpec) -> None:
        """As modules are made by default."""

    def exec_module(self, module: ModuleType) -> None:
        """Run it. Raises what it raises."""
        if self._file:
            module.__file__ = self._file
        exec(self.get_code(self._name), module.__dict__)

    def get_code(self, name: str) -> CodeType:
        if self._is_code:
            import marshal

            code: CodeType = marshal.loads(self._content)
            return code
        return compile(self._content, self._file or "<namespace>", "exec", dont_inherit=True)

    def get_source(self, name: str) -> str | None:
        """For tracebacks."""
        if self._is_code:
            return None  # the file has another by now
        from importlib.util import decode_source

        return decode_source(self._content)

    def is_package(self, name: str) -> bool:
        return self._package

    def get_data(self, path: str) -> bytes:
        """For pkgutil.get_data(). Raises OSError for what is not in the directory of the module."""
        root = os.path.dirname(self._file)
        inside = os.path.relpath(path, root).replace(os.sep, "/")
        package = self._name if self._package else self._name.rpartition(".")[0]
        if not package:
            raise FileNotFoundError(2, "a module that is in no package has no data files here", path)
        return Data(self._finder, package, *inside.split("/")).read_bytes()

    def get_resource_reader(self, name: str) -> Reader:
        """For importlib.resources."""
        return Reader(Data(self._finder, name if self._package else name.rpartition(".")[0]))


class Reader:
    """Implements importlib.resources.abc.TraversableResources."""

    def __init__(self, root: Data) -> None:
        self._root = root

    def files(self) -> Data:
        return self._root


class Data:
    """A file or directory of a package of the driver's; implements importlib.resources.abc.Traversable. It is fetched
    when something is asked of it, and kept."""

    def __init__(self, finder: Finder, package: str, *parts: str) -> None:
        self._finder = finder
        self._package = package
        self._parts = parts
        self._found: tuple[dict[str, bool] | None, bytes | None] | None = None

    @property
    def name(self) -> str:
        return self._parts[-1] if self._parts else self._package.rpartition(".")[2]

    def _look(self) -> tuple[dict[str, bool] | None, bytes | None]:
        """The names in it, or its content; neither if it is not there."""
        if self._found is None:
            header, content = self._finder.ask(f"{self._package}\0{'/'.join(self._parts)}")
            self._found = (header.get("names"), content if header.get("data") else None)
        return self._found

    def is_dir(self) -> bool:
        return self._look()[0] is not None

    def is_file(self) -> bool:
        return self._look()[1] is not None

    def iterdir(self) -> Iterator[Data]:
        names = self._look()[0]
        if names is None:
            raise NotADirectoryError(20, "no directory of the package", str(self))
        return (self.joinpath(name) for name in sorted(names))

    def joinpath(self, *descendants: Any) -> Data:
        parts = [part for one in descendants for part in os.fspath(one).split("/") if part not in ("", ".")]
        return Data(self._finder, self._package, *self._parts, *parts)

    __truediv__ = joinpath

    def read_bytes(self) -> bytes:
        content = self._look()[1]
        if content is None:
            raise FileNotFoundError(2, "no file of the package, where the program runs", str(self))
        return content

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        with self.open("r", encoding=encoding, errors=errors) as file:
            text: str = file.read()
            return text

    def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        import io

        if mode not in ("r", "rt", "rb"):
            raise ValueError(f"a data file of a package can only be read, not opened with {mode!r}")
        stream = io.BytesIO(self.read_bytes())
        return stream if "b" in mode else io.TextIOWrapper(stream, *args, **kwargs)

    def __str__(self) -> str:
        return "/".join((self._package, *self._parts))

    def __repr__(self) -> str:
        return f"<data file {self} of the driver's>"
