"""dpool: the pools that Python programs already use, faster on one machine, and on a cluster, by changing an import.

The face: names are found when they are asked for; importing dpool imports and starts nothing. It only watches for
joblib, which gets to know the backend "dpool" when the program imports it.
"""

from __future__ import annotations

from dpool.joblib import watch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dpool.concurrent.futures.process import ProcessPoolExecutor as ProcessPoolExecutor
    from dpool.multiprocessing.pool import Pool as Pool
    from dpool.session import init as init

__version__ = "0.1.0"

# Public name -> the module that defines it.
_names = {
    "init": "dpool.session",
    "Pool": "dpool.multiprocessing.pool",
    "ProcessPoolExecutor": "dpool.concurrent.futures.process",
    "DpoolError": "dpool.errors",
    "WorkerDied": "dpool.errors",
    "GroupBroken": "dpool.errors",
    "GroupTerminated": "dpool.errors",
    "RemoteError": "dpool.errors",
    "ClusterError": "dpool.errors",
    "KeyProblem": "dpool.errors",
    "NodeLost": "dpool.errors",
    "ObjectStoreFull": "dpool.errors",
    "ObjectLost": "dpool.errors",
    "ObjectRef": "dpool.objects",
    "put": "dpool.objects",
    "get": "dpool.objects",
    "wait": "dpool.objects",
    "memory_summary": "dpool.objects",
}

__all__ = ["__version__", *_names]


def __getattr__(name: str) -> Any:
    module = _names.get(name)
    if module is None:
        raise AttributeError(f"module 'dpool' has no attribute {name!r}")
    import sys

    __import__(module)  # importlib would be three modules more, in every driver
    value = getattr(sys.modules[module], name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_names])


watch()
del watch
