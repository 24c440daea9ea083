"""The worker: takes batches from the socket it shares with its group's other workers, runs them, sends the outcomes.

It decides nothing about other batches, keeps no task after its outcome is sent, and knows no network. Started by the
node as the target of a multiprocessing Process; it ends when the socket does.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import pickle
import signal
import socket
import sys
from array import array
from collections import deque
from itertools import starmap
from time import perf_counter_ns

from dpool import engine
from dpool.cluster.store import segments
from dpool.cluster.store.refs import Accepted, Descriptors, Sending, resolve
from dpool.cluster.wire import frames, pickling
from dpool.cluster.wire.functions import StaleFunction, load_by_name
from dpool.cluster.wire.handles import BATCH, READY, SLOT_WORDS, TASK, blocking_socket, reopen, trace_offset
from dpool.cluster.wire.pickling import ATOMS
from dpool.cluster.worker.setup import Setup, arm_lifeline
from dpool.errors import DpoolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from dpool.cluster.wire.pickling import Pickles

# Shorter: a caller waits less for the first results of a batch. Longer: fewer messages.
REPORT_EVERY_NS = 10_000_000
# Functions that are found by their name, kept between batches; they are the module's own objects anyway.
MAX_FUNCTIONS = 256
# Segments for results that are kept mapped. More: less mapping anew. Fewer: fewer descriptors.
MAX_SPARES = 16


def worker_main(setup: Setup) -> None:
    """Run until the tasks end. Returns so that multiprocessing's own finalizers run as in any of its processes."""
    os.setpgid(0, 0)
    arm_lifeline(setup.lifeline.descriptor)
    _let_children_be()
    os.environ.update(setup.environment)
    signal.sigtimedwait((signal.SIGINT,), 0)  # a Ctrl-C for the driver's process group, until now this process's too
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
    worker = Worker(setup)
    try:
        worker.start(setup)
        worker.run()
    except KeyboardInterrupt:
        pass  # sent to this process alone, between tasks: it ends, quietly
    finally:
        worker.tasks.close()
        worker.results.close()


def _let_children_be() -> None:
    """Allow this process to have children of its own: the driver sees a daemon, a task may open a pool."""
    from multiprocessing import process

    process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


