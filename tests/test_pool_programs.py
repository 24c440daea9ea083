"""Whole programs that use a Pool: however their functions came to be, and however they end. Nothing but their own words
is printed, their exit codes are kept, and nothing of them is left.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from leftovers import GONE_S, MARK, PATIENCE_S, Watched, marked, new_mark

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["fork", "forkserver", "spawn"]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(*command: str, directory: Path, stdin: str = "", code: int = 0) -> str:
    """What a program prints on stdout; it must be silent otherwise, exit with `code`, and leave nothing."""
    mark = new_mark()
    path = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry)])
    try:
        done = subprocess.run([sys.executable, *command], input=stdin, capture_output=True, text=True,
                              timeout=PATIENCE_S, cwd=directory, env={**os.environ, "PYTHONPATH": path, MARK: mark})
        assert (done.stderr, done.returncode) == ("", code)
        assert Watched(marked(mark)).left_after(GONE_S) == []
    finally:
        for pid in marked(mark):
            os.kill(pid, 9)
    return done.stdout


def run_script(text: str, directory: Path, code: int = 0) -> str:
    script = directory / "program.py"
    script.write_text(text)
    return run(str(script), directory=directory, code=code)


# -- where functions come from

MAIN = """
import functools, sys
from multiprocessing import get_context
from dpool.multiprocessing.pool import Pool

FACTOR = 2
state = "unset"

class Item:
    def __init__(self, value):
        self.value = value
    def times(self, factor):
        return Item(self.value * factor)
    def __call__(self, value):
        return self.value + value
    def get(self):
        return self.value

class Oops(Exception):
    pass

def double(value):
    return value * FACTOR

def make(value):
    return Item(value)

def fail(value):
    raise Oops(value)

def set_state(value):
    global state
    state = value

def get_state(_):
    return state

def add(first, second):
    return first + second

def program(method):
    with Pool(2, set_state, ("set",), context=get_context(method)) as pool:
        print(pool.map(double, range(4)))
        print(pool.map(lambda value: double(value) + 1, range(4)))
        items = pool.map(make, range(4))
        print(all(type(item) is Item for item in items), [item.value for item in items])
        print(set(pool.map(get_state, range(10))))
        try:
            pool.apply(fail, (7,))
        except Oops as error:
            print("oops", error)

def objects(method):
    with Pool(2, context=get_context(method)) as pool:
        print([item.value for item in pool.map(Item(3).times, range(4))])
        print(pool.map(Item(3), range(4)), pool.map(functools.partial(add, 10), range(4)))
        print(pool.map(Item.get, [Item(1), Item(2)]))
"""
PRINTED = """[0, 2, 4, 6]
[1, 3, 5, 7]
True [0, 1, 2, 3]
{'set'}
oops 7
"""
OBJECTS = """[0, 3, 6, 9]
[3, 4, 5, 6] [10, 11, 12, 13]
[1, 2]
"""


def test_functions_of_a_script(method: str, tmp_path: Path) -> None:
    text = f"{MAIN}\nif __name__ == '__main__':\n    program({method!r})\n"
    assert run_script(text, tmp_path) == PRINTED


def test_objects_of_a_script(method: str, tmp_path: Path) -> None:
    """Bound methods, callables, partials, arguments: whatever refers to a class or function of __main__."""
    text = f"{MAIN}\nif __name__ == '__main__':\n    objects({method!r})\n"
    assert run_script(text, tmp_path) == OBJECTS


def test_a_function_of_a_script_that_calls_another_goes_by_its_name(method: str, tmp_path: Path) -> None:
    """By value it would not go: the program's lock, which the worker's main module does not have, goes nowhere."""
    assert run_script(f"""
import threading
from multiprocessing import get_context
from dpool.multiprocessing.pool import Pool

lock = None

def is_worker():
    return __name__ != "__main__" or lock is not None and {method == "fork"}

def call(_):
    return is_worker(), lock is None

if __name__ == "__main__":
    lock = threading.Lock()
    with Pool(1, context=get_context({method!r})) as pool:
        print(pool.map(call, range(2)))
""", tmp_path) == f"{[(True, method != 'fork')] * 2}\n"


def test_functions_that_cache_of_a_program_that_cannot_be_imported(method: str, tmp_path: Path) -> None:
    """What was computed in a worker is not computed there again."""
    assert run("-c", f"""
