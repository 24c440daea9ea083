"""A batch on its way out: pickled, its large buffers in segments or shared objects, as a message to a worker.

Sends nothing and takes no lock of the group's. Called by driver/group.py, in whichever thread sends.
"""

from __future__ import annotations

import pickle

from dpool import engine
from dpool.cluster.store.refs import Sending, store_buffer
from dpool.cluster.wire import frames, pickling
from dpool.errors import ObjectLost, ObjectStoreFull

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable
    from typing import Any

    from dpool.cluster.driver.dispatch import Batch, Job
    from dpool.cluster.store.store import Store

# Buffers of this size that several tasks of one call have in common are stored once. Larger: fewer are looked at.
SHARE_MIN_BYTES = 1 << 20
# Different buffers of one call that are remembered for that.
MAX_SHARED = 256


class Refused(Exception):
    """These tasks of the batch, as (index, error), can never be sent."""

    def __init__(self, errors: list[tuple[int, BaseException]]) -> None:
        super().__init__(errors)
        self.errors = errors


class TooManyRefs(Exception):
    """The tasks of the batch have more large refs than one message can carry."""


class Outgoing:
    """A batch as a message. `lent`: segments of the store's go with it, for its holder. Keep it until it is sent."""

    __slots__ = ("parts", "descriptors", "lent", "_sending")

    def __init__(self, parts: list[bytes], descriptors: list[int], lent: bool, sending: Sending) -> None:
        self.parts = parts
        self.descriptors = descriptors  # the store's and the function's: they stay theirs
        self.lent = lent
        self._sending = sending  # holds what is sent until it is


def encode(batch: Batch, store: Store, holder: Hashable, here: bool) -> Outgoing:
    """The message for a batch. `here`: for a worker of this machine; a segment for its results goes along where they
    will be large.

    Raises Refused, TooManyRefs, ObjectStoreFull, and KeyboardInterrupt; nothing is lent then.
    """
    function: Any = batch.function
    with Sending(function.refs) as sending:
        packed, errors = pickling.pack(batch.items(), by_value=True, elsewhere=not here)
    if errors:
        raise Refused(errors)
    flags = function.flags
    if packed.one:
        flags |= frames.ONE_PICKLE
    if batch.job.unsettled > batch.stop:
        flags |= frames.KEEP_FUNCTION
    body = packed.body
    lent = False
    try:
        layout, own = _share(batch, packed.buffers, sending) if packed.buffers else ((), ())
        if len(sending.refs) > frames.MAX_DESCRIPTORS:
            raise TooManyRefs
        refs, shared = sending.export(layout)
        descriptors = [function.descriptor] if function.descriptor >= 0 else []
        if own or len(body) + len(refs) > frames.INLINE_MAX_BYTES:
            descriptor, body = store.write([body, *own], holder)
            descriptors.append(descriptor)
            flags |= frames.BODY_IN_SEGMENT
            lent = True
    except ObjectStoreFull:
        raise
    except (OSError, ObjectLost) as error:
        raise Refused([(index, error) for index in range(batch.stop)]) from None
    descriptors += shared
    spare = 0
    if here and batch.timing.result_bytes:
        found = store.spare(batch.timing.result_bytes * batch.stop, holder)
        if found is not None:
            spare = found[0]
            descriptors.append(found[1])
            lent = True
    header = frames.TASKS.pack(flags, batch.mode, 0, function.number, batch.number, batch.stop, len(function.inline),
                               len(refs), spare)
    return Outgoing([header, function.inline, refs, body], descriptors, lent, sending)


def _share(batch: Batch, buffers: list[memoryview],
           sending: Sending) -> tuple[list[bytes | None], list[memoryview]]:
    """Where each buffer of a batch goes: those that other tasks of the job have too become objects, stored once; the
    others go into the batch's own segment."""
    job = batch.job
    layout: list[bytes | None] = [None] * len(buffers)
    if batch.jobs is not None or (len(job.items) <= job.chunk and not job.open):
        return [], buffers
    if job.shared is None:
        job.shared = {}
    own = []
    for index, view in enumerate(buffers):
        ref = None
        if view.nbytes >= SHARE_MIN_BYTES:
            owner = pickling.read_only_owner(view.obj)
            place = getattr(owner, "__array_interface__", None)
            key = (place["data"][0] if place is not None else id(owner), view.nbytes)
            known = job.shared.get(key)
            if known is None:
                if len(job.shared) >= MAX_SHARED:
                    job.shared.clear()
                # The owner is kept, so that no other buffer can come to lie where it lies.
                known = job.shared[key] = [owner, None, 0]
            known[2] += 1
            if known[1] is None and (known[2] > 1 or _comes_again(job, batch.first + batch.stop, owner)):
                known[1] = store_buffer(view)
            ref = known[1]
        if ref is None:
            own.append(view)
        else:
            sending.add(ref)
            layout[index] = ref.key
    return (layout, own) if len(own) < len(buffers) else ([], buffers)


def _comes_again(job: Job, task: int, owner: Any) -> bool:
    """Whether the job's task `task` has `owner`, or a tuple or list that holds it, as its item."""
    items = job.items[task * job.chunk:(task + 1) * job.chunk]
    return any(item is owner or (type(item) in (tuple, list) and any(part is owner for part in item))
               for item in items)


def explain(error: BaseException, item: Any, mode: int) -> BaseException:
    """The error of an item that cannot be pickled, of the same type, with the path to the culprit in its text."""
    if type(error) not in (TypeError, pickle.PicklingError, AttributeError):
        return error
    return type(error)(f"{error} ({_culprit(item, mode)})").with_traceback(error.__traceback__)


def _culprit(item: Any, mode: int) -> str:
    if mode == engine.CALL:
        args, kwargs = item
        for key, value in [*enumerate(args), *kwargs.items()]:
            name = f"args[{key}]" if isinstance(key, int) else str(key)
            try:
                pickling.dumps(value)
            except Exception:
                return pickling.culprit(value, name)
    return pickling.culprit(item, "item")
