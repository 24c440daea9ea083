"""Handles of stored objects, and how they cross a process border: by number, their descriptors beside the message.

Knows no socket: it says which descriptors must go along and takes in those that came. Used by both ends of a worker
socket, and by dpool.objects.
"""

from __future__ import annotations

import itertools
import os
import pickle
import threading
import weakref

from dpool.cluster.store import segments, store
from dpool.cluster.wire import frames, pickling
from dpool.errors import ObjectStoreFull

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from types import TracebackType
    from typing import Any

    from dpool.cluster.store.store import Stored

# Objects up to this size travel inside the messages that name them. Larger: fewer descriptors. Smaller: less copying.
SMALL_BYTES = 16 * 1024
_PLAIN = frozenset((int, float, complex, bool, type(None)))

_numbers = itertools.count(1)
_prefix = os.urandom(8)


def _be_another() -> None:
    """In a forked child: its objects must not have the names that its parent gives to its own."""
    global _prefix
    _prefix = os.urandom(8)


os.register_at_fork(after_in_child=_be_another)


def new_key() -> bytes:
    """A name that no other object has, here or in any process."""
    return _prefix + next(_numbers).to_bytes(8, "little")


class ObjectRef:
    """A handle of a stored object: hashable, comparable, awaitable; picklable into tasks, results and other objects.

    The object lives while any process has a handle of it. As an argument of a task, by itself, it arrives as the
    object's value; nested in something else, as a ref. Made by dpool.put().
    """

    __slots__ = ("key", "nbytes", "_stored", "_data", "_inner", "__weakref__")

    def __init__(self, key: bytes, nbytes: int, stored: Stored | None, data: bytes | None,
                 inner: Sequence[ObjectRef] = ()) -> None:
        self.key = key
        self.nbytes = nbytes
        self._stored = stored  # of a large object
        self._data = data  # of a small one: the value's pickle itself
        self._inner = inner

    def __del__(self) -> None:
        if getattr(self, "_stored", None) is not None:
            store.current().drop(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectRef) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"ObjectRef({self.key.hex()}, {self.nbytes:,} bytes)"

    def __reduce__(self) -> tuple[Any, ...]:
        sending = getattr(_local, "sending", None)
        if sending is None:
            raise TypeError("an ObjectRef can be pickled only into a task, a task's result, or an object that is put")
        if self._data is not None:
            sending.any = True
            for inner in self._inner:
                sending.add(inner)
            return _rebuild_small, (self.key, self._data, self._inner)
        sending.add(self)
        return _rebuild, (self.key,)

    def __copy__(self) -> ObjectRef:
        return self

    def __deepcopy__(self, memo: object) -> ObjectRef:
        return self

    def __await__(self) -> Any:
        """The value; it is here, so nothing is waited for."""
        return self.value()
        yield  # a generator, as await wants it

    def value(self) -> Any:
        """The value, rebuilt from its bytes: each call gives an object of its own, its large buffers copy-on-write."""
        if self._data is not None:
            return pickle.loads(self._data)
        assert self._stored is not None
        data, *buffers = store.current().open(self._stored)
        return pickle.loads(self._stored.head or data, buffers=buffers)


def _rebuild_small(key: bytes, data: bytes, inner: Sequence[ObjectRef]) -> ObjectRef:
    return ObjectRef(key, len(data), None, data, inner)


def _rebuild(key: bytes) -> ObjectRef:
    stored = store.current().hold(key)
    return ObjectRef(key, stored.nbytes, stored, None)


_CONSTANT = _PLAIN | {str, bytes, range, ObjectRef}


class Descriptors:
    """Descriptors that are closed when this goes, and in every forked child: it would keep what they are of."""

    __slots__ = ("numbers", "__weakref__")

    def __init__(self) -> None:
        self.numbers: list[int] = []
        _open.add(self)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        numbers, self.numbers = self.numbers, []
        for number in numbers:
            os.close(number)


_open: weakref.WeakSet[Descriptors] = weakref.WeakSet()


def _close_all() -> None:
    for descriptors in list(_open):
        descriptors.close()


os.register_at_fork(after_in_child=_close_all)