class Worker:
    """One worker's sockets, page and functions. Used by one thread."""

    def __init__(self, setup: Setup) -> None:
        self.slot = setup.slot
        self.tasks = blocking_socket(setup.tasks.descriptor)
        self.results = blocking_socket(setup.results.descriptor)
        words = memoryview(mmap.mmap(setup.page.descriptor, setup.slots * SLOT_WORDS * 8)).cast("Q")
        self.page = words[self.slot * SLOT_WORDS:(self.slot + 1) * SLOT_WORDS]
        self.claims = setup.claims
        self.left = setup.max_tasks or 1 << 62
        # What is finished of the running batch and not sent, for report(): its number, values, failures and beginning.
        # None while these are being changed.
        self.finished: tuple[int, list[Any], list[tuple[Any, ...]], int] | None = None
        self.reported = 0  # tasks of the running batch that were sent
        self.functions: dict[int, Callable[..., Any]] = {}
        # A function that travels by value may hold much: one is kept, while more of its tasks will come; of one that
        # its tasks may change, what makes it.
        self.latest: tuple[int, Any] = (0, None)
        self.spare = 0  # the segment of the driver's that this batch's results may be written into
        self.spares: dict[int, segments.Segment] = {}  # the latest of them, mapped: that takes as long as the writing
        self.released: deque[int] = deque()  # segments of the driver's that nobody here looks at any more
        self.buffer = bytearray(frames.RECEIVE_BYTES)
        try:
            trace = reopen(setup.page.descriptor, os.O_WRONLY)
            os.lseek(trace, trace_offset(setup.slots, setup.slot), os.SEEK_SET)
            faulthandler.enable(trace)
        except OSError:
            pass  # no /proc: a crash is reported without its trace

    def start(self, setup: Setup) -> None:
        """Run the initializer; if it fails, say so and end."""
        try:
            setup.initializer.run()
        except BaseException as error:
            failure = pickle.dumps([(0, *describe_exception(error))], pickling.PROTOCOL)
            self._send(frames.BROKEN, 0, 0, [], failure, 0, 0)
            raise SystemExit(1) from None
        setup.initializer = None  # type: ignore[assignment]
        # Of all signals the one that can do no harm: it is ignored by whoever has no handler for it, used by hardly
        # anybody, and expected to come without a reason (Go preempts its goroutines with it).
        signal.signal(signal.SIGURG, self.report)
        self.page[READY] = 1

    def run(self) -> None:
        """Batch after batch, until the driver closes the socket or this worker has done its share."""
        buffer = memoryview(self.buffer)
        ancillary = socket.CMSG_SPACE((frames.MAX_DESCRIPTORS + 2) * 4)
        receive = self.tasks.recvmsg_into
        flags, cut = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_CTRUNC)  # the enum's own `&` takes a microsecond
        while self.left > 0:
            size, control, received, _ = receive([buffer], ancillary, flags)
            if not size:
                return
            self._batch(buffer[:size], _descriptors(control), bool(received & cut))

    def report(self, *_: object) -> None:
        """SIGURG: the node asks for what is finished, since a task takes long. Runs in the midst of that task, as soon
        as it is in Python code.

        So it must not run code of the user's, nor wait for a lock that the task may hold: values of other than plain
        types are left for later, and so is everything that does not succeed at once.
        """
        finished = self.finished
        if finished is None or not finished[1] or not all(map(_is_plain, finished[1])):
            return
        self.finished = None
        number, values, failures, started = finished
        ready = values[:]
        executed = self.reported + len(ready)
        try:
            self._send(0, number, self.reported, ready, _dump_failures(failures), executed, perf_counter_ns() - started,
                       early=True)
        except BaseException:
            pass  # not the running task's fault: it is tried again with the next ones
        else:
            # In place: the loop holds on to these lists.
            self.reported = executed
            values.clear()
            failures.clear()
        self.finished = finished

    def _batch(self, message: memoryview, descriptors: list[int], cut: bool = False) -> None:
        """Run one message. `cut`: not all of its descriptors could be opened here, and none can be told from another.
        """
        started = perf_counter_ns()
        (flags, mode, _, function_number, number, count, function_bytes, ref_bytes,
         spare) = frames.TASKS.unpack_from(message)
        self.page[TASK] = 0
        self.page[BATCH] = number
        claims = self.claims if count > 1 else None
        if claims is not None:
            for _ in range(count - 1):  # the first task is begun at once
                claims.release()
        start = frames.TASKS.size
        refs = start + function_bytes
        body = refs + ref_bytes
        if spare and not cut:
            self._take_spare(spare, descriptors.pop())
        own = bool(flags & frames.FUNCTION_IN_SEGMENT) + bool(flags & frames.BODY_IN_SEGMENT)
        # What is prepared is handed over by its list, so that nothing here keeps it alive while it runs.
        prepared: list[Any] = []
        try:
            accepted = None
            if cut:
                raise segments.too_many_open()
            if ref_bytes:
                of_refs = descriptors[own:]
                try:
                    accepted = Accepted(message[refs:body], of_refs)
                finally:
                    descriptors[own:] = of_refs  # those that are not the store's now
            function, make = self._function(function_number, flags, message[start:refs], descriptors)
            prepared.append(_CALLS[mode](function))
            del function
            prepared.append(_calls(mode, make))
            prepared.append(self._unpack(message[body:], flags, descriptors, accepted))
            prepared.append(accepted)
        except StaleFunction as stale:
            self._drain(claims)
            self._send(frames.DONE | frames.NEED_VALUE, number, 0, [], pickle.dumps(str(stale)), 0, 0)
        except BaseException as error:
            self._drain(claims)
            failures = [(i, *describe_exception(error, engine.ARGUMENT_BROKEN)) for i in range(count)]
            self._send(frames.DONE, number, 0, [None] * count, _dump_failures(failures), count, 0)
        else:
            accepted = None
            self._run(number, prepared, _RESOLVE[mode] if ref_bytes else None, count, claims, started)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self.page[BATCH] = 0

    def _unpack(self, body: memoryview, flags: int, descriptors: list[int],
                accepted: Accepted | None) -> list[Any] | Pickles:
        one = bool(flags & frames.ONE_PICKLE)
        buffers: Sequence[memoryview] = ()
        if flags & frames.BODY_IN_SEGMENT:
            body, *buffers = segments.read(descriptors[-1], body, self.released.append)
        if accepted is not None:
            buffers = accepted.buffers(buffers)
        return pickling.unpack(body, buffers, one)

    def _drain(self, claims: Any) -> None:
        if claims is not None:
            while claims.acquire(False):
                pass

    def _function(self, number: int, flags: int, inline: memoryview,
                  descriptors: list[int]) -> tuple[Callable[..., Any], Callable[[], Any] | None]:
        """The function of a batch, and what makes another one for each task after the first; None if they share it."""
        if flags & frames.BY_NAME:
            function = self.functions.get(number)
            if function is None:
                function = load_by_name(inline)
                if len(self.functions) >= MAX_FUNCTIONS:
                    self.functions.clear()
                self.functions[number] = function
            return function, None
        known, kept = self.latest
        if known != number or kept is None:
            self.latest = (0, None)  # before loading the next, which may be as large
            kept = _maker(inline, descriptors[0] if flags & frames.FUNCTION_IN_SEGMENT else -1)
            if not flags & frames.FUNCTION_ANEW:
                kept = kept()
        self.latest = (number, kept) if flags & frames.KEEP_FUNCTION else (0, None)
        return (kept(), kept) if flags & frames.FUNCTION_ANEW else (kept, None)

    def _run(self, number: int, prepared: list[Any], resolve: Callable[[Any], Any] | None, count: int, claims: Any,
             started: int) -> None:
        """Run a batch's tasks in order, for as long as they are there to be claimed."""
        call, make, tasks, accepted = prepared
        prepared.clear()
        page = self.page
        load: Any = tasks.__getitem__ if isinstance(tasks, list) else tasks.load
        values: list[Any] = []
        failures: list[tuple[Any, ...]] = []
        index = self.reported = 0
        reported_at = started
        last = min(count, self.left)
        finished = self.finished = (number, values, failures, started)
        while True:
            try:
                item = load(index)
                if index and make is not None:
                    call = None
                    call = make()
            except BaseException as error:
                self.finished = None
                failures.append((len(values), *describe_exception(error, engine.ARGUMENT_BROKEN)))
                values.append(None)
                self.finished = finished
            else:
                try:
                    value = call(item if resolve is None else resolve(item))
                except BaseException as error:
                    self.finished = None
                    failures.append((len(values), *describe_exception(error)))
                    values.append(None)
                    self.finished = finished
                else:
                    # The next task may change what this one has returned; unless all is sent before it begins.
                    # Most values are numbers and the like: those cost no call.
                    if (type(value) not in ATOMS and index + 1 < last and not pickling.is_constant(value)
                            and perf_counter_ns() - reported_at <= REPORT_EVERY_NS):
                        try:
                            value = _as_it_is(value)
                            if value.hurries:
                                reported_at = 0  # it is sent before the next task begins
                        except KeyboardInterrupt:
                            raise
                        except BaseException as error:
                            self.finished = None
                            failures.append((len(values), *describe_unpicklable(value, error)))
                            value = None
                    values.append(value)
                    self.finished = finished
                    value = None
                item = None
            index += 1
            if index >= last or (claims is not None and not claims.acquire(False)):
                break
            page[TASK] = index
            now = perf_counter_ns()
            if now - reported_at > REPORT_EVERY_NS:
                self.finished = None
                self._send(0, number, self.reported, values, _dump_failures(failures), index, now - started)
                values, failures = [], []
                self.reported, reported_at = index, now
                finished = self.finished = (number, values, failures, started)
        self.finished = None
        del finished
        self.left -= index
        if claims is not None and index < count:
            self._drain(claims)
        del tasks, load, call, make, accepted
        self._send(frames.DONE, number, self.reported, values, _dump_failures(failures), index,
                   perf_counter_ns() - started)

    def _send(self, flags: int, number: int, first: int, values: list[Any], failures: bytes, executed: int,
              run_ns: int, early: bool = False) -> None:
        """Send outcomes. With `early` what goes wrong is raised, and nothing is sent."""
        with Sending() as sending:
            packed, errors = pickling.pack(values)
        if not packed.one:
            for known in [value.sending for value in values if type(value) is pickling.Pickled]:
                if known is not None:
                    sending.take(known)
        if early and errors:
            raise errors[0][1]
        if len(sending.refs) >= frames.MAX_DESCRIPTORS:
            return self._send_less(flags, number, first, values, failures, executed, run_ns)
        if errors:
            others = pickle.loads(failures) if failures else []
            failures = _dump_failures(others + [(i, *describe_unpicklable(values[i], error)) for i, error in errors])
        if packed.one:
            flags |= frames.ONE_PICKLE
        count = len(values)
        del values
        descriptor = -1
        body = packed.body
        try:
            refs, shared = sending.export()
            if packed.buffers or len(body) + len(failures) + len(refs) > frames.INLINE_MAX_BYTES:
                parts: list[bytes | memoryview] = [failures, body, *packed.buffers]
                table = self._write_spare(parts)
                if table is not None:
                    body = table
                    flags |= frames.BODY_IN_SPARE
                else:
                    descriptor, body = segments.write(parts)
                    flags |= frames.BODY_IN_SEGMENT
                    shared.insert(0, descriptor)
                failures = b""
        except (OSError, DpoolError) as error:
            if early:
                raise
            # No memory for the results: each task learns it, instead of all hanging.
            lost = [(i, *describe_exception(error, engine.RESULT_LOST)) for i in range(count)]
            return self._send(flags & ~frames.ONE_PICKLE, number, first, [None] * count, _dump_failures(lost),
                              executed, run_ns)
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", shared))] if shared else []
        released = b""
        if self.spare and flags & frames.DONE:
            self.released.append(self.spare)  # not needed
            self.spare = 0
        if self.released:
            numbers = array("Q")
            while self.released:
                numbers.append(self.released.popleft())
            released = numbers.tobytes()
        header = frames.RESULTS.pack(flags, 0, self.slot, number, first, count, executed, run_ns, len(failures),
                                     len(refs), len(released))
        try:
            self.results.sendmsg((header, failures, refs, released, body), control)
        except (BrokenPipeError, ConnectionResetError):
            os._exit(1)  # nobody is there to receive it
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _take_spare(self, number: int, descriptor: int) -> None:
        self.spare = number
        segment = self.spares.pop(number, None)
        if segment is not None:
            os.close(descriptor)
        else:
            segment = segments.Segment(os.fstat(descriptor).st_size, descriptor)
        self.spares[number] = segment
        if len(self.spares) > MAX_SPARES:
            self.spares.pop(next(iter(self.spares))).close()

    def _write_spare(self, parts: Sequence[memoryview | bytes]) -> bytes | None:
        """Write results into the segment that came for them: its table, None if there is none that is large enough."""
        number = self.spare
        if not number or segments.needed(parts) > self.spares[number].size:
            return None
        self.spare = 0
        return segments.head(number) + self.spares[number].write(parts, warm=True)

    def _send_less(self, flags: int, number: int, first: int, values: list[Any], failures: bytes, executed: int,
                   run_ns: int) -> None:
        """The values have more refs than one message can carry: send them one by one."""
        known = {entry[0]: entry[1:] for entry in pickle.loads(failures)} if failures else {}
        for index, value in enumerate(values):
            mine = [(0, *known[index])] if index in known else []
            if len(values) == 1:
                error = ValueError(f"a result may have at most {frames.MAX_DESCRIPTORS} large refs in it: put() the "
                                   "values together")
                mine, value = [(0, *describe_exception(error))], None
            last = flags if index == len(values) - 1 else flags & ~frames.DONE
            self._send(last, number, first + index, [value], _dump_failures(mine), executed, run_ns)


