"""Large arrays: stored once a call, mapped by every worker that gets them; joblib's rules on what may be written to.

For workers of this machine a stored array is a memfd, or a nameless file in the user's temp_folder: nothing to leak,
whoever is killed. For those of a cluster it is an object of the store, which travels to each node once. It is never
taken for the array it was made of without looking whether that has changed. Used by backend.py in the program, which
stores, and by worker.py, which opens.
"""

from __future__ import annotations

import itertools
import mmap
import os
import pickle
import tempfile
import weakref

from dpool import objects
from dpool.errors import ObjectStoreFull

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Arrays that may not be mapped read-only, but are at least so large, are stored once all the same, and mapped
# copy-on-write. Smaller: fewer copies. Larger: fewer descriptors and mappings.
SHARE_MIN_BYTES = 1 << 20
# Stored arrays that exist at once; each takes a descriptor. Beyond, arrays travel with their tasks.
MAX_STORED = 256
# How much of an array is compared in one step: what fits into a processor's cache.
COMPARE_BYTES = 1 << 18

_numbers = itertools.count(1)
_living: weakref.WeakSet[Stored] = weakref.WeakSet()


class Stored:
    """The bytes of one array, as they were when `seen_at` batches had been made; open() says how a worker gets at them.
    They go when the last task that needs them has ended."""

    __slots__ = ("order", "seen_at", "_view", "__weakref__")

    def __init__(self, array: Any, seen_at: int) -> None:
        self.order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
        self.seen_at = seen_at
        self._view: Any = None
        _living.add(self)

    def equals(self, array: Any) -> bool:
        """Whether the array has the bytes that were stored."""
        import numpy

        if self._view is None:
            self._view = self._bytes()
        flat = self._flat(array)
        return all(numpy.array_equal(self._view[start:start + COMPARE_BYTES], flat[start:start + COMPARE_BYTES])
                   for start in range(0, flat.nbytes, COMPARE_BYTES))

    def _flat(self, array: Any) -> Any:
        import numpy

        return _flat(numpy.asarray(array, order=self.order))  # type: ignore[call-overload]

    def open(self, array: Any, mode: str | None) -> tuple[Any, ...]:
        """The reduction, for pickle, of an array with these bytes."""
        raise NotImplementedError

    def _bytes(self) -> Any:
        raise NotImplementedError


class StoredFile(Stored):
    """In a file without a name, for the workers of this machine."""

    __slots__ = ("descriptor", "key", "size")

    def __init__(self, array: Any, folder: str | None, seen_at: int) -> None:
        super().__init__(array, seen_at)
        self.size = array.nbytes
        self.descriptor = _nameless_file(folder)
        # A worker may hold the mapping of a file that is closed here and whose descriptor has a new owner.
        self.key = (os.getpid(), next(_numbers))
        flat = self._flat(array)
        written = 0
        while written < self.size:
            # Not through a mapping: a full disk or memory is an OSError here, and a SIGBUS there.
            written += os.pwrite(self.descriptor, memoryview(flat)[written:written + (1 << 30)], written)

    def __del__(self) -> None:
        descriptor = getattr(self, "descriptor", -1)
        if descriptor >= 0:
            os.close(descriptor)

    @property
    def path(self) -> str:
        """Where any process of this machine and user can open it, as long as it is held here."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    def open(self, array: Any, mode: str | None) -> tuple[Any, ...]:
        return _open, (self.path, self.key, array.dtype, array.shape, self.order, mode)

    def _bytes(self) -> Any:
        import numpy

        return numpy.frombuffer(mmap.mmap(self.descriptor, self.size, access=mmap.ACCESS_READ), numpy.uint8)


class StoredObject(Stored):
    """In the object store, for workers of other machines."""

    __slots__ = ("ref",)

    def __init__(self, array: Any, seen_at: int) -> None:
        super().__init__(array, seen_at)
        self.ref = objects.put(self._flat(array))

    def open(self, array: Any, mode: str | None) -> tuple[Any, ...]:
        return _open_object, (self.ref, array.dtype, array.shape, self.order, mode)

    def _bytes(self) -> Any:
        return objects.get(self.ref)


def _flat(array: Any) -> Any:
    """The bytes of a contiguous array, as an array, without a copy."""
    import numpy

    return array.reshape(-1, order="A").view(numpy.uint8)


def _nameless_file(folder: str | None) -> int:
    if folder is None:
        return os.memfd_create("dpool-array", os.MFD_CLOEXEC)
    os.makedirs(folder, exist_ok=True)
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:  # a file system without nameless files
        descriptor, path = tempfile.mkstemp(dir=folder)
        os.unlink(path)
        return descriptor


class Arrays:
    """How the arrays of one joblib call travel. Used by one thread at a time: joblib holds its own lock.

    `local`: the workers can open this process's descriptors. `max_nbytes`, `mmap_mode` and `folder` are joblib's.
    """

    def __init__(self, local: bool, max_nbytes: int | None, mmap_mode: str | None, folder: str | None) -> None:
        self._local = local
        self._mode = mmap_mode
        self._folder = folder
        mapped = max_nbytes is not None and mmap_mode is not None
        self._mapped_from = max_nbytes if mapped else None
        self._stored: dict[int, tuple[Any, Stored]] = {}
        self.batch = 0  # which batch is being packed; arrays that were looked at since it was made are not again
        self.made = 0  # how many batches have been made so far
        self.used: list[Stored] = []  # what the batch being packed needs

    def clear(self) -> None:
        """Forget what is stored; what tasks still need lives on with them."""
        self._stored.clear()

    def reduce(self, array: Any) -> Any:
        """The reduction of an array of a task, for pickle; NotImplemented if it travels like anything else."""
        backing = _backing(array)
        if backing is not None and self._local:
            # Already in a file that workers can open by its name.
            from joblib._memmapping_reducer import _reduce_memmap_backed

            return _reduce_memmap_backed(array, backing)
        if array.dtype.hasobject or not array.size:
            return NotImplemented
        mode: str | None = None
        if self._mapped_from is not None and array.nbytes > self._mapped_from:
            mode = self._mode
        elif array.nbytes < SHARE_MIN_BYTES:
            return NotImplemented
        stored = self._find(array, mode)
        if stored is not None:
            self.used.append(stored)
            return stored.open(array, mode)
        if mode == "r":
            return _read_only, (pickle.PickleBuffer(_flat(array)) if _is_flat(array) else array.tobytes(),
                                array.dtype, array.shape, "F" if array.flags.fnc else "C")
        return NotImplemented

    def _find(self, array: Any, mode: str | None) -> Stored | None:
        """The array's stored bytes, made now if need be; None if there is no room."""
        number = id(array)
        known = self._stored.get(number)
        if known is not None and known[0]() is array:
            stored = known[1]
            # With these modes the workers write to the one copy, and see what others wrote: that is their meaning.
            if mode in ("r+", "w+") or self.batch <= stored.seen_at:
                return stored
            if stored.equals(array):
                stored.seen_at = self.made
                return stored
        if len(_living) >= MAX_STORED:
            return None
        try:
            stored = StoredFile(array, self._folder, self.made) if self._local else StoredObject(array, self.made)
        except (OSError, ObjectStoreFull):
            return None
        stored_arrays = self._stored
        gone = weakref.ref(array, lambda _: stored_arrays.pop(number, None))
        stored_arrays[number] = (gone, stored)
        return stored


