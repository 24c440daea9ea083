"""How a function travels: by name where the other side has the same code, by value (cloudpickle) otherwise.

The driver encodes a function once and numbers it; a worker resolves the name and compares a digest of the code, and
asks for the value if they differ. Never sends anything itself. Used by the driver's FunctionTable and by the worker.
"""

from __future__ import annotations

import os
import pickle
import sys
import types
import weakref
import zlib
from collections import ChainMap
from multiprocessing.reduction import ForkingPickler

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# The program's main module: multiprocessing gives it another name in workers that it spawns.
_MAINS = ("__main__", "__mp_main__")
_SIMPLE = (int, float, complex, bool, str, bytes, type(None))


def digest(function: types.FunctionType, depth: int = 3) -> int:
    """A number that differs, in all likelihood, if the code differs. Stable across processes, unlike hash().

    It covers the bytecode, names, constants and simple defaults, and, for a function of `__main__`, the functions of
    `__main__` that it calls by name, since a notebook redefines those one at a time.
    """
    crc = code_digest(function.__code__)
    for value in (function.__defaults__ or ()) + tuple((function.__kwdefaults__ or {}).values()):
        crc = zlib.crc32((repr(value) if isinstance(value, _SIMPLE) else type(value).__qualname__).encode(), crc)
    if depth and function.__module__ in _MAINS:
        for name in function.__code__.co_names:
            other = function.__globals__.get(name)
            if isinstance(other, types.FunctionType) and other is not function and other.__module__ in _MAINS:
                crc = zlib.crc32(digest(other, depth - 1).to_bytes(4, "little"), crc)
    return crc


def code_digest(code: types.CodeType, crc: int = 0) -> int:
    """The same of code alone, wherever it stands in its file."""
    crc = zlib.crc32(code.co_code, crc)
    crc = zlib.crc32(repr((code.co_names, code.co_varnames, code.co_freevars)).encode(), crc)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            crc = code_digest(constant, crc)
        elif isinstance(constant, frozenset):
            crc = zlib.crc32(repr(sorted(map(repr, constant))).encode(), crc)
        else:
            crc = zlib.crc32(repr(constant).encode(), crc)
    return crc


def calls_of(function: types.FunctionType) -> list[tuple[str, Any]]:
    """The globals of `__main__` that a function's code names: while they are the same objects, its digest holds."""
    names = function.__globals__
    return [(name, names[name]) for name in function.__code__.co_names if name in names]


def by_name(function: Callable[..., Any]) -> bytes:
    """A function, builtin or class as its name and the digest of its code. Raises PicklingError or AttributeError if
    it cannot be found by its name."""
    return pickle.dumps((function, digest(function) if isinstance(function, types.FunctionType) else None), 5)


class StaleFunction(Exception):
    """This process has another function, or none, under the name that was sent."""


def load_by_name(data: bytes | memoryview) -> Callable[..., Any]:
    """The function that by_name() named. Raises StaleFunction if it is not here, or has other code here."""
    try:
        function, sent = pickle.loads(data)
    except (AttributeError, ImportError) as error:
        raise StaleFunction(str(error)) from error
    if sent is not None and (not isinstance(function, types.FunctionType) or digest(function) != sent):
        raise StaleFunction(f"{function!r} has other code here")
    return function  # type: ignore[no-any-return]


def dumps_by_value(value: Any, buffer_callback: Any = None) -> bytes:
    """Pickle `value` so that nothing of `__main__`, and no local function or class, needs to exist on the other side.

    Functions of `__main__` are rebuilt on the worker's own `__main__` namespace: an initializer and the tasks share
    their globals. Classes of `__main__` are found there afterwards, so that results name them, and are the driver's own
    when they come back. Raises what cloudpickle raises.
    """
    import io

    out = io.BytesIO()
    by_value_pickler()(out, protocol=5, buffer_callback=buffer_callback).dump(value)
    return out.getvalue()


_pickler: Any = None


