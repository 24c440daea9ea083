"""The object store as users see it: put, get, wait, and what is held. Part of the face, over this process's store.

Holds nothing itself. Values stay in the process that put them and in those that refs were sent to; no daemon has them.
"""

from __future__ import annotations

from dpool import session
from dpool.cluster.store import refs as _refs
from dpool.cluster.store import store as _store
from dpool.cluster.store.refs import ObjectRef

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

__all__ = ["ObjectRef", "configure", "get", "memory_summary", "put", "wait"]


def put(value: Any) -> ObjectRef:
    """Store `value` once, for any number of tasks. Returns its ref; the value lives while a ref to it does.

    Blocks for one copy of the value's buffers. Raises what pickling raises, and ObjectStoreFull if the store's limit
    leaves no room and nothing can be spilled to disk.
    """
    if isinstance(value, ObjectRef):
        raise TypeError("put() of an ObjectRef: it is stored already; put a list of refs to store several as one")
    return _refs.store_value(value, session.is_elsewhere())


def get(refs: ObjectRef | Sequence[ObjectRef], timeout: float | None = None) -> Any:
    """The value of a ref, or the list of values of several. Large buffers are mapped copy-on-write: no copy is made,
    and they are writable. `timeout`, in seconds, bounds the wait for values that are not here yet; there are none such
    so far, for a ref is given out when its value is stored.

    Raises TypeError for what is no ref, and ObjectLost if a value cannot be had any more.
    """
    if isinstance(refs, ObjectRef):
        return refs.value()
    return [ref.value() for ref in _checked(refs)]


def wait(refs: Iterable[ObjectRef], num_returns: int = 1,
         timeout: float | None = None) -> tuple[list[ObjectRef], list[ObjectRef]]:
    """Wait until `num_returns` of `refs` have values, or `timeout` seconds have passed; returns (those, the rest)."""
    listed = _checked(refs)
    if not 0 < num_returns <= max(len(listed), 1):
        raise ValueError(f"num_returns must be between 1 and the number of refs, {len(listed)}, not {num_returns}")
    if len(set(listed)) != len(listed):
        raise ValueError("wait() takes each ref once")
    # A ref is given out only when its value is stored, so all are ready.
    return listed[:num_returns], listed[num_returns:]


def _checked(refs: Iterable[ObjectRef]) -> list[ObjectRef]:
    listed: list[Any] = list(refs) if hasattr(refs, "__iter__") else [refs]
    for ref in listed:
        if not isinstance(ref, ObjectRef):
            raise TypeError(f"expected ObjectRefs, got {type(ref).__name__}; a ref is what put() returns")
    return listed


def configure(object_memory: int | None = None, spill_dir: str | None = None) -> None:
    """Set this process's limit for stored bytes, and the directory for what goes beyond it.

    The defaults are a share of the machine's memory, or of the cgroup's, and the temporary directory; the environment
    variables DPOOL_OBJECT_MEMORY and DPOOL_SPILL_DIR set them too. Raises ValueError or OSError for what cannot be.
    """
    import os

    if object_memory is not None and object_memory <= 0:
        raise ValueError(f"object_memory must be a positive number of bytes, not {object_memory}")
    if spill_dir is not None and not (os.path.isdir(spill_dir) and os.access(spill_dir, os.W_OK)):
        raise NotADirectoryError(f"spill_dir is not a directory that can be written to: {spill_dir}")
    _store.current().configure(object_memory, spill_dir)


def memory_summary() -> dict[str, Any]:
    """What this process's store holds, in bytes: `limit`, `total`, `warm` (kept for reuse), `spilled`, `by_state`, and
    `objects`: id, nbytes, where (memory, disk, or borrowed from another process), views, shared, inner."""
    return _store.current().summary()
