"""Segments: sealed memfds that carry large payloads beside the socket, handed over by descriptor, never by name.

Writes and maps them; keeps no list of them: a segment lives as long as a descriptor or a mapping of it does, so a
process that dies takes nothing of it along and leaves nothing behind. Used by both ends of a worker socket.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# Buffers start at multiples of this: a cache line, and what the widest vector instructions like.
ALIGN = 64
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
_PART = struct.Struct("<QQ")


def write(parts: Sequence[memoryview | bytes]) -> tuple[int, bytes]:
    """A new sealed segment that holds `parts`: its descriptor, which the caller owns, and the table to read it by.

    Writing with write() faults pages in at twice the rate of a store into a mapping, and reports a full memory as
    OSError where a store would be a SIGBUS.
    """
    descriptor = os.memfd_create("dpool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        table = []
        offset = 0
        for part in parts:
            view = memoryview(part).cast("B")
            table.append(_PART.pack(offset, view.nbytes))
            written = 0
            while written < view.nbytes:
                written += os.pwrite(descriptor, view[written:], offset + written)
            offset += -(-view.nbytes // ALIGN) * ALIGN
        os.ftruncate(descriptor, max(offset, 1))
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, b"".join(table)


def read(descriptor: int, table: bytes | memoryview) -> list[memoryview]:
    """The parts of a segment, mapped copy-on-write: no copy is made, and what the reader writes is its own.

    The caller still owns the descriptor and may close it at once. The mapping ends with the last view of it.
    """
    size = os.fstat(descriptor).st_size
    mapping = memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY))
    return [mapping[offset:offset + length] for offset, length in _PART.iter_unpack(table)]
