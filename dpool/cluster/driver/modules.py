"""Answers workers that ask for a module, or for a data file of a package: the program's own, as it has imported them.

Reads files and imports nothing: a question runs no code here. What is installed belongs on the node, too, and is never
sent. A driver that is a worker itself passes questions on to its own driver, about what it has from there or does not
have. Called by driver/remote.py.

A question is the name of a module, or that of a package, a NUL, and the path of a file or directory in it. An answer is
a line of JSON, and what it speaks of after it.
"""

from __future__ import annotations

import importlib.util
import json
import marshal
import os
import site
import sys
import sysconfig
import types
import warnings
import zipimport
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder

from dpool.cluster.wire.functions import code_digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Fetch = Callable[[str], bytes | None]


def answer(question: str, fetch: Fetch | None = None) -> bytes | None:
    """The answer to a worker's question; None if there is nothing here that it asks for. `fetch`, in a driver that is a
    worker, asks the driver of that worker the same."""
    name, is_data, path = question.partition("\0")
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts) or parts[0] in sys.stdlib_module_names or parts[0] == "__main__":
        return None
    try:
        spec = getattr(sys.modules.get(name), "__spec__", None) or _find(parts)
        if fetch is not None and (spec is None or _is_fetched(spec)):
            return fetch(question)
        if spec is None:
            return None
        return _data(spec, path) if is_data else _module(spec)
    except Exception as error:  # a module may be anything; the worker's import fails, and nothing else
        _warn(f"{name} cannot be sent to workers on other machines: {type(error).__name__}: {error}", name)
        return None


def _is_fetched(spec: ModuleSpec) -> bool:
    """Whether a module has come from a driver: it has an origin, if only an empty one, and no file there. The import
    machinery's own have a file, or are namespaces and have no origin."""
    return not spec.has_location and spec.origin is not None


def _answer(content: bytes = b"", **header: Any) -> bytes:
    return json.dumps(header).encode() + b"\n" + content


# -- modules


def _module(spec: ModuleSpec) -> bytes | None:
    package = spec.submodule_search_locations is not None
    if package and not spec.has_location:  # a namespace: nothing but a name
        if all(map(_is_installed, spec.submodule_search_locations or ())):
            return _answer(refused="is installed where the program runs")
        return _answer(file="", package=True)
    file = spec.origin
    if file is None:
        return None
    if _is_installed(file):
        return _answer(refused="is installed where the program runs")
    if file.endswith(tuple(EXTENSION_SUFFIXES)):
        return _answer(refused="is an extension module where the program runs")
    if not file.endswith(".py"):
        return None
    try:
        if isinstance(spec.loader, zipimport.zipimporter):
            source = (spec.loader.get_source(spec.name) or "").encode()
        else:
            with open(file, "rb") as stream:
                source = stream.read()
    except (OSError, ImportError):
        return None
    original = _original(spec, source)
    if original is not None:
        return _answer(marshal.dumps(original), file=file, package=package, code=True)
    return _answer(source, file=file, package=package)


def _original(spec: ModuleSpec, source: bytes) -> types.CodeType | None:
    """The code that was imported here, if that is not what the file holds by now; None if the file is to be sent.

    An import leaves the code in a file of bytecode with the time and size of its source. Where neither is what was
    imported, the file is sent all the same, with a warning.
    """
    module = sys.modules.get(spec.name)
    file = spec.origin
    if module is None or file is None:
        return None
    try:
        current = compile(source, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        current = None
    changed = current is None or not _fits(module, current)
    imported, is_current = _bytecode(spec.cached, file, source)
    # Where imports leave no bytecode, what is there may be older than what was imported. What was written within the
    # second of the import may have its time.
    if imported is not None and (changed or not is_current and not sys.dont_write_bytecode) and _fits(module, imported):
        return imported
    if changed:
        _warn(f"{spec.name} was changed after it was imported here: workers on other machines import the file as it is "
              f"now", file)
    return None


def _bytecode(cached: str | None, file: str, source: bytes) -> tuple[types.CodeType | None, bool]:
    """The code in a module's file of bytecode, and whether that says that it was made from this source."""
    try:
        with open(cached or "", "rb") as stream:
            data = stream.read()
        status = os.stat(file)
    except OSError:
        return None, False
    if data[:4] != importlib.util.MAGIC_NUMBER or len(data) <= 16:
        return None, False
    if data[4] & 1:
        same = data[8:16] == importlib.util.source_hash(source)
    else:
        now = (int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF)
        same = data[8:16] == b"".join(number.to_bytes(4, "little") for number in now)
    try:
        code = marshal.loads(data[16:])
    except (ValueError, EOFError, TypeError):
        return None, False
    return (code, same) if isinstance(code, types.CodeType) else (None, False)


def _fits(module: types.ModuleType, code: types.CodeType) -> bool:
    """Whether every function that a module has now may have come from this code."""
    known = {code_digest(one) for one in _nested(code)}
    return all(code_digest(function.__code__) in known for function in _functions(module))


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _functions(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """The functions of a module and of its classes that were written in its file."""
    file = getattr(module, "__file__", None)
    for value in list(vars(module).values()):
        # By its type: isinstance() asks the value, and a proxy answers with code of its own.
        own = issubclass(type(value), type) and value.__module__ == module.__name__
        inside = list(vars(value).values()) if own else []
        for one in (value, *inside):
            if type(one) is types.FunctionType and one.__code__.co_filename == file:
                yield one


def _warn(text: str, file: str) -> None:
    try:
        warnings.warn_explicit(text, RuntimeWarning, file, 1, registry=_warned)
    except RuntimeWarning:  # the program has made errors of warnings; this thread is not the program's
        print(f"{file}: RuntimeWarning: {text}", file=sys.stderr)


_warned: dict[Any, Any] = {}


# -- data files


def _data(spec: ModuleSpec, path: str) -> bytes | None:
    """A file of a package, or the names in a directory of it and whether each is a directory itself."""
    parts = path.split("/") if path else []
    if any(part in ("", ".", "..") or "\\" in part for part in parts):
        return None
    for location in spec.submodule_search_locations or ():
        target = os.path.join(location, *parts)
        if _is_installed(target):
            continue
        try:
            if os.path.isdir(target):
                with os.scandir(target) as entries:
                    return _answer(names={entry.name: entry.is_dir() for entry in entries})
            with open(target, "rb") as stream:
                return _answer(stream.read(), data=True)
        except OSError:
            continue
    return None


# -- where they are


def _find(parts: list[str]) -> ModuleSpec | None:
    spec: ModuleSpec | None = None
    path = None
    for index in range(len(parts)):
        spec = PathFinder.find_spec(".".join(parts[:index + 1]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return spec


def _is_installed(path: str) -> bool:
    """Whether a file belongs to the interpreter or was put there by an installer."""
    roots = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots.update((*site.getsitepackages(), site.getusersitepackages()))
    real = os.path.realpath(path)
    return any(real.startswith(os.path.realpath(root) + os.sep) for root in roots if root)
