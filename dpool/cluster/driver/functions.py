"""The functions a driver has sent: each is encoded once and numbered, and remembered while it may be sent again.

Encodes and remembers; sends nothing. One table per process, used by every group's submitters.
"""

from __future__ import annotations

import functools
import itertools
import pickle
import sys
import types

from dpool.cluster.driver.dispatch import Timing
from dpool.cluster.store import segments
from dpool.cluster.store.refs import Descriptors, Sending
from dpool.cluster.wire import frames, pickling
from dpool.cluster.wire.functions import by_name, calls_of, dumps_by_value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from dpool.cluster.store.refs import ObjectRef

# Functions by name that are remembered; each entry keeps its function alive. Past it the table starts anew.
MAX_REMEMBERED = 1024

_numbers = itertools.count(1)
_IMMUTABLE = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type, str, bytes, int, float, type(None),
              bool, types.MethodDescriptorType, types.WrapperDescriptorType)


class Function:
    """One function as it travels: its number, its bytes in the message, its segment if it is large.

    `target` is the callable itself, kept to encode it by value should a worker not know it by name.
    """

    __slots__ = ("number", "flags", "inline", "descriptor", "target", "timing", "by_value", "problem", "calls",
                 "refs", "_held")

    def __init__(self, target: Callable[..., Any], timing: Timing) -> None:
        self.number = next(_numbers)
        self.target = target
        self.timing = timing
        self.descriptor = -1
        self._held: Descriptors | None = None  # owns it
        self.by_value = False
        self.problem: Exception | None = None  # why it cannot go by value, though a worker asks for that
        self.calls: list[tuple[str, Any]] = []
        self.flags = 0
        self.inline = b""
        self.refs: list[ObjectRef] = []  # stored objects that it refers to: they go along with every batch

    def encode_by_name(self) -> None:
        """Raises PicklingError or AttributeError if the function is not found under its name."""
        self.inline = by_name(self.target)
        self.flags = frames.BY_NAME

    def encode_with_state(self, elsewhere: bool) -> None:
        """As a plain pickle with large buffers beside it, by value if that fails, or names `__main__` and the worker
        has another."""
        buffers: list[memoryview] = []
        try:
            with Sending() as sending:
                data = pickling.dumps(self.target, buffers, elsewhere=elsewhere)
        except Exception:
            return self.encode_by_value()
        self._place(data, buffers, sending)

    def encode_by_value(self) -> None:
        """So that no module of the worker needs to hold it. Raises what pickling raises, naming the culprit."""
        self.by_value = True
        buffers: list[memoryview] = []

        def beside(buffer: pickle.PickleBuffer) -> bool:
            view = buffer.raw()
            if view.nbytes < pickling.OUT_OF_BAND_MIN_BYTES:
                return True
            buffers.append(view)
            return False

        try:
            with Sending() as sending:
                data = dumps_by_value(self.target, beside)
        except (TypeError, pickle.PicklingError, AttributeError) as error:
            name = getattr(self.target, "__name__", type(self.target).__name__)
            error.args = (f"{error} ({pickling.culprit(self.target, name)})",)
            raise
        self._place(data, buffers, sending)

    def _place(self, data: bytes, buffers: list[memoryview], sending: Sending) -> None:
        self._close()
        self.refs = list(sending.refs.values())
        if buffers or len(data) > frames.INLINE_MAX_BYTES:
            self.descriptor, self.inline = segments.write([data, *buffers])
            self._held = Descriptors()
            self._held.numbers.append(self.descriptor)
            self.flags = frames.FUNCTION_IN_SEGMENT
        else:
            self.inline = data
            self.flags = 0
        if not _is_constant(self.target):
            self.flags |= frames.FUNCTION_ANEW

    def _close(self) -> None:
        self.descriptor = -1
        self._held = None


def _is_constant(value: Any) -> bool:
    """Whether a callable, or an argument that it holds, is the same after any call: a function, a method of a class, a
    functools.partial of such. One that travels by value keeps its globals and what it encloses, as in its module."""
    if type(value) is functools.partial:
        return not vars(value) and all(map(_is_constant, (value.func, *value.args, *value.keywords.values())))
    if isinstance(value, (types.MethodType, types.BuiltinFunctionType)):
        value = value.__self__
    return isinstance(value, (types.ModuleType, type)) or type(value) in _IMMUTABLE


class FunctionTable:
    """Finds or makes the Function of a callable. Safe from any thread: the worst of a race is a second encoding."""

    def __init__(self) -> None:
        self._known: dict[int, Function] = {}
        self._timings: dict[Any, Timing] = {}

    def get(self, target: Callable[..., Any], elsewhere: bool = False) -> Function:
        """The Function to send for `target`, `elsewhere` to workers with a `__main__` of their own. Raises TypeError if
        it is not callable, and what pickling it raises."""
        known = self._known.get(id(target))
        if known is not None and known.target is target:
            if not known.calls or self._holds(known):
                return known
            del self._known[id(target)]
        return self._make(target, elsewhere)

    def _holds(self, known: Function) -> bool:
        """Whether what a function of __main__ refers to is what it was when it was encoded."""
        names = known.target.__globals__
        return all(names.get(name) is value for name, value in known.calls)

    def _make(self, target: Callable[..., Any], elsewhere: bool) -> Function:
        function = Function(target, self._timing(target))
        if (isinstance(target, (types.FunctionType, type))
                or (isinstance(target, types.BuiltinFunctionType) and _is_constant(target))):
            try:
                function.encode_by_name()
            except (pickle.PicklingError, AttributeError, TypeError):
                function.encode_by_value()  # lambdas, closures: their state may change, so they are not remembered
                return function
            if isinstance(target, types.FunctionType) and target.__module__ == "__main__":
                function.calls = calls_of(target)
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            self._known[id(target)] = function
        else:
            function.encode_with_state(elsewhere)
        return function

    def send_by_value(self, function: Function) -> None:
        """A worker does not know `function` by its name: from now on it travels by value."""
        target: Any = function.target
        module = sys.modules.get(getattr(target, "__module__", None) or "")
        if module is None or module.__name__ in ("__main__", "builtins"):
            function.encode_by_value()
        else:
            import cloudpickle

            cloudpickle.register_pickle_by_value(module)
            try:
                function.encode_by_value()
            finally:
                cloudpickle.unregister_pickle_by_value(module)
        if not all(isinstance(value, _IMMUTABLE) for _, value in function.calls):
            self._known.pop(id(target), None)  # what it refers to may change in place: encode it anew each time

    def _timing(self, target: Callable[..., Any]) -> Timing:
        key: Any = target
        while True:
            if isinstance(key, functools.partial):
                key = key.func
            elif isinstance(key, types.MethodType):
                key = key.__func__
            else:
                break
        if not isinstance(key, (type, types.BuiltinFunctionType)):
            key = getattr(key, "__code__", None) or type(key)
        timing = self._timings.get(key)
        if timing is None:
            if len(self._timings) >= MAX_REMEMBERED:
                self._timings.clear()
            timing = self._timings[key] = Timing()
        return timing


table = FunctionTable()
