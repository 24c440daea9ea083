"""Decides about memory: which segment serves a value, which object is spilled, which segment is kept or given back.

Every change of the books happens here. It owns no descriptor, mapping, lock or clock: numbers come in, what must be
done comes out. Called by store/store.py, under its lock.
"""

from __future__ import annotations

from dpool.errors import ObjectStoreFull

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable

# A segment this much larger than needed is not dealt out. Larger: more values find a warm one. Smaller: less is wasted.
MAX_WASTE = 2.0
# Warm segments that nobody took for so long go back to the kernel. Longer: a pause does not cost the next burst its
# speed. Shorter: an idle program holds less.
WARM_FOR_S = 10.0
MIN_SEGMENT_BYTES = 64 * 1024

# What a segment is doing.
WRITING = "writing"  # reserved by this process, nobody else knows it
LENT = "lent"  # its descriptor was sent with a batch; `holder` is the batch, later the worker, that may see it
VIEWED = "viewed"  # a value's copy: of a result that arrived here, or of an argument that `holder`, a worker, kept
OBJECT = "object"  # it holds a stored object
WARM = "warm"  # nobody can see it; its pages are kept


def size_class(nbytes: int) -> int:
    """The size of the segment for `nbytes`: the next of four steps per power of two, so that segments are reusable."""
    if nbytes <= MIN_SEGMENT_BYTES:
        return MIN_SEGMENT_BYTES
    step = 1 << max((nbytes - 1).bit_length() - 3, 0)
    return -(-nbytes // step) * step


class Segment:
    """The books of one segment: `size` bytes, what it is doing, for whom, since when."""

    __slots__ = ("number", "size", "state", "holder", "since")

    def __init__(self, number: int, size: int, state: str, now: float) -> None:
        self.number = number
        self.size = size
        self.state = state
        self.holder: Hashable = None
        self.since = now


class Entry:
    """The books of one object: `nbytes` long, in `segment` or, if that is None, on disk."""

    __slots__ = ("key", "nbytes", "segment", "views", "shared", "used")

    def __init__(self, key: bytes, nbytes: int, segment: int, now: float) -> None:
        self.key = key
        self.nbytes = nbytes
        self.segment: int | None = segment
        self.views = 0  # mappings in this process that somebody still looks at
        self.shared = False  # its descriptor was sent to another process, which may still look at it
        self.used = now


class Plan:
    """What to do to have room: write into `segment` (None: make a new one of `size`), after trimming and spilling."""

    __slots__ = ("number", "reuse", "size", "trim", "spill")

    def __init__(self, number: int, reuse: bool, size: int, trim: list[int], spill: list[bytes]) -> None:
        self.number = number
        self.reuse = reuse
        self.size = size
        self.trim = trim
        self.spill = spill


class Ledger:
    """The books of one process: at most `limit` bytes of segments, of which `warm_limit` may be idle.

    Viewed ones do not count: they are what the program itself has made of results and arguments, and no store could
    take them away from it.
    """

    def __init__(self, limit: int, warm_limit: int) -> None:
        self.limit = limit
        self.warm_limit = warm_limit
        self.segments: dict[int, Segment] = {}
        self.entries: dict[bytes, Entry] = {}
        self.total = 0  # bytes of all segments
        self.warm = 0  # bytes of those that are warm
        self.viewed = 0  # bytes of those that are viewed
        self._number = 0

    # -- room

    def reserve(self, nbytes: int, now: float) -> Plan:
        """Room for `nbytes`. The segment counts as taken from here on. Raises ObjectStoreFull with the sizes if not
        even trimming and spilling makes room; the books are as before then."""
        size = size_class(nbytes)
        best = self._take_warm(nbytes)
        if best is not None:
            self._become(best, WRITING)
            best.since = now
            return Plan(best.number, True, best.size, [], [])
        excess = self.total - self.viewed + size - self.limit
        trim: list[int] = []
        spill: list[bytes] = []
        if excess > 0:
            for segment in sorted((s for s in self.segments.values() if s.state == WARM), key=lambda s: s.since):
                if excess <= 0:
                    break
                trim.append(segment.number)
                excess -= segment.size
        if excess > 0:
            idle = [e for e in self.entries.values() if e.segment is not None and not e.views]
            for entry in sorted(idle, key=lambda e: e.used):
                if excess <= 0:
                    break
                spill.append(entry.key)
                assert entry.segment is not None
                excess -= self.segments[entry.segment].size
        if excess > 0:
            raise ObjectStoreFull(
                f"no room for {nbytes:,} bytes: the store holds {self.total - self.viewed:,} of at most "
                f"{self.limit:,} bytes, and {self.total - self.viewed - self.warm:,} of them are in use; raise "
                "object_memory or drop objects", nbytes, self.total - self.viewed, self.limit)
        self._number += 1
        for number in trim:
            self._remove(number)
        self._add(Segment(self._number, size, WRITING, now))
        return Plan(self._number, False, size, trim, spill)

    def adopt(self, size: int, now: float) -> int:
        """The number of a segment that another process made and this one looks at."""
        self._number += 1
        self._add(Segment(self._number, size, VIEWED, now))
        return self._number

    def retire(self, number: int, now: float) -> bool:
        """Nobody can see the segment any more. True: keep it warm; False: it is off the books, give it back."""
        segment = self.segments[number]
        self._become(segment, WRITING)
        if self.warm + segment.size > self.warm_limit or self.total - self.viewed > self.limit:
            self._remove(number)
            return False
        self._become(segment, WARM)
        segment.since = now
        return True

    def discard(self, number: int) -> None:
        """The segment is given back, whoever may still see it: the kernel keeps its pages until they are done."""
        self._remove(number)

    def cool(self, now: float) -> list[int]:
        """Warm segments that nobody took for WARM_FOR_S: off the books, to be given back."""
        cold = [s.number for s in self.segments.values() if s.state == WARM and now - s.since >= WARM_FOR_S]
        for number in cold:
            self._remove(number)
        return cold

    # -- segments that travel with a batch

    def lend(self, number: int, holder: Hashable) -> None:
        """The segment's descriptor goes to whoever `holder` stands for."""
        segment = self.segments[number]
        assert segment.state == WRITING
        self._become(segment, LENT, holder)

    def spare(self, nbytes: int, holder: Hashable) -> int | None:
        """A warm segment for `nbytes` that `holder` may write results into, if there is one."""
        best = self._take_warm(nbytes)
        if best is None:
            return None
        self._become(best, LENT, holder)
        return best.number

    def arrived(self, number: int) -> None:
        """A spare came back with results in it, which this process looks at."""
        segment = self.segments[number]
        assert segment.state == LENT
        self._become(segment, VIEWED)

    def pass_on(self, holder: Hashable, new_holder: Hashable) -> None:
        """What `holder` had is with `new_holder` now: the batch has ended, its worker may still look."""
        for segment in self.segments.values():
            if segment.state == LENT and segment.holder == holder:
                self._become(segment, VIEWED, new_holder)

    def lent_to(self, holder: Hashable) -> list[int]:
        """The segments that `holder` has."""
        return [s.number for s in self.segments.values() if s.state in (LENT, VIEWED) and s.holder == holder]

    # -- objects

    def put(self, key: bytes, number: int, nbytes: int, now: float) -> None:
        """The segment holds object `key` now."""
        segment = self.segments[number]
        assert segment.state == WRITING and key not in self.entries
        self._become(segment, OBJECT)
        self.entries[key] = Entry(key, nbytes, number, now)

    def view(self, key: bytes, change: int, now: float) -> None:
        """Count the mappings of this process up or down."""
        entry = self.entries.get(key)
        if entry is not None:
            entry.views += change
            entry.used = now

    def share(self, key: bytes, now: float) -> None:
        """The object's descriptor goes to another process."""
        entry = self.entries[key]
        entry.shared = True
        entry.used = now

    def forked(self) -> None:
        """A child of this process can see, or find, every object there is."""
        for entry in self.entries.values():
            entry.shared = True

    def free(self, key: bytes, now: float) -> tuple[int | None, bool]:
        """The object has no handle left: its segment, None if it is on disk, and whether that may be kept warm. It may
        not while somebody could still look at it; then it is off the books and must be given back."""
        entry = self.entries.pop(key)
        if entry.segment is None:
            return None, False
        if entry.shared or entry.views:
            self._remove(entry.segment)
            return entry.segment, False
        return entry.segment, self.retire(entry.segment, now)

    def spilled(self, key: bytes) -> int:
        """The object is on disk now; its segment, to be given back."""
        entry = self.entries[key]
        assert entry.segment is not None
        number, entry.segment = entry.segment, None
        self._remove(number)
        return number

    def restored(self, key: bytes, number: int, now: float) -> None:
        """The object is in a segment again."""
        segment = self.segments[number]
        assert segment.state == WRITING
        self._become(segment, OBJECT)
        entry = self.entries[key]
        entry.segment, entry.used, entry.shared, entry.views = number, now, False, 0

    # -- the pieces

    def _take_warm(self, nbytes: int) -> Segment | None:
        """The smallest warm segment that serves for `nbytes`; those that a worker made may be of any size."""
        best: Segment | None = None
        most = size_class(nbytes) * MAX_WASTE
        for segment in self.segments.values():
            if segment.state == WARM and nbytes <= segment.size <= most:
                if best is None or segment.size < best.size:
                    best = segment
        return best

    def _add(self, segment: Segment) -> None:
        self.segments[segment.number] = segment
        self.total += segment.size
        if segment.state == VIEWED:
            self.viewed += segment.size

    def _remove(self, number: int) -> None:
        segment = self.segments[number]
        self._become(segment, WRITING)
        del self.segments[number]
        self.total -= segment.size

    def _become(self, segment: Segment, state: str, holder: Hashable = None) -> None:
        if segment.state == WARM:
            self.warm -= segment.size
        elif segment.state == VIEWED:
            self.viewed -= segment.size
        if state == WARM:
            self.warm += segment.size
        elif state == VIEWED:
            self.viewed += segment.size
        segment.state, segment.holder = state, holder

    def validate(self) -> None:
        """Raise AssertionError unless the books agree. For tests."""
        assert self.total == sum(s.size for s in self.segments.values())
        assert self.warm == sum(s.size for s in self.segments.values() if s.state == WARM)
        assert self.viewed == sum(s.size for s in self.segments.values() if s.state == VIEWED)
        owned = [e.segment for e in self.entries.values() if e.segment is not None]
        assert len(set(owned)) == len(owned), "two objects in one segment"
        assert {s.number for s in self.segments.values() if s.state == OBJECT} == set(owned)
        for entry in self.entries.values():
            assert entry.views >= 0
            assert entry.segment is None or entry.nbytes <= self.segments[entry.segment].size
