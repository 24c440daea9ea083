"""What an import costs and gives: few modules, and every name and signature of the running standard library.

Each question is asked of a fresh interpreter. Numbers of modules, never times.
"""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import multiprocessing.dummy
import multiprocessing.pool
import os
import pkgutil
import subprocess
import sys
from multiprocessing import get_all_start_methods
from pathlib import Path
from typing import Any

import pytest

import dpool
import dpool.multiprocessing
import dpool.multiprocessing.pool

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"zmq", "asyncio", "joblib", "numpy", "typing", "dataclasses", "cloudpickle", "msgspec", "psutil", "inspect",
         "concurrent.futures", "ssl", "email", "http", "urllib.request"}


def ask(program: str, directory: Path | None = None, *flags: str) -> str:
    """What a program prints, in an interpreter without site-packages' start-up files. Silent on stderr."""
    path = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry)])
    done = subprocess.run([sys.executable, *flags, "-c", program], capture_output=True, text=True, timeout=60,
                          cwd=directory, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def modules_after(program: str) -> set[str]:
    return set(ask(f"import sys\n{program}\nprint(*sys.modules)", None, "-S").split())


def test_import_dpool_imports_next_to_nothing() -> None:
    new = modules_after("import dpool") - modules_after("")
    assert not new & HEAVY
    assert len({name for name in new if not name.startswith("dpool")}) <= 10, sorted(new)


def test_the_pool_door_imports_no_more_than_it_must() -> None:
    new = modules_after("import dpool.multiprocessing.pool") - modules_after("import multiprocessing.pool")
    assert not new & HEAVY
    assert len(new) <= 47, sorted(new)  # what the first pool needs among them: see session.prepare()


def test_the_links_of_a_cluster_import_no_asyncio() -> None:
    """Which would be half of what a node's start or dpool.init() takes."""
    program = "import dpool.cluster_engine, dpool.cluster.node.agent, dpool.cluster.head.server"
    assert "asyncio" not in modules_after(program)


def test_a_first_map_imports_nothing_heavy_in_the_driver() -> None:
    """Of an importable function; a lambda needs cloudpickle."""
    program = "from dpool import Pool\nwith Pool(1) as pool: pool.map(abs, [1])"
    assert not (modules_after(program) - modules_after("import multiprocessing.pool")) & HEAVY


WORKER = """
import sys
from multiprocessing import get_context
{imports}
if __name__ == "__main__":
    with Pool(1, context=get_context({method!r})) as pool:
        pool.apply(abs, (1,))
        print(*pool.apply(list_modules.run))
"""


@pytest.mark.parametrize("method", get_all_start_methods())
def test_a_worker_s_start_imports_nothing_heavy(method: str, tmp_path: Path) -> None:
    (tmp_path / "list_modules.py").write_text("import sys\ndef run():\n    return sorted(sys.modules)\n")
    found = {}
    for name, imports in [("ours", "from dpool import Pool"), ("theirs", "from multiprocessing.pool import Pool")]:
        script = tmp_path / f"{name}.py"
        script.write_text(WORKER.format(imports=f"{imports}\nimport list_modules", method=method))
        done = subprocess.run([sys.executable, "-S", str(script)], capture_output=True, text=True, timeout=60,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])})
        assert (done.returncode, done.stderr) == (0, "")
        found[name] = set(done.stdout.split())
    new = found["ours"] - found["theirs"]
    assert not new & HEAVY
    assert len(new) <= (45 if method == "fork" else 35), sorted(new)
    if method != "fork":  # which has what the driver has
        assert not [name for name in new if name.startswith("dpool.cluster.driver")]


def test_importing_dpool_starts_nothing_and_prints_nothing() -> None:
    assert ask("import dpool, dpool.multiprocessing.pool, threading, os\n"
               "print(threading.active_count(), open(f'/proc/self/task/{os.getpid()}/children').read())") == "1 \n"


# -- names


def stdlib_modules() -> list[str]:
    """multiprocessing's modules that can be imported on this system."""
    found = []
    for info in pkgutil.walk_packages(multiprocessing.__path__, "multiprocessing."):
        try:
            importlib.import_module(info.name)
        except ImportError:
            continue
        found.append(info.name)
    return found


@pytest.mark.parametrize("name", ["multiprocessing", *stdlib_modules()])
def test_every_name_of_the_standard_library_can_be_imported(name: str) -> None:
    theirs = importlib.import_module(name)
    program = f"import {name}\nimport dpool.{name}\n"
    public = {*(n for n in vars(theirs) if not n.startswith("_")), *getattr(theirs, "__all__", ())}
    program += "".join(f"from dpool.{name} import {attribute}\n" for attribute in sorted(public))
    assert ask(program) == ""


@pytest.mark.parametrize("name", ["multiprocessing", "multiprocessing.pool"])
def test_a_star_import_gives_the_same_names(name: str) -> None:
    theirs = ask(f"from {name} import *\nprint(*sorted(dir()))")
    assert ask(f"from dpool.{name} import *\nprint(*sorted(dir()))") == theirs


@pytest.mark.parametrize("name", [name for name in dpool.__all__ if name != "__version__"])
def test_every_name_of_the_face_is_there(name: str) -> None:
    assert name in dir(dpool)
    assert getattr(dpool, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Poool'"):
        _ = dpool.Poool
    with pytest.raises(AttributeError):
        _ = dpool.multiprocessing.nope


# -- signatures


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


METHODS = [(ours, theirs, name)
           for ours, theirs in [(getattr(dpool.multiprocessing.pool, kind), getattr(multiprocessing.pool, kind))
                                for kind in ("Pool", "ApplyResult", "MapResult", "IMapIterator",
                                             "IMapUnorderedIterator")]
           for name, value in inspect.getmembers(theirs, inspect.isfunction)
           if not name.startswith("_") or name in ("__enter__", "__exit__", "__iter__", "__next__")]


@pytest.mark.parametrize("ours, theirs, name", METHODS, ids=[f"{t.__name__}.{n}" for _, t, n in METHODS])
def test_methods_have_the_signatures_of_the_running_python(ours: type, theirs: type, name: str) -> None:
    assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name))


def test_constructors_have_the_signatures_of_the_running_python_and_one_option_more() -> None:
    more = [("resources", inspect.Parameter.KEYWORD_ONLY, None)]
    assert parameters(dpool.Pool) == parameters(multiprocessing.pool.Pool) + more
    assert parameters(dpool.multiprocessing.Pool) == parameters(multiprocessing.Pool) + more
    for method in get_all_start_methods():
        assert (parameters(dpool.multiprocessing.get_context(method).Pool)
                == parameters(multiprocessing.get_context(method).Pool) + more)


def test_results_and_pools_are_the_standard_library_s_kinds() -> None:
    assert issubclass(dpool.Pool, multiprocessing.pool.Pool)
    assert issubclass(dpool.multiprocessing.pool.AsyncResult, multiprocessing.pool.AsyncResult)
    assert dpool.multiprocessing.TimeoutError is multiprocessing.TimeoutError
    assert dpool.multiprocessing.pool.ThreadPool is multiprocessing.pool.ThreadPool
