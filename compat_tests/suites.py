"""Finds the classes of the running interpreter's `test` package that exercise process pools, and puts a target in.

Finds by looking, so that tests of a newer Python turn up by themselves; what is known about them is in names.py.
Called by __main__.py to list what can be run, and by child.py to get the one class it runs.
"""

import inspect
import multiprocessing
import pkgutil
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from unittest import TestCase, defaultTestLoader

from compat_tests import substitution
from compat_tests.targets import Target

FAMILIES = ("pool", "manager", "main", "executor", "asyncio")
CONTEXTS = ("fork", "spawn", "forkserver")

# A class as this harness names it (without its start method, which is a column of its own), and its tests.
Suites = dict[str, tuple[type[TestCase], list[str]]]

_SPELLING = {"fork": "Fork", "spawn": "Spawn", "forkserver": "Forkserver"}


def find(family: str, context: str, target: Target | None = None) -> Suites:
    """The suites of a family under a start method, by name; with the target put in, if one is given.

    Raises ModuleNotFoundError if this interpreter came without that part of its `test` package. With a target, the
    modules of this process are changed for good and its start method is set: call it once in a process.
    """
    match family:
        case "pool" | "manager":
            return _find_pool(family, context, target)
        case "main":
            return _find_main(context, target)
        case "executor":
            return _find_executor(context, target)
        case "asyncio":
            return _find_asyncio(context, target)
        case "harness":  # not CPython's: what test_harness.py runs
            return {
                name: (cls, _test_names(cls)) for name, cls in _test_classes(import_module("compat_tests.stand_ins"))
            }
    raise ValueError(family)


def _find_pool(family: str, context: str, target: Target | None) -> Suites:
    tests = import_module("test._test_multiprocessing")
    if target:
        substitution.into_multiprocessing_tests(target, context)
    # CPython builds the classes itself, with its own setUpModule, which sets the start method, and tearDownModule,
    # which looks for threads and processes left behind. unittest finds those two through the class's module.
    made = ModuleType("compat_tests.made_by_cpython")
    sys.modules[made.__name__] = made
    tests.install_tests_in_module_dict(vars(made), context)
    suites: Suites = {}
    for name, cls in _test_classes(made):
        chosen = [test for test in _test_names(cls) if _family_of(cls, test) == family]
        if chosen:
            suites[name] = (cls, chosen)
    if target:
        substitution.into_pool_classes(target, tests, {name: cls for name, (cls, _) in suites.items()})
    return suites


def _family_of(cls: type[TestCase], test: str) -> str | None:
    """pool or manager, by the class's flavour; None for a test that makes no process pool."""
    if cls.__name__.startswith("WithThreads"):
        return None
    source = inspect.getsource(getattr(cls, test))
    if "TestPool" not in cls.__name__ and not re.search(r"\bPool\(|pool_in_process", source):
        return None
    hosted = cls.__name__.startswith("WithManager") or "manager.Pool(" in source
    return "manager" if hosted else "pool"


def _find_main(context: str, target: Target | None) -> Suites:
    tests = import_module("test.test_multiprocessing_main_handling")
    if target:
        substitution.into_main_handling_tests(target)
    # One class for each start method, of which the rest of the name is the same.
    [cls] = [cls for _, cls in _test_classes(tests) if getattr(cls, "start_method", None) == context]
    return {"CmdLineTest": (cls, _test_names(cls))}


def _find_executor(context: str, target: Target | None) -> Suites:
    package = import_module("test.test_concurrent_futures")
    modules = [package]  # up to 3.11 one module, later a package of several
    if hasattr(package, "__path__"):
        modules = [
            import_module(f"{package.__name__}.{info.name}")
            for info in pkgutil.iter_modules(package.__path__)
            if info.name == "util" or info.name.startswith("test_")
        ]
    if target:
        substitution.into_executor_tests(target, modules)
    suites: Suites = {}
    for module in modules:
        for name, cls in _test_classes(module):
            # ProcessPoolSpawnWaitTest is WaitTest under spawn.
            if match := re.fullmatch(rf"ProcessPool{_SPELLING[context]}([A-Z]\w+)", name):
                suites[match[1]] = (cls, _test_names(cls))
            elif name == "FailingInitializerResourcesTest":  # has a test for each start method but fork
                if (test := f"test_{context}") in _test_names(cls):
                    suites[name] = (cls, [test])
    return suites


def _find_asyncio(context: str, target: Target | None) -> Suites:
    tests = import_module("test.test_asyncio.test_events")
    if target:
        substitution.into_asyncio_tests(target)
        multiprocessing.set_start_method(context, force=True)
    suites: Suites = {}
    for name, cls in _test_classes(tests):
        chosen = [test for test in _test_names(cls) if "ProcessPoolExecutor(" in inspect.getsource(getattr(cls, test))]
        if chosen:
            suites[name] = (cls, chosen)
    return suites


def _test_names(cls: type[TestCase]) -> list[str]:
    return list(defaultTestLoader.getTestCaseNames(cls))


def _test_classes(module: ModuleType) -> Iterator[tuple[str, type[TestCase]]]:
    for name, value in vars(module).copy().items():
        if isinstance(value, type) and issubclass(value, TestCase) and value.__module__ == module.__name__:
            yield name, value
