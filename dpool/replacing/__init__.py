"""The names that `dpool run` answers: the standard library's Pool and ProcessPoolExecutor, joblib's default backend.

Replaces them in this process and in those that multiprocessing starts from it, when their modules are imported. Touches
no other name, and what the standard library's modules see of each other stays theirs. Called by cli/run.py, and in
workers.
"""

from __future__ import annotations

import sys
from types import ModuleType

from dpool.noticing import notice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["install", "installed"]

# Where programs find a name -> the name, the door that must be loaded first, and the module that has dpool's.
_NAMES = {
    "multiprocessing.pool": ("Pool", "dpool.multiprocessing.pool", "dpool.multiprocessing.replacement"),
    "concurrent.futures.process": ("ProcessPoolExecutor", "dpool.concurrent.futures.process",
                                   "dpool.concurrent.futures.process"),
}
_OURS = {ours: name for name, (_, *both) in _NAMES.items() for ours in both}
_SPAWN = "multiprocessing.spawn"

_installed = False


def installed() -> bool:
    """Whether the names are replaced in this process."""
    return _installed


def install() -> None:
    """Replace the names in this process, at once or when their modules are loaded. May be called again."""
    global _installed
    if _installed:
        return
    _installed = True
    notice({_SPAWN, *_NAMES, *_OURS} - set(sys.modules), _loaded)
    for name in (_SPAWN, *_NAMES):
        if name in sys.modules:
            _loaded(name)
    _import("dpool.joblib").watch(make_default=True)


def _import(name: str) -> Any:
    from importlib import import_module

    return import_module(name)


def _loaded(name: str) -> None:
    """A module that matters here has been executed."""
    if name == _SPAWN:
        _pass_on(sys.modules[name])
        return
    name = _OURS.get(name, name)
    attribute, door, source = _NAMES[name]
    if any(ours in sys.modules and not hasattr(sys.modules[ours], attribute) for ours in (door, source)):
        return  # it is what imports this module, and will be heard of when it is through
    if name in sys.modules:
        replacement = getattr(_import(source), attribute)
        if type(sys.modules[name]) is not View:
            _put(name, attribute, replacement)


def _put(name: str, attribute: str, replacement: object) -> None:
    module = sys.modules[name]
    original = getattr(module, attribute)
    view = sys.modules[name] = View(module, attribute, replacement)
    package, _, child = name.rpartition(".")
    names = vars(sys.modules[package])
    if names.get(child) is module:  # else the import that is under way puts it there
        names[child] = view
    if names.get(attribute) is original:  # concurrent.futures keeps what it was asked for once
        names[attribute] = replacement


class View(ModuleType):
    """A module of the standard library's, seen with one name replaced. The module itself stays as it was, for those of
    its own functions that use the name. Every other name, and every assignment, is the module's."""

    def __init__(self, module: ModuleType, attribute: str, replacement: object) -> None:
        super().__init__(module.__name__)
        special = {name: value for name, value in vars(module).items() if name[:2] == "__" == name[-2:]}
        vars(self).update(special)
        vars(self).update({"_viewed": module, attribute: replacement})

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_viewed"], name)

    def __setattr__(self, name: str, value: object) -> None:
        if name in vars(self):
            vars(self)[name] = value
        else:
            setattr(vars(self)["_viewed"], name, value)

    def __delattr__(self, name: str) -> None:
        if name in vars(self):
            del vars(self)[name]
        else:
            delattr(vars(self)["_viewed"], name)

    def __dir__(self) -> list[str]:
        return dir(vars(self)["_viewed"])


# -- processes that multiprocessing starts


class _Again:
    """Unpickled as the first thing in a process that multiprocessing starts anew: before the program's main module is
    imported there, which may bind the names."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        # Its sys.path is not the program's yet.
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        return exec, (f"import sys\nif {root!r} not in sys.path:\n    sys.path.append({root!r})\n"
                      f"from dpool.replacing import install\ninstall()\n", {})


def _pass_on(spawn: Any) -> None:
    """Have processes that are started by spawn or forkserver replace the names, too."""
    from functools import wraps

    prepared = spawn.get_preparation_data

    @wraps(prepared)
    def get_preparation_data(name: str) -> dict[str, Any]:
        return {"dpool": _Again(), **prepared(name)}

    spawn.get_preparation_data = get_preparation_data
