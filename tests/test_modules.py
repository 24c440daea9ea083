"""Owns the tests of modules and data files that only the driver has: what a worker finds of them, and what travels.

Each program is a process of its own, with a package in its directory that its node knows nothing of.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from textwrap import dedent

import pytest
from clusters import Cluster

from dpool.cluster.driver.modules import answer
from dpool.cluster.node import modules
from dpool.cluster.node.modules import Library, Questions
from dpool.cluster.wire.messages import Found, Wanted, digest_of


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=1) as cluster:
        yield cluster


def write(directory: Path, **files: str) -> None:
    """Files by name; a double underscore is a slash, the last single one a dot."""
    for name, text in files.items():
        path = directory / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))


def run(cluster: Cluster, directory: Path, program: str, **more: str) -> tuple[str, str]:
    """What a driver of the cluster prints, on stdout and stderr."""
    (directory / "program.py").write_text("from dpool.multiprocessing import Pool\n" + dedent(program))
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True, timeout=60, cwd=directory,
                          env=cluster.environment() | {"DPOOL_ADDRESS": cluster.address} | more)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# -- data files


def test_data_files_of_a_package(cluster: Cluster, tmp_path: Path) -> None:
    write(tmp_path, mine__data__deep__words_txt="häuser\n", mine__data__more_txt="", secret_txt="secret")
    write(tmp_path, mine__work_py="""
        import importlib.resources as resources
        import pkgutil

        def work(_):
            root = resources.files("mine")
            data = root / "data"
            with resources.as_file(data.joinpath("deep", "words.txt")) as copy:
                copied = copy.read_text(encoding="utf-8")
            with data.joinpath("deep/words.txt").open(encoding="utf-8") as lines:
                read = list(lines)
            return (sorted(entry.name for entry in data.iterdir()), data.joinpath("deep").is_dir(), copied, read,
                    (data / "deep/words.txt").read_bytes(), pkgutil.get_data("mine", "data/deep/words.txt"),
                    pkgutil.get_data("mine.work", "data/more.txt"), (data / "nothing").is_file())

        def outside(way):
            from importlib.resources import files
            try:
                return files("mine").joinpath(way).read_text()
            except OSError as error:
                return type(error).__name__
    """)
    (tmp_path / "mine" / "__init__.py").write_text("")
    out, err = run(cluster, tmp_path, """
        import mine.work
        if __name__ == "__main__":
            with Pool(2) as pool:
                print(*pool.apply(mine.work.work, (0,)), sep="\\n")
                print(pool.map(mine.work.outside, ["data/none.txt", "../secret.txt", "data/../../secret.txt"]))
    """)
    words = "häuser\n".encode()
    expected: list[object] = [["deep", "more.txt"], True, "häuser\n", ["häuser\n"], words, words, b"", False]
    lines = "\n".join(str(one) for one in expected)
    assert (out, err) == (lines + "\n" + str(["FileNotFoundError"] * 3) + "\n", "")


def test_data_files_of_a_namespace_package(cluster: Cluster, tmp_path: Path) -> None:
    write(tmp_path, space__words_txt="here", space__work_py="""
        def work():
            from importlib.resources import files
            from . import other
            return files("space").joinpath("words.txt").read_text() + other.VALUE
    """, space__other_py="VALUE = '!'")
    out, err = run(cluster, tmp_path, """
        from space.work import work
        if __name__ == "__main__":
            with Pool(1) as pool:
                print(pool.apply(work))
    """)
    assert (out, err) == ("here!\n", "")


# -- modules that were changed

CHANGED = """
    import os, sys
    import changed

    def value():
        import changed
        return changed.VALUE, changed.value()

    if __name__ == "__main__":
        with open("changed.py", "w") as file:
            file.write(sys.argv[1] if len(sys.argv) > 1 else {after!r})
        with Pool(1) as pool:
            print(pool.apply(value))
