"""Owns the tests of the object store under faults: processes that are killed; memory, disks and descriptors that end.

Memory is measured from outside: what the segments take that any process has open or mapped. Run by pytest.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.pool import MaybeEncodingError  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

import object_tasks as tasks
import pytest
from leftovers import GONE_S, MARK, PATIENCE_S, Watched, children, marked, new_mark
from object_tasks import MB

import dpool
from dpool.cluster.store import store
from dpool.errors import WorkerDied
from dpool.multiprocessing.pool import Pool

np = pytest.importorskip("numpy")
HERE = Path(__file__).resolve().parent


def large(number: int = 1, nbytes: int = 8 * MB) -> Any:
    return np.full(nbytes, number, "u1")


def own_memory() -> int:
    """Of this process, without what it keeps warm because a group of another test's is still there."""
    here = store.current()
    with here._lock:
        here._give_back(here.ledger.cool(float("inf")))
    return tasks.memory_of([os.getpid()])


def memory() -> int:
    gc.collect()  # an exception and the result that raised it refer to each other
    return tasks.memory_of(children() | {os.getpid()})


@pytest.fixture
def pool() -> Iterator[Pool]:
    """One worker, and no memory in use before and after."""
    before = own_memory()
    with Pool(1, context=get_context("fork")) as pool:
        yield pool
        pool.close()
        pool.join()
    del pool
    assert dpool.memory_summary()["objects"] == []
    assert own_memory() <= before


# -- killed


def test_a_reader_is_killed_while_it_has_values_mapped(pool: Pool) -> None:
    pool.apply(tasks.total, (large(),))
    before = memory()
    ref = dpool.put(large(2, 16 * MB))
    for value in (large(1, 32 * MB), ref, [ref]):
        with pytest.raises(WorkerDied):
            pool.apply_async(tasks.keep_and_die, (value,)).get(PATIENCE_S)
    del value
    assert pool.apply(tasks.total, (ref,)) == 32 * MB  # the object is whole
    del ref
    assert pool.apply(tasks.kept_total) == 0  # another worker
    assert memory() <= before


def test_a_reader_is_killed_while_others_read_the_same() -> None:
    with Pool(2, context=get_context("fork")) as pool:
        value = large(1, 16 * MB)
        results = [pool.apply_async(tasks.total, (value,)) for _ in range(5)]
        mapped = pool.map_async(tasks.total, [value] * 20, 1)
        death = pool.apply_async(tasks.keep_and_die, (value,))
        with pytest.raises(WorkerDied):
            death.get(PATIENCE_S)
        assert mapped.get(PATIENCE_S) == [16 * MB] * 20
        assert [result.get(PATIENCE_S) for result in results] == [16 * MB] * 5


def test_a_writer_is_killed_while_it_writes_a_result(pool: Pool, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    for _ in range(2):  # the second time its result would go into warm memory
        pool.apply(tasks.make_array, (8 * MB,))
    before = memory()
    # In the middle of the copy the array's pages are no longer there: written by the kernel that is an error, written
    # by the worker it is a SIGBUS.
    for _ in range(2):
        with pytest.raises((WorkerDied, MaybeEncodingError)):
            pool.apply_async(tasks.vanishing, (path, 8 * MB)).get(PATIENCE_S)
        assert int(pool.apply(tasks.make_array, (8 * MB, 3))[-1]) == 3
    assert memory() <= before + 16 * MB


PROGRAM = """
import os, sys
sys.path.insert(0, {here!r})
import numpy as np
import object_tasks as tasks
import dpool
from dpool.multiprocessing.pool import Pool
MB = tasks.MB
if __name__ == "__main__":
    {body}
"""


def program(tmp_path: Path, body: str) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(here=str(HERE), body="\n    ".join(body.splitlines())))
    return [sys.executable, str(path)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}", **more}


