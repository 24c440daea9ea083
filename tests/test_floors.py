"""The floors of the house: imports point down, and the files that decide import no socket, thread or clock.

Reads the source, runs none of it. Imports inside functions count; those for the type checker do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Room -> the rooms it may import. A room that is missing here has no floor yet: say where it stands.
BASE = {"dpool", "engine", "errors", "batching", "resources", "culprits"}  # `dpool` itself: the version number
WIRE = BASE | {"cluster.wire"}
STORE = WIRE | {"cluster.store"}
DOOR = BASE | {"session", "waiting"}
FLOORS: dict[str, set[str]] = {
    "errors": set(),
    "batching": set(),
    "resources": set(),
    "engine": {"errors"},
    "noticing": set(),
    "waiting": set(),
    "culprits": set(),
    "replacing": {"noticing"},  # what it puts in for the names it takes from a table, when their modules are imported
    "cluster": set(),
    "cluster.suspects": set(),
    "cluster.wire": WIRE,
    "cluster.store": STORE,
    "cluster.worker": STORE | {"replacing"},
    "cluster.node": STORE | {"cluster.worker", "cluster.suspects", "waiting"},
    "cluster.driver": STORE | {"cluster.suspects", "waiting"},
    "cluster.head": WIRE,
    "cluster.launch": WIRE | {"cluster.head", "cluster.node"},
    "testing": STORE | {"cluster.driver", "cluster.node", "cluster.worker"},
    "embedded": BASE | {"cluster.driver", "cluster.node"},
    "cluster_engine": WIRE | {"cluster.driver", "replacing"},
    "session": WIRE | {"cluster.node", "cluster.worker", "embedded", "cluster_engine"},
    "multiprocessing": DOOR,
    "concurrent": DOOR,
    "asyncio": DOOR,
    "joblib": DOOR | {"objects", "noticing"},  # arrays are objects, for workers of a cluster
    "objects": DOOR | {"cluster.store"},
    "dpool": {"joblib"},  # the face watches for joblib; every other name of it is found when it is asked for
    "cli": WIRE | {"cluster.driver", "cluster.head", "cluster.node", "cluster.launch", "session", "replacing"},
    "__main__": {"cli"},
}

# The files that decide.
PURE = ["dpool.errors", "dpool.batching", "dpool.resources", "dpool.engine", "dpool.cluster.driver.dispatch",
        "dpool.cluster.driver.dealing", "dpool.cluster.driver.spreading", "dpool.cluster.node.supervisor",
        "dpool.cluster.node.ledger", "dpool.cluster.node.objects", "dpool.cluster.suspects",
        "dpool.cluster.head.membership", "dpool.cluster.store.ledger"]
# What makes a file act. The files that decide may import nothing that imports these at its top, either.
ACTING = {"socket", "select", "selectors", "threading", "_thread", "queue", "time", "datetime", "os", "io", "mmap",
          "signal", "subprocess", "multiprocessing", "concurrent", "asyncio", "zmq", "random", "resource", "fcntl"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in sorted((ROOT / "dpool").rglob("*.py"))}


def room(module: str) -> str:
    parts = module.split(".")
    if len(parts) == 1:
        return "dpool"
    return ".".join(parts[1:3]) if parts[1] == "cluster" else parts[1]


def imports(path: Path, inside_functions: bool = True) -> Iterator[str]:
    """The modules that a file imports at run time."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            todo.extend(node.orelse)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            known = modules()
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo.extend(ast.iter_child_nodes(node))


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in modules()} <= set(FLOORS)


def test_imports_point_down() -> None:
    wrong = [f"{module} imports {target}"
             for module, path in modules().items()
             for target in imports(path)
             if target.split(".")[0] == "dpool" and room(target) not in FLOORS[room(module)] | {room(module)}]
    assert not wrong


def test_the_floors_have_no_circle() -> None:
    """With the face left out, from which the rooms take only the version."""
    below = {name: targets - {name, "dpool"} for name, targets in FLOORS.items()}
    while below:
        ground = {name for name, targets in below.items() if not targets & set(below)}
        assert ground, f"a circle among {sorted(below)}"
        below = {name: targets for name, targets in below.items() if name not in ground}


@pytest.mark.parametrize("module", PURE)
def test_files_that_decide_import_no_socket_thread_or_clock(module: str) -> None:
    known = modules()
    seen: set[str] = set()
    todo = [module]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        for target in imports(known[current], inside_functions=current == module):
            assert target.split(".")[0] not in ACTING, f"{current} imports {target}"
            if target in known and target != "dpool":
                todo.append(target)


@pytest.mark.parametrize("module", list(modules()))
def test_every_module_says_what_it_is(module: str) -> None:
    path = modules()[module]
    if path.stat().st_size:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
