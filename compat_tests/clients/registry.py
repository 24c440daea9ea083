"""Names the clients, and the distributions that each needs. Imports none of them.

A client is a line here and a module `client_<name>` beside it. Used by __main__.py, child.py and test_clients.py.
"""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from platform import python_version


@dataclass(frozen=True, slots=True)
class Client:
    """A program that dpool should serve as the standard library does."""

    name: str
    distributions: tuple[str, ...] = ()  # the client, then what its workload needs beside; none: it is part of Python
    quick: bool = True  # to install: part of the extra "clients"

    @property
    def module(self) -> str:
        """Where its workloads are."""
        return f"compat_tests.clients.client_{self.name}"

    @property
    def version(self) -> str | None:
        """Of what is installed; None if something is missing."""
        try:
            return [*map(version, self.distributions), python_version()][0]
        except PackageNotFoundError:
            return None


CLIENTS = (
    Client("adaptive", ("adaptive",), quick=False),
    Client("aiohttp", ("aiohttp",)),
    Client("apscheduler", ("APScheduler",)),
    Client("black", ("black",)),
    Client("compileall"),
    Client("cython", ("Cython",), quick=False),
    Client("dask", ("dask", "numpy")),
    Client("deap", ("deap",)),
    Client("dynesty", ("dynesty",), quick=False),
    Client("emcee", ("emcee", "numpy")),
    Client("flake8", ("flake8",)),
    Client("gensim", ("gensim",), quick=False),
    Client("isort", ("isort",)),
    Client("mpmath", ("mpmath",)),
    Client("nautilus", ("nautilus-sampler",), quick=False),
    Client("nevergrad", ("nevergrad",), quick=False),
    Client("nltk", ("nltk",), quick=False),
    Client("numpy", ("numpy",)),
    Client("optuna", ("optuna",), quick=False),
    Client("pandas", ("pandas",), quick=False),
    Client("pillow", ("pillow",)),
    Client("platypus", ("platypus-opt",)),
    Client("pylint", ("pylint",), quick=False),
    Client("pymoo", ("pymoo",), quick=False),
    Client("scipy", ("scipy",)),
    Client("sympy", ("sympy",), quick=False),
    Client("tornado", ("tornado",)),
    Client("tqdm", ("tqdm",)),
)


def quick() -> list[str]:
    """The distributions of the extra "clients"."""
    return sorted({name for client in CLIENTS if client.quick for name in client.distributions})
