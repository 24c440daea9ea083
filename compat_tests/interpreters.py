"""Finds the Python interpreters of the machine, and gives each an environment in which dpool can be imported.

Looks on PATH and below pyenv's root; a newer minor version is looked at when it is there. Installs nothing outside
the checkout's .venv-* folders. Called by test_compat.py.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from compat_tests.running import CHECKOUT
from compat_tests.suites import FAMILIES

OLDEST = (3, 11)

# What an interpreter says about itself: its version, and the families that its `test` package has.
_PROBE = """
import json, sys
from importlib.util import find_spec
modules = dict(
    pool="test._test_multiprocessing", manager="test._test_multiprocessing",
    main="test.test_multiprocessing_main_handling", executor="test.test_concurrent_futures",
    asyncio="test.test_asyncio.test_events",
)
def has(name):
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
print(json.dumps([sys.executable, sys.version_info[:3], [family for family in modules if has(modules[family])]]))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """An interpreter, and the families of tests it came with."""

    executable: str
    version: tuple[int, ...]
    families: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


class Unusable(Exception):
    """The dependencies of dpool cannot be made available to an interpreter; the text says why."""


@functools.cache
def running() -> Interpreter:
    """The interpreter that runs this."""
    found = _probe(sys.executable)
    assert found is not None
    return found


@functools.cache
def others() -> list[Interpreter]:
    """One interpreter for each other minor version: the one with the most families, then the newest.

    For the minor version that is running, only one that has families which the running one lacks.
    """
    best: dict[tuple[int, ...], Interpreter] = {running().version[:2]: running()}
    for path in sorted(_candidates()):
        found = _probe(path)
        if found and found.version >= OLDEST:
            rival = best.setdefault(found.version[:2], found)
            if (len(found.families), found.version) > (len(rival.families), rival.version):
                if rival != running() or set(found.families) > set(rival.families):
                    best[found.version[:2]] = found
    return [best[minor] for minor in sorted(best) if best[minor] != running()]


def prepared(interpreter: Interpreter) -> str:
    """An executable of this interpreter that can import dpool's dependencies.

    Makes a .venv-X.Y in the checkout if need be, and uses it again. Raises Unusable if that does not work out.
    """
    if interpreter == running() or _has_dependencies(interpreter.executable):
        return interpreter.executable
    folder = CHECKOUT / f".venv-{interpreter.version[0]}.{interpreter.version[1]}-compat"
    executable = str(folder / "bin" / "python")
    if _has_dependencies(executable):
        return executable
    # Without pip: some distributions have no ensurepip. The running interpreter's pip installs for both.
    requirements = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    for command in (
        [interpreter.executable, "-m", "venv", "--clear", "--without-pip", str(folder)],
        [sys.executable, "-m", "pip", "--python", executable, "install", "-q", *requirements],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unusable(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    return executable


def _candidates() -> set[str]:
    """Every python3.N on PATH and in pyenv's versions."""
    folders = [Path(folder) for folder in os.get_exec_path()]
    pyenv_root = os.environ.get("PYENV_ROOT")
    if not pyenv_root and shutil.which("pyenv"):
        pyenv_root = subprocess.run(["pyenv", "root"], capture_output=True, text=True).stdout.strip()
    if pyenv_root:
        folders += Path(pyenv_root).glob("versions/*/bin")
    return {
        str(path)
        for folder in folders
        if folder.is_dir()
        for path in folder.iterdir()
        if re.fullmatch(r"python3\.\d+", path.name)
    }


def _probe(executable: str) -> Interpreter | None:
    """What the interpreter says of itself, or None if it does not start (a shim for a version not chosen)."""
    try:
        done = subprocess.run([executable, "-c", _PROBE], capture_output=True, text=True, timeout=30)
        path, version, families = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return Interpreter(path, tuple(version), tuple(family for family in FAMILIES if family in families))


def _has_dependencies(executable: str) -> bool:
    code = "import cloudpickle, msgspec, zmq"
    return Path(executable).exists() and not subprocess.run([executable, "-c", code], capture_output=True).returncode
