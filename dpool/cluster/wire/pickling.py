"""Turns lists of values into bytes and large buffers, and back, so that one bad value spoils only itself.

Never sends and never touches a segment's descriptor itself. Used by the driver for arguments and by the worker for
results; results use plain pickle only, as the standard library's pools do, arguments fall back to cloudpickle.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from itertools import chain
from multiprocessing.reduction import ForkingPickler

from dpool.cluster.wire import large_bytes
from dpool.cluster.wire.functions import dumps_by_value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

PROTOCOL = 5

# Buffers from this size on travel beside the pickle. Larger: small ones save a mapping (about 30 us). Smaller: they
# save a copy.
OUT_OF_BAND_MIN_BYTES = 64 * 1024

# Buffers up to this size in all are copied, to be sent with others. Larger: fewer messages. Smaller: less is copied.
COPY_MAX_BYTES = 1 << 20

# Values of exactly these types cannot fail to pickle or to unpickle, so a whole list of them may share one pickle.
ATOMS = frozenset((int, float, complex, bool, str, type(None)))

# Tuples and lists up to this length are searched for large bytes; nested ones as deep as they go.
MAX_LIFTED = 16
_LIFTED = frozenset((bytes, bytearray, memoryview, tuple, list))

_CONNECTION = b"multiprocessing.connection"
_MAIN = b"__main__"

# So many reductions are registered, all of them multiprocessing's own, which plain pickle does without.
_plain_reducers = -1


def _only_plain(extra: dict[Any, Any]) -> bool:
    """Whether nobody has registered reductions of their own with multiprocessing."""
    global _plain_reducers
    if all(reduce.__module__ in ("multiprocessing.reduction", "multiprocessing.connection")
           for reduce in extra.values()):
        _plain_reducers = len(extra)
    return len(extra) == _plain_reducers


class Packed:
    """A list of values as bytes: `body` is the pickle, `buffers` what travels beside it, `one` its layout."""

    __slots__ = ("body", "buffers", "one")

    def __init__(self, body: bytes, buffers: list[memoryview], one: bool) -> None:
        self.body = body
        self.buffers = buffers
        self.one = one

    @property
    def nbytes(self) -> int:
        return len(self.body) + sum(b.nbytes for b in self.buffers)


class Pickled:
    """A value as it was: pickled before whoever has it changes it, with the refs that go along if there are any. If it
    `hurries`, its buffers are the value's own, and it is to be sent before that."""

    __slots__ = ("data", "buffers", "hurries", "sending")

    def __init__(self, value: Any, sending: Any = None) -> None:
        beside: list[memoryview] = []
        self.data = dumps(value, beside)
        self.hurries = bool(beside) and sum(view.nbytes for view in beside) > COPY_MAX_BYTES
        self.buffers = beside
        if beside and not self.hurries:  # nobody can change bytes
            self.buffers = [view if type(view.obj) is bytes else memoryview(bytes(view)) for view in beside]
        self.sending = sending


def is_constant(value: Any) -> bool:
    """Whether nobody can change a value; of some it is not found out."""
    return type(value) in ATOMS or (type(value) is tuple and ATOMS.issuperset(map(type, value)))


class _Bytes:
    """Stands for large bytes in a pickle: plain pickle would copy them into its own output."""

    __slots__ = ("data",)

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        make = large_bytes.build if type(self.data) is bytes else bytearray
        return make, (pickle.PickleBuffer(self.data),)


class _View:
    """Stands for a memoryview in a pickle, which plain pickle refuses."""

    __slots__ = ("view",)

    def __init__(self, view: memoryview) -> None:
        self.view = view

    def __reduce__(self) -> tuple[Any, ...]:
        view = self.view
        return _rebuild_view, (pickle.PickleBuffer(view if view.nbytes else b""), view.format, view.shape)


def _rebuild_view(data: Any, kind: str, shape: tuple[int, ...]) -> memoryview:
    flat = memoryview(data).cast("B")
    return flat.cast(kind, shape) if flat.nbytes else flat.cast(kind)  # type: ignore[call-overload, no-any-return]


def _lift(value: Any) -> Any:
    """`value`, with large bytes and memoryviews in its first levels of short tuples and lists put behind a buffer."""
    if not _holds_large(value):
        return value
    try:
        return _lifted(value, {})
    except RecursionError:
        return value


def _holds_large(value: Any, levels: int = 2) -> bool:
    kind = type(value)
    if kind is tuple or kind is list:
        if len(value) <= MAX_LIFTED:
            for item in value:
                if type(item) in _LIFTED and (_holds_large(item, levels - 1) if levels else _nests_large(item)):
                    return True
        return False
    return kind in _LIFTED and _is_large(value)


def _is_large(value: Any) -> bool:
    return bool(value.c_contiguous) if type(value) is memoryview else len(value) >= OUT_OF_BAND_MIN_BYTES


