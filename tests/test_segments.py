"""Owns the tests of segments: memfds, their tables and seals.

Run by pytest.
"""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Iterator

import pytest
from leftovers import descriptors

from dpool.cluster.store import segments
from dpool.cluster.store.segments import ALIGN, SEEN, Segment


@pytest.fixture(autouse=True)
def nothing_stays_open() -> Iterator[None]:
    before = descriptors()
    yield
    gc.collect()
    assert descriptors() == before


def test_parts_come_back_aligned_and_in_order() -> None:
    parts: list[bytes | bytearray | memoryview] = [b"", b"a", os.urandom(100), b"", bytearray(os.urandom(70_000)),
                                                   memoryview(b"xyz")]
    descriptor, table = segments.write([memoryview(part) for part in parts])
    got = segments.read(descriptor, table)
    os.close(descriptor)  # the mapping lives on
    assert [bytes(part) for part in got] == [bytes(part) for part in parts]
    assert all(offset % ALIGN == 0 for offset, _ in segments.places(table))
    assert os.sysconf("SC_PAGE_SIZE") % ALIGN == 0


def test_what_a_reader_writes_is_its_own() -> None:
    descriptor, table = segments.write([b"abc"])
    (first,), (second,) = segments.read(descriptor, table), segments.read(descriptor, table)
    first[:] = b"xyz"
    assert bytes(second) == b"abc" == bytes(segments.read(descriptor, table)[0])
    os.close(descriptor)


@pytest.mark.parametrize("warm", [False, True])
def test_a_segment_is_written_again(warm: bool) -> None:
    segment = Segment(200_000)
    for number in range(3):
        table = segments.head(0) + segment.write([bytes([number]) * 100_000, bytes([number + 1]) * 50_000], warm)
        first, second = segments.read(segment.descriptor, table)
        assert (bytes(first), bytes(second)) == (bytes([number]) * 100_000, bytes([number + 1]) * 50_000)
        del first, second
    segment.close()
    segment.close()


def test_the_size_is_sealed() -> None:
    segment = Segment(10_000)
    for size in (9_999, 10_001):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(segment.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert not os.get_inheritable(segment.descriptor)
    segment.close()


def test_the_owner_hears_of_the_end_of_the_last_view() -> None:
    descriptor, table = segments.write([b"abc", b"def"])
    ended: list[int] = []
    first, second = segments.read(descriptor, segments.head(7) + table[8:], ended.append)
    part = first[1:]
    del first
    del second
    assert ended == []
    del part
    assert ended == [7]
    segments.read(descriptor, segments.head(0) + table[8:], ended.append)
    assert ended == [7]
    os.close(descriptor)


def test_the_owner_hears_that_a_forked_child_may_still_look() -> None:
    descriptor, table = segments.write([b"abc"])
    table = segments.head(7) + table[8:]
    ended: list[int] = []
    before = segments.read(descriptor, table, ended.append)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    after = segments.read(descriptor, table, ended.append)
    del before
    del after
    assert ended == [7 | SEEN, 7]
    os.close(descriptor)


def test_scrapped_pages_are_gone_for_all() -> None:
    segment = Segment(1 << 20)
    other = os.dup(segment.descriptor)
    segment.write([b"x" * (1 << 20)])
    assert os.fstat(other).st_blocks * 512 >= 1 << 20
    segment.close(scrap=True)
    assert os.fstat(other).st_blocks == 0
    os.close(other)


def test_what_needs_no_mapping_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MAX_MAPPED", 0)
    descriptor, table = segments.write([b"abc", b"d" * 100_000, b""])
    ended: list[int] = []
    parts = segments.read(descriptor, segments.head(7) + table[8:], ended.append)
    assert ended == [7]
    os.close(descriptor)
    assert [bytes(part) for part in parts] == [b"abc", b"d" * 100_000, b""]
    parts[0][:] = b"xyz"


def test_a_segment_that_is_too_short_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MAX_MAPPED", 0)
    descriptor, _ = segments.write([b"abc"])
    _, table = segments.write([b"d" * 100_000])
    os.close(_)
    with pytest.raises(ValueError, match="bytes long instead of"):
        segments.read(descriptor, table)
    os.close(descriptor)


def test_a_table_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="table of a segment"):
        segments.places(b"12345678123")
