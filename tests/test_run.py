"""Owns the tests of `dpool run`: unmodified programs, which must behave as with `python` but for whose pools they get.

Each program is a process of its own, compared with the same program run by the interpreter. Batch jobs are in
test_jobs.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from clusters import Cluster

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["fork", "forkserver", "spawn"]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("DPOOL_", "SLURM", "OMPI_", "PMIX_", "PYTHON"))}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **more}


def python(directory: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=directory, env=environment(**more), text=True,
                          stdin=subprocess.DEVNULL, capture_output=True, timeout=60)


def dpool_run(directory: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return python(directory, "-m", "dpool", "run", *arguments, **more)


def write(directory: Path, name: str, text: str) -> str:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text))
    return name


def prints(directory: Path, program: str, *arguments: str, **more: str) -> str:
    """What a program prints under `dpool run`, with nothing on stderr."""
    done = dpool_run(directory, write(directory, "program.py", program), *arguments, **more)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# -- whose pools


def test_every_way_to_name_a_pool_gets_dpool_s(tmp_path: Path) -> None:
    program = """
        import concurrent.futures, concurrent.futures.process, multiprocessing, multiprocessing.pool
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import Pool, get_context
        from multiprocessing.pool import Pool as PoolClass

        def worker_of(_):
            import sys
            return "dpool.cluster.worker.main" in sys.modules

        if __name__ == "__main__":
            for make in (Pool, PoolClass, multiprocessing.Pool, multiprocessing.pool.Pool, get_context().Pool,
                         get_context("spawn").Pool):
                with make(1) as pool:
                    print(pool.map(worker_of, [1]), isinstance(pool, multiprocessing.pool.Pool))
            for make in (ProcessPoolExecutor, concurrent.futures.ProcessPoolExecutor,
                         concurrent.futures.process.ProcessPoolExecutor):
                with make(1) as executor:
                    print([*executor.map(worker_of, [1])], isinstance(executor, concurrent.futures.Executor))
    """
    assert prints(tmp_path, program) == "[True] True\n" * 9


@pytest.mark.parametrize("method", METHODS)
def test_workers_know_main_and_have_the_names_replaced(method: str, tmp_path: Path) -> None:
    program = """
        import multiprocessing, sys
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing.pool import Pool

        value = 20

        class Point:
            def __init__(self, x):
                self.x = x

        def double(point):
            return Point(point.x * 2 + value)

        def whose(_):
            import concurrent.futures, multiprocessing.pool
            names = Pool, ProcessPoolExecutor, multiprocessing.pool.Pool, concurrent.futures.ProcessPoolExecutor
            return {name.__module__.split(".")[0] for name in names}

        if __name__ == "__main__":
            multiprocessing.set_start_method(sys.argv[1])
            value = 21
            with multiprocessing.Pool(2) as pool:
                points = pool.map(double, [Point(1), Point(2)])
                print([type(point) is Point for point in points], [point.x for point in points])
                print(pool.map(whose, [1]))
    """
    seen = 21 if method == "fork" else 20
    assert prints(tmp_path, program, method) == f"[True, True] [{seen + 2}, {seen + 4}]\n[{{'dpool'}}]\n"


def test_processes_of_multiprocessing_have_the_names_replaced(tmp_path: Path) -> None:
    program = """
        import multiprocessing

        def child(queue):
            with multiprocessing.Pool(1) as pool:
                queue.put((type(pool).__module__.split(".")[0], pool.map(abs, [-1])))

        if __name__ == "__main__":
            for method in multiprocessing.get_all_start_methods():
                context = multiprocessing.get_context(method)
                queue = context.SimpleQueue()
                process = context.Process(target=child, args=(queue,))
                process.start()
                print(queue.get())
                process.join()
                print(process.exitcode)
    """
    assert prints(tmp_path, program) == "('dpool', [1])\n0\n" * 3


def test_the_rest_of_the_standard_library_is_as_it_was(tmp_path: Path) -> None:
    program = """
        import abc, multiprocessing, multiprocessing.pool, pickle
        from concurrent.futures import ThreadPoolExecutor
        from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
        from multiprocessing.pool import Pool, ThreadPool

        class Mine(Pool, abc.ABC):
            pass

        def end():
            import os
            os._exit(3)

        if __name__ == "__main__":
            with ThreadPool(2) as pool:
                print(pool.map(abs, [-1]), isinstance(pool, Pool), issubclass(ThreadPool, Pool))
            with ThreadPoolExecutor(1) as executor:
                print(executor.submit(abs, -1).result(), isinstance(executor, ProcessPoolExecutor))
            with Mine(1) as pool:
                print(pool.map(abs, [-1]), isinstance(pool, Pool))
            with ProcessPoolExecutor(1) as executor:
                try:
                    executor.submit(end).result()
                except BrokenProcessPool:
                    print("broken")
            with multiprocessing.Pool(1) as pool:
                try:
                    pool.apply_async(input).get(0.001)
                except multiprocessing.TimeoutError:
                    print("too late")
            with multiprocessing.Manager() as manager, manager.Pool(1) as pool:
                print(pool.map(abs, [-1]))
            module = multiprocessing.pool
            print(pickle.loads(pickle.dumps(module.mapstar)) is module.mapstar, module.__all__, module.__name__)
            module.anything = 1
            print(module.anything, "anything" in dir(module))
            del module.anything
            print(hasattr(module, "anything"))
    """
    assert prints(tmp_path, program) == dedent("""\
        [1] True True
        1 False
        [1] True
        broken
        too late
        [1]
        True ['Pool', 'ThreadPool'] multiprocessing.pool
        1 True
        False
    """)


def test_a_program_that_names_dpool_itself_gets_the_same(tmp_path: Path) -> None:
    for first in ("from dpool.multiprocessing.pool import Pool", "from dpool import Pool",
                  "from dpool.concurrent.futures.process import ProcessPoolExecutor"):
        program = f"""
            {first}
            import concurrent.futures, multiprocessing.pool, dpool
            print(issubclass(multiprocessing.pool.Pool, dpool.Pool))
            print(concurrent.futures.ProcessPoolExecutor is dpool.ProcessPoolExecutor)
        """
        assert prints(tmp_path, program) == "True\nTrue\n"


def test_joblib_s_default_backend(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    program = """
        from joblib import Parallel, delayed, parallel_config
        from joblib.parallel import get_active_backend

        def worker_of(_):
            import sys
            return "dpool.cluster.worker.main" in sys.modules

        if __name__ == "__main__":
            print(Parallel(n_jobs=2)(delayed(worker_of)(i) for i in range(2)))
            with parallel_config(backend="threading"):
                print(type(get_active_backend()[0]).__name__)
    """
    assert prints(tmp_path, program) == "[True, True]\nThreadingBackend\n"


def test_what_the_program_starts_is_not_touched(tmp_path: Path) -> None:
    program = """
        import subprocess, sys
        text = "from multiprocessing.pool import Pool; print(Pool.__module__)"
        print(subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout)
    """
    before = set(os.listdir(tmp_path))
    assert prints(tmp_path, program) == "multiprocessing.pool\n\n"
    assert set(os.listdir(tmp_path)) - before == {"program.py"}


def test_a_program_without_pools_finds_next_to_nothing_loaded(tmp_path: Path) -> None:
    program = "import sys\nprint(*sys.modules)\n"
    ours = set(prints(tmp_path, program).split())
    theirs = set(python(tmp_path, "program.py").stdout.split())
    assert not (ours - theirs) & {"multiprocessing", "concurrent.futures", "zmq", "msgspec", "asyncio", "typing",
                                  "threading", "subprocess", "shutil", "socket", "inspect", "dataclasses"}


# -- as with the interpreter

LOOK = """
    import sys
    main = sys.modules["__main__"]
    print(sorted(vars(main)))
    print(__name__, globals().get("__file__"), __package__, type(__builtins__), vars(main) is globals())
    print(getattr(__loader__, "__name__", None), type(__loader__), __spec__ and (__spec__.name, __spec__.origin))
    print(sys.argv, sys.path)
