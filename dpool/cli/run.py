"""`dpool run`: runs a Python program in this process, as `python` would, with its pools answered by dpool.

Finds out what is to be run and on which cluster; the names are dpool.replacing's to replace, a batch job is batch.py's
to make a cluster of. What the program raises passes through, without the frames of this package. Called by cli/main.py.
"""

from __future__ import annotations

import builtins
import importlib.machinery
import io
import os
import runpy
import sys
import zipimport
from types import ModuleType

from dpool import replacing
from dpool.errors import DpoolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    # A function and its arguments: called so that no frame stands between this file's and the program's.
    Call = tuple[Callable[..., Any], tuple[Any, ...]]

_USAGE = """\
usage: dpool run [--address ADDRESS | --local] [--key PATH] [--] [python] (FILE | -m MODULE | -c CODE) [ARGUMENT ...]"""
_HELP = f"""{_USAGE}

Run a Python program as python would, with multiprocessing's Pool, concurrent.futures' ProcessPoolExecutor and joblib's
default backend answered by dpool. In a job of Slurm (srun) or Open MPI (mpirun), the first process runs the program,
and the others work for it.

options:
  --address ADDRESS  of a cluster's head, tcp://host:7077; default: DPOOL_ADDRESS, else the processes of this batch job,
                     else this machine
  --local            this machine alone, whatever the environment says
  --key PATH         the key file; default: DPOOL_KEY_FILE, DPOOL_KEY, ~/.config/dpool/key"""
# Options of Python's own that take an argument.
_VALUED = ("-W", "-X", "--check-hash-based-pycs")


class Usage(ValueError):
    """The arguments are wrong."""


def run(arguments: Sequence[str]) -> int:
    """Run a program; returns the exit code if it comes to its end, or if it cannot be run."""
    try:
        options, command = _parse(arguments)
        if "help" in options:
            print(_HELP)
            return 0
        set_up = _program(command, arguments[:len(arguments) - len(command)])
        code = _choose_engine(options)
    except Usage as error:
        print(f"{_USAGE}\ndpool run: {error}", file=sys.stderr)
        return 2
    except (DpoolError, ValueError, OSError) as error:
        print(f"dpool: {error}", file=sys.stderr)
        return 2 if isinstance(error, FileNotFoundError) else 1
    except KeyboardInterrupt:
        return 130
    if code is not None:
        return code  # this process was a node of the cluster
    replacing.install()
    _execute(set_up)
    return 0


