"""imap's input as the standard library reads it: one item after the other, each sent as it is when it is yielded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import dpool
from dpool.multiprocessing import get_context
from dpool.multiprocessing.pool import Pool

PATIENCE_S = 60


def first(items: Any) -> int:
    return int(items[0])


def one_bytearray(count: int) -> Iterator[bytearray]:
    buffer = bytearray(4)
    for number in range(count):
        buffer[0] = number
        yield buffer


def one_array(count: int) -> Iterator[Any]:
    array = np.zeros(1 << 18, np.uint8)
    for number in range(count):
        array[0] = number
        yield array


def one_list(count: int) -> Iterator[list[Any]]:
    whole: list[Any] = [0, b"x" * 100_000]
    for number in range(count):
        whole[0] = number
        yield whole


@pytest.mark.parametrize("source", [one_bytearray, one_array, one_list])
@pytest.mark.parametrize("method", ["imap", "imap_unordered"])
def test_a_generator_may_yield_the_same_object_again_and_again(source: Any, method: str) -> None:
    with Pool(2, context=get_context("fork")) as pool:
        found = sorted(getattr(pool, method)(first, source(100)))
    assert found == list(range(100))
    assert dpool.memory_summary()["objects"] == []


def test_what_cannot_be_pickled_fails_alone() -> None:
    def source() -> Iterator[Any]:
        yield [1]
        yield [one_list(1)]
        yield [3]

    with Pool(2, context=get_context("fork")) as pool:
        results = pool.imap(first, source())
        assert results.next(PATIENCE_S) == 1
        with pytest.raises(TypeError, match="generator"):
            results.next(PATIENCE_S)
        assert results.next(PATIENCE_S) == 3


def test_large_items_are_read_ahead_only_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpool.multiprocessing import pool as door

    monkeypatch.setattr(door, "LOOK_AHEAD_BYTES", 1 << 20)
    held = []

    def source() -> Iterator[Any]:
        for number in range(64):
            held.append(dpool.memory_summary()["by_state"].get("object", 0))
            yield np.full(1 << 18, number, np.uint8)

    with Pool(2, context=get_context("fork")) as pool:
        assert list(pool.imap(first, source())) == list(range(64))
    # The size of a segment may be up to a quarter more than is in it.
    assert max(held) <= (door.LOOK_AHEAD_LEAST + 1) * (1 << 18) * 1.25 + (1 << 20)


def test_a_full_store_makes_the_reader_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpool.cluster.store import store

    monkeypatch.setattr(store.current().ledger, "limit", 6 << 20)
    monkeypatch.setattr(store.current(), "spill_dir", "/nowhere")
    with Pool(2, context=get_context("fork")) as pool:
        assert list(pool.imap(first, one_array(100))) == list(range(100))