import functools
from multiprocessing import get_context
from dpool.multiprocessing.pool import Pool

@functools.lru_cache(maxsize=500)
def double(value):
    return value * 2

@functools.cache
def fibonacci(number):
    return number if number < 2 else fibonacci(number - 1) + fibonacci(number - 2)

class Adder:
    @functools.cache
    def add(self, value):
        return value + 1

@functools.singledispatch
def kind(value):
    return "other"

@kind.register
def _(value: int):
    return "int"

def use(value):
    return double(value), fibonacci(60), Adder().add(value), kind(value), kind("1"), double.cache_info().maxsize

def computed():
    return double.cache_info().misses

def make(factor):
    @functools.cache
    def times(value):
        return value * factor
    return times

with Pool(1, context=get_context({method!r})) as pool:
    print(pool.map(lambda value: double(value), [1, 2, 1]), pool.map(kind, [1, "1"]), pool.map(make(3), [1, 1]))
    print(pool.map(use, [1]), pool.map(lambda value: use(value), [1]))
    print(pool.apply(computed))
""", directory=tmp_path) == """[2, 4, 2] ['int', 'other'] [3, 3]
[(2, 1548008755920, 2, 'int', 'other', 500)] [(2, 1548008755920, 2, 'int', 'other', 500)]
2
"""


@pytest.mark.parametrize("method", ["fork", *(pytest.param(name, marks=pytest.mark.xfail(
    strict=True, reason="by name only: a worker that was not forked has no such __main__"))
    for name in ("forkserver", "spawn"))])
def test_objects_of_a_program_that_cannot_be_imported(method: str, tmp_path: Path) -> None:
    assert run("-c", f"{MAIN}\nobjects({method!r})\n", directory=tmp_path) == OBJECTS


def test_functions_of_a_program_on_the_command_line(method: str, tmp_path: Path) -> None:
    assert run("-c", f"{MAIN}\nif __name__ == '__main__':\n    program({method!r})\n", directory=tmp_path) == PRINTED


def test_functions_of_a_program_on_stdin(method: str, tmp_path: Path) -> None:
    """jupyter/notebook#5261: a program that no worker can import."""
    text = f"{MAIN}\nprogram({method!r})\n"
    assert run("-", directory=tmp_path, stdin=text) == PRINTED
    assert run(directory=tmp_path, stdin=text) == PRINTED


