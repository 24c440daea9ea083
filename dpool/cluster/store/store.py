"""The store of this process: segments that are used again, objects that were put, and their limit.

Acts on what the ledger decides: makes, maps, spills and closes. One a process, asked by the driver's group, the worker
and dpool.objects; any thread may call it.
"""

from __future__ import annotations

import collections
import os
import threading
import time
import zlib
from multiprocessing import process

from dpool.cluster.store import segments
from dpool.cluster.store.ledger import Ledger
from dpool.cluster.store.segments import Segment
from dpool.errors import ObjectLost, ObjectStoreFull

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from typing import Any

# What of the machine's memory, or of the cgroup's, objects may take unless object_memory says otherwise.
DEFAULT_SHARE = 0.3
# What of object_memory may be segments that are kept warm.
WARM_SHARE = 0.5
# Warm segments are looked through this often while there are any. Longer: they are given back later.
TIDY_EVERY_S = 5.0
# With less than this of the machine's memory available nothing is kept warm.
SHORT_SHARE = 0.05
# First parts up to this size are kept beside the segment, too.
HEAD_BYTES = 4096


class Spill:
    """A file without a name that holds one object; gone with its descriptor, whatever becomes of this process."""

    __slots__ = ("descriptor", "nbytes", "checksum")

    def __init__(self, directory: str, parts: Sequence[memoryview]) -> None:
        """Write `parts`. Raises OSError if the disk is full; nothing is left then."""
        self.nbytes = sum(part.nbytes for part in parts)
        self.descriptor = _nameless(directory)
        self.checksum = 0
        try:
            free = os.fstatvfs(self.descriptor)
            if self.nbytes > free.f_bavail * free.f_frsize:
                raise OSError(28, f"no space for {self.nbytes:,} bytes to spill", directory)
            for part in parts:
                self.checksum = zlib.crc32(part, self.checksum)
                written = 0
                while written < part.nbytes:
                    written += os.write(self.descriptor, part[written:])
        except BaseException:
            self.close()
            raise

    def read(self) -> memoryview:
        """All of it. Raises ObjectLost if it is not what was written."""
        view = segments.private(self.nbytes)
        done = 0
        while done < self.nbytes:
            count = os.preadv(self.descriptor, [view[done:]], done)
            if not count:
                raise ObjectLost(f"a spilled object is {done:,} bytes long instead of {self.nbytes:,}")
            done += count
        if zlib.crc32(view) != self.checksum:
            raise ObjectLost("a spilled object is not what was written: its checksum differs")
        return view

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _nameless(directory: str) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(directory, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if not os.path.isdir(directory) or not os.access(directory, os.W_OK):
            raise OSError(error.errno, f"cannot spill objects: {error.strerror}; set spill_dir", directory) from None
    import tempfile

    descriptor, path = tempfile.mkstemp(dir=directory)  # a file system without O_TMPFILE
    os.unlink(path)
    return descriptor


class Stored:
    """One object: where its bytes are. `table` reads them from the segment; `inner` keeps alive the objects that the
    value refers to."""

    __slots__ = ("key", "nbytes", "table", "segment", "number", "spill", "inner", "owned", "refs",
                 "origin", "inherited", "head")

    def __init__(self, key: bytes, nbytes: int, table: bytes, segment: Segment | None, number: int,
                 inner: Sequence[Any], owned: bool) -> None:
        self.key = key
        self.nbytes = nbytes
        self.table = table
        self.segment = segment
        self.number = number
        self.spill: Spill | None = None
        self.inner = inner
        self.owned = owned  # it counts against this process's limit and may be spilled
        self.refs = 0  # handles in this process
        # Of an object that was here when this process was forked: where the parent has it (pid, descriptor, inode).
        self.origin: tuple[int, int, int] | None = None
        self.head: bytes | None = None  # the first part, if it is small: reading it where it lies costs a page fault
        self.inherited = 0  # handles among `refs` that this process has from its parent: they hold nothing


class _Afterwards:
    """Behind a block that has held the lock, the notes that others left meanwhile are seen to.

    The lock itself is taken and let go by the `with` statement alone: a Ctrl-C cannot come between.
    """

    __slots__ = ("_store",)

    def __init__(self, store: Store) -> None:
        self._store = store

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._store._notes:
            self._store._heed()


class Store:
    """See the top of the file. `limit` and `spill_dir` may be changed while it is in use."""

    def __init__(self, limit: int, spill_dir: str) -> None:
        # Guards all that follows. Finalizers never take it: they may run in a thread that holds it, so they leave a
        # note in _notes, which whoever has the lock works off.
        self._lock: Any = threading.RLock()  # for it can say whose it is
        self._after = _Afterwards(self)
        self._notes: collections.deque[Callable[[], None]] = collections.deque()
        self.ledger = Ledger(limit, 0)  # nothing is kept warm before there is a use for it
        self.spill_dir = spill_dir
        self._groups = 0
        self._tidier: threading.Thread | None = None
        self._segments: dict[int, Segment] = {}
        self.objects: dict[bytes, Stored] = {}

    def configure(self, limit: int | None = None, spill_dir: str | None = None) -> None:
        """Change the limit, in bytes, or the directory. What is already held stays."""
        with self._after, self._lock:
            if limit is not None:
                self.ledger.limit = limit
                self._set_warm_limit()
            if spill_dir is not None:
                self.spill_dir = spill_dir

    def attach(self) -> None:
        """A worker group begins to use this store: segments are kept warm from now on."""
        with self._after, self._lock:
            self._groups += 1
            self._set_warm_limit()

    def detach(self) -> None:
        """A worker group has ended; with the last one all warm segments go back to the kernel."""
        with self._after, self._lock:
            self._work_off()
            self._groups -= 1
            if not self._groups:
                self._give_back(self.ledger.cool(float("inf")))
            self._set_warm_limit()

    def _keep_warm_alone(self) -> None:
        """Keep segments warm without a group, too, for a program that puts one object after the other; a thread gives
        them back when it pauses. Not in workers: what they put is sent away."""
        if self._tidier is None and process.parent_process() is None:
            tidier = threading.Thread(target=self._tidy_alone, name="dpool-store", daemon=True)
            try:
                tidier.start()
            except RuntimeError:  # the interpreter is ending, or may have no more threads
                return
            self._tidier = tidier
            self._set_warm_limit()

    def _tidy_alone(self) -> None:
        while True:
            time.sleep(TIDY_EVERY_S)
            self.tidy()
            with self._after, self._lock:
                if not self.ledger.warm or self._groups:
                    self._tidier = None
                    self._set_warm_limit()
                    return

    def _set_warm_limit(self) -> None:
        limit = int(self.ledger.limit * WARM_SHARE) if self._groups or self._tidier is not None else 0
        if self.ledger.warm > limit:
            self._give_back(self.ledger.cool(float("inf")))
        self.ledger.warm_limit = limit

    # -- segments that travel with a batch

    def write(self, parts: Sequence[memoryview | bytes], holder: Hashable) -> tuple[int, bytes]:
        """Put `parts` into a segment for `holder`: its descriptor, which stays the store's, and the table.

        Raises ObjectStoreFull, or the OSError of a machine without memory.
        """
        with self._after, self._lock:
            self._work_off()
            number, segment, warm = self._room(segments.needed(parts))
            self.ledger.lend(number, holder)
        try:
            return segment.descriptor, segments.head(number) + segment.write(parts, warm)
        except BaseException:
            with self._after, self._lock:
                self._forsake(number)
            raise

    def pass_on(self, holder: Hashable, new_holder: Hashable) -> None:
        """A batch has ended; what it was sent may still be looked at by the worker that ran it."""
        with self._after, self._lock:
            self.ledger.pass_on(holder, new_holder)

    def released(self, numbers: Sequence[int]) -> None:
        """Nobody looks at these segments any more: they may be used again."""
        with self._after, self._lock:
            for number in numbers:
                self._seen_no_more(number)
            self._work_off()

    def unsent(self, holder: Hashable) -> None:
        """What `holder` was to get was never sent."""
        with self._after, self._lock:
            for number in self.ledger.lent_to(holder):
                self._retire(number)

    def lost(self, holder: Hashable) -> None:
        """Nobody knows who looks at what `holder` had: give it back; the kernel keeps it for those who do."""
        with self._after, self._lock:
            for number in self.ledger.lent_to(holder):
                self._forsake(number)

    def adopt(self, descriptor: int, table: bytes | memoryview) -> list[memoryview]:
        """Map a segment that another process made for this one, and take its descriptor over: once the last view has
        died, the segment is used again."""
        size = os.fstat(descriptor).st_size
        with self._after, self._lock:
            self._work_off()
            number = self.ledger.adopt(size, time.monotonic())
            self._segments[number] = Segment(size, descriptor)
        return self._look_at(number, descriptor, segments.head(number) + bytes(table[8:]))

    def spare(self, nbytes: int, holder: Hashable) -> tuple[int, int] | None:
        """A warm segment for `holder` to write results of `nbytes` into, if there is one: its number, and its
        descriptor, which stays the store's."""
        with self._after, self._lock:
            self._work_off()
            number = self.ledger.spare(nbytes, holder)
            return None if number is None else (number, self._segments[number].descriptor)

    def arrived(self, table: bytes | memoryview) -> list[memoryview]:
        """Map a spare that came back with results in it. Once the last view has died it is used again."""
        (number,) = segments.HEAD.unpack_from(table)
        with self._after, self._lock:
            self.ledger.arrived(number)
            descriptor = self._segments[number].descriptor
        return self._look_at(number, descriptor, table)

    def _look_at(self, number: int, descriptor: int, table: bytes | memoryview) -> list[memoryview]:
        try:
            return segments.read(descriptor, table, self._note_end)
        except BaseException:
            self._note_end(number)
            raise

    def _note_end(self, number: int) -> None:
        self._note(lambda: self._seen_no_more(number))

    def _seen_no_more(self, number: int) -> None:
        if number & segments.SEEN:  # but by a forked child, perhaps
            self._forsake(number & ~segments.SEEN)
        elif number in self._segments:
            self._retire(number)

    def _forsake(self, number: int) -> None:
        """Give a segment back at which somebody may look: the kernel keeps it for them."""
        if number in self._segments:
            self.ledger.discard(number)
            self._segments.pop(number).close()

    # -- objects

    def put(self, key: bytes, parts: Sequence[memoryview | bytes], inner: Sequence[Any]) -> Stored:
        """Store `parts` as object `key`, which lives while it has handles: see hold().

        Raises ObjectStoreFull or OSError.
        """
        nbytes = segments.needed(parts)
        with self._after, self._lock:
            self._work_off()
            number, segment, warm = self._room(nbytes)
            try:
                table = segments.head(0) + segment.write(parts, warm)
            except BaseException:
                self._forsake(number)
                raise
            self.ledger.put(key, number, nbytes, time.monotonic())
            stored = self.objects[key] = Stored(key, nbytes, table, segment, number, inner, True)
            if type(parts[0]) is bytes and len(parts[0]) <= HEAD_BYTES:
                stored.head = parts[0]
            if not self._groups:
                self._keep_warm_alone()
        return stored

    def take_over(self, key: bytes, nbytes: int, table: bytes, descriptor: int) -> Stored:
        """One handle for an object of another process's store, whose descriptor came with a message. It counts there.
        """
        with self._after, self._lock:
            self._work_off()
            stored = self.objects.get(key)
            if stored is None:
                stored = self.objects[key] = Stored(key, nbytes, table, None, 0, (), False)
            if stored.segment is None and stored.spill is None:
                stored.segment = Segment(os.fstat(descriptor).st_size, descriptor)
            else:
                os.close(descriptor)
            stored.refs += 1
        return stored

    def hold(self, key: bytes) -> Stored:
        """One handle more for an object. Raises ObjectLost if this process has none of it."""
        with self._after, self._lock:
            stored = self.objects.get(key)
            if stored is None:
                raise ObjectLost(f"object {key.hex()} is not in this process's store")
            stored.refs += 1
            return stored

    def open(self, stored: Stored) -> list[memoryview]:
        """Map an object copy-on-write, from disk if need be: the parts that were put."""
        with self._after, self._lock:
            self._work_off()
            try:
                segment = self._present(stored)
            except ObjectStoreFull:
                if stored.spill is None:
                    raise
                # The value is the program's own memory then, as a copy of it would be.
                return segments.parts_of(stored.spill.read(), stored.table)
            if not stored.owned:
                parts = segments.read(segment.descriptor, stored.table)
                self._let_go(stored)
                return parts
            key = stored.key
            table = segments.head(1) + stored.table[8:]
            self.ledger.view(key, 1, time.monotonic())
            try:
                return segments.read(segment.descriptor, table, lambda _: self._note_view(key), segment.size)
            except BaseException:
                self.ledger.view(key, -1, time.monotonic())
                raise

    def _note_view(self, key: bytes) -> None:
        self._note(lambda: self.ledger.view(key, -1, time.monotonic()))

    def note_fork(self) -> None:
        """A child may look at every object from now on."""
        self._note(self.ledger.forked)

    def share(self, stored: Stored) -> int:
        """A descriptor of the object to send to another process, for the caller to close: the store may spill it
        meanwhile."""
        with self._after, self._lock:
            segment = self._present(stored)
            if stored.owned:
                self.ledger.share(stored.key, time.monotonic())
            try:
                descriptor = os.dup(segment.descriptor)
            except OSError:
                if not self.ledger.warm:
                    raise segments.too_many_open() from None
                self._give_back(self.ledger.cool(float("inf")))
                descriptor = os.dup(segment.descriptor)
            self._let_go(stored)
            return descriptor

    def drop(self, key: bytes) -> None:
        """One handle less; with the last one the object goes. Safe in a finalizer."""
        self._note(lambda: self._drop(key))

    def _drop(self, key: bytes) -> None:
        stored = self.objects.get(key)
        if stored is not None:
            stored.refs -= 1
            if stored.refs <= 0:
                self._free(key)
            else:
                self._let_go(stored)

    def _let_go(self, stored: Stored) -> None:
        """A forked child holds no descriptor for the handles it inherited: nobody ever drops them, and its parent's
        memory would stay."""
        if stored.origin is not None and stored.segment is not None and stored.refs <= stored.inherited:
            stored.segment.close()
            stored.segment = None

    def _free(self, key: bytes) -> None:
        stored = self.objects.pop(key)
        if stored.spill is not None:
            stored.spill.close()
        if not stored.owned:
            if stored.segment is not None:
                stored.segment.close()
        else:
            number, warm = self.ledger.free(key, time.monotonic())
            if number is not None and not warm:
                self._segments.pop(number).close()

    def _present(self, stored: Stored) -> Segment:
        """The object's segment, restored from disk if it was spilled."""
        if stored.segment is None and stored.origin is not None:
            stored.segment = _reopen(stored)
        if stored.segment is None:
            assert stored.spill is not None
            number, segment, warm = self._room(stored.nbytes)
            try:
                # As it lay: the table holds for the same offsets.
                segment.write([stored.spill.read()], warm)
            except BaseException:
                self._forsake(number)
                raise
            if stored.owned:
                self.ledger.restored(stored.key, number, time.monotonic())
            else:  # spilled by the process this one was forked from
                self.ledger.discard(number)
                self._segments.pop(number)
            stored.segment, stored.number = segment, number
            stored.spill.close()
            stored.spill = None
        return stored.segment

    # -- the pieces, called with the lock held

    def _room(self, nbytes: int) -> tuple[int, Segment, bool]:
        plan = self.ledger.reserve(nbytes, time.monotonic())
        try:
            for key in plan.spill:
                self._spill(self.objects[key])
        except OSError as error:
            self._undo(plan)
            raise ObjectStoreFull(f"no room for {nbytes:,} bytes, and no object can be spilled to make room: {error}",
                                  nbytes, self.ledger.total, self.ledger.limit) from error
        self._give_back(plan.trim)
        if not plan.reuse:
            try:
                self._segments[plan.number] = self._make(plan.size)
            except BaseException:
                self.ledger.discard(plan.number)
                raise
        return plan.number, self._segments[plan.number], plan.reuse

    def _make(self, size: int) -> Segment:
        try:
            return Segment(size)
        except OSError:  # too many descriptors, or no memory: what is kept warm has some of both
            if not self.ledger.warm:
                raise
            self._give_back(self.ledger.cool(float("inf")))
            return Segment(size)

    def _undo(self, plan: Any) -> None:
        self._give_back(plan.trim)
        if plan.reuse:
            self._retire(plan.number)
        else:
            self.ledger.discard(plan.number)

    def _spill(self, stored: Stored) -> None:
        assert stored.segment is not None
        whole = segments.read(stored.segment.descriptor, segments.head(0) + segments.whole(stored.nbytes))
        stored.spill = Spill(self.spill_dir, whole)
        self._segments.pop(self.ledger.spilled(stored.key)).close()
        stored.segment = None

    def _retire(self, number: int) -> None:
        if not self.ledger.retire(number, time.monotonic()):
            self._segments.pop(number).close(scrap=True)

    def _give_back(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._segments.pop(number).close(scrap=True)

    def _note(self, note: Callable[[], None]) -> None:
        self._notes.append(note)
        self._heed()

    def _heed(self) -> None:
        """Work off the notes, unless somebody has the lock, who will look again after letting go of it."""
        lock = self._lock
        if lock._is_owned():  # by what this thread was about when it came here
            return
        try:
            while self._notes and lock.acquire(blocking=False):
                self._work_off()
                lock.release()
        finally:
            if lock._is_owned():  # something was raised: by a note, or by a Ctrl-C anywhere here
                lock.release()

    def _work_off(self) -> None:
        while self._notes:
            self._notes.popleft()()

    @property
    def warm(self) -> int:
        """Bytes of segments that are kept for the next use."""
        return self.ledger.warm

    def tidy(self) -> None:
        """Give warm segments back that nobody took for a while; all of them when the machine is short of memory."""
        with self._after, self._lock:
            self._work_off()
            self._give_back(self.ledger.cool(float("inf") if _memory_is_short() else time.monotonic()))

    def summary(self) -> dict[str, Any]:
        """What is held, in bytes: see dpool.memory_summary()."""
        with self._after, self._lock:
            self._work_off()
            states: dict[str, int] = {}
            for books in self.ledger.segments.values():
                states[books.state] = states.get(books.state, 0) + books.size
            objects = []
            for stored in self.objects.values():
                entry = self.ledger.entries.get(stored.key)
                where = "disk" if stored.segment is None else "memory" if stored.owned else "borrowed"
                objects.append({"id": stored.key.hex(), "nbytes": stored.nbytes, "where": where,
                                "views": entry.views if entry else 0, "shared": entry.shared if entry else True,
                                "inner": len(stored.inner)})
            return {"limit": self.ledger.limit, "total": self.ledger.total, "warm": self.ledger.warm,
                    "by_state": states, "spill_dir": self.spill_dir,
                    "spilled": sum(s.nbytes for s in self.objects.values() if s.spill is not None),
                    "objects": objects}


_store: Store | None = None
_making = threading.Lock()


def current() -> Store:
    """The store of this process, made when it is first asked for."""
    global _store
    if _store is None:
        with _making:
            if _store is None:
                limit = int(os.environ.get("DPOOL_OBJECT_MEMORY", 0)) or int(memory_bytes() * DEFAULT_SHARE)
                _store = Store(limit, os.environ.get("DPOOL_SPILL_DIR") or os.environ.get("TMPDIR") or "/tmp")
    return _store


def memory_bytes() -> int:
    """The machine's memory, or what the cgroup allows of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                total = min(total, int(file.read()))
        except (OSError, ValueError):
            continue
    return total


def _memory_is_short() -> bool:
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        available, total = (int(fields[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        return False
    return available < total * SHORT_SHARE


def _reopen(stored: Stored) -> Segment:
    """The segment of an object that the process has which this one was forked from."""
    assert stored.origin is not None
    pid, descriptor, inode = stored.origin
    try:
        mine = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        mine = -1
    if mine >= 0:
        found = os.fstat(mine)
        if found.st_ino == inode:
            return Segment(found.st_size, mine)
        os.close(mine)
    raise ObjectLost(f"object {stored.key.hex()} is no longer in process {pid}, from which this one was forked: "
                     "pass refs to tasks as arguments")


def _forking() -> None:
    if _store is not None:
        _store.note_fork()


def _forget() -> None:
    """In a forked child: segments are the parent's. Objects stay readable by the refs that the child inherited, but
    hold no descriptor here: a pool's workers must not keep what their parent drops."""
    global _store, _making
    old, _store = _store, None
    _making = threading.Lock()
    if old is None:
        return
    _store = Store(old.ledger.limit, old.spill_dir)
    parent = os.getppid()
    for stored in old.objects.values():
        if stored.segment is not None:
            stored.origin = (parent, stored.segment.descriptor, os.fstat(stored.segment.descriptor).st_ino)
            if not stored.owned:
                stored.segment.close()
            stored.segment = None
        stored.owned = False
        stored.inherited = stored.refs
        _store.objects[stored.key] = stored
    for segment in old._segments.values():
        segment.close()


# Twice in the parent: for what is there before the fork, and for what came between.
os.register_at_fork(before=_forking, after_in_parent=_forking, after_in_child=_forget)