def _parse(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options of `dpool run`, and the command that follows them. By hand: argparse loads what a program should not
    find loaded."""
    options: dict[str, str] = {}
    command = list(arguments)
    while command and (command[0].startswith("--") or command[0] == "-h"):
        option, equals, value = command.pop(0).partition("=")
        if option == "--":
            break
        if option in ("--help", "-h"):
            return {"help": ""}, []
        if option in ("--address", "--key"):
            if not equals:
                if not command:
                    raise Usage(f"{option} needs an argument")
                value = command.pop(0)
            options[option[2:]] = value
        elif option == "--local" and not equals:
            options["local"] = ""
        else:
            raise Usage(f"there is no option {option}")
    if "local" in options and "address" in options:
        raise Usage("--address and --local exclude each other")
    if not command:
        raise Usage("no program is given")
    return options, command


# -- where its pools have their workers


def _choose_engine(options: dict[str, str]) -> int | None:
    """Say to this process, and to those it starts, where workers are. Returns the exit code if this process of a batch
    job was a node of the cluster, and had no other part in it."""
    if "key" in options:
        os.environ["DPOOL_KEY_FILE"] = os.path.abspath(options["key"])
    if "local" in options:
        os.environ.pop("DPOOL_ADDRESS", None)
    elif "address" in options:
        os.environ["DPOOL_ADDRESS"] = options["address"]
    elif not os.environ.get("DPOOL_ADDRESS") and ("SLURM_PROCID" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ):
        from dpool.cli.jobs import job_of

        job = job_of(os.environ)
        if job is not None:
            from dpool.cli import batch

            if job.rank:
                return batch.follow(job)
            os.environ["DPOOL_ADDRESS"] = batch.lead(job)
    return None


# -- what is to be run


def _program(command: list[str], own: Sequence[str]) -> Call:
    """The call that returns the call that runs the program. Raises ValueError if it is none of Python's,
    FileNotFoundError if it is not there. Does not return if it needs an interpreter of its own: that begins anew, with
    the options `own`."""
    python = None
    if _is_named_python(command[0]):
        python = _on_path(command[0])
        if python is None:
            raise FileNotFoundError(f"there is no {command[0]} on the PATH")
        command = command[1:]
    flags, rest = _flags(command)
    if not rest:
        raise Usage("no program is given")
    if flags or (python is not None and not _is_this(python)):
        interpreter = python or sys.executable
        kept = [option for option in own if option != "--"]
        os.execv(interpreter, [interpreter, *flags, "-m", "dpool", "run", *kept, "--", *rest])
    kind, arguments = rest[0], rest[1:]
    if kind[:2] in ("-m", "-c"):
        what = kind[2:] or (arguments.pop(0) if arguments else "")
        if not what:
            raise Usage(f"{kind} needs an argument")
        return _set_up_module if kind[1] == "m" else _set_up_code, (what, arguments)
    if kind == "-":
        raise ValueError("a program cannot be read from stdin: give its file")
    path = kind
    if python is None and not os.path.exists(path):
        path = _installed_script(kind)
    if not os.path.exists(path):
        raise FileNotFoundError(f"can't open file {_absolute(path)!r}: [Errno 2] No such file or directory")
    if python is None and not _is_python_program(path):
        raise ValueError(f"{path} is no program of Python's, and no other can be run: give a script, or -m and a "
                         f"module")
    return _set_up_file, (path, arguments)


def _flags(command: list[str]) -> tuple[list[str], list[str]]:
    """The options of Python's own that stand before the program, and what follows them."""
    flags: list[str] = []
    rest = list(command)
    while rest and rest[0].startswith("-") and rest[0] != "-" and rest[0][:2] not in ("-m", "-c"):
        if rest[0] == "--":
            return flags, rest[1:]
        if at := _program_in(rest[0]):
            return [*flags, rest[0][:at]], [f"-{rest[0][at:]}", *rest[1:]]
        flags.append(rest.pop(0))
        if flags[-1] in _VALUED and rest:
            flags.append(rest.pop(0))
    return flags, rest


def _program_in(options: str) -> int:
    """Where, in options that stand together, -m or -c begins the program (-um module); 0 if none does."""
    for at, letter in enumerate(options):
        if letter in "mc" and not options.startswith("--"):
            return at
        if letter in "WX":
            break
    return 0


def _is_named_python(word: str) -> bool:
    version = os.path.basename(word).removeprefix("python")
    return version != os.path.basename(word) and all(part.isdigit() for part in version.split(".") if version)


def _is_this(python: str) -> bool:
    """Whether a path is that of this interpreter, in this environment."""
    here = os.path.abspath(sys.executable)
    found = os.path.abspath(python)
    return os.path.dirname(found) == os.path.dirname(here) and os.path.realpath(found) == os.path.realpath(here)


def _installed_script(name: str) -> str:
    """The path of a command that an installer has put on the PATH; `name` if there is none."""
    return (_on_path(name) if os.sep not in name else None) or name


def _on_path(name: str) -> str | None:
    import shutil  # with all kinds of compression, which a program should not find loaded

    return shutil.which(name)


def _is_python_program(path: str) -> bool:
    if path.endswith((".py", ".pyc", ".pyw")) or _is_archive(path):
        return True
    with open(path, "rb") as file:
        first = file.readline(512)
    if first.startswith(b"#!"):
        return b"python" in first
    return not os.access(path, os.X_OK) and b"\0" not in first


def _is_archive(path: str) -> bool:
    """Whether a path is that of a directory or zip file, whose `__main__` is what runs."""
    if os.path.isdir(path):
        return True
    try:
        zipimport.zipimporter(path)
    except zipimport.ZipImportError:
        return False
    return True


def _absolute(path: str) -> str:
    """As the interpreter makes the path of a script absolute."""
    return path if os.path.isabs(path) else os.path.join(os.getcwd(), path)


# -- running it


def _set_up_file(path: str, arguments: list[str]) -> Call:
    sys.argv[:] = [path, *arguments]
    if _is_archive(path):
        _new_main()
        # Also where a directory of a script is not put there: as with the interpreter itself.
        _first_of_path(_absolute(path), always=True)
        return runpy._run_module_as_main, ("__main__", False)  # type: ignore[attr-defined]
    _first_of_path(os.path.dirname(os.path.realpath(path)))
    file = _absolute(path)
    if path.endswith(".pyc"):
        compiled = importlib.machinery.SourcelessFileLoader("__main__", file)
        names = _new_main(compiled, file)
        return exec, (compiled.get_code("__main__"), names)
    names = _new_main(importlib.machinery.SourceFileLoader("__main__", file), file)
    with io.open_code(file) as script:
        return exec, (compile(script.read(), file, "exec", dont_inherit=True), names)


def _set_up_module(name: str, arguments: list[str]) -> Call:
    sys.argv[:] = ["-m", *arguments]
    _first_of_path(os.getcwd())
    _new_main()
    return runpy._run_module_as_main, (name,)  # type: ignore[attr-defined]


def _set_up_code(code: str, arguments: list[str]) -> Call:
    sys.argv[:] = ["-c", *arguments]
    _first_of_path("")
    return exec, (compile(code, "<string>", "exec", dont_inherit=True), _new_main())


def _new_main(loader: object = importlib.machinery.BuiltinImporter, file: str | None = None) -> dict[str, object]:
    """A fresh `__main__`, as the interpreter would have made it; its names."""
    main = ModuleType("__main__")
    names = vars(main)
    names.update(__builtins__=builtins, __loader__=loader)
    if sys.version_info < (3, 14):
        names["__annotations__"] = {}
    if file is not None:
        names.update(__file__=file, __cached__=None)
    # The one before stays alive: functions of a console script are being run.
    _before.append(sys.modules["__main__"])
    sys.modules["__main__"] = main
    return names


_before: list[ModuleType] = []


def _first_of_path(entry: str, always: bool = False) -> None:
    """Put the program's own place where this command's own was."""
    if not sys.flags.safe_path:
        sys.path[0] = entry
    elif always:
        sys.path.insert(0, entry)


def _execute(set_up: Call) -> None:
    """Run the program. What it raises is shown as if the interpreter had started it."""
    runs = False
    try:
        function, arguments = set_up
        function, arguments = function(*arguments)
        runs = True
        function(*arguments)
    except BaseException as error:
        # This frame is not the program's; and if it was not even begun, none is.
        _show_from(error, error.__traceback__.tb_next if runs and error.__traceback__ is not None else None)
        raise


def _show_from(error: BaseException, trace: object) -> None:
    """Have the interpreter show this error, if it comes to that, with `trace` for its traceback."""
    shown_by = sys.excepthook

    def excepthook(kind: type[BaseException], value: BaseException, whole: object) -> None:
        if value is error:
            value.__traceback__ = whole = trace  # type: ignore[assignment]
        shown_by(kind, value, whole)  # type: ignore[arg-type]

    sys.excepthook = excepthook