class Sending:
    """While it is entered, refs may be pickled in this thread; those of large objects gather in `refs`, with those
    inside them. `any` is true if there were refs at all."""

    __slots__ = ("refs", "any", "_outer", "_descriptors")

    def __init__(self, refs: Iterable[ObjectRef] = ()) -> None:
        self.refs: dict[bytes, ObjectRef] = {ref.key: ref for ref in refs}
        self.any = False

    def add(self, ref: ObjectRef) -> None:
        """`ref` goes along."""
        self.any = True
        if ref.key not in self.refs:
            self.refs[ref.key] = ref
            for inner in ref._stored.inner if ref._stored is not None else ref._inner:
                self.add(inner)

    def take(self, other: Sending) -> None:
        """What goes along with the other goes along with this."""
        self.any |= other.any
        self.refs.update(other.refs)

    def __enter__(self) -> Sending:
        self._outer = getattr(_local, "sending", None)
        _local.sending = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        _local.sending = self._outer

    def export(self, layout: Sequence[bytes | None] = ()) -> tuple[bytes, list[int]]:
        """What to send along: a table, b"" if there are no refs, and descriptors that live as long as this object.

        `layout` has an entry for each buffer of the message: the key of the object that holds it, None for one that
        comes in the message's own segment. Raises ObjectStoreFull if there is no room to bring an object back from
        disk, OSError if there are too many descriptors.
        """
        if not self.refs and not layout:
            return (frames.pack_refs((), ()) if self.any else b""), []
        entries = []
        here = store.current()
        # Of its own: an object that has to make room for the next one, or for somebody else's, is still here to send.
        self._descriptors = Descriptors()
        descriptors = self._descriptors.numbers
        for ref in self.refs.values():
            stored = ref._stored
            if stored is None:
                continue
            entries.append((ref.key, stored.nbytes, stored.table, [inner.key for inner in stored.inner]))
            descriptors.append(here.share(stored))
        return frames.pack_refs(entries, layout), list(descriptors)


_local = threading.local()


class Accepted:
    """What an export() sent, taken in: the descriptors are the store's from here on. Keep it until what came with it
    has been unpickled, which finds its refs by their keys."""

    __slots__ = ("refs", "_layout")

    def __init__(self, table: bytes | memoryview, descriptors: list[int]) -> None:
        """Takes the descriptors out of the list one by one; if this raises, those left in it are still the caller's."""
        here = store.current()
        entries, self._layout = frames.unpack_refs(table)
        if len(entries) != len(descriptors):
            raise segments.too_many_open()
        self.refs: dict[bytes, ObjectRef] = {}
        inner_keys = []
        for key, nbytes, where, inner in entries:
            stored = here.take_over(key, nbytes, where, descriptors.pop(0))
            self.refs[key] = ObjectRef(key, nbytes, stored, None)
            if inner and not stored.inner:
                inner_keys.append((stored, inner))
        for stored, keys in inner_keys:
            stored.inner = [self.refs[key] if key in self.refs else _rebuild(key) for key in keys]

    def buffers(self, own: Sequence[memoryview]) -> Sequence[memoryview]:
        """All the buffers of the message, from those in its own segment and those in objects."""
        if not self._layout:
            return own
        rest = iter(own)
        here = store.current()
        opened: list[memoryview] = []
        for key in self._layout:
            if key is None:
                opened.append(next(rest))
            else:
                stored = self.refs[key]._stored
                assert stored is not None
                opened.append(here.open(stored)[0])
        return opened


def store_value(value: Any, elsewhere: bool = False) -> ObjectRef:
    """Store `value` as it is now; see pickling.dumps() for `elsewhere`. Raises what pickling it raises, and
    ObjectStoreFull."""
    if type(value) in _PLAIN:  # what needs no care, and is put by the thousand
        data = pickle.dumps(value, pickling.PROTOCOL)
        return ObjectRef(new_key(), len(data), None, data)
    buffers: list[memoryview] = []
    with Sending() as inside:
        data = pickling.dumps(value, buffers, by_value=True, elsewhere=elsewhere)
    inner = list(inside.refs.values()) if inside.refs else ()
    key = new_key()
    if not buffers and len(data) <= SMALL_BYTES:
        return ObjectRef(key, len(data), None, data, inner)
    here = store.current()
    stored = here.put(key, [data, *buffers], inner)
    return ObjectRef(key, stored.nbytes, here.hold(key), None)


def snapshot(item: Any, elsewhere: bool = False) -> Any:
    """What stands for `item` as it is now, whatever becomes of it later, and arrives at a task as its value: itself if
    it cannot change, else a ref. What cannot be pickled stays itself: the sending of it says why."""
    kind = type(item)
    if kind in _CONSTANT or (kind is tuple and all(type(part) in _CONSTANT for part in item)):
        return item
    try:
        return store_value(item, elsewhere)
    except ObjectStoreFull:
        raise
    except Exception:
        return item


def store_buffer(view: memoryview) -> ObjectRef:
    """A buffer as an object of its own, for messages that will have it in common."""
    here = store.current()
    key = new_key()
    stored = here.put(key, [view], [])
    return ObjectRef(key, stored.nbytes, here.hold(key), None)


def resolve(value: Any) -> Any:
    """The object of a ref; any other value as it is."""
    return value.value() if type(value) is ObjectRef else value


__all__ = ["Accepted", "Descriptors", "ObjectRef", "Sending", "new_key", "resolve", "snapshot", "store_buffer",
           "store_value"]