"""


@pytest.mark.parametrize("arguments", [
    ["look.py", "a", "--address", "-m"], ["./look.py"], ["sub/../look.py"], ["{here}/look.py"], ["link.py"],
    ["folder", "x"], ["packed.zip"], ["-m", "look", "-m"], ["-mlook"], ["-m", "package", "1"],
    ["-m", "package.inner"]], ids=" ".join)
def test_the_program_finds_itself_as_with_the_interpreter(arguments: list[str], tmp_path: Path) -> None:
    arguments = [argument.format(here=tmp_path) for argument in arguments]
    for name in ("look.py", "sub/real.py", "folder/__main__.py", "package/__main__.py", "package/inner.py"):
        write(tmp_path, name, LOOK)
    write(tmp_path, "package/__init__.py", "")
    (tmp_path / "link.py").symlink_to("sub/real.py")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.write(tmp_path / "look.py", "__main__.py")
    theirs = python(tmp_path, *arguments)
    assert theirs.returncode == 0, theirs.stderr
    ours = dpool_run(tmp_path, *arguments)
    assert (ours.stdout, ours.stderr, ours.returncode) == (theirs.stdout, theirs.stderr, 0)


def test_code_on_the_command_line(tmp_path: Path) -> None:
    code = dedent(LOOK)
    ours, theirs = dpool_run(tmp_path, "-c", code, "a"), python(tmp_path, "-c", code, "a")
    assert (ours.stdout, ours.stderr, ours.returncode) == (theirs.stdout, theirs.stderr, 0)


ENDS = {
    "falls off its end": "import atexit\natexit.register(print, 'last')\nprint('first')",
    "a number": "import sys\nsys.exit(3)",
    "a text": "import sys\nsys.exit('no')",
    "nothing": "raise SystemExit",
    "os._exit": "import os\nos._exit(5)",
    "an exception": "def f():\n    raise KeyError('x')\nf()",
    "an exception with a cause": "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('v') from e",
    "an error of the system": "open('/nowhere/at/all')",
    "a syntax error": "x = = 1",
    "a Ctrl-C": "raise KeyboardInterrupt",
    "a signal": "import os\nos.kill(os.getpid(), 15)",
    "a hook of its own": "import sys\nsys.excepthook = lambda k, e, t: print(k, e, t.tb_lineno, e.__traceback__ is t)\n"
                         "raise KeyError('x')",
    "a thread that goes on": "import threading\nthreading.Thread(target=lambda: (\n"
                             "    threading.main_thread().join(), print('last'))).start()\nprint('first')",
    "an exception in an import": "import broken_module",
}


@pytest.mark.parametrize("text", ENDS.values(), ids=ENDS)
def test_the_program_ends_as_with_the_interpreter(text: str, tmp_path: Path) -> None:
    write(tmp_path, "broken_module.py", "def f():\n    return nothing\nf()\n")
    (tmp_path / "program.py").write_text(text)
    theirs, ours = python(tmp_path, "program.py"), dpool_run(tmp_path, "program.py")
    assert (ours.stdout, ours.stderr, ours.returncode) == (theirs.stdout, theirs.stderr, theirs.returncode)
    theirs, ours = python(tmp_path, "-m", "program"), dpool_run(tmp_path, "-m", "program")
    assert (ours.stdout, ours.stderr, ours.returncode) == (theirs.stdout, theirs.stderr, theirs.returncode)


# -- the command


def test_an_interpreter_may_stand_before_the_program(tmp_path: Path) -> None:
    write(tmp_path, "program.py", """
        import multiprocessing.pool, os, sys
        print(multiprocessing.pool.Pool.__module__, sys.argv, sys.executable, sys.flags.optimize, sys.warnoptions)
    """)
    bin = os.path.dirname(sys.executable)
    path = os.pathsep.join([bin, os.environ["PATH"]])
    name = os.path.basename(sys.executable)
    plain = f"dpool.multiprocessing.replacement ['program.py', 'a'] {sys.executable} 0 []\n"
    for command in (["--", "program.py", "a"], [name, "program.py", "a"], ["--", name, "program.py", "a"],
                    [sys.executable, "program.py", "a"]):
        done = dpool_run(tmp_path, *command, PATH=path)
        assert (done.stdout, done.stderr) == (plain, "")
    flagged = f"dpool.multiprocessing.replacement ['program.py', 'a'] {sys.executable} 1 ['error']\n"
    for command in ([name, "-O", "-W", "error", "program.py", "a"],
                    ["--local", "--", "-O", "-Werror", "program.py", "a"]):
        done = dpool_run(tmp_path, *command, PATH=path)
        assert (done.stdout, done.stderr) == (flagged, "")


@pytest.mark.parametrize("options, at", [("-um", 2), ("-uEc", 3), ("-m", 1), ("-u", 0), ("-Wm", 0), ("-uXm", 0),
                                         ("--check-hash-based-pycs", 0), ("-umodule", 2)])
def test_options_that_stand_together(options: str, at: int) -> None:
    from dpool.cli.run import _program_in

    assert _program_in(options) == at


def test_the_installed_command_runs_a_program_as_the_module_does(tmp_path: Path) -> None:
    write(tmp_path, "bin/dpool", "import sys\nfrom dpool.cli.main import main\nsys.exit(main())\n")
    for text in (dedent(LOOK), *ENDS.values()):
        (tmp_path / "program.py").write_text(text)
        theirs, ours = python(tmp_path, "program.py", "a"), python(tmp_path, "bin/dpool", "run", "program.py", "a")
        assert (ours.stdout, ours.stderr, ours.returncode) == (theirs.stdout, theirs.stderr, theirs.returncode)


def test_an_installed_command_is_a_program(tmp_path: Path) -> None:
    script = tmp_path / "bin" / "tool"
    write(tmp_path, "bin/tool", f"#!{sys.executable}\nimport multiprocessing.pool as m\nprint(m.Pool.__module__)\n")
    script.chmod(0o755)
    done = dpool_run(tmp_path, "tool", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert (done.stdout, done.stderr) == ("dpool.multiprocessing.replacement\n", "")


@pytest.mark.parametrize("command, code, words", [
    ([], 2, "no program is given"), (["nowhere.py"], 2, "can't open file"), (["-m"], 2, "-m needs an argument"),
    (["/bin/sh", "-c", "true"], 1, "no program of Python's"), (["-"], 1, "stdin"), (["python9.99", "x"], 2, "PATH"),
    (["--nothing", "x.py"], 2, "no option --nothing"), (["--address"], 2, "--address needs an argument"),
    (["--local", "--address", "a", "x"], 2, "exclude")])
def test_what_cannot_be_run_is_said_in_a_sentence(command: list[str], code: int, words: str, tmp_path: Path) -> None:
    done = dpool_run(tmp_path, *command)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr


# -- on a cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=1) as cluster:
        yield cluster


ON_A_CLUSTER = """
    import multiprocessing, os
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import Pool

    def far(_):
        return os.environ.get("DPOOL_TEST_MARK"), ProcessPoolExecutor.__module__.split(".")[0]

    def nested(_):
        with Pool(1) as pool:
            return type(pool).__module__.split(".")[0]

    if __name__ == "__main__":
        with Pool(1) as pool:
            print(pool.map(far, [1]), pool.map(nested, [1]))
        with ProcessPoolExecutor(1) as executor:
            print([*executor.map(far, [1])])
