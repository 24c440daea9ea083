"""The layout of the messages between a driver or node and its workers: fixed headers, then opaque bytes.

Packs and unpacks; never sends, never pickles. A forwarder needs no more than the header. Used by both ends of a
worker socket; both ends are always the same version of dpool, so there is no version field.
"""

from __future__ import annotations

import struct

# A message up to this size goes through the socket; what is larger goes through a segment. Larger: fewer segments.
# Smaller: more messages fit into the socket buffer, whose default is 208 KiB for all in flight.
INLINE_MAX_BYTES = 32 * 1024

# What both ends allocate to receive into: an inline body, an inline function, and the headers.
RECEIVE_BYTES = 4 * INLINE_MAX_BYTES

# TASKS: flags, mode, unused, function number, batch number, tasks, bytes of function, bytes of refs. Then the function,
# the refs, and the body.
TASKS = struct.Struct("<BBHIQIII")
# RESULTS: flags, unused, slot, batch number, first task, tasks here, tasks run so far, run time in ns, bytes of
# failures, bytes of refs, bytes of released segments' numbers. Then the failures, the refs, the released, and the body.
RESULTS = struct.Struct("<BBHQIIIQIII")

# Descriptors come in this order: the function's segment, the body's, those of the refs. The kernel takes 253 a message.
MAX_DESCRIPTORS = 240

# Flags of both.
BODY_IN_SEGMENT = 1  # the last descriptor is a segment; the body is its table
ONE_PICKLE = 2  # the values are one pickle of a list; else a pickle of a list of pickles
# Flags of TASKS.
FUNCTION_IN_SEGMENT = 4  # the first descriptor is the function's segment
KEEP_FUNCTION = 8  # more batches of this function will follow; else forget it after this one
BY_NAME = 16  # the function's pickle names it and gives its digest
# Flags of RESULTS.
DONE = 32  # the worker has left the batch; what it did not run, it never will
NEED_VALUE = 64  # the worker has no such function by name; none of the tasks was begun
BROKEN = 128  # the initializer failed; the worker ends. The body is its failure
