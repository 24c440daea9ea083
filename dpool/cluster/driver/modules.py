"""Answers workers that ask for a module: the source of the program's own ones, nothing else.

Reads files and imports nothing: a worker's question runs no code here. Called by driver/remote.py.
"""

from __future__ import annotations

import json
import os
import site
import sys
import sysconfig
from importlib.machinery import ModuleSpec, PathFinder


def source_of(name: str) -> bytes | None:
    """A line of JSON about the module, then its source; None for what is not here, not written in Python, or installed:
    that belongs on the node, too."""
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts) or parts[0] in sys.stdlib_module_names or parts[0] == "__main__":
        return None
    spec = getattr(sys.modules.get(name), "__spec__", None) or _find(parts)
    if spec is None:
        return None
    package = spec.submodule_search_locations is not None
    if package and not spec.has_location:  # a namespace: nothing but a name
        if all(map(_is_installed, spec.submodule_search_locations or ())):
            return None
        return json.dumps({"file": "", "package": True}).encode() + b"\n"
    file = spec.origin
    if file is None or not file.endswith(".py") or _is_installed(file):
        return None
    try:
        with open(file, "rb") as source:
            return json.dumps({"file": file, "package": package}).encode() + b"\n" + source.read()
    except OSError:
        return None


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
