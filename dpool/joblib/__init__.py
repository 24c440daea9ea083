"""The joblib backend "dpool": registers it with joblib, at once or as soon as the program imports joblib.

Never imports joblib unless register() is called, and opens nothing: the backend itself is in backend.py. watch() is
called by `import dpool`, in workers too.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["register"]

NAME = "dpool"
_default = False  # whether joblib is to take it for calls that name none
# The module that holds joblib's table of backends; once it has run, a backend can be entered.
_TABLE = "joblib.parallel"


def register(make_default: bool = False) -> None:
    """Make joblib know the backend "dpool", by importing joblib if need be; `make_default` makes it joblib's default.

    `import dpool` does this by itself for programs that import joblib. May be called again. Raises ImportError if
    joblib is not installed or is older than 1.3.
    """
    try:
        from joblib.parallel import register_parallel_backend
    except ImportError as error:
        raise ImportError(f"dpool.joblib needs joblib 1.3 or newer: pip install 'dpool[joblib]' ({error})") from error
    from dpool.joblib.backend import DpoolBackend

    register_parallel_backend(NAME, DpoolBackend, make_default=make_default)


def watch(make_default: bool = False) -> None:
    """Register now if joblib is loaded, else in the moment it is; `make_default` as in register(), from here on."""
    global _default
    _default = _default or make_default
    if hasattr(sys.modules.get(_TABLE), "register_parallel_backend"):
        _register_quietly()
    elif not any(type(finder) is _Watch for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register_quietly() -> None:
    """A joblib that is too old must still be importable: only register() itself complains."""
    try:
        register(_default)
    except ImportError:
        pass


class _Watch:
    """Stands first among the import finders, and finds nothing but the moment in which joblib is imported."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        try:
            sys.meta_path.remove(self)
        except ValueError:
            return None  # another thread is at it
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find is not None else None
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """joblib's own loader, but for what is done after it; it leaves no trace of itself in the module."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        try:
            self._loader.exec_module(module)
        except BaseException:
            watch()  # the import failed and may be tried again
            raise
        _register_quietly()
