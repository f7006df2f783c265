"""The tokens of an unfinished corpus on disk: what stands there up to a journal entry is never lost.

Tokens and the lengths of their documents are appended to two files and reach the disk before the journal
says so. Going on after a kill, everything beyond the last entry is cut off and the rest is hashed again.
Memory does not grow with the number of documents: the index is written from the file of lengths.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.corpus_guard import BlockHasher
from megatron_exact.data.indexed_format import index_blocks

BLOCK_BYTES = 4 << 20  # a multiple of every item size
WRITE_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CorpusTotals:
    """What has been appended."""

    documents: int = 0
    """Documents."""
    tokens: int = 0
    """Their tokens."""
    bin_digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    """sha256 of the tokens' bytes; copied, never updated in place."""
    largest_id: int = -1
    """Of the tokens."""
    bin_blocks: BlockHasher = field(default_factory=BlockHasher)
    """The same of each block."""


class GrowingCorpus:
    """Append-only tokens and lengths in a folder.

    Args:
        folder: holds `bin` (tokens of `dtype`) and `lengths` (int32, one a document); made if missing.
        dtype: of the stored token ids.

    Attributes:
        totals: what `add` has appended; replaced as a whole, so that an interrupt finds it consistent.
    """

    def __init__(self, folder: Path, dtype: np.dtype[np.integer]) -> None:
        self.dtype = dtype
        self.bin_path, self._lengths_path = folder / "bin", folder / "lengths"
        self.totals = CorpusTotals()
        with contextlib.ExitStack() as stack:
            self._bin = stack.enter_context(_open(self.bin_path))
            self._lengths = stack.enter_context(_open(self._lengths_path))
            self._files = stack.pop_all()

    def restore(
        self, documents: int, tokens: int, bin_sha256: str, on_bytes: Callable[[int], object]
    ) -> None:
        """Cut both files to what the journal says, and prove that it is still there.

        Args:
            documents, tokens, bin_sha256: of the journal.
            on_bytes: called with the number of bytes after each block.

        Raises:
            ValueError: less or other bytes than the journal says.
        """
        damaged = ValueError(
            f"{self.bin_path.parent} does not hold the {documents:,} documents of {tokens:,} tokens of its "
            "journal: the disk lost something, remove that folder to start over"
        )
        for stream, size in ((self._bin, tokens * self.dtype.itemsize), (self._lengths, documents * 4)):
            if os.fstat(stream.fileno()).st_size < size:
                raise damaged
            stream.truncate(size)
        digest, blocks = hashlib.sha256(), BlockHasher()
        largest = -1
        for block in _blocks(self._bin):
            digest.update(block)
            blocks.update(block)
            if len(block) % self.dtype.itemsize == 0:
                largest = max(largest, int(np.frombuffer(block, self.dtype).max()))
            on_bytes(len(block))
        summed = sum(int(lengths.sum(dtype=np.int64)) for lengths in self._length_blocks())
        if digest.hexdigest() != bin_sha256 or summed != tokens:
            raise damaged
        for stream in (self._bin, self._lengths):
            stream.seek(0, os.SEEK_END)
        self.totals = CorpusTotals(
            documents=documents,
            tokens=tokens,
            bin_digest=digest,
            bin_blocks=blocks,
            largest_id=largest,
        )

    def add(self, ids: NDArray[np.integer], lengths: NDArray[np.int32]) -> None:
        """Append documents: [tokens] of `dtype` back to back, and [documents] how many each has."""
        self._bin.write(np.ascontiguousarray(ids, self.dtype))
        self._lengths.write(np.ascontiguousarray(lengths, np.int32))
        digest, blocks = self.totals.bin_digest.copy(), self.totals.bin_blocks.copy()
        digest.update(np.ascontiguousarray(ids, self.dtype))
        blocks.update(np.ascontiguousarray(ids, self.dtype).data)
        self.totals = CorpusTotals(
            documents=self.totals.documents + len(lengths),
            tokens=self.totals.tokens + len(ids),
            bin_digest=digest,
            bin_blocks=blocks,
            largest_id=max(self.totals.largest_id, int(ids.max())) if len(ids) else self.totals.largest_id,
        )

    def sync(self) -> None:
        """Everything that was appended is on disk when this returns."""
        for stream in (self._bin, self._lengths):
            stream.flush()
            os.fsync(stream.fileno())

    def write_index(self, path: Path) -> str:
        """Write the `.idx` to `path`, flushed to disk; returns its hex sha256."""
        self._lengths.flush()
        count = self.totals.documents
        digest = hashlib.sha256()
        with open(path, "wb", buffering=WRITE_BUFFER_BYTES) as stream:
            for block in index_blocks(self.dtype, count, self._length_blocks):
                stream.write(block)
                digest.update(block)
            stream.flush()
            os.fsync(stream.fileno())
        return digest.hexdigest()

    def _length_blocks(self) -> Iterator[NDArray[np.int32]]:
        for block in _blocks(self._lengths):
            yield np.frombuffer(block, np.int32)

    def close(self) -> None:
        """Close both files, whatever is still in their buffers."""
        with contextlib.suppress(OSError):  # the disk is full: that error was raised by `add` already
            self._files.close()


def _open(path: Path) -> BinaryIO:
    path.touch()
    return open(path, "r+b", buffering=WRITE_BUFFER_BYTES)


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    stream.seek(0)
    while block := stream.read(BLOCK_BYTES):
        yield block
