"""The pass over a whole `.idx` that proves it, and hashes it on the way.

A training worker cannot afford it (100 million documents have an index of 2 GB), so packing, `--verify`
and the start of a job do it once. The file is read in blocks, not through a mapping, so that the memory
it takes does not depend on the corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.indexed_format import HEADER, Layout

BLOCK_ELEMENTS = 1 << 18


def check_index(layout: Layout, on_bytes: Callable[[int], object] | None = None) -> str:
    """Prove that sequences lie back to back in the `.bin` and that documents cover them in order.

    Args:
        layout: of the corpus.
        on_bytes: called after each block with its size; they sum to the size of the `.idx`.

    Returns:
        Hex sha256 of the `.idx`.

    Raises:
        ValueError: the index is damaged, or does not fit its `.bin`.
    """
    with open(layout.idx_path, "rb") as stream:
        reader = _HashingReader(layout, stream, on_bytes)
        if reader.read(HEADER.size) != layout.header:
            raise reader.cut_short()
        _check_lengths(layout, reader)
        _check_offsets(layout, reader)
        _check_boundaries(layout, reader)
        for _ in reader.blocks(layout.idx_bytes - reader.position, np.dtype(np.int8)):
            pass  # modes
    return reader.hexdigest()


class _HashingReader:
    """Reads a file in order and hashes it."""

    def __init__(self, layout: Layout, stream: BinaryIO, on_bytes: Callable[[int], object] | None) -> None:
        self._layout = layout
        self._stream = stream
        self._on_bytes = on_bytes
        self._digest = hashlib.sha256()
        self.position = 0

    def cut_short(self) -> ValueError:
        return ValueError(f"{self._layout.idx_path} changed while it was read: wait for its writer")

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        if len(content) != size:
            raise self.cut_short()
        self._digest.update(content)
        self.position += size
        if self._on_bytes is not None:
            self._on_bytes(size)
        return content

    def blocks(self, count: int, dtype: np.dtype[np.integer]) -> Iterator[NDArray[np.integer]]:
        """The next `count` elements."""
        for first in range(0, count, BLOCK_ELEMENTS):
            yield np.frombuffer(self.read(min(BLOCK_ELEMENTS, count - first) * dtype.itemsize), dtype)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _check_lengths(layout: Layout, reader: _HashingReader) -> None:
    tokens = 0
    for lengths in reader.blocks(layout.num_sequences, np.dtype(np.int32)):
        if lengths.min() < 0:
            raise layout.gap_error()
        tokens += int(lengths.sum(dtype=np.int64))
    if tokens * layout.dtype.itemsize != layout.bin_bytes:
        raise layout.size_error(tokens)


def _check_offsets(layout: Layout, reader: _HashingReader) -> None:
    """Each offset is the sum of the lengths before it; those are read a second time beside it."""
    place = 0
    with open(layout.idx_path, "rb") as stream:
        stream.seek(HEADER.size)
        for offsets in reader.blocks(layout.num_sequences, np.dtype(np.int64)):
            lengths = np.frombuffer(stream.read(4 * offsets.size), np.int32)
            if lengths.size != offsets.size:
                raise reader.cut_short()
            ends = np.cumsum(lengths, dtype=np.int64)
            ends *= layout.dtype.itemsize
            ends += place
            if offsets[0] != place or not np.array_equal(offsets[1:], ends[:-1]):
                raise layout.gap_error()
            place = int(ends[-1])


def _check_boundaries(layout: Layout, reader: _HashingReader) -> None:
    """Opening has compared the first and the last; between them they must not decrease."""
    last = 0
    for boundaries in reader.blocks(layout.num_documents + 1, np.dtype(np.int64)):
        if boundaries[0] < last or (boundaries[1:] < boundaries[:-1]).any():
            raise layout.boundaries_error()
        last = int(boundaries[-1])
