"""`multiprocessing.pool.Pool` as `dpool run` replaces it: dpool's Pool, of which a ThreadPool is still a kind.

Programs ask isinstance(pool, multiprocessing.pool.Pool) of both. Loaded by dpool.replacing alone, which names it.
"""

from __future__ import annotations

from abc import ABCMeta
from multiprocessing.pool import ThreadPool

# Not by way of the package: its attribute `pool` is the standard library's until this import has come to its end.
from dpool.multiprocessing.pool import Pool as _Pool


class Pool(_Pool, metaclass=ABCMeta):
    __doc__ = _Pool.__doc__


# Not by a metaclass of dpool's own: programs derive from Pool and from abstract classes together.
Pool.register(ThreadPool)