def test_a_driver_is_killed(tmp_path: Path) -> None:
    mark, fifo = new_mark(), str(tmp_path / "fifo")
    os.mkfifo(fifo)
    driver = subprocess.Popen(program(tmp_path, f"""
ref = dpool.put(np.full(32 * MB, 1, "u1"))
spilled = dpool.put(np.full(32 * MB, 1, "u1"))
pool = Pool(2)
result = pool.apply(tasks.make_array, (16 * MB,))
pool.apply(tasks.tell_and_block, ({fifo!r}, ref, np.full(16 * MB, 1, "u1")))
"""), env=environment(**{MARK: mark}))
    try:
        with open(fifo) as file:
            assert file.readline()
        ours = marked(mark)
        seen = tasks.segments_of(ours)
        assert sum(seen.values()) >= 90 * MB
        watched = Watched(ours)
        driver.send_signal(signal.SIGKILL)
        driver.wait(PATIENCE_S)
        assert watched.left_after(GONE_S) == []
        assert not seen.keys() & tasks.segments_of(int(name) for name in os.listdir("/proc") if name.isdigit()).keys()
    finally:
        driver.kill()
        driver.wait()


def test_refs_that_are_left_at_the_end_say_nothing(tmp_path: Path) -> None:
    done = subprocess.run(program(tmp_path, """
ref, small, array = dpool.put(np.ones(MB)), dpool.put(1), dpool.get(dpool.put(np.ones(MB)))
tasks.kept = [ref, array]
pool = Pool(1)
tasks.more = pool.apply(tasks.put_array, (MB, 1))
print("end")
"""), env=environment(), capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


# -- what ends


def run(tmp_path: Path, body: str, before: str = "", **more: str) -> str:
    """Run a program to its end, in file systems of its own if `before` is to mount some; its output."""
    command = program(tmp_path, body)
    if before:
        if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
            pytest.skip("no file systems of one's own here")
        command = ["unshare", "-m", "sh", "-c", before + ' && exec "$@"', "sh", *command]
    done = subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_row_29_dev_shm_is_tiny(tmp_path: Path, method: str) -> None:
    assert run(tmp_path, f"""
import multiprocessing
with Pool(2, context=multiprocessing.get_context({method!r})) as pool:
    print(pool.map(tasks.total, [np.full(32 * MB, n, "u1") for n in range(4)]) == [n * 32 * MB for n in range(4)])
    print(pool.apply(tasks.total, (dpool.put(np.full(32 * MB, 1, "u1")),)) == 32 * MB)
    print(sum(len(array) for array in pool.map(tasks.make_array, [32 * MB] * 4, 1)) == 128 * MB)
""", "mount -t tmpfs -o size=64k tmpfs /dev/shm") == "True\n" * 3


def test_row_30_memory_for_objects_ends(tmp_path: Path) -> None:
    assert run(tmp_path, """
refs = [dpool.put(np.full(16 * MB - 4096, n, "u1")) for n in range(10)]
summary = dpool.memory_summary()
print(summary["limit"] == 64 * MB, summary["total"] <= 64 * MB, summary["spilled"] >= 6 * 15 * MB)
with Pool(2) as pool:
    print(pool.map(tasks.last, refs, 1), pool.apply(tasks.kinds, refs) == ["ndarray"] * 10)
    print(pool.map(tasks.last, [np.full(16 * MB, n, "u1") for n in range(10)], 1))
    try:
        pool.apply(tasks.last, (np.full(100 * MB, 1, "u1"),))
    except dpool.ObjectStoreFull as full:
        print(full.needed >= 100 * MB, full.limit == 64 * MB, "104,857," in str(full), "67,108,864" in str(full))
    print(pool.apply(tasks.last, (refs[0],)))
""", DPOOL_OBJECT_MEMORY=str(64 * MB), DPOOL_SPILL_DIR=str(tmp_path)) == (
        "True True True\n"
        f"{list(range(10))} True\n"
        f"{list(range(10))}\n"
        "True True True True\n"
        "0\n")


def test_row_31_the_disk_is_full_while_spilling(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    assert run(tmp_path, f"""
refs = []
try:
    while True:
        refs.append(dpool.put(np.full(3 * MB, len(refs), "u1")))
except dpool.ObjectStoreFull as full:
    print("spill" in str(full), "no space" in str(full), full.limit == 16 * MB)
count = len(refs)
print(4 <= count < 8)
print([int(dpool.get(ref)[-1]) for ref in refs] == list(range(count)))
free = os.statvfs({str(disk)!r}).f_bavail
del refs
print(os.statvfs({str(disk)!r}).f_bavail > free, os.listdir({str(disk)!r}))
with Pool(1) as pool:
    print(pool.apply(tasks.last, (dpool.put(np.full(3 * MB, 7, "u1")),)))
""", f"mount -t tmpfs -o size=8m tmpfs {disk}", DPOOL_OBJECT_MEMORY=str(16 * MB), DPOOL_SPILL_DIR=str(disk)) == (
        "True True True\nTrue\nTrue\nTrue []\n7\n")


# Row 32, a spill file that was changed or cut, is in test_objects.py.


FEW = """
import multiprocessing.pool
import resource
def limit(count):
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
"""


def test_row_33_descriptors_end_while_objects_are_put(tmp_path: Path) -> None:
    assert run(tmp_path, FEW + """
with Pool(1) as pool:
    limit(64)
    refs = []
    try:
        while True:
            refs.append(dpool.put(np.full(MB, len(refs), "u1")))
    except OSError as error:
        print(error.errno == 24, "64 (RLIMIT_NOFILE" in str(error))
    print(pool.apply(tasks.last, ([1, 2, 3],)), len(refs) > 10)
    while len(refs) > 10:
        refs.pop()
    print([int(array[-1]) for array in dpool.get(refs)] == list(range(10)))
    print(pool.map(tasks.last, refs) == list(range(10)))
""") == "True True\n3 True\nTrue\nTrue\n"


def test_row_33_descriptors_end_while_results_come(tmp_path: Path) -> None:
    assert run(tmp_path, FEW + """
with Pool(1) as pool:
    limit(64)
    kept = []
    try:
        while len(kept) < 200:
            kept.append(pool.apply(tasks.make_array, (MB, len(kept))))
    except Exception as error:
        print(type(error).__name__, error)
    print(10 < len(kept), [int(array[-1]) for array in kept] == list(range(len(kept))))
    kept.clear()
    print(int(pool.apply(tasks.make_array, (MB, 5))[-1]), pool.apply(tasks.last, ([1],)))
""").splitlines()[-2:] == ["True True", "5 1"]


def test_row_33_descriptors_end_in_a_worker(tmp_path: Path) -> None:
    assert run(tmp_path, FEW + """
with Pool(1, initializer=limit, initargs=(40,)) as pool:
    refs = [dpool.put(np.full(MB, n, "u1")) for n in range(100)]
    try:
        pool.apply(tasks.total_of_refs, (refs,))
    except Exception as error:
        print("40 (RLIMIT_NOFILE" in str(error), isinstance(error, (OSError, multiprocessing.pool.MaybeEncodingError)))
    print(pool.apply(tasks.total_of_refs, (refs[:5],)) == sum(range(5)) * MB)
    print([pool.apply(tasks.last, (ref,)) for ref in refs] == list(range(100)))
""") == "True True\nTrue\nTrue\n"


def test_many_results_are_kept_with_the_usual_number_of_descriptors(tmp_path: Path) -> None:
    assert run(tmp_path, FEW + """
limit(1024)
with Pool(2) as pool:
    arrays = pool.starmap(tasks.make_array, [(100_000, n % 200) for n in range(1500)], 1)
    print(all(int(array[-1]) == n % 200 and array.flags.writeable for n, array in enumerate(arrays)))
    print(pool.map(tasks.last, arrays, 1) == [n % 200 for n in range(1500)])
    refs = [dpool.put(array) for array in arrays[:300]]
    print([int(array[-1]) for array in dpool.get(refs)] == [n % 200 for n in range(300)])
""") == "True\n" * 3


def unmapped(function: Callable[[], Any]) -> Any:
    """Call with every further segment copied instead of mapped."""
    from dpool.cluster.store import segments

    before = segments.MAX_MAPPED
    segments.MAX_MAPPED = 0
    try:
        return function()
    finally:
        segments.MAX_MAPPED = before


def test_beyond_a_number_of_mappings_values_are_copied(pool: Pool) -> None:
    ref = dpool.put(large(3))
    got = unmapped(lambda: dpool.get(ref))
    assert tasks.total(got) == 24 * MB and tasks.alignments([got]) == [0]
    got[:] = 1
    assert tasks.total(dpool.get(ref)) == 24 * MB
    assert dpool.memory_summary()["objects"][0]["views"] == 0
    result = unmapped(lambda: pool.apply(tasks.make_array, (8 * MB, 2)))
    assert tasks.total(result) == 16 * MB
    assert "viewed" not in dpool.memory_summary()["by_state"]