def test_functions_of_a_module_that_is_run(method: str, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tool.py").write_text(f"{MAIN}\nif __name__ == '__main__':\n    program({method!r})\n")
    (package / "__main__.py").write_text(f"{MAIN}\nif __name__ == '__main__':\n    program({method!r})\n")
    assert run("-m", "package.tool", directory=tmp_path) == PRINTED
    assert run("-m", "package", directory=tmp_path) == PRINTED


def test_cells_of_a_notebook_may_redefine_their_functions(method: str, tmp_path: Path) -> None:
    """An interpreter whose __main__ has no file and grows while the pool lives."""
    cells = [
        "from multiprocessing import get_context; from dpool import Pool",
        f"pool = Pool(2, context=get_context({method!r}))",
        "def f(x):\n    return x + 1\n",
        "print(pool.map(f, range(3)))",
        "y = 10\ndef f(x):\n    return x + y\n",
        "print(pool.map(f, range(3)))",
        "y = 20",
        "print(pool.map(f, range(3)))",
        "class C:\n    v = 1\n",
        "print(type(pool.apply(lambda: C())) is C, pool.apply(lambda: C.v))",
        "pool.terminate(); pool.join()",
    ]
    text = ("import code, sys\nshell = code.InteractiveInterpreter(sys.modules['__main__'].__dict__)\n"
            f"for cell in {cells!r}:\n    shell.runsource(cell, '<cell>', 'exec')\n")
    assert run("-", directory=tmp_path, stdin=text) == "[1, 2, 3]\n[10, 11, 12]\n[20, 21, 22]\nTrue 1\n"


def test_a_script_without_a_guard_works_where_the_standard_library_s_does(tmp_path: Path) -> None:
    """Row 10 of bad input, under fork."""
    assert run_script("from multiprocessing import get_context\nfrom dpool import Pool\n"
                      "pool = Pool(2, context=get_context('fork'))\nprint(pool.map(abs, [-1, 2]))\n"
                      "pool.close()\npool.join()\n", tmp_path) == "[1, 2]\n"


@pytest.mark.parametrize("flags", [["-O"], ["-OO"], ["-I"], ["-S"], ["-E", "-B"], ["-W", "error"], ["-X", "dev"],
                                   ["-X", "utf8"], ["-u"]])
def test_flags_of_the_interpreter(flags: list[str], method: str, tmp_path: Path) -> None:
    """Row 34 of bad input. -W error also says that nothing here warns."""
    if flags[0] == "-W" and method == "fork" or flags[-1] == "dev" and method == "fork":
        pytest.skip("Python itself warns of a fork beside threads")
    text = (f"import sys\nsys.path[:0] = {[str(ROOT), *filter(None, sys.path)]!r}\n"
            f"from multiprocessing import get_context\nfrom dpool import Pool\n"
            f"def run():\n    with Pool(2, context=get_context({method!r})) as pool:\n"
            f"        print(pool.map(abs, range(-3, 3)), pool.apply(lambda: 5))\n    pool.join()\n"
            f"if __name__ == '__main__':\n    run()\n")
    script = tmp_path / "program.py"
    script.write_text(text)
    assert run(*flags, str(script), directory=tmp_path) == "[3, 2, 1, 0, 1, 2] 5\n"


@pytest.mark.parametrize("seconds", [0.0, 0.001])
def test_sockets_of_a_program_may_have_a_timeout(seconds: float, method: str, tmp_path: Path) -> None:
    """As in programs that fetch pages; whoever waits for tasks and results has none."""
    if not seconds and method == "forkserver":
        pytest.skip("multiprocessing's own client of the server does not do without waiting")
    text = (f"import socket\nsocket.setdefaulttimeout({seconds})\n"
            f"from multiprocessing import get_context\nfrom dpool import Pool\n"
            f"if __name__ == '__main__':\n    with Pool(2, context=get_context({method!r})) as pool:\n"
            f"        workers = [process.pid for process in pool._pool]\n"
            f"        print(sum(pool.apply(abs, (-1,)) for _ in range(200)), len(pool.map(list, [b'ab'] * 50, 1)))\n"
            f"        print([process.pid for process in pool._pool] == workers, pool.apply(socket.getdefaulttimeout))\n"
            f"    pool.join()\n")
    assert run_script(text, tmp_path) == f"200 50\nTrue {seconds}\n"


# -- ends

HEAD = """
import atexit, gc, os, sys, threading
from multiprocessing import get_context
from dpool import Pool

def double(value):
    return value * 2

def wait(_):
    threading.Event().wait()

def nested(method, depth):
    if not depth:
        return 1
    with Pool(2, context=get_context(method)) as pool:
        return sum(pool.starmap(nested, [(method, depth - 1)] * 2))

if __name__ == "__main__":
    context = get_context({method!r})
"""


@pytest.mark.parametrize("body, printed, code", [
    ("with Pool(2, context=context) as pool: print(pool.map(double, range(3)))", "[0, 2, 4]\n", 0),
    ("pool = Pool(2, context=context); print(pool.map(double, range(3)))", "[0, 2, 4]\n", 0),
    ("pool = Pool(2, context=context)", "", 0),
    ("pool = Pool(2, context=context); pool.close()", "", 0),
    ("pool = Pool(2, context=context); r = pool.map_async(wait, range(100), chunksize=1)", "", 0),
    ("pool = Pool(2, context=context); r = pool.map_async(wait, range(9), chunksize=1); pool.close()", "", 0),
    ("pool = Pool(2, context=context); r = pool.imap(double, iter(int, 1)); next(r)", "", 0),
    ("pool = Pool(2, context=context); r = pool.map_async(wait, range(100)); sys.exit(3)", "", 3),
    ("a = Pool(1, context=context); a.me = a; r = a.apply_async(wait, (1,)); del a, r; gc.collect()", "", 0),
    ("pool = Pool(2, context=context); atexit.register(lambda: print(pool.map(double, [1])))", "[2]\n", 0),
    ("threading.Thread(target=lambda: print(Pool(1, context=context).map(double, [1]))).start()", "[2]\n", 0),
    ("pool = Pool(2, context=context)\n"
     "    threading.Thread(target=lambda: print(pool.map(double, range(2000), chunksize=1)[-1])).start()", "3998\n", 0),
    ("print(nested({method!r}, 2))", "4\n", 0),
])
def test_a_program_ends_as_it_would_without_dpool(body: str, printed: str, code: int, method: str,
                                                  tmp_path: Path) -> None:
    """Silently, whatever is pending: with a pool that is closed, open, idle or busy, held by a thread or a cycle."""
    text = HEAD.format(method=method) + "    " + body.replace("{method!r}", repr(method)) + "\n"
    assert run_script(text, tmp_path, code) == printed


def test_a_program_that_exits_without_a_word_to_python_leaves_nothing(tmp_path: Path) -> None:
    """Where workers are not forked, the standard library's resource tracker has a word to say, as with its own Pool."""
    assert run_script(HEAD.format(method="fork") + "    pool = Pool(2, context=context); "
                      "pool.map_async(wait, range(100)); os._exit(4)\n", tmp_path, 4) == ""


@pytest.mark.parametrize("who", ["dpool", "multiprocessing.pool"])
def test_a_program_prints_what_it_prints_with_the_standard_library_s_pool(who: str, tmp_path: Path) -> None:
    """Prints of tasks reach stdout whole, once; those of the driver are not printed again by forked workers."""
    text = f"""
from multiprocessing import get_context
from {who} import Pool

def say(number):
    print(f"task {{number}}")
    return number

if __name__ == "__main__":
    print("before")
    for method in ("fork", "forkserver", "spawn"):
        with Pool(1, context=get_context(method)) as pool:
            pool.map(say, range(3))
            pool.close()
            pool.join()
    print("after")
"""
    lines = sorted(run_script(text, tmp_path).splitlines())
    assert lines == sorted(["before", "after", *[f"task {number}" for number in range(3)] * 3])


def test_a_program_that_forks_uses_pools_on_both_sides(method: str, tmp_path: Path) -> None:
    """ray#28328, and a child of multiprocessing's that opens a pool of its own while the parent's is busy."""
    text = HEAD.format(method=method) + """
    import warnings
    warnings.simplefilter("ignore")
    pool = Pool(2, context=context)
    pending = pool.map_async(double, range(5000), chunksize=1)
    pid = os.fork()
    if not pid:
        with Pool(2, context=context) as own:
            print("child", own.map(double, range(3)), flush=True)
        own.join()
        os._exit(0)
    os.waitpid(pid, 0)
    print("parent", len(pending.get(60)), flush=True)
    child = context.Process(target=nested, args=(context.get_start_method(), 1))
    child.start()
    child.join()
    print(child.exitcode, pool.map(double, range(3)))
    pool.close()
    pool.join()
"""
    assert run_script(text, tmp_path) == "child [0, 2, 4]\nparent 5000\n0 [0, 2, 4]\n"


def test_the_standard_library_s_other_tools_work_beside_and_inside(method: str, tmp_path: Path) -> None:
    text = HEAD.format(method=method) + """
    import multiprocessing, subprocess
    from multiprocessing.pool import Pool as Other, ThreadPool
    with Pool(2, context=context) as pool, Other(1) as other, ThreadPool(2) as threads:
        print(pool.map(double, range(2)), other.map(double, range(2)), threads.map(double, range(2)))
        print(threads.map(lambda value: pool.apply(double, (value,)), range(4)))
        print(pool.apply(use_stdlib))
"""
    text = text.replace("def nested", """def use_stdlib():
    import subprocess
    from multiprocessing import Process, Queue
    from multiprocessing.pool import Pool as Other
    queue = Queue()
    process = Process(target=queue.put, args=(5,))
    process.start()
    value = queue.get()
    process.join()
    with Other(1) as other:
        return value, other.map(double, [1]), subprocess.run(["echo", "x"], capture_output=True).stdout

def nested""", 1)
    assert run_script(text, tmp_path) == "[0, 2] [0, 2] [0, 2]\n[0, 2, 4, 6]\n(5, [2], b'x\\n')\n"
