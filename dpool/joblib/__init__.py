"""The joblib backend "dpool": registers it with joblib, at once or as soon as the program imports joblib.

Never imports joblib unless register() is called, and opens nothing: the backend itself is in backend.py. watch() is
called by `import dpool`, in workers too.
"""

from __future__ import annotations

import sys

from dpool.noticing import notice

__all__ = ["register"]

NAME = "dpool"
_default = False  # whether joblib is to take it for calls that name none
_watching = False
# The module that holds joblib's table of backends; once it has run, a backend can be entered.
_TABLE = "joblib.parallel"


def register(make_default: bool = False) -> None:
    """Make joblib know the backend "dpool", by importing joblib if need be; `make_default` makes it joblib's default.

    `import dpool` does this by itself for programs that import joblib. May be called again. Raises ImportError if
    joblib is not installed or is older than 1.3.
    """
    try:
        from joblib.parallel import register_parallel_backend
    except ImportError as error:
        raise ImportError(f"dpool.joblib needs joblib 1.3 or newer: pip install 'dpool[joblib]' ({error})") from error
    from dpool.joblib.backend import DpoolBackend

    register_parallel_backend(NAME, DpoolBackend, make_default=make_default)


def watch(make_default: bool = False) -> None:
    """Register now if joblib is loaded, else in the moment it is; `make_default` as in register(), from here on."""
    global _default, _watching
    _default = _default or make_default
    if hasattr(sys.modules.get(_TABLE), "register_parallel_backend"):
        _register_quietly(_TABLE)
    elif not _watching:
        _watching = True
        notice([_TABLE], _register_quietly)


def _register_quietly(_: str) -> None:
    """A joblib that is too old must still be importable: only register() itself complains."""
    try:
        register(_default)
    except ImportError:
        pass