def _maker(inline: memoryview, descriptor: int) -> Callable[[], Any]:
    """What unpickles a function, each time a new one. `descriptor` is its segment's, -1 if it has none."""
    data = bytes(inline)
    if descriptor < 0:
        return lambda: pickle.loads(data)
    held = Descriptors()
    held.numbers.append(os.dup(descriptor))

    def make() -> Any:
        # Mapped anew: what a task writes into its function's arrays is seen by none of the others.
        body, *buffers = segments.read(held.numbers[0], data)
        return pickle.loads(body, buffers=buffers)

    return make


# From a function to a callable of one item, by mode.
_CALLS: dict[int, Callable[[Any], Callable[[Any], Any]]] = {
    engine.CALL: lambda f: lambda item: f(*item[0], **item[1]),
    engine.MAP: lambda f: f,
    engine.STAR: lambda f: lambda item: f(*item),
    engine.MAP_CHUNK: lambda f: lambda item: list(map(f, item)),
    engine.STAR_CHUNK: lambda f: lambda item: list(starmap(f, item)),
}


def _calls(mode: int, make: Callable[[], Any] | None) -> Callable[[], Callable[[Any], Any]] | None:
    """The same, of what makes a function."""
    return None if make is None else lambda: _CALLS[mode](make())


def _resolve_call(item: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[list[Any], dict[str, Any]]:
    return [resolve(arg) for arg in item[0]], {key: resolve(arg) for key, arg in item[1].items()}


def _resolve_all(item: Any) -> list[Any]:
    return [resolve(part) for part in item]


# What takes a task's refs to their values, by mode: those that are arguments themselves.
_RESOLVE: dict[int, Callable[[Any], Any]] = {
    engine.CALL: _resolve_call,
    engine.MAP: resolve,
    engine.STAR: _resolve_all,
    engine.MAP_CHUNK: _resolve_all,
    engine.STAR_CHUNK: lambda item: [_resolve_all(part) for part in item],
}


_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, bytearray))
# Of a container no more are looked at, in so many layers.
_PLAIN_ITEMS = 1000
_PLAIN_LAYERS = 4


