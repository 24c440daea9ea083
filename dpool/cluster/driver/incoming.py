"""What a worker has said, taken apart: values and failures from its message, and whom to tell of them.

Receives nothing and takes no lock of the group's. Called by driver/group.py, in the thread that received.
"""

from __future__ import annotations

import os
import pickle

from dpool import engine
from dpool.cluster.store import segments
from dpool.cluster.store.refs import Accepted
from dpool.cluster.wire import frames, pickling
from dpool.engine import Failure
from dpool.errors import RemoteError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from dpool.cluster.driver.dispatch import Batch
    from dpool.cluster.store.store import Store


class Incoming:
    """A RESULTS message: the header's fields, and the rest as it lies in the message or in a segment."""

    __slots__ = ("flags", "slot", "number", "first", "count", "executed", "run_ns", "released", "result_bytes",
                 "_failures", "_body", "_buffers", "_accepted", "_lost")

    def __init__(self, message: memoryview, descriptors: list[int], store: Store) -> None:
        """Takes the descriptors over. What refers to `message` is used before the next one is received."""
        (self.flags, _, self.slot, self.number, self.first, self.count, self.executed, self.run_ns, failure_bytes,
         ref_bytes, released_bytes) = frames.RESULTS.unpack_from(message)
        refs_at = frames.RESULTS.size + failure_bytes
        released_at = refs_at + ref_bytes
        self._failures: Any = message[frames.RESULTS.size:refs_at]
        self._body: Any = message[released_at + released_bytes:]
        self._buffers: Sequence[memoryview] = ()
        self.result_bytes = 0  # of what did not fit into the message
        self._accepted: Accepted | None = None
        self._lost: Exception | None = None  # why nothing of it can be had: no memory, or no descriptors
        try:
            if self.flags & (frames.BODY_IN_SEGMENT | frames.BODY_IN_SPARE):
                if not descriptors and not self.flags & frames.BODY_IN_SPARE:
                    raise segments.too_many_open()
                parts = (store.arrived(self._body) if self.flags & frames.BODY_IN_SPARE
                         else store.adopt(descriptors.pop(0), self._body))
                self.result_bytes = segments.needed(parts)
                self._failures, self._body, *self._buffers = parts
            if ref_bytes:
                self._accepted = Accepted(message[refs_at:released_at], descriptors)
        except Exception as error:
            self._lost = error
            for descriptor in descriptors:
                os.close(descriptor)
        # Numbers of segments of this process's store that nobody in the worker looks at any more.
        self.released: list[int] = (
            message[released_at:released_at + released_bytes].cast("Q").tolist() if released_bytes else [])

    def outcomes(self) -> tuple[list[Any], dict[int, Failure]]:
        """The values of the tasks that the message tells of, and the failures of some of them by their index. Runs code
        of the user's, and raises none of what that raises."""
        if self._lost is not None:
            lost = Failure(engine.RESULT_BROKEN, self._lost)
            return [None] * self.count, dict.fromkeys(range(self.count), lost)
        failed: dict[int, Failure] = {}
        values: list[Any] = []
        if self.count:
            try:
                loaded = pickling.unpack(self._body, self._buffers, bool(self.flags & frames.ONE_PICKLE))
            except BaseException as error:  # a single value, whose unpickling is code of the user's
                loaded = [None] * self.count
                failed = {index: Failure(engine.RESULT_BROKEN, error) for index in range(self.count)}
            if isinstance(loaded, list):
                values = loaded
            else:
                for index in range(self.count):
                    try:
                        values.append(loaded.load(index))
                    except BaseException as error:
                        values.append(None)
                        failed[index] = Failure(engine.RESULT_BROKEN, error)
        self._accepted = None
        if len(self._failures):
            for entry in pickle.loads(self._failures):
                failed[entry[0]] = _rebuild(entry)
        return values, failed

    def reason(self) -> Any:
        """What stands in place of failures where no task was run."""
        return pickle.loads(self._failures)

    def initializer_failure(self) -> Failure:
        """Of a BROKEN message."""
        return _rebuild(self.reason()[0])


def _rebuild(entry: tuple[Any, ...]) -> Failure:
    """A failure as a worker described it: see worker/main.py, describe_exception."""
    _, kind, data, name, text, traceback, value_repr = entry
    if data is not None:
        try:
            error = pickle.loads(data)
            if isinstance(error, BaseException):
                return Failure(kind, error, traceback, value_repr)
        except BaseException:
            pass
    return Failure(kind, RemoteError(text or name, name), traceback, value_repr)


def tell(batch: Batch, first: int, values: list[Any], failed: dict[int, Failure]) -> None:
    """Tell the sinks of a batch what became of its tasks from `first` on."""
    if batch.jobs is None:
        base = batch.first + first
        sink = batch.job.sink
        if not failed:
            sink.set(base, values)
            return
        start = 0
        for index in sorted(failed):
            if index > start:
                sink.set(base + start, values[start:index])
            sink.fail(base + index, failed[index])
            start = index + 1
        if start < len(values):
            sink.set(base + start, values[start:])
        return
    for index, value in enumerate(values):
        sink = batch.jobs[first + index].sink
        if index in failed:
            sink.fail(0, failed[index])
        else:
            sink.set(0, (value,))
