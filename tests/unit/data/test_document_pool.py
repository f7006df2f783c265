"""Lengths in two bytes, and arrays in files without a name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.data import document_pool
from megatron_exact.data.document_pool import CompactLengths, DocumentPool, scratch_array

NEAR_THE_LIMIT = st.sampled_from([0, 1, 65_533, 65_534, 65_535, 65_536, 65_537, 131_071, 2**31 - 1])


def compact(lengths: np.ndarray, block: int = 3) -> CompactLengths:
    return CompactLengths((lengths[at : at + block] for at in range(0, lengths.size, block)), lengths.size)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_compact_lengths_read_like_the_array(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.int32, np.int64]))
    lengths = np.array(
        data.draw(st.lists(NEAR_THE_LIMIT | st.integers(0, 70_000), min_size=1, max_size=40)), dtype
    )
    found = compact(lengths, data.draw(st.integers(1, 50)))
    assert found.dtype == lengths.dtype
    assert len(found) == found.size == lengths.size
    start, stop = data.draw(st.integers(0, 45)), data.draw(st.integers(0, 45))
    where = np.array(data.draw(st.lists(st.integers(0, lengths.size - 1), max_size=60)), np.uint32)
    for expected, mine in (
        (lengths, np.asarray(found)),
        (lengths[start:stop], found[start:stop]),
        (lengths[where], found[where]),
        (lengths[-1], found[-1 % lengths.size]),
    ):
        assert np.array_equal(expected, mine)
        assert mine.dtype == lengths.dtype


def test_longer_than_32_bits() -> None:
    lengths = np.array([5, 2**33, 65_535], np.int64)
    assert compact(lengths)[:].tolist() == lengths.tolist()


def test_a_length_less_is_our_own_fault() -> None:
    with pytest.raises(AssertionError, match="every document"):
        CompactLengths([np.ones(3, np.int32)], 4)


def test_blocks_of_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_pool, "BLOCK_DOCUMENTS", 2)
    lengths = np.array([1, 70_000, 3, 0, 5], np.int32)
    for tokens in (lengths, compact(lengths)):
        pool = DocumentPool(tokens=tokens, first=np.array([0, 3, 5]))
        assert [block.tolist() for block in pool.lengths_of(0)] == [[1, 70_000], [3]]
        assert [block.tolist() for block in pool.blocks()] == [[1, 70_000], [3], [0, 5]]
        assert pool.total_tokens() == 70_009


def test_a_large_scratch_array_is_a_file_without_a_name(tmp_path: Path) -> None:
    array = scratch_array(document_pool.SCRATCH_BYTES // 4, np.uint32, tmp_path)
    array[[0, -1]] = 7, 9
    assert array.base is not None
    assert array[[0, -1]].tolist() == [7, 9]
    assert not list(tmp_path.iterdir())


def test_small_arrays_and_those_without_a_folder_are_in_memory(tmp_path: Path) -> None:
    assert scratch_array(1000, np.uint32, tmp_path).base is None
    assert scratch_array(document_pool.SCRATCH_BYTES, np.uint32, None).base is None
    assert scratch_array(0, np.uint32, tmp_path).size == 0


def test_a_full_disk_leaves_the_array_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.warns(UserWarning, match=r"8,388,608 bytes \(No space left on device\): as many"):
        array = scratch_array(document_pool.SCRATCH_BYTES, np.uint8, tmp_path)
    assert array.base is None
    with pytest.warns(UserWarning, match="No such file"):
        array = scratch_array(document_pool.SCRATCH_BYTES, np.uint8, tmp_path / "missing")
    assert array.base is None