def _nests_large(value: Any) -> bool:
    """The same, whatever there is: tuples and lists may hold one another, and be in many places. Three times slower."""
    seen = set()
    pending = [value]
    for item in pending:
        if type(item) is tuple or type(item) is list:
            if len(item) <= MAX_LIFTED and id(item) not in seen:
                seen.add(id(item))
                pending += [part for part in item if type(part) in _LIFTED]
        elif _is_large(item):
            return True
    return False


def _lifted(value: Any, known: dict[int, Any]) -> Any:
    """`known`: what stands for what was met before, which is one object on the other side too."""
    kind = type(value)
    if kind not in _LIFTED:
        return value
    made: Any = known.get(id(value))
    if made is not None:
        return made
    if kind is bytes or kind is bytearray:
        made = _Bytes(value) if len(value) >= OUT_OF_BAND_MIN_BYTES else value
    elif kind is memoryview:
        made = _View(value) if value.c_contiguous else value
    elif len(value) > MAX_LIFTED:
        made = value
    elif kind is list:
        made = known[id(value)] = []
        made.extend([_lifted(item, known) for item in value])
    else:
        made = tuple([_lifted(item, known) for item in value])
    known[id(value)] = made
    return made


def dumps(value: Any, buffers: list[memoryview] | None = None, by_value: bool = False,
          elsewhere: bool = False) -> bytes:
    """One value as a pickle; its large buffers are appended to `buffers`.

    Plain pickle first, for its speed; then the reductions of multiprocessing (sockets, connections); then, if
    `by_value`, cloudpickle. Raises what the first of them raised. `elsewhere`: it is for a process that has another
    `__main__`, so a value that names this one's goes by value, if it can.
    """
    if not elsewhere:
        return _dumps(value, buffers, by_value)
    start = len(buffers) if buffers is not None else 0
    data = _dumps(value, buffers, by_value)
    if _MAIN not in data:
        return data
    beside: list[memoryview] = []
    try:
        data = dumps_by_value(value, None if buffers is None else _collector(beside))
    except Exception:
        return data
    if buffers is not None:
        buffers[start:] = beside
    return data


def is_read_only(value: Any) -> bool:
    """Whether a value is an array that pickle would rebuild read-only."""
    kind = type(value)
    return kind.__name__ == "ndarray" and kind.__module__ == "numpy" and not value.flags.writeable


def reduce_writable(array: Any) -> Any:
    """The reduction of a read-only array, whose buffer does not say that it is: it arrives writable, as it always did
    with multiprocessing, where tasks work in place."""
    reduced = array.__reduce_ex__(PROTOCOL)
    if not (type(reduced) is tuple and reduced[1] and type(reduced[1][0]) is pickle.PickleBuffer):
        return reduced
    import ctypes

    # The same memory, of which pickle reads only.
    memory: Any = (ctypes.c_char * array.nbytes).from_address(array.__array_interface__["data"][0])
    memory._dpool_read_only = array
    return (reduced[0], (pickle.PickleBuffer(memory), *reduced[1][1:]), *reduced[2:])


def read_only_owner(owner: Any) -> Any:
    """The array of a buffer of reduce_writable()'s; of any other buffer, its owner itself."""
    return getattr(owner, "_dpool_read_only", owner)


class _ReadOnly(Exception):
    """There is a read-only array in what is pickled."""


class _WritablePickler(pickle.Pickler):
    """Slower: it asks about each object."""

    def reducer_override(self, obj: Any) -> Any:
        return reduce_writable(obj) if is_read_only(obj) else NotImplemented


