"""Owns the tests of put, get and wait, of refs through the doors, and of large values in arguments and results.

Copies are counted by looking at pages, never by a clock. Run by pytest; what the workers do is in object_tasks.py.
"""

from __future__ import annotations

import array
import asyncio
import copy
import ctypes
import functools
import gc
import operator
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import object_tasks as tasks
import pytest
from leftovers import PATIENCE_S, Census, children
from object_tasks import MB, Holder

import dpool
from dpool import ObjectRef, errors
from dpool.concurrent.futures import ProcessPoolExecutor
from dpool.multiprocessing.pool import Pool
from dpool.objects import configure

np = pytest.importorskip("numpy")
METHODS = ["fork", "forkserver", "spawn"]


def held() -> set[str]:
    """The objects there are."""
    gc.collect()
    return {entry["id"] for entry in dpool.memory_summary()["objects"]}


@pytest.fixture(autouse=True)
def all_is_freed() -> Iterator[None]:
    """Every test ends with no object that it made."""
    before = held()
    yield
    assert not held() - before


@pytest.fixture(scope="module", params=METHODS)
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """One pool for each start method."""
    with Pool(2, context=get_context(request.param)) as pool:
        yield pool
        pool.close()
        pool.join()


@contextmanager
def fresh_pool(processes: int = 2, method: str = "fork", **options: Any) -> Iterator[Pool]:
    """A pool of a test's own, which leaves nothing."""
    _give_back()
    census = Census()
    with Pool(processes, context=get_context(method), **options) as pool:
        yield pool
        pool.close()
        pool.join()
    del pool
    _give_back()
    census.check()


def _give_back() -> None:
    """What is kept warm goes back to the kernel."""
    from dpool.cluster.store import store

    here = store.current()
    with here._lock:
        here._give_back(here.ledger.cool(float("inf")))


def large(number: int = 1, nbytes: int = MB) -> Any:
    return np.full(nbytes, number, "u1")


# -- values