"""


@pytest.mark.parametrize("after", [
    "VALUE = 'another'\ndef value():\n    return 1\n", "VALUE = 'first'\ndef value():\n    return 2\n", "x = = 1"],
    ids=["a constant", "a function", "nonsense"])
def test_a_module_changed_after_its_import_is_sent_as_it_was_imported(after: str, cluster: Cluster,
                                                                      tmp_path: Path) -> None:
    write(tmp_path, changed_py="VALUE = 'first'\ndef value():\n    return 1\n")
    assert run(cluster, tmp_path, CHANGED.format(after=after)) == ("('first', 1)\n", "")


def test_where_the_original_is_lost_a_warning_says_so(cluster: Cluster, tmp_path: Path) -> None:
    write(tmp_path, changed_py="VALUE = 'first'\ndef value():\n    return 1\n")
    after = "VALUE = 'another'\ndef value():\n    return 2\n"
    out, err = run(cluster, tmp_path, CHANGED.format(after=after), PYTHONDONTWRITEBYTECODE="1")
    assert out == "('another', 2)\n"
    assert err == (f"{tmp_path / 'changed.py'}:1: RuntimeWarning: changed was changed after it was imported here: "
                   f"workers on other machines import the file as it is now\n  VALUE = 'another'\n")


def test_old_bytecode_is_not_taken_for_the_original(cluster: Cluster, tmp_path: Path) -> None:
    write(tmp_path, changed_py="VALUE = 'old, and longer'\ndef value():\n    return 1\n")
    subprocess.run([sys.executable, "-c", "import changed"], cwd=tmp_path, check=True, timeout=60)
    write(tmp_path, changed_py="VALUE = 'new'\ndef value():\n    return 1\n")
    out, err = run(cluster, tmp_path, """
        import changed

        def value():
            import changed
            return changed.VALUE

        if __name__ == "__main__":
            with Pool(1) as pool:
                print(pool.apply(value))
    """, PYTHONDONTWRITEBYTECODE="1")
    assert (out, err) == ("new\n", "")


def test_a_program_that_makes_errors_of_warnings_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    write(tmp_path, changed_py="VALUE = 'first'\ndef value():\n    return 1\n")
    after = "VALUE = 'another'\ndef value():\n    return 2\n"
    out, err = run(cluster, tmp_path, CHANGED.format(after=after), PYTHONDONTWRITEBYTECODE="1",
                   PYTHONWARNINGS="error::RuntimeWarning")
    assert out == "('another', 2)\n"
    assert err.startswith(f"{tmp_path / 'changed.py'}: RuntimeWarning: changed was changed after it was imported here")


def test_modules_in_a_zip_file_are_sent(cluster: Cluster, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.writestr("mine/__init__.py", "")
        archive.writestr("mine/work.py", "from . import other\ndef work(x):\n    return x + other.VALUE\n")
        archive.writestr("mine/other.py", "VALUE = 10\n")
    out, err = run(cluster, tmp_path, """
        import sys
        sys.path.insert(0, "packed.zip")
        import mine.work
        if __name__ == "__main__":
            with Pool(1) as pool:
                print(pool.map(mine.work.work, [1, 2]))
    """)
    assert (out, err) == ("[11, 12]\n", "")


# -- what travels


def test_a_module_travels_to_a_node_once(cluster: Cluster, tmp_path: Path) -> None:
    write(tmp_path, mine_py="""
        import os, time

        def meet(directory):
            # Every worker has imported this module.
            open(os.path.join(directory, str(os.getpid())), "w").close()
            while len(os.listdir(directory)) < 2:
                time.sleep(0.01)
    """)
    out, _ = run(cluster, tmp_path, """
        import tempfile
        import mine
        from dpool.cluster.driver import remote

        if __name__ == "__main__":
            asked, sent = [], []
            answer, segment = remote.answer, remote.segment

            def counted(question, fetch):
                asked.append(question)
                return answer(question, fetch)

            def posted(carried):
                sent.append(carried)
                return segment(carried)

            remote.answer, remote.segment = counted, posted
            for _ in range(2):
                with Pool(2) as pool, tempfile.TemporaryDirectory() as directory:
                    pool.map(mine.meet, [directory] * 4, chunksize=1)
                print(asked.count("mine"), len(sent))
    """)
    assert out == "1 1\n2 1\n"


def test_an_installed_module_that_is_missing_is_named_with_its_node(cluster: Cluster, tmp_path: Path) -> None:
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    site = tmp_path / "user" / "lib" / version / "site-packages"
    write(site, thirdparty_py="VALUE = 1")
    write(tmp_path, mine_py="""
        import importlib.util

        def work():
            import thirdparty
            return thirdparty.VALUE

        def look():
            return importlib.util.find_spec("thirdparty")
    """)
    out, err = run(cluster, tmp_path, """
        import mine, thirdparty
        if __name__ == "__main__":
            with Pool(1) as pool:
                print(pool.apply(mine.look))
                for _ in range(2):
                    try:
                        pool.apply(mine.work)
                    except ModuleNotFoundError as error:
                        print(error.name, error)
                        print(str(error) in str(error.__cause__))
    """, PYTHONUSERBASE=str(tmp_path / "user"), PYTHONPATH=f"{cluster.environment()['PYTHONPATH']}:{site}")
    wanted = (f"thirdparty No module named 'thirdparty' on the node {socket.gethostname()}: it is installed where the "
              f"program runs, and such modules are not sent; install it there for Python "
              f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})\nTrue\n")
    assert (out, err) == ("None\n" + wanted * 2, "")


@pytest.mark.parametrize("question", ["json", "json\0tool.py", "__main__", "no.such", "a b", "../x", "", "deeds\0x",
                                      "dpool\0../pyproject.toml", "dpool\0/etc/passwd", "dpool\0cli/../../README.md",
                                      "pytest\0py.typed"])
def test_what_is_not_answered(question: str) -> None:
    import deeds  # noqa: F401

    assert answer(question) is None


def test_looking_at_a_module_runs_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy, such as a web framework's settings, may fail when it is asked what it is."""
    (tmp_path / "with_proxy.py").write_text(dedent("""
        class Proxy:
            @property
            def __class__(self):
                raise LookupError("not set up yet")
        settings = Proxy()
        def f(): return 1
    """))
    monkeypatch.syspath_prepend(str(tmp_path))
    with_proxy = importlib.import_module("with_proxy")
    found = answer("with_proxy")
    assert found is not None and b"settings" in found
    assert with_proxy.f() == 1
    del sys.modules["with_proxy"]