def _collector(buffers: list[memoryview], refuse: bool = False) -> Callable[[pickle.PickleBuffer], bool]:
    """For pickle: what puts large buffers there, and leaves small ones in the pickle. `refuse`: raises _ReadOnly."""
    def beside(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if refuse and view.readonly and is_read_only(view.obj):
            raise _ReadOnly
        if view.nbytes < OUT_OF_BAND_MIN_BYTES:
            return True
        buffers.append(view)
        return False

    return beside


def _dumps(value: Any, buffers: list[memoryview] | None, by_value: bool) -> bytes:
    start = len(buffers) if buffers is not None else 0
    callback = None if buffers is None else _collector(buffers)
    extra = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
    try:
        if len(extra) == _plain_reducers or _only_plain(extra):
            # Most values; nobody has registered reductions of their own with multiprocessing.
            try:
                refusing = None if buffers is None else _collector(buffers, refuse=True)
                data = pickle.dumps(_lift(value), PROTOCOL, buffer_callback=refusing)
                if _CONNECTION not in data:
                    return data
                # Plain pickle has written down the number of a descriptor, which means nothing elsewhere.
            except _ReadOnly:
                pass
            if buffers is not None:
                del buffers[start:]
        return _forking_dumps(value, callback)
    except Exception as first:
        if buffers is not None:
            del buffers[start:]
        try:
            return _forking_dumps(value, callback)
        except Exception:
            if buffers is not None:
                del buffers[start:]
        if by_value:
            try:
                return dumps_by_value(value, callback)
            except Exception:
                if buffers is not None:
                    del buffers[start:]
        raise first


def _forking_dumps(value: Any, callback: Any) -> bytes:
    out = io.BytesIO()
    pickler = _WritablePickler(out, PROTOCOL, buffer_callback=callback)
    pickler.dispatch_table = {**copyreg.dispatch_table, **ForkingPickler._extra_reducers}  # type: ignore[attr-defined]
    pickler.dump(_lift(value))
    return out.getvalue()


def pack(values: Sequence[Any], by_value: bool = False,
         elsewhere: bool = False) -> tuple[Packed, list[tuple[int, BaseException]]]:
    """`values`, some of them Pickled, as bytes, and the (index, error) of each that cannot be pickled; those arrive as
    None. The other parameters are those of dumps().

    Raises nothing but KeyboardInterrupt: a value's own code may raise anything, SystemExit too.
    """
    if len(values) == 1 and type(values[0]) is not Pickled:
        if type(values[0]) in ATOMS:
            return Packed(pickle.dumps([values[0]], PROTOCOL), [], True), []
        # Nobody else to spoil: no need for a pickle within a pickle.
        beside: list[memoryview] = []
        try:
            return Packed(dumps([values[0]], beside, by_value, elsewhere), beside, True), []
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return Packed(_NONES, [], True), [(0, error)]
    if _plain(values):
        return Packed(pickle.dumps(values if type(values) is list else list(values), PROTOCOL), [], True), []
    errors: list[tuple[int, BaseException]] = []
    pickles: list[Any] = []
    counts: list[int] = []
    buffers: list[memoryview] = []
    for index, value in enumerate(values):
        before = len(buffers)
        try:
            data: Any
            if type(value) is Pickled:
                data = value.data
                buffers += value.buffers
            else:
                data = dumps(value, buffers, by_value, elsewhere)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            data = _NONE
            errors.append((index, error))
        counts.append(len(buffers) - before)
        if len(data) >= OUT_OF_BAND_MIN_BYTES:
            data = pickle.PickleBuffer(data)
        pickles.append(data)
    # The pickles of single values are themselves values of an outer pickle; the large ones go beside it.
    inner: list[memoryview] = []
    outer = (counts if buffers else None, pickles)
    body = pickle.dumps(outer, PROTOCOL, buffer_callback=lambda b: inner.append(b.raw()))
    return Packed(body, inner + buffers, False), errors


_NONE = pickle.dumps(None, PROTOCOL)
_NONES = pickle.dumps([None], PROTOCOL)


def _plain(values: Sequence[Any]) -> bool:
    """Whether no value can fail to pickle: numbers and texts, tuples of them, and calls with no more than those."""
    kinds = set(map(type, values))
    if kinds <= ATOMS:
        return True
    if kinds == {tuple}:
        parts = list(chain.from_iterable(values))
        kinds = set(map(type, parts))
        if kinds == {tuple, dict} and not any(map(dict.__len__, filter(_is_dict, parts))):
            kinds = set(map(type, chain.from_iterable(parts)))  # calls: (args, {})
        return kinds <= ATOMS
    return False


def _is_dict(value: Any) -> bool:
    return type(value) is dict


def unpack(body: bytes | memoryview, buffers: Sequence[memoryview], one: bool) -> list[Any] | Pickles:
    """The values themselves, or their pickles: load those one by one, each may raise."""
    if one:
        return pickle.loads(body, buffers=buffers)  # type: ignore[no-any-return]
    source = iter(buffers)
    counts, pickles = pickle.loads(body, buffers=source)
    return Pickles(counts, pickles, source)


class Pickles:
    """The pickles of several values, to be loaded in order."""

    __slots__ = ("_counts", "_pickles", "_buffers")

    def __init__(self, counts: list[int] | None, pickles: list[Any], buffers: Iterable[memoryview]) -> None:
        self._counts = counts
        self._pickles = pickles
        self._buffers = iter(buffers)

    def load(self, index: int) -> Any:
        """Value `index`; call it once for each index in order. Raises what its unpickling raises."""
        data = self._pickles[index]
        self._pickles[index] = None
        if self._counts is None:
            return pickle.loads(data)
        # Taken before loading, so that the next value finds its own even if this one fails.
        mine = [next(self._buffers) for _ in range(self._counts[index])]
        return pickle.loads(data, buffers=mine)


def culprit(value: Any, name: str) -> str:
    """See dpool.culprits. By plain pickle."""
    from dpool import culprits

    return culprits.culprit(value, name, _is_bad)


def _is_bad(part: Any) -> bool:
    try:
        pickle.dumps(part, PROTOCOL)
    except Exception:
        return True
    return False