def _is_plain(value: Any, layers: int = _PLAIN_LAYERS) -> bool:
    """Whether pickling a value runs nobody's code, and takes no lock: numbers, texts, bytes, NumPy arrays of such, and
    containers of them that are not large."""
    kind = type(value)
    if kind in _PLAIN:
        return True
    if kind is pickling.Pickled:
        return value.sending is None
    if kind in (list, tuple, set, frozenset, dict):
        if not layers or len(value) > _PLAIN_ITEMS:
            return False
        items = (*value, *value.values()) if kind is dict else value
        return all(_is_plain(item, layers - 1) for item in items)
    return kind.__name__ == "ndarray" and kind.__module__ == "numpy" and not value.dtype.hasobject


def _descriptors(control: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.extend(int.from_bytes(data[i:i + 4], "little") for i in range(0, len(data) - 3, 4))
    return found


def _dump_failures(failures: list[tuple[Any, ...]]) -> bytes:
    return pickle.dumps(failures, pickling.PROTOCOL) if failures else b""


def describe_exception(error: BaseException, kind: str = engine.RAISED) -> tuple[Any, ...]:
    """An exception as (kind, pickle or None, type name, text, traceback, ""): the pickle is None if the exception
    could not be rebuilt from it, which is tried here, where it harms nobody."""
    import traceback

    if isinstance(error, ModuleNotFoundError) and (modules := sys.modules.get("dpool.cluster.worker.modules")):
        modules.explain(error)
    frames_of_user = error.__traceback__.tb_next if error.__traceback__ is not None else None
    text = "".join(traceback.format_exception(type(error), error, frames_of_user or error.__traceback__))
    name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    error.__traceback__ = None
    try:
        data: bytes | None = pickling.dumps(error)
    except BaseException as unpicklable:
        return engine.RESULT_LOST, _dump_or_none(unpicklable), repr(unpicklable), str(error), text, _repr(error)
    try:
        rebuilt = pickle.loads(data)  # type: ignore[arg-type]
        if type(rebuilt) is not type(error):
            data = None
    except BaseException:
        data = None
    return kind, data, name, _text(error), text, ""


def _as_it_is(value: Any) -> pickling.Pickled:
    """A value, pickled before it can change. Raises what pickling raises."""
    try:
        return pickling.Pickled(value)
    except KeyboardInterrupt:
        raise
    except BaseException:
        # It may have refs in it, which are hardly ever there and refuse to be pickled but within this, which costs as
        # much as a small value's pickle.
        with Sending() as sending:
            return pickling.Pickled(value, sending)


def describe_unpicklable(value: Any, error: BaseException) -> tuple[Any, ...]:
    """A result that cannot be pickled, in the same form."""
    if type(error) in (TypeError, pickle.PicklingError, AttributeError):
        error.args = (f"{error} (in the result: {pickling.culprit(value, 'result')})",)
    error.__traceback__ = None
    return engine.RESULT_LOST, _dump_or_none(error), repr(error), "", "", _repr(value)


def _dump_or_none(error: BaseException) -> bytes | None:
    try:
        data = pickle.dumps(error, pickling.PROTOCOL)
        pickle.loads(data)
        return data
    except BaseException:
        return None


def _repr(value: Any) -> str:
    try:
        return repr(value)
    except BaseException as error:
        return f"<{type(value).__qualname__} whose repr raises {type(error).__qualname__}>"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return ""
