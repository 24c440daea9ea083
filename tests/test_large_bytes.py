"""Bytes that are built on memory asked for beforehand are bytes like any others."""

from __future__ import annotations

import mmap
import pickle

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


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_through_a_pickle(kind: type) -> None:
    value = kind(b"xyz" * large_bytes.MIN_BYTES)
    buffers: list[memoryview] = []
    data = pickling.dumps([value], buffers)
    assert len(data) < 1000
    (back,) = pickle.loads(data, buffers=[memoryview(bytearray(buffer)) for buffer in buffers])
    assert type(back) is kind
    assert back == value