def _is_flat(array: Any) -> bool:
    return bool(array.flags.c_contiguous or array.flags.f_contiguous)


def _backing(array: Any) -> Any:
    """The numpy.memmap of a file with a name that the array is, or is a view of; else None."""
    import numpy

    base = array
    while base is not None:
        below = getattr(base, "base", None)
        if isinstance(below, mmap.mmap):
            if isinstance(base, numpy.memmap) and base.filename and not str(base.filename).startswith("/proc/"):
                return base
            return None
        base = below
    return None


# Arrays that this process has open for reading: a task that gets one again need not map it again.
_open_now: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()


def _open(path: str, key: tuple[int, int], dtype: Any, shape: tuple[int, ...], order: Any, mode: str | None) -> Any:
    """In a worker: the array that is stored at `path`."""
    import numpy

    if mode is None:
        # A copy of one's own, made by the kernel page by page, as it is written to.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)
        return numpy.ndarray(shape, dtype, data, order=order)
    if mode != "r":
        return numpy.memmap(path, dtype, "r+" if mode == "w+" else mode, 0, shape, order)  # type: ignore[call-overload]
    array = _open_now.get(key)
    if array is None:
        array = _open_now[key] = numpy.memmap(path, dtype, "r", 0, shape, order)
    return array


def _open_object(ref: objects.ObjectRef, dtype: Any, shape: tuple[int, ...], order: Any, mode: str | None) -> Any:
    """In a worker on another machine: the array that is stored as `ref`. What may be written to is a copy of one's own,
    made by the kernel page by page, as it is written to; the other machine's is not reached."""
    import numpy

    if mode != "r":
        return numpy.ndarray(shape, dtype, objects.get(ref), order=order)
    array = _open_now.get(ref)
    if array is None:
        array = _open_now[ref] = numpy.ndarray(shape, dtype, objects.get(ref), order=order)
        array.flags.writeable = False
    return array


def _read_only(data: Any, dtype: Any, shape: tuple[int, ...], order: Any) -> Any:
    """In a worker on another machine: the array, for which there was no room in the store, from what came with the
    task."""
    import numpy

    array = numpy.ndarray(shape, dtype, data, order=order)
    array.flags.writeable = False
    return array


def reduce_result(array: Any) -> Any:
    """In a worker: the reduction of an array of a result. What the caller gets is its own and can be written to."""
    import numpy

    backing = _backing(array)
    if backing is not None:
        from joblib._memmapping_reducer import _reduce_memmap_backed

        return _reduce_memmap_backed(array, backing)
    if type(array) is numpy.ndarray and array.flags.writeable:
        return NotImplemented
    return numpy.array(array, order="K", subok=False).__reduce_ex__(5)
