"""Tells when a module is imported: somebody else's, whose names dpool enters or replaces as soon as it is there.

Imports nothing and finds nothing by itself; leaves no trace in the modules. Used by joblib/ and replacing/.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


def notice(names: Iterable[str], loaded: Callable[[str], object]) -> None:
    """Call `loaded` with the name of each of these modules whenever it has been executed, in the thread that imports
    it. What it raises, the import raises."""
    sys.meta_path.insert(0, _Finder(frozenset(names), loaded))


class _Finder:
    """Stands first among the import finders, and finds what the others do."""

    def __init__(self, names: frozenset[str], loaded: Callable[[str], object]) -> None:
        self._names = names
        self._loaded = loaded

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self._names:
            return None
        # Two of these may want the same module: each asks those that stand behind it.
        finders = sys.meta_path[:]
        for finder in finders[finders.index(self) + 1:] if self in finders else finders:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find is not None else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, self._loaded)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """The module's own loader, but for what is done after it."""

    def __init__(self, loader: Any, loaded: Callable[[str], object]) -> None:
        self._loader = loader
        self._loaded = loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._loaded(module.__name__)