VALUES: dict[str, Any] = {
    "none": None,
    "int": 5,
    "huge int": 1 << 200_000,
    "text": "text",
    "long text": "text" * 100_000,
    "bytes": b"bytes",
    "many bytes": bytes(range(256)) * 1000,
    "bytearray": bytearray(b"bytes"),
    "long bytearray": bytearray(range(256)) * 1000,
    "array.array": array.array("d", range(100_000)),
    "tuple with bytes": (b"x" * 100_000, [bytearray(100_000), 3]),
    "dict": {"a": [1, 2, {"b": b"x" * 100_000}]},
    "no bytes": b"",
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_equal_and_of_its_type(name: str) -> None:
    value = VALUES[name]
    ref = dpool.put(value)
    for _ in range(2):
        got = dpool.get(ref)
        assert type(got) is type(value)
        assert got == value


ARRAYS: dict[str, Any] = {
    "bytes": np.arange(MB, dtype="u1"),
    "floats": np.linspace(0, 1, 100_000),
    "fortran": np.asfortranarray(np.arange(90_000.0).reshape(300, 300)),
    "transposed": np.arange(90_000.0).reshape(300, 300).T,
    "strided": np.arange(400_000)[::3],
    "empty": np.empty((0, 7)),
    "small": np.arange(10),
    "zero dimensions": np.array(7.5),
    "records": np.zeros(20_000, dtype=[("a", "i4"), ("b", "f8")]),
    "objects": np.array([{"a": 1}, None, "x"] * 100, dtype=object),
    "texts": np.array(["a", "bb", "ccc"] * 20_000),
    "dates": np.arange(0, 100_000).astype("M8[s]"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_comes_back_equal_and_writable(name: str) -> None:
    value = ARRAYS[name]
    got = dpool.get(dpool.put(value))
    assert got.dtype == value.dtype and got.shape == value.shape
    np.testing.assert_array_equal(got, value)
    assert got.flags.writeable


def test_arrays_through_a_pool(pool: Pool) -> None:
    for value, got in zip(ARRAYS.values(), pool.map(tasks.identity, ARRAYS.values()), strict=True):
        np.testing.assert_array_equal(got, value)
        assert got.dtype == value.dtype and got.flags.writeable
    refs = [dpool.put(value) for value in ARRAYS.values()]
    for value, got in zip(ARRAYS.values(), pool.map(tasks.identity, refs), strict=True):
        np.testing.assert_array_equal(got, value)


def test_values_through_a_pool(pool: Pool) -> None:
    assert pool.map(tasks.identity, VALUES.values()) == list(VALUES.values())
    assert pool.map(tasks.identity, [dpool.put(value) for value in VALUES.values()]) == list(VALUES.values())
    assert pool.map(tasks.kind, VALUES.values()) == [type(value).__name__ for value in VALUES.values()]


@pytest.mark.parametrize("nbytes", [0, 10, 100_000])
def test_memoryviews(pool: Pool, nbytes: int) -> None:
    view = memoryview(bytes(range(256)) * 1000)[:nbytes]
    for got in (dpool.get(dpool.put(view)), pool.apply(tasks.identity, (view,))):
        assert type(got) is memoryview
        assert got == view
    doubles = memoryview(array.array("d", range(nbytes)))
    got = dpool.get(dpool.put([doubles]))[0]
    assert got.format == "d" and got == doubles


def test_objects_that_hold_arrays(pool: Pool) -> None:
    ref = dpool.put({"one": Holder(large(2)), "other": [Holder(large(3))]})
    assert pool.apply(tasks.kind, (ref,)) == "dict"
    got = dpool.get(ref)
    assert (tasks.total(got["one"].array), tasks.total(got["other"][0].array)) == (2 * MB, 3 * MB)


def test_data_frames(pool: Pool) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": np.arange(50_000.0), "b": np.arange(50_000), "c": ["x", "y"] * 25_000})
    for got in (dpool.get(dpool.put(frame)), pool.apply(tasks.identity, (frame,)),
                pool.apply(tasks.identity, (dpool.put(frame),))):
        pandas.testing.assert_frame_equal(got, frame)
        got.loc[0, "a"] = 5.0


def test_arrow_tables(pool: Pool) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"a": np.arange(100_000.0), "b": [None, "text"] * 50_000})
    for got in (dpool.get(dpool.put(table)), pool.apply(tasks.identity, (table,)),
                pool.apply(tasks.identity, (dpool.put(table),))):
        assert got.equals(table)


def test_tensors(pool: Pool) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(100_000.0)
    for got in (dpool.get(dpool.put(tensor)), pool.apply(tasks.identity, (tensor,))):
        assert torch.equal(got, tensor)


def test_lambdas_and_local_classes_can_be_put() -> None:
    class Local:
        number = 5

    assert dpool.get(dpool.put(lambda: 7))() == 7
    assert dpool.get(dpool.put(Local())).number == 5


def test_what_cannot_be_pickled_is_refused_and_leaves_nothing() -> None:
    import threading

    with pytest.raises(TypeError, match="cannot pickle '_thread.lock' object"):
        dpool.put([large(), threading.Lock()])


def test_put_takes_the_value_as_it_is_then() -> None:
    value = large(1)
    ref = dpool.put(value)
    value[:] = 2
    assert tasks.total(dpool.get(ref)) == MB


def test_each_get_gives_an_array_of_its_own() -> None:
    ref = dpool.put(large(1))
    first, second = dpool.get([ref, ref])
    first[:] = 7
    assert tasks.total(second) == MB
    assert tasks.total(dpool.get(ref)) == MB


def test_values_start_at_multiples_of_64_bytes(pool: Pool) -> None:
    odd = [large(1, 70_000 + number) for number in range(5)]
    assert tasks.alignments(dpool.get(dpool.put(odd))) == [0] * 5
    assert pool.apply(tasks.alignments, (odd,)) == [0] * 5
    assert tasks.alignments(pool.apply(tasks.identity, (odd,))) == [0] * 5


# -- refs


def test_get_of_a_list_and_of_a_tuple() -> None:
    refs = [dpool.put(number) for number in range(5)]
    assert dpool.get(refs) == dpool.get(tuple(refs)) == [0, 1, 2, 3, 4]
    assert dpool.get([]) == []


def test_timeouts_are_taken() -> None:
    ref = dpool.put(1)
    assert dpool.get(ref, timeout=0) == 1
    assert dpool.get([ref], 0.5) == [1]
    assert dpool.wait([ref], timeout=0) == ([ref], [])


def test_wait_divides_refs() -> None:
    refs = [dpool.put(number) for number in range(3)]
    assert dpool.wait(refs) == (refs[:1], refs[1:])
    assert dpool.wait(iter(refs), 3) == (refs, [])
    assert dpool.wait([]) == ([], [])


@pytest.mark.parametrize("count", [0, -1, 3])
def test_wait_refuses_a_wrong_number(count: int) -> None:
    with pytest.raises(ValueError, match="num_returns must be between 1 and the number of refs, 2"):
        dpool.wait([dpool.put(1), dpool.put(2)], count)


def test_wait_refuses_a_ref_twice() -> None:
    ref = dpool.put(1)
    with pytest.raises(ValueError, match="each ref once"):
        dpool.wait([ref, ref])


@pytest.mark.parametrize("value", [5, "text", [5], None, [None], {"a": 1}])
def test_get_refuses_what_is_no_ref(value: Any) -> None:
    with pytest.raises(TypeError, match="expected ObjectRefs, got"):
        dpool.get(value)
    with pytest.raises(TypeError, match="expected ObjectRefs, got"):
        dpool.wait(value)


def test_put_of_a_ref_is_refused() -> None:
    with pytest.raises(TypeError, match="it is stored already"):
        dpool.put(dpool.put(1))


@pytest.mark.parametrize("value", [1, large()], ids=["small", "large"])
class TestRefs:
    def test_equal_only_to_itself(self, value: Any) -> None:
        ref, other = dpool.put(value), dpool.put(value)
        assert ref == ref and ref != other and ref != 5
        assert len({ref, other, ref}) == 2

    def test_copies_are_the_ref(self, value: Any) -> None:
        ref = dpool.put(value)
        assert copy.copy(ref) is ref and copy.deepcopy([ref]) == [ref]

    def test_shows_its_size(self, value: Any) -> None:
        assert "bytes" in repr(dpool.put(value))

    def test_can_be_awaited(self, value: Any) -> None:
        async def main() -> Any:
            return await dpool.put(value)

        assert tasks.total(asyncio.run(main())) == tasks.total(value)

    def test_cannot_be_pickled_outside_tasks(self, value: Any) -> None:
        with pytest.raises(TypeError, match="only into a task, a task's result, or an object that is put"):
            pickle.dumps([dpool.put(value)])

    def test_arrives_as_its_value_at_top_level(self, pool: Pool, value: Any) -> None:
        ref = dpool.put(value)
        name = type(value).__name__
        assert pool.apply(tasks.kinds, (ref, 5), {"named": ref}) == [name, "int", name]
        assert pool.map(tasks.kind, [ref, 5, ref]) == [name, "int", name]
        assert pool.map(tasks.kind, [ref] * 10, chunksize=5) == [name] * 10
        assert pool.starmap(tasks.kinds, [(ref, 5)] * 2) == [[name, "int"]] * 2
        assert pool.starmap(tasks.kinds, [(ref, 5)] * 4, chunksize=2) == [[name, "int"]] * 4
        assert list(pool.imap(tasks.kind, iter([ref, 5]))) == [name, "int"]
        assert list(pool.imap(tasks.kind, iter([ref, 5] * 4), 4)) == [name, "int"] * 4
        assert pool.apply_async(tasks.total, (ref,)).get(PATIENCE_S) == tasks.total(value)

    def test_arrives_as_a_ref_where_it_is_nested(self, pool: Pool, value: Any) -> None:
        ref = dpool.put(value)
        assert pool.map(tasks.kind, [[ref], (ref,), {"a": ref}, Holder(ref)]) == ["list", "tuple", "dict", "Holder"]
        assert pool.apply(tasks.total_of_refs, ([ref, ref],)) == 2 * tasks.total(value)
        assert pool.map(tasks.total_of_refs, [{ref: 1}, (ref, ref)]) == [tasks.total(value), 2 * tasks.total(value)]

    def test_in_the_function(self, pool: Pool, value: Any) -> None:
        ref = dpool.put(value)
        expected = tasks.total(value)
        assert pool.map(functools.partial(tasks.total_of_refs, [ref]), [()] * 0) == []
        assert pool.apply(functools.partial(tasks.total_of_refs, [ref])) == expected
        assert pool.apply(functools.partial(tasks.kind, ref)) == "ObjectRef"
        assert pool.map(lambda number: number + int(np.sum(dpool.get(ref))), [1, 2]) == [expected + 1, expected + 2]

    def test_comes_back(self, pool: Pool, value: Any) -> None:
        ref = dpool.put(value)
        assert pool.apply(tasks.identity, ([ref],)) == [ref]
        back = pool.apply(tasks.call, (tasks.put, value))
        assert type(back) is ObjectRef
        assert tasks.total(dpool.get(back)) == tasks.total(value)
        assert pool.apply(tasks.total, (back,)) == tasks.total(value)

    def test_inside_what_is_put(self, pool: Pool, value: Any) -> None:
        inner = dpool.put(value)
        outer = dpool.put({"inner": [inner], "array": large(2)})
        again = dpool.put([outer])
        del inner, outer
        inside = dpool.get(dpool.get(again)[0])["inner"][0]
        assert tasks.total(dpool.get(inside)) == tasks.total(value)
        assert pool.apply(tasks.get_first, (again,))["inner"] == [inside]
        got = pool.apply(tasks.get_first, ([dpool.get(again)[0]],))
        assert tasks.total(dpool.get(got["inner"][0])) == tasks.total(value)

    def test_through_an_executor(self, value: Any) -> None:
        ref = dpool.put(value)
        name = type(value).__name__
        with ProcessPoolExecutor(2, mp_context=get_context("fork")) as executor:
            assert executor.submit(tasks.kinds, ref, named=ref).result(PATIENCE_S) == [name, name]
            assert executor.submit(tasks.kind, [ref]).result(PATIENCE_S) == "list"
            assert list(executor.map(tasks.kind, [ref, 5])) == [name, "int"]
            assert list(executor.map(tasks.kind, [ref] * 4, chunksize=2)) == [name] * 4
            back = executor.submit(tasks.put, value).result(PATIENCE_S)
        assert tasks.total(dpool.get(back)) == tasks.total(value)

    def test_outlives_the_pool_that_made_it(self, value: Any) -> None:
        with Pool(2) as pool:
            refs = pool.map(tasks.put, [value, value])
        assert [tasks.total(got) for got in dpool.get(refs)] == [tasks.total(value)] * 2
        with fresh_pool() as pool:
            assert pool.map(tasks.total, refs) == [tasks.total(value)] * 2

    def test_may_be_lost_while_its_task_is_queued(self, value: Any) -> None:
        with fresh_pool(1) as pool:
            results = [pool.apply_async(tasks.total, (dpool.put(value),)) for _ in range(50)]
            mapped = pool.map_async(tasks.total, [dpool.put(value) for _ in range(50)], 1)
            gc.collect()
            assert [result.get(PATIENCE_S) for result in results] == [tasks.total(value)] * 50
            assert mapped.get(PATIENCE_S) == [tasks.total(value)] * 50
            del results, mapped

    def test_inherited_by_fork(self, value: Any) -> None:
        global _inherited
        _inherited = dpool.put(value)
        try:
            with fresh_pool() as pool:
                assert pool.apply(_total_of_inherited) == tasks.total(value)
                assert pool.apply(tasks.total, (_inherited,)) == tasks.total(value)
        finally:
            _inherited = None


_inherited: Any = None


def _total_of_inherited() -> int:
    return tasks.total(dpool.get(_inherited))


def test_a_ref_that_a_task_keeps_stays_readable() -> None:
    with fresh_pool(1) as pool:
        pool.apply(tasks.keep, ([dpool.put(large(3))],))
        gc.collect()
        assert dpool.memory_summary()["objects"] == []  # the worker has it, not this process
        assert pool.apply(_total_of_kept) == 3 * MB
        pool.apply(tasks.forget)


def _total_of_kept() -> int:
    return tasks.total_of_refs(tasks._kept[0])


def test_a_ref_goes_from_worker_to_worker() -> None:
    with Pool(1) as one, Pool(1) as other:
        ref = one.apply(tasks.put_array, (MB, 4))
        one.terminate()
        one.join()
        assert other.apply(tasks.total, (ref,)) == 4 * MB
        assert other.apply(tasks.identity, ([ref],)) == [ref]


def test_many_small_refs_at_once(pool: Pool) -> None:
    refs = [dpool.put(number) for number in range(2000)]
    assert pool.map(tasks.identity, refs) == list(range(2000))
    assert pool.apply(tasks.total_of_refs, (refs,)) == sum(range(2000))
    assert pool.apply(tasks.call, (tasks.identity, refs)) == refs


def test_many_large_refs_at_once(pool: Pool) -> None:
    refs = [dpool.put(large(1, 100_000)) for _ in range(300)]
    assert pool.map(tasks.total, refs) == [100_000] * 300
    assert pool.map(tasks.identity, refs, chunksize=100)[0].nbytes == 100_000
    some = refs[:200]
    assert pool.apply(tasks.total_of_refs, (some,)) == 200 * 100_000
    assert pool.apply(tasks.total_of_refs, (dpool.put(some),)) == 200 * 100_000
    assert pool.apply(tasks.call, (tasks.identity, some)) == some


def test_more_refs_than_a_message_carries_are_refused(pool: Pool) -> None:
    refs = [dpool.put(large(1, 100_000)) for _ in range(300)]
    for value in (refs, dpool.put(refs)):
        with pytest.raises(ValueError, match="at most 240 large refs in its arguments: put.. the values together"):
            pool.apply(tasks.total_of_refs, (value,))
    del value
    with pytest.raises(ValueError, match="a result may have at most 240 large refs"):
        pool.apply(tasks.put_many, (300, 100_000))
    assert pool.apply(tasks.total_of_values, (dpool.put(dpool.get(refs)),)) == 300 * 100_000


# -- no copy, and private


def in_store(page: tuple[str, int, int]) -> bool:
    """Whether an array lies in a segment, with no byte of it copied."""
    name, _, copied = page
    return name.startswith("/memfd:dpool") and copied == 0


def test_get_makes_no_copy() -> None:
    ref = dpool.put(large(1, 8 * MB))
    first, second = dpool.get([ref, ref])
    assert in_store(tasks.page_of(first))
    assert tasks.page_of(first) == tasks.page_of(second)
    first[0] = 5
    copied = tasks.page_of(first)[2]
    assert 0 < copied < MB
    assert in_store(tasks.page_of(second))


def test_arguments_and_results_are_not_copied(pool: Pool) -> None:
    for _ in range(3):  # fresh segments, and warm ones
        assert in_store(pool.apply(tasks.page_of, (large(1, 8 * MB),)))
        assert all(in_store(page) for page in pool.map(tasks.page_of, [large(n, 4 * MB) for n in range(4)], 1))
        assert in_store(tasks.page_of(pool.apply(tasks.make_array, (8 * MB,))))


def test_arguments_are_writable_and_private(pool: Pool) -> None:
    value = large(1, 2 * MB)
    ref = dpool.put(value)
    for _ in range(3):
        assert pool.map(tasks.overwrite, [value, ref, value, ref], 1) == [(True, 18 * MB)] * 4
        assert pool.apply(tasks.overwrite, (ref,)) == (True, 18 * MB)
    assert tasks.total(value) == 2 * MB == tasks.total(dpool.get(ref))


def test_results_are_writable_and_private(pool: Pool) -> None:
    ref = dpool.put(large(1, 2 * MB))
    results = pool.map(tasks.overwritten, [ref] * 4, 1)
    assert [tasks.total(result) for result in results] == [2 * MB + 8000] * 4
    for result in results:
        result[:] = 3
    assert tasks.total(dpool.get(ref)) == 2 * MB


@pytest.mark.parametrize("size", [10, MB])
def test_read_only_arrays_arrive_writable(pool: Pool, size: int) -> None:
    """As with the standard library, whose older pickles know of no such thing."""
    value = large(1, size)
    value.flags.writeable = False
    total = tasks.total(value)
    assert pool.map(tasks.overwrite, [value] * 3, 1) == [(True, 9 * total)] * 3
    assert pool.apply(lambda array: tasks.overwrite(array), (value,)) == (True, 9 * total)
    assert pool.apply(lambda: value.flags.writeable)
    for got in (pool.apply(tasks.identity, (value,)), dpool.get(dpool.put(value)), *pool.map(tasks.identity, [value])):
        assert got.flags.writeable
    with pytest.raises(TypeError, match="generator"):
        pool.apply(tasks.identity, ([value, (n for n in range(3))],))
    assert not value.flags.writeable and tasks.total(value) == total


class Frame(ctypes.c_char * MB):  # type: ignore[misc]
    """A buffer of its own, and an attribute that it has in common with others."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return bytearray, (pickle.PickleBuffer(self),)


def test_buffers_are_told_apart_whatever_attributes_their_owners_have(pool: Pool) -> None:
    frames = [Frame(), Frame(), Frame()]
    for number, frame in enumerate(frames):
        frame.array = frames[0]
        frame[0] = bytes([number])
    assert pool.map(operator.itemgetter(0), frames, 1) == [0, 1, 2]


def test_a_result_stays_what_it_is_while_others_come(pool: Pool) -> None:
    kept = pool.map(tasks.make_array, [MB] * 3)
    for number in range(2, 12):
        assert [tasks.total(got) for got in pool.starmap(tasks.make_array, [(MB, number)] * 3)] == [number * MB] * 3
    assert [tasks.total(value) for value in kept] == [MB] * 3


def test_an_argument_that_a_task_keeps_stays_what_it_is() -> None:
    with fresh_pool(1) as pool:
        pool.apply(tasks.keep, (large(1), dpool.put(large(2))))
        for number in range(3, 13):
            assert pool.apply(tasks.total, (large(number),)) == number * MB
            dpool.put(large(number))
        assert pool.apply(tasks.kept_total) == 3 * MB
        pool.apply(tasks.forget)


def test_a_result_that_a_forked_child_sees_stays_what_it_is() -> None:
    with fresh_pool(1) as pool:
        result = pool.apply(tasks.make_array, (MB, 5))
        _check_in_fork(pool, result, 5 * MB)
        del result


def test_an_object_that_a_forked_child_sees_stays_what_it_is() -> None:
    with fresh_pool(1) as pool:
        ref = dpool.put(large(5))
        mapped = dpool.get(ref)
        del ref
        _check_in_fork(pool, mapped, 5 * MB)
        del mapped


def test_an_object_that_a_forked_child_gets_stays_what_it_is() -> None:
    with fresh_pool(1) as pool:
        _check_in_fork(pool, dpool.put(large(5)), 5 * MB)


def test_an_argument_that_a_forked_child_of_the_task_sees_stays_what_it_is() -> None:
    with fresh_pool(1) as pool:
        fds = pool.apply(_fork_with, (large(5),))
        _write_over(pool)
        assert pool.apply(_ask, fds) == 5 * MB


def _check_in_fork(pool: Pool, value: Any, expected: int) -> None:
    """Fork; drop the value here; use the store much; the child must see what it saw."""
    boxed = [value]
    del value
    fds = _fork_with(boxed)
    boxed.clear()
    gc.collect()
    _write_over(pool)
    assert _ask(*fds) == expected


def _write_over(pool: Pool) -> None:
    for number in range(10):
        pool.apply(tasks.total, (large(number),))
        pool.apply(tasks.make_array, (MB, number))
        dpool.put(large(number))


def _fork_with(value: Any) -> tuple[int, int, int]:
    """A child that waits for a byte and then answers what the value adds up to: its pid, where to ask, where to hear.
    A ref is got before the byte."""
    ask, asked = os.pipe()
    hear, answered = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            seen = value[0] if type(value) is list else value
            if type(seen) is ObjectRef:
                seen = dpool.get(seen)
            os.write(answered, b"!")
            os.read(ask, 1)
            os.write(answered, str(tasks.total(seen)).encode())
        finally:
            os._exit(0)
    os.close(ask)
    os.close(answered)
    assert os.read(hear, 1) == b"!"
    return pid, asked, hear


def _ask(pid: int, asked: int, hear: int) -> int:
    os.write(asked, b"?")
    answer = os.read(hear, 100)
    os.waitpid(pid, 0)
    os.close(asked)
    os.close(hear)
    return int(answer)


# -- once


def test_an_array_that_many_tasks_get_is_stored_once(pool: Pool) -> None:
    value = large(1, 4 * MB)
    holder = Holder(value)
    offset = np.full(4 * MB, 1, "u1")
    for pages in (
        pool.map(tasks.page_of, [value] * 20, 1),
        pool.map(tasks.page_of, [dpool.put(value)] * 20, 1),
        pool.starmap(tasks.page_of, [(value, number) for number in range(20)], 1),
        list(pool.imap(tasks.page_of, iter([dpool.put(value)] * 20))),
        pool.map(functools.partial(tasks.page_of, value), range(20), 1),
        pool.map(holder.page, range(20), 1),
        pool.map(lambda _: tasks.page_of(offset), range(20), 1),
    ):
        assert all(in_store(page) for page in pages)
        assert len({inode for _, inode, _ in pages}) == 1, "stored more than once"


def test_an_array_in_initargs_is_stored_once() -> None:
    for method in METHODS:
        with fresh_pool(2, method, initializer=tasks.remember, initargs=(large(1, 4 * MB),)) as pool:
            pages = pool.map(tasks.remembered_page, range(20), 1)
            assert all(copied == 0 for _, _, copied in pages) or method == "fork"
            if method != "fork":  # by fork they have it all the same, and no store is needed
                assert all(in_store(page) for page in pages)
                assert len({inode for _, inode, _ in pages}) == 1


def test_a_ref_in_initargs() -> None:
    for method in METHODS:
        with fresh_pool(2, method, initializer=tasks.remember, initargs=(dpool.put(large(3)),)) as pool:
            assert pool.map(tasks.kept_total, range(4), 1) == [3 * MB] * 4


# -- limits


@contextmanager
def limited(limit: int, spill_dir: str) -> Iterator[None]:
    before = dpool.memory_summary()
    configure(limit, spill_dir)
    try:
        yield
    finally:
        configure(before["limit"], before["spill_dir"])


def test_past_the_limit_the_least_recently_used_go_to_disk_and_come_back(tmp_path: Any) -> None:
    with limited(64 * MB, str(tmp_path)):
        refs = [dpool.put(large(number, 15 * MB)) for number in range(10)]
        summary = dpool.memory_summary()
        assert summary["total"] <= 64 * MB
        where = [entry["where"] for entry in summary["objects"]]
        assert where == ["disk"] * 6 + ["memory"] * 4
        assert summary["spilled"] >= 6 * 15 * MB
        assert os.listdir(tmp_path) == []  # nameless
        for number, ref in enumerate(refs):
            assert tasks.total(dpool.get(ref)) == number * 15 * MB
            assert dpool.memory_summary()["total"] <= 64 * MB
        assert dpool.get(refs[0]).flags.writeable
        del ref, refs


def test_all_objects_may_be_looked_at_at_once_past_the_limit(tmp_path: Any) -> None:
    with limited(64 * MB, str(tmp_path)):
        refs = [dpool.put(large(number, 15 * MB)) for number in range(10)]
        values = dpool.get(refs)
        assert [int(value[-1]) for value in values] == list(range(10))
        assert tasks.alignments(values) == [0] * 10
        values[0][:] = 1
        assert dpool.get(refs[0])[0] == 0
        del values, refs


def test_spilled_objects_go_to_tasks(tmp_path: Any, pool: Pool) -> None:
    with limited(64 * MB, str(tmp_path)):
        refs = [dpool.put(large(number, 15 * MB)) for number in range(10)]
        expected = [number * 15 * MB for number in range(10)]
        assert pool.map(tasks.total, refs, 1) == expected
        assert [pool.apply(tasks.total, (ref,)) for ref in refs] == expected
        # More in one task than memory has room for: each is sent before it makes room for the next.
        assert pool.apply(tasks.total_of_refs, (refs,)) == sum(expected)
        assert pool.apply(tasks.totals, refs) == expected
        del refs


def test_no_room_is_said_with_the_sizes(tmp_path: Any) -> None:
    with limited(64 * MB, str(tmp_path)):
        with pytest.raises(errors.ObjectStoreFull, match="no room for 104,857,") as caught:
            dpool.put(large(1, 100 * MB))
        assert caught.value.needed > 100 * MB
        assert caught.value.limit == 64 * MB
        assert caught.value.held <= 64 * MB
        assert isinstance(caught.value, MemoryError)
        assert pickle.loads(pickle.dumps(caught.value)).needed == caught.value.needed
        views = [dpool.get(dpool.put(large(1, 15 * MB)))]
        refs = [dpool.put(large(1, 15 * MB)) for _ in range(3)]
        mapped = dpool.get(refs)
        dpool.put(large(1, 15 * MB))
        fourth = dpool.put(large(1, 12 * MB))
        mapped.append(dpool.get(fourth))
        with pytest.raises(dpool.ObjectStoreFull, match="in use"):
            dpool.put(large(1, 15 * MB))
        del mapped, refs, fourth, views
        dpool.put(large(1, 15 * MB))


def test_no_room_for_an_argument(tmp_path: Any, pool: Pool) -> None:
    with limited(64 * MB, str(tmp_path)):
        with pytest.raises(dpool.ObjectStoreFull, match="no room for"):
            pool.apply(tasks.total, (large(1, 100 * MB),))
        assert pool.map(tasks.total, [large(number, 20 * MB) for number in range(10)], 1) == \
            [number * 20 * MB for number in range(10)]


def test_results_that_are_kept_take_no_room(tmp_path: Any, pool: Pool) -> None:
    with limited(64 * MB, str(tmp_path)):
        results = pool.map(tasks.make_array, [15 * MB] * 10, 1)
        assert pool.map(tasks.total, results, 1) == [15 * MB] * 10
        dpool.put(results[0])
        del results


def test_a_damaged_spill_file_is_noticed(tmp_path: Any) -> None:
    from dpool.cluster.store import store

    with limited(32 * MB, str(tmp_path)):
        refs = [dpool.put(large(1, 15 * MB)) for _ in range(4)]
        changed, cut = (store.current().objects[ref.key].spill for ref in refs[:2])
        assert changed is not None and cut is not None
        os.pwrite(changed.descriptor, b"\0", 7 * MB)
        os.ftruncate(cut.descriptor, 7 * MB)
        with pytest.raises(dpool.ObjectLost, match="checksum"):
            dpool.get(refs[0])
        with pytest.raises(dpool.ObjectLost, match="bytes long instead of"):
            dpool.get(refs[1])
        with fresh_pool(1) as pool:
            with pytest.raises(dpool.ObjectLost, match="checksum"):
                pool.apply(tasks.total, (refs[0],))
            assert pool.map(tasks.total, refs[2:]) == [15 * MB] * 2
        del refs


def test_a_spill_directory_that_has_gone(tmp_path: Any) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    with limited(32 * MB, str(gone)):
        gone.rmdir()
        refs = [dpool.put(large(1, 15 * MB))]
        with pytest.raises(dpool.ObjectStoreFull, match="no object can be spilled.*set spill_dir"):
            refs += [dpool.put(large(1, 15 * MB)) for _ in range(4)]
        assert tasks.total(dpool.get(refs[0])) == 15 * MB
        gone.mkdir()
        more = dpool.put(large(2, 15 * MB)), dpool.put(large(2, 15 * MB))
        assert tasks.total(dpool.get(more[0])) == 30 * MB
        del refs, more


@pytest.mark.parametrize("options, kind, text", [
    (dict(object_memory=0), ValueError, "positive number of bytes, not 0"),
    (dict(object_memory=-5), ValueError, "positive number of bytes, not -5"),
    (dict(spill_dir="/nonexistent"), NotADirectoryError, "/nonexistent"),
    (dict(spill_dir="/proc/self/maps"), NotADirectoryError, "/proc/self/maps"),
])
def test_configure_refuses(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    before = dpool.memory_summary()
    with pytest.raises(kind, match=text):
        configure(**options)
    assert dpool.memory_summary() == before


# -- freed


def test_the_summary_tells_what_is_held() -> None:
    small, ref = dpool.put(1), dpool.put([large(1, 3 * MB), dpool.put(large())])
    outer = dpool.get(ref)
    (inner, entry) = sorted(dpool.memory_summary()["objects"], key=lambda each: int(each["nbytes"]))
    assert inner["nbytes"] >= MB and entry["nbytes"] >= 3 * MB
    assert entry["id"] == ref.key.hex() and entry["where"] == "memory"
    assert (entry["views"], entry["inner"]) == (1, 1)
    assert not entry["shared"]
    with fresh_pool(1) as pool:
        pool.apply(tasks.kind, (ref,))
    entry = next(e for e in dpool.memory_summary()["objects"] if e["id"] == ref.key.hex())
    assert entry["shared"]
    del outer, small


def test_bytes_are_counted_to_zero() -> None:
    with fresh_pool() as pool:
        refs = [dpool.put(large(number)) for number in range(4)]
        views = dpool.get(refs)
        results = pool.map(tasks.identity, [*refs, *views], 1)
        summary = dpool.memory_summary()
        assert summary["by_state"]["object"] >= 4 * MB
        assert summary["total"] == sum(summary["by_state"].values())
        del refs, views, results
    summary = dpool.memory_summary()
    assert (summary["total"], summary["warm"], summary["spilled"], summary["objects"]) == (0, 0, 0, [])


def test_memory_returns_when_refs_go(pool: Pool) -> None:
    ours = children() | {os.getpid()}
    _give_back()
    before = tasks.memory_of(ours)
    refs = [dpool.put(large(1, 8 * MB)) for _ in range(4)]
    assert tasks.memory_of(ours) >= before + 32 * MB
    del refs
    _give_back()
    assert tasks.memory_of(ours) <= before


def test_memory_returns_after_work() -> None:
    before = tasks.memory_of([os.getpid()])
    with fresh_pool() as pool:
        ours = children() | {os.getpid()}
        for _ in range(20):
            pool.map(tasks.total, [large(n, 8 * MB) for n in range(4)], 1)
            pool.map(tasks.make_array, [8 * MB] * 4, 1)
            pool.map(functools.partial(tasks.page_of, large(1, 8 * MB)), range(4), 1)
            pool.apply(tasks.total, (dpool.put(large(1, 8 * MB)),))
        # What is kept warm is bounded by what was needed at once, not by what was ever sent.
        assert tasks.memory_of(ours) <= before + 256 * MB
    assert tasks.memory_of([os.getpid()]) <= before


def test_one_array_to_many_tasks_costs_one_store() -> None:
    with fresh_pool() as pool:
        ours = children() | {os.getpid()}
        before = tasks.memory_of(ours)
        value = large(1, 32 * MB)
        assert pool.map(tasks.total, [value] * 100, 1) == [32 * MB] * 100
        assert tasks.memory_of(ours) <= before + 64 * MB
