"""Bytes that are built on memory asked for beforehand are bytes like any others."""

from __future__ import annotations

import mmap
import pickle
import sys
from typing import Any

import pytest

from dpool.cluster.wire import large_bytes, pickling


@pytest.mark.parametrize("size", [0, 1, large_bytes.MIN_BYTES - 1, large_bytes.MIN_BYTES, large_bytes.MIN_BYTES + 4097])
def test_equal_and_usable(size: int) -> None:
    pattern = bytes(range(256)) * (size // 256 + 1)
    for writable in (True, False):
        source = memoryview(bytearray(pattern[:size])) if writable else memoryview(pattern[:size])
        made = large_bytes.build(source)
        assert type(made) is bytes
        assert made == pattern[:size]
        assert hash(made) == hash(pattern[:size])
        assert len(made) == size
        assert made.isascii() == pattern[:size].isascii()
        assert pickle.loads(pickle.dumps(made)) == made


def test_it_owes_nothing_to_its_source() -> None:
    source = mmap.mmap(-1, large_bytes.MIN_BYTES)
    source[:] = b"a" * large_bytes.MIN_BYTES
    made = large_bytes.build(memoryview(source))
    source[:] = b"b" * large_bytes.MIN_BYTES
    source.close()
    assert made == b"a" * large_bytes.MIN_BYTES


def through_a_pickle(value: Any) -> Any:
    buffers: list[memoryview] = []
    data = pickling.dumps(value, buffers)
    return pickle.loads(data, buffers=[memoryview(bytearray(buffer)) for buffer in buffers])


def test_what_is_in_two_places_is_one_object() -> None:
    large, numbers = bytearray(b"x" * large_bytes.MIN_BYTES), [1]
    holder = [large, numbers]
    first, second, third, fourth = through_a_pickle((holder, large, [holder, numbers], numbers))
    assert first[0] is second and third[0] is first and third[1] is fourth is first[1]
    assert second == large and fourth == numbers


@pytest.mark.parametrize("within", [1, b"x" * large_bytes.MIN_BYTES])
def test_containers_may_hold_themselves(within: object) -> None:
    itself: list[Any] = [within]
    itself.append((itself, 2))
    back = through_a_pickle(itself)
    assert back[0] == within and back[1][0] is back and back[1][1] == 2


@pytest.mark.parametrize("within", [1, b"x" * large_bytes.MIN_BYTES])
def test_containers_may_be_in_many_places(within: object) -> None:
    """Each is looked at once, not 2 to the 60 times."""
    value: list[Any] = [within]
    for _ in range(60):
        value = [value, value]
    back = through_a_pickle(value)
    for _ in range(60):
        assert back[0] is back[1]
        back = back[0]
    assert back == [within]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="pickle itself counts against the limit of recursion")
@pytest.mark.parametrize("within", [1, b"x" * large_bytes.MIN_BYTES])
def test_containers_may_be_as_deep_as_pickle_allows(within: object) -> None:
    value: list[Any] = [within]
    for _ in range(sys.getrecursionlimit() + 100):
        value = [value]
    back = through_a_pickle(value)
    while type(back[0]) is list:
        back = back[0]
    assert back == [within]


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_through_a_pickle(kind: type) -> None:
    value = kind(b"xyz" * large_bytes.MIN_BYTES)
    buffers: list[memoryview] = []
    data = pickling.dumps([value], buffers)
    assert len(data) < 1000
    (back,) = pickle.loads(data, buffers=[memoryview(bytearray(buffer)) for buffer in buffers])
    assert type(back) is kind
    assert back == value
