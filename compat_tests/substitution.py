"""Puts the target where CPython's test modules look for Pool and ProcessPoolExecutor, and nowhere else.

Replaces names in the namespaces of test modules and in the text of the programs they start. Never patches
multiprocessing or concurrent.futures. Called by child.py, in the process that runs one class.
"""

import concurrent.futures
import functools
import multiprocessing
import multiprocessing.pool
import re
from collections.abc import Callable
from importlib import import_module
from multiprocessing import managers
from multiprocessing.managers import SyncManager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import TestCase

from compat_tests.targets import TARGETS, Target

CHECKOUT = Path(__file__).resolve().parent.parent


class View(ModuleType):
    """A module seen with some names replaced. Every other name, and every assignment, is the real module's."""

    def __init__(self, module: ModuleType, **replaced: object) -> None:
        super().__init__(module.__name__)
        vars(self).update(replaced, _viewed=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_viewed"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(vars(self)["_viewed"], name, value)


def replace(module: ModuleType, **replaced: object) -> None:
    """Set names in a module's namespace, also in a View's own."""
    vars(module).update(replaced)


def hosting_manager(target: Target) -> type[SyncManager]:
    """A SyncManager class whose server process makes the target's Pool; otherwise the stdlib's.

    The server runs the stdlib's own _run_server, so it needs nothing of this package.
    """

    class Manager(SyncManager):
        _run_server = staticmethod(vars(managers.BaseManager)["_run_server"].__get__(None, SyncManager))

    Manager.register("Pool", target.load_multiprocessing()[1].Pool, vars(managers)["PoolProxy"])
    return Manager


class Programs:
    """Rewrites the import lines of a program's text so that it imports the target from this checkout.

    The programs run isolated (python -I or -E), where PYTHONPATH is ignored, so sys.path is set at the import line.
    """

    def __init__(self, target: Target, start_method: str | None = None) -> None:
        # Programs that choose no start method themselves are given the one under test.
        path = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); "
        method = f"import multiprocessing; multiprocessing.set_start_method({start_method!r}, force=True); "
        before = path + (method if start_method else "")
        self._rules = (
            (r"import multiprocessing(?=\s*$)", f"{before}import {target.multiprocessing} as multiprocessing"),
            (r"from multiprocessing import", f"{before}from {target.multiprocessing} import"),
            (r"from concurrent\.futures import", f"{path}from {target.futures} import"),
        )

    def rewrite(self, text: str) -> str:
        """The program's text with its imports pointing to the target; a text without such imports is an error."""
        changed = 0
        for pattern, replacement in self._rules:
            # A backslash in the checkout's path is none of re's.
            text, count = re.subn(rf"(?m)^(\s*){pattern}", r"\1" + replacement.replace("\\", r"\\"), text)
            changed += count
        if not changed:
            raise AssertionError(f"compat_tests found no import of a pool to rewrite in:\n{text}")
        return text

    def rewriting(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run` (an assert_python_ok) with its program, given by -c or as a file, rewritten first."""

        def run_rewritten(*args: str, **environment: Any) -> Any:
            *options, program = args
            if options and options[-1] == "-c":
                program = self.rewrite(program)
            else:
                Path(program).write_text(self.rewrite(Path(program).read_text()))
            return run(*options, program, **environment)

        return run_rewritten


def into_multiprocessing_tests(target: Target, start_method: str) -> ModuleType:
    """Replace Pool in test._test_multiprocessing, and in the programs its tests start."""
    tests = import_module("test._test_multiprocessing")
    package, pool = target.load_multiprocessing()
    helper = import_module("test.support.script_helper")
    run = Programs(target, start_method).rewriting(helper.assert_python_ok)
    helper_view = View(helper, assert_python_ok=run)
    replace(
        tests,
        multiprocessing=View(multiprocessing, Pool=package.Pool, pool=View(multiprocessing.pool, Pool=pool.Pool)),
        script_helper=helper_view,
        test=View(import_module("test"), support=View(import_module("test.support"), script_helper=helper_view)),
    )
    return tests


def into_pool_classes(target: Target, tests: ModuleType, classes: dict[str, type[TestCase]]) -> None:
    """Give the classes that CPython made the target's Pool, directly and inside a manager."""
    package, _ = target.load_multiprocessing()
    manager = hosting_manager(target)
    for name, cls in classes.items():
        # A class method travels to a worker as getattr(cls, name): it must be of a class that workers can import.
        base = cls.__mro__[1]
        for method in dir(base):
            if method.startswith("_test") and isinstance(vars(base).get(method), classmethod):
                setattr(cls, method, staticmethod(getattr(base, method)))
        if name.startswith("WithProcesses"):
            cls.Pool = staticmethod(package.Pool)  # type: ignore[attr-defined]
        if name.startswith("WithManager"):
            replace(tests.multiprocessing, Manager=functools.partial(_started, manager))
        if hasattr(cls, "manager_class"):
            cls.manager_class = manager
        if name == "TestStdinBadfiledescriptor":
            _check_pool_in_process(target, tests, cls)


def _started(manager: type[SyncManager]) -> SyncManager:
    server = manager(ctx=multiprocessing.get_context())
    server.start()
    return server


def _check_pool_in_process(target: Target, tests: ModuleType, cls: type[TestCase]) -> None:
    """Make the pool of test_pool_in_process the target's, also in a spawned process, and look at its exit code.

    CPython's test only joins the process: an exception in it would pass.
    """
    started: list[multiprocessing.process.BaseProcess] = []

    def process(**kwargs: Any) -> multiprocessing.process.BaseProcess:
        start_method = multiprocessing.get_start_method()
        started.append(multiprocessing.Process(target=pool_in_process, args=(target.name, start_method)))
        return started[-1]

    def check_exit_code(self: TestCase) -> None:
        exit_codes = [p.exitcode for p in started]
        started.clear()  # tearDownModule takes a process that is still referred to for one left behind
        self.assertEqual(exit_codes, [0])

    replace(tests.multiprocessing, Process=process)
    cls.tearDown = check_exit_code  # type: ignore[method-assign]


def pool_in_process(target: str, start_method: str) -> None:
    """Run CPython's function of this name in a process that may have been spawned, with the target put in again."""
    into_multiprocessing_tests(TARGETS[target], start_method).pool_in_process()


def into_main_handling_tests(target: Target) -> ModuleType:
    """Replace the imports of the scripts, packages and zip files that test_multiprocessing_main_handling writes."""
    tests = import_module("test.test_multiprocessing_main_handling")
    programs = Programs(target)
    make_script, make_zip_pkg = tests.make_script, tests.make_zip_pkg

    def make_script_rewritten(folder: str, name: str, source: str, omit_suffix: bool = False) -> Any:
        starts_pool = "multiprocessing" in source  # not so the launcher and the empty sibling module
        return make_script(folder, name, programs.rewrite(source) if starts_pool else source, omit_suffix)

    def make_zip_pkg_rewritten(folder: str, base: str, package: str, name: str, source: str, depth: int = 1) -> Any:
        return make_zip_pkg(folder, base, package, name, programs.rewrite(source), depth)

    replace(tests, make_script=make_script_rewritten, make_zip_pkg=make_zip_pkg_rewritten)
    return tests


def into_executor_tests(target: Target, modules: list[ModuleType]) -> None:
    """Replace ProcessPoolExecutor in the modules of test_concurrent_futures and in the programs they start."""
    executor = target.load_futures().ProcessPoolExecutor
    view = View(concurrent.futures, ProcessPoolExecutor=executor)
    programs = Programs(target)
    for module in modules:
        replace(module, futures=view)
        if hasattr(module, "assert_python_ok"):
            replace(module, assert_python_ok=programs.rewriting(module.assert_python_ok))
        for name, mixin in vars(module).items():
            if re.fullmatch(r"ProcessPool\w+Mixin", name):
                mixin.executor_type = executor


def into_asyncio_tests(target: Target) -> ModuleType:
    """Replace ProcessPoolExecutor in test_asyncio's tests of run_in_executor."""
    tests = import_module("test.test_asyncio.test_events")
    view = View(concurrent.futures, ProcessPoolExecutor=target.load_futures().ProcessPoolExecutor)
    replace(tests, concurrent=View(concurrent, futures=view))
    return tests
