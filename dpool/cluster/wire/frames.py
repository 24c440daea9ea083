"""The layout of the messages between a driver or node and its workers: fixed headers, then opaque bytes.

Packs and unpacks; never sends, never pickles. A forwarder needs no more than the header. Used by both ends of a
worker socket; both ends are always the same version of dpool, so there is no version field.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# A message up to this size goes through the socket; what is larger goes through a segment. Larger: fewer segments.
# Smaller: more messages fit into the socket buffer, whose default is 208 KiB for all in flight.
INLINE_MAX_BYTES = 64 * 1024

# The same for calls to what is lent (lent.py), and their answers, on the socket of a worker and between machines.
INLINE_CALL_BYTES = 32 * 1024

# What both ends allocate to receive into: an inline body, an inline function, and the headers.
RECEIVE_BYTES = 4 * INLINE_MAX_BYTES

# TASKS: flags, mode, unused, function number, batch number, tasks, bytes of function, bytes of refs, number of the
# spare segment or 0. Then the function, the refs, and the body.
TASKS = struct.Struct("<BBHIQIIIQ")
# RESULTS: flags, unused, slot, batch number, first task, tasks here, tasks run so far, run time in ns, bytes of
# failures, bytes of refs, bytes of released segments' numbers. Then the failures, the refs, the released, and the body.
RESULTS = struct.Struct("<BBHQIIIQIII")

# Descriptors come in this order: the function's segment, the body's, those of the refs, the spare. The kernel takes 253
# a message.
MAX_DESCRIPTORS = 240

# Flags of both.
BODY_IN_SEGMENT = 1  # the last descriptor is a segment; the body is its table
ONE_PICKLE = 2  # the values are one pickle of a list; else a pickle of a list of pickles
# Flags of TASKS.
FUNCTION_IN_SEGMENT = 4  # the first descriptor is the function's segment
KEEP_FUNCTION = 8  # more batches of this function will follow; else forget it after this one
BY_NAME = 16  # the function's pickle names it and gives its digest
FUNCTION_ANEW = 32  # a task may change what the function holds: each task has one of its own
# Flags of RESULTS.
BODY_IN_SPARE = 4  # the body is the table of the segment that came as a spare
DONE = 32  # the worker has left the batch; what it did not run, it never will
NEED_VALUE = 64  # the worker has no such function by name; none of the tasks was begun
BROKEN = 128  # the initializer failed; the worker ends. The body is its failure

# The refs of a message: so many objects, so many places of its buffers. Then each object: its key, its size, the bytes
# of its table, how many objects it refers to; then the table and their keys. Then each place: whether the buffer is an
# object, and the object's key.
_REFS = struct.Struct("<II")
_OBJECT = struct.Struct("<16sQII")
_PLACE = struct.Struct("<?16s")
KEY_BYTES = 16
_NO_KEY = bytes(KEY_BYTES)

# An object on its way: key, size, table, keys of the objects that it refers to.
Entry = tuple[bytes, int, bytes, list[bytes]]


def pack_refs(entries: Sequence[Entry], layout: Sequence[bytes | None]) -> bytes:
    """The refs of a message; `layout` says of each of its buffers which object holds it, None for its own segment."""
    out = [_REFS.pack(len(entries), len(layout))]
    for key, nbytes, table, inner in entries:
        out += (_OBJECT.pack(key, nbytes, len(table), len(inner)), table, *inner)
    out += (_PLACE.pack(key is not None, key or _NO_KEY) for key in layout)
    return b"".join(out)


def unpack_refs(data: bytes | memoryview) -> tuple[list[Entry], list[bytes | None]]:
    """What pack_refs() was given. Raises ValueError if it is something else."""
    try:
        objects, places = _REFS.unpack_from(data)
        at = _REFS.size
        entries: list[Entry] = []
        for _ in range(objects):
            key, nbytes, table_bytes, count = _OBJECT.unpack_from(data, at)
            inner_at = at + _OBJECT.size + table_bytes
            table = bytes(data[at + _OBJECT.size:inner_at])
            at = inner_at + count * KEY_BYTES
            if at > len(data):
                break
            entries.append((key, nbytes, table, [bytes(data[i:i + KEY_BYTES])
                                                 for i in range(inner_at, at, KEY_BYTES)]))
        if at + places * _PLACE.size != len(data):
            raise ValueError("the refs of a message are longer or shorter than they say")
        layout = [key if held else None for held, key in _PLACE.iter_unpack(data[at:])]
    except struct.error as error:
        raise ValueError(f"the refs of a message are none: {error}") from None
    return entries, layout