def test_what_is_installed_is_refused() -> None:
    assert answer("pytest") == b'{"refused": "is installed where the program runs"}\n'


def test_an_extension_module_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"native_of_mine{EXTENSION_SUFFIXES[0]}").write_bytes(b"not loaded by a question")
    monkeypatch.syspath_prepend(tmp_path)
    assert answer("native_of_mine") == b'{"refused": "is an extension module where the program runs"}\n'


# -- the node's books


def ask(questions: Questions, asked: socket.socket) -> Wanted | None:
    """Have it see the next question."""
    data, [asker], _, _ = socket.recv_fds(asked, 1 << 16, 1)
    return questions.ask(data, asker)


class Asker:
    """A worker that asks."""

    def __init__(self, to: socket.socket, question: str) -> None:
        self.mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(to, [question.encode()], [theirs.fileno()])
        self.mine.settimeout(30)

    def told(self) -> bytes | None:
        with self.mine:
            _, descriptors, _, _ = socket.recv_fds(self.mine, 1, 1)
        if not descriptors:
            return None
        with open(descriptors[0], "rb") as file:
            return file.read()


def segment(content: bytes) -> int:
    descriptor = os.memfd_create("test")
    os.pwrite(descriptor, content, 0)
    return descriptor


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    asked, asks = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with asked, asks:
        yield asked, asks


def test_those_who_ask_the_same_are_told_together_and_later_ones_at_once(ends: tuple[socket.socket, socket.socket]
                                                                         ) -> None:
    asked, asks = ends
    questions = Questions(Library())
    first, second = Asker(asks, "mine"), Asker(asks, "mine")
    wanted = ask(questions, asked)
    assert wanted is not None and wanted.name == "mine" and not wanted.whole
    assert ask(questions, asked) is None
    assert questions.found(Found(wanted.request, True, digest_of(b"text")), [segment(b"text")]) is None
    assert (first.told(), second.told()) == (b"text", b"text")
    third = Asker(asks, "mine")
    assert ask(questions, asked) is None
    assert third.told() == b"text"


def test_what_is_nowhere_is_asked_for_once(ends: tuple[socket.socket, socket.socket]) -> None:
    asked, asks = ends
    questions = Questions(Library())
    first = Asker(asks, "mine")
    wanted = ask(questions, asked)
    assert wanted is not None
    questions.found(Found(wanted.request, False), [])
    second = Asker(asks, "mine")
    assert ask(questions, asked) is None
    assert (first.told(), second.told()) == (None, None)


def test_an_answer_that_is_not_here_any_more_is_asked_for_again(ends: tuple[socket.socket, socket.socket],
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    asked, asks = ends
    library = Library()
    monkeypatch.setattr(modules, "MAX_KEPT", 1)
    library.keep(b"first")
    library.keep(b"second")
    questions = Questions(library)
    one, other = Asker(asks, "first"), Asker(asks, "second")
    wanted, also = ask(questions, asked), ask(questions, asked)
    assert wanted is not None and also is not None
    again = questions.found(Found(wanted.request, True, digest_of(b"first")), [])
    assert again == Wanted(wanted.request, "first", whole=True)
    assert questions.found(Found(also.request, True, digest_of(b"second")), []) is None
    assert questions.found(Found(wanted.request, True, digest_of(b"first")), [segment(b"first")]) is None
    assert (one.told(), other.told()) == (b"first", b"second")


def test_who_waits_at_the_end_is_told_that_there_is_nothing(ends: tuple[socket.socket, socket.socket]) -> None:
    asked, asks = ends
    questions = Questions(Library())
    asker = Asker(asks, "mine")
    assert ask(questions, asked) is not None
    questions.close()
    assert asker.told() is None
    assert questions.found(Found(99, True, b"x"), [segment(b"late")]) is None