"""


@pytest.mark.parametrize("how", ["address", "variable"])
def test_on_a_cluster(how: str, cluster: Cluster, tmp_path: Path) -> None:
    write(tmp_path, "program.py", ON_A_CLUSTER)
    far = (cluster.mark, "dpool")
    expected = f"[{far}] ['dpool']\n[{far}]\n"
    if how == "address":
        done = dpool_run(tmp_path, "--address", cluster.address, "--key", str(cluster.key), "program.py")
    else:
        done = dpool_run(tmp_path, "program.py", DPOOL_ADDRESS=cluster.address, DPOOL_KEY_FILE=str(cluster.key))
    assert (done.stdout, done.stderr, done.returncode) == (expected, "", 0)


def test_local_is_this_machine_whatever_the_variable_says(cluster: Cluster, tmp_path: Path) -> None:
    write(tmp_path, "program.py", ON_A_CLUSTER)
    done = dpool_run(tmp_path, "--local", "program.py", DPOOL_ADDRESS=cluster.address)
    assert (done.stdout, done.stderr) == ("[(None, 'dpool')] ['dpool']\n[(None, 'dpool')]\n", "")


def test_no_cluster_there_is_said_by_the_first_pool(tmp_path: Path) -> None:
    write(tmp_path, "program.py", "import multiprocessing\nprint('begins', flush=True)\nmultiprocessing.Pool(1)\n")
    done = dpool_run(tmp_path, "--address", "nonsense", "program.py", DPOOL_KEY=cluster_key())
    assert done.returncode == 1 and done.stdout == "begins\n"
    assert done.stderr.splitlines()[-1] == ("ValueError: 'nonsense' is no address of a cluster: it looks like "
                                            "tcp://host:7077 or tcp://[::1]:7077")


def cluster_key() -> str:
    from dpool.cluster.wire.keys import Keys

    return Keys.new().text()
