"""Segments: memfds that carry large payloads beside the socket, handed over by descriptor, never by name.

Makes, fills and maps them; keeps no list of them: a segment lives as long as a descriptor or a mapping of it does, so a
process that dies takes nothing of it along and leaves nothing behind. Used by the store, and by both ends of a worker
socket.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import weakref

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Buffers start at multiples of this: a cache line, and what the widest vector instructions like.
ALIGN = 64
# The size is sealed, so no peer can make a reader fault beyond the end. The content is not: a segment is used again.
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PART = struct.Struct("<QQ")
HEAD = struct.Struct("<Q")
# With so many mappings alive, further segments are copied instead of mapped: Python keeps a descriptor for each, and a
# process may have 1,024 unless told otherwise. Larger: fewer copies. Smaller: more descriptors for everything else.
MAX_MAPPED = 256
# Added to the number of a segment of which a forked child may still have the mapping: it must not be used again.
SEEN = 1 << 63

_mapped: set[int] = set()
_forks = 0


class Segment:
    """A descriptor of a memfd of `size` bytes, and a writable mapping of it once it is written a second time.

    close() gives the descriptor back; others that have one, or a mapping, keep the memory.
    """

    __slots__ = ("descriptor", "size", "_map")

    def __init__(self, size: int, descriptor: int = -1) -> None:
        self.size = size
        self._map: mmap.mmap | None = None
        if descriptor < 0:
            try:
                descriptor = os.memfd_create("dpool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            except OSError as error:
                raise (too_many_open() if error.errno == errno.EMFILE else error) from None
            try:
                os.ftruncate(descriptor, size)
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            except BaseException:
                os.close(descriptor)
                raise
        self.descriptor = descriptor

    def write(self, parts: Sequence[memoryview | bytes], warm: bool = False) -> bytes:
        """Store `parts` from the start of the segment; returns the table to read them by.

        Fresh pages are written by write(), which faults them in at twice the rate of a store into a mapping and
        reports a full memory as OSError where a store would be a SIGBUS. Warm pages are written through a mapping that
        is kept: five times faster.
        """
        if warm and self._map is None:
            self._map = mmap.mmap(self.descriptor, self.size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        table = []
        offset = 0
        for part in parts:
            view = memoryview(part).cast("B")
            table.append(_PART.pack(offset, view.nbytes))
            if self._map is not None:
                self._map[offset:offset + view.nbytes] = view
            else:
                written = 0
                while written < view.nbytes:
                    written += os.pwrite(self.descriptor, view[written:], offset + written)
            offset += -(-view.nbytes // ALIGN) * ALIGN
        return b"".join(table)

    def close(self, scrap: bool = False) -> None:
        """Give the descriptor back; `scrap`: and the pages at once, for nobody looks at them. A worker that may have
        written there still has them mapped."""
        if scrap:
            try:
                if self._map is None:
                    self._map = mmap.mmap(self.descriptor, self.size)
                self._map.madvise(mmap.MADV_REMOVE)
            except OSError:
                pass  # no descriptors, or no memory, for that: they go with the last mapping
        if self._map is not None:
            self._map.close()
            self._map = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def too_many_open() -> OSError:
    """That this process may open no more files, and what its limit is."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return OSError(errno.EMFILE, f"too many open files: each large value takes one, and this process may have {limit} "
                                 "(RLIMIT_NOFILE, ulimit -n)")


def needed(parts: Sequence[memoryview | bytes]) -> int:
    """How many bytes of segment `parts` take."""
    return sum(-(-memoryview(part).nbytes // ALIGN) * ALIGN for part in parts)


def write(parts: Sequence[memoryview | bytes]) -> tuple[int, bytes]:
    """A new segment that holds `parts`: its descriptor, which the caller owns, and the table to read it by. It belongs
    to no store: it is not used again."""
    segment = Segment(max(needed(parts), 1))
    try:
        return segment.descriptor, HEAD.pack(0) + segment.write(parts)
    except BaseException:
        segment.close()
        raise


def head(number: int) -> bytes:
    """What goes before a table: the number under which the segment's owner wants to hear that it is seen no more;
    0 for one that nobody asks about."""
    return HEAD.pack(number)


def read(descriptor: int, table: bytes | memoryview, ended: Callable[[int], object] | None = None,
         size: int = 0) -> list[memoryview]:
    """The parts of a segment, mapped copy-on-write: no copy is made, and what the reader writes is its own.

    The caller still owns the descriptor and may close it at once. The mapping ends with the last view of it; then
    `ended` is called with the segment's number, in whichever thread that happens, if the number is not 0; with SEEN
    added if this process was forked meanwhile. `size` is the segment's, where it is known.
    """
    (number,) = HEAD.unpack_from(table)
    parts = list(_PART.iter_unpack(table[HEAD.size:]))
    mapping = _map(descriptor, size) if len(_mapped) < MAX_MAPPED else None
    if mapping is None:
        view = _copy(descriptor, max((offset + length for offset, length in parts), default=0))
        if ended is not None and number:
            ended(number)
    else:
        _mapped.add(id(mapping))
        weakref.finalize(mapping, _unmapped, id(mapping), _forks, ended, number).atexit = False
        view = memoryview(mapping)
    return [view[offset:offset + length] for offset, length in parts]


def parts_of(view: memoryview, table: bytes | memoryview) -> list[memoryview]:
    """The parts of a segment that lies in memory as `view`."""
    return [view[offset:offset + length] for offset, length in _PART.iter_unpack(table[HEAD.size:])]


def _map(descriptor: int, size: int) -> mmap.mmap | None:
    try:
        return mmap.mmap(descriptor, size or os.fstat(descriptor).st_size, access=mmap.ACCESS_COPY)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return None  # there is no descriptor left for it


def _unmapped(mapping: int, forks: int, ended: Callable[[int], object] | None, number: int) -> None:
    _mapped.discard(mapping)
    if ended is not None and number:
        ended(number if forks == _forks else number | SEEN)


def _copy(descriptor: int, nbytes: int) -> memoryview:
    view = private(nbytes)
    done = 0
    while done < nbytes:
        count = os.preadv(descriptor, [view[done:]], done)
        if not count:
            raise ValueError(f"a segment is {done:,} bytes long instead of {nbytes:,}")
        done += count
    return view


def private(nbytes: int) -> memoryview:
    """Memory of this process alone, aligned like a segment."""
    return memoryview(mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[:nbytes]


def _count_fork() -> None:
    global _forks
    _forks += 1


# Before: what is mapped now, the child will see. After: and what was mapped between the two.
os.register_at_fork(before=_count_fork, after_in_parent=_count_fork)


def places(table: bytes | memoryview) -> list[tuple[int, int]]:
    """Where the parts of a table are: (offset, bytes) each. The rest of the segment is not theirs: it may hold what was
    written there before. Raises ValueError if it is no table."""
    try:
        return list(_PART.iter_unpack(table[HEAD.size:]))
    except struct.error as error:
        raise ValueError(f"a table of a segment is none: {error}") from None


def whole(nbytes: int) -> bytes:
    """The table of a segment's first `nbytes` as one part."""
    return _PART.pack(0, nbytes)
