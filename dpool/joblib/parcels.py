"""Batches and their outcomes as bytes: by value what the other side cannot import, large buffers beside the pickle.

Pickles and unpickles; sends nothing and keeps nothing. Used by backend.py in the program and worker.py in a worker; how
arrays travel is told by whoever packs: see arrays.py.
"""

from __future__ import annotations

import io
import pickle
import sys
import threading

from dpool import session
from dpool.objects import ObjectRef

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

# Buffers from this size on travel beside the pickle, without a copy into it. Smaller ones would cost more to handle
# one by one than to copy.
BESIDE_MIN_BYTES = 64 * 1024


class Parcel:
    """A pickle, with the buffers and the refs that belong to it. Cheap to pickle again: nothing of it is looked at or
    copied."""

    __slots__ = ("refs", "data", "buffers")

    def __init__(self, refs: Sequence[ObjectRef], data: Any, *buffers: Any) -> None:
        self.refs = refs
        self.data = data
        self.buffers = buffers

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Parcel, (self.refs, pickle.PickleBuffer(self.data), *map(pickle.PickleBuffer, self.buffers))

    def unpack(self) -> Any:
        """The value. Raises what its unpickling raises."""
        before = getattr(_unpacking, "refs", ())
        _unpacking.refs = self.refs
        try:
            return pickle.loads(self.data, buffers=self.buffers)
        finally:
            _unpacking.refs = before


_unpacking = threading.local()


def _ref(number: int) -> ObjectRef:
    """A ref of the parcel that is being unpacked in this thread."""
    found: ObjectRef = _unpacking.refs[number]
    return found


def pack(value: Any, reduce_array: Callable[[Any], Any] | None = None) -> Parcel:
    """`value` as a parcel. `reduce_array` is asked how each NumPy array in it is pickled; it may say NotImplemented.

    Raises what pickling raises.
    """
    buffers: list[Any] = []

    def beside(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < BESIDE_MIN_BYTES:
            return True
        buffers.append(view)
        return False

    out = io.BytesIO()
    pickler = _pickler()(out, protocol=5, buffer_callback=beside)
    pickler.refs = []
    numpy = sys.modules.get("numpy")
    if numpy is not None and reduce_array is not None:
        pickler.arrays = (numpy.ndarray, numpy.memmap)
        pickler.reduce_array = reduce_array
    pickler.dump(value)
    return Parcel(pickler.refs, out.getvalue(), *buffers)  # without a copy: nothing else has the bytes


_class: Any = None


def _pickler() -> Any:
    global _class
    if _class is not None:
        return _class
    base = session.by_value_pickler()

    class Pickler(base):  # type: ignore[misc, valid-type]
        """With our reductions of arrays, and of refs."""

        arrays: tuple[type, ...] = ()
        refs: list[ObjectRef]

        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is ObjectRef:
                # It can be pickled where the parcel is sent, not here.
                self.refs.append(obj)
                return _ref, (len(self.refs) - 1,)
            if type(obj) in self.arrays:
                reduced = self.reduce_array(obj)
                if reduced is not NotImplemented:
                    return reduced
            return super().reducer_override(obj)

    _class = Pickler
    return Pickler


def culprit(value: Any, name: str) -> str:
    """See dpool.culprits."""
    from dpool import culprits

    return culprits.culprit(value, name, _is_bad)


def _is_bad(part: Any) -> bool:
    try:
        pack(part)
    except Exception:
        return True
    return False