def by_value_pickler() -> Any:
    """The class of pickler behind dumps_by_value(): cloudpickle's, but for functions and classes of `__main__`."""
    global _pickler
    if _pickler is not None:
        return _pickler
    import functools

    import cloudpickle

    from dpool.cluster.wire.pickling import is_read_only, reduce_writable

    cached: Any = functools._lru_cache_wrapper
    lookup: Any = cloudpickle.cloudpickle._lookup_module_and_qualname

    def reduce_code(code: types.CodeType) -> Any:
        make, arguments = cloudpickle.cloudpickle._code_reduce(code)
        return make, tuple(code.co_filename if type(argument) is str and argument == "<dynamic-code>" else argument
                           for argument in arguments)

    def reduce_weak(values: weakref.WeakKeyDictionary[Any, Any]) -> Any:
        return weakref.WeakKeyDictionary, (dict(values),)

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        # Tracebacks name the file, which cloudpickle takes away. functools.singledispatch() has a weak dictionary. And
        # reductions that the program has registered hold here, too.
        dispatch_table = ChainMap({types.CodeType: reduce_code, weakref.WeakKeyDictionary: reduce_weak},
                                  *cloudpickle.CloudPickler.dispatch_table.maps,
                                  ForkingPickler._extra_reducers)  # type: ignore[attr-defined]

        def reducer_override(self, obj: Any) -> Any:
            if is_read_only(obj):
                return reduce_writable(obj)
            if type(obj) is cached and lookup(obj) is None:
                # By itself it names itself, and it is not there.
                number = _cached_numbers.setdefault(obj, os.urandom(16))
                name = obj.__qualname__
                found = sys.modules["__main__"].__dict__.get(name) is obj
                return _make_cached, (number, name if found else "", obj.__wrapped__, obj.cache_parameters())
            reduced = super().reducer_override(obj)
            if isinstance(obj, type) and obj.__module__ == "__main__" and isinstance(reduced, tuple):
                state = reduced[2], obj.__qualname__, _outermost(obj)
                return (*reduced[:2], state, None, None, _set_class_in_main)
            if (isinstance(obj, types.FunctionType) and obj.__globals__ is sys.modules["__main__"].__dict__
                    and isinstance(reduced, tuple) and len(reduced) == 6):
                make, arguments, state = reduced[:3]
                # cloudpickle's arguments: code, base globals, name, defaults, closure.
                return _make_in_main, (make, arguments[0], *arguments[2:]), state, None, None, _set_state_in_main
            return reduced

    _pickler = Pickler
    return Pickler


# What functools.lru_cache() has made and was sent, and what was made of it here: one object here for one there, so that
# what a worker has cached lasts from one task to the next.
_cached_numbers: weakref.WeakKeyDictionary[Any, bytes] = weakref.WeakKeyDictionary()
_cached: weakref.WeakValueDictionary[bytes, Any] = weakref.WeakValueDictionary()


def _make_cached(number: bytes, name: str, function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    import functools

    made = _cached.get(number)
    if made is None:
        made = _cached[number] = functools.lru_cache(**parameters)(function)
        _cached_numbers[made] = number
    if name:
        _ship(name, made)
    return made


# The globals that drivers have shipped into this process's __main__, by name: a global that still is what was shipped
# may be replaced by a newer one; a global that the worker has assigned itself wins.
_shipped: dict[str, Any] = {}
_MISSING = object()


def _make_in_main(make: Callable[..., Any], code: types.CodeType, *rest: Any) -> Any:
    return make(code, sys.modules["__main__"].__dict__, *rest)


def _outermost(kind: type) -> type | None:
    """The class of `__main__` within which `kind` is found by its name, perhaps itself; None if it is not found."""
    top, _, rest = kind.__qualname__.partition(".")
    found = outermost = sys.modules["__main__"].__dict__.get(top)
    for name in filter(None, rest.split(".")):
        found = getattr(found, name, None)
    return outermost if found is kind and isinstance(outermost, type) else None


# The classes that were set up here. Not again: that would set their attributes back.
_set_up: weakref.WeakSet[type] = weakref.WeakSet()


def _set_class_in_main(made: Any, state: Any) -> Any:
    from cloudpickle import cloudpickle

    state, qualname, outermost = state
    mine = _outermost(made)
    if made in _set_up or (mine is not None and mine is not _shipped.get(mine.__name__)):
        return made  # the latter is this process's own, come back
    _set_up.add(made)
    made = cloudpickle._class_setstate(made, state)
    made.__qualname__ = qualname
    if outermost is not None:
        _ship(qualname.partition(".")[0], outermost)
    return made


def _ship(name: str, value: Any) -> None:
    main = sys.modules["__main__"].__dict__
    mine = main.get(name, _MISSING)
    if mine is _MISSING or mine is _shipped.get(name, _MISSING):
        main[name] = _shipped[name] = value


def _set_state_in_main(function: Any, state: Any) -> None:
    from cloudpickle import cloudpickle

    attributes, slots = state
    slots = dict(slots)
    for name, value in slots.pop("__globals__", {}).items():
        _ship(name, value)
    slots["__globals__"] = {}
    cloudpickle._function_setstate(function, (attributes, slots))
