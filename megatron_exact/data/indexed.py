"""Megatron's indexed token files, read and written without Megatron.

Importing upstream's module costs about nine CPU-seconds in every worker process, so this small reader
and writer stands beside it; a test compares bytes with `megatron.core.datasets.indexed_dataset`. The
format is described in `indexed_format`.

Every data worker of a job opens every corpus that it reads, so opening takes constant time and the index
is never copied. What only a pass over the whole index can prove is `IndexedTokens.check`.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import resource
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.indexed_check import BLOCK_ELEMENTS, check_index
from megatron_exact.data.indexed_format import (
    CODE_OF_DTYPE,
    HEADER,
    MAGIC,
    VERSION,
    Layout,
    index_blocks,
    read_layout,
    token_dtype,
)

__all__ = [
    "CODE_OF_DTYPE",
    "HEADER",
    "MAGIC",
    "VERSION",
    "IndexedTokens",
    "IndexedWriter",
    "token_dtype",
]

OPEN_FILES_A_CORPUS = 4  # a mapped corpus holds two; the other half of those permitted stays free


@dataclass(frozen=True, kw_only=True)
class _Maps:
    """The mapped files of one corpus. An element of a memoryview is a Python int, at once."""

    sequence_tokens: memoryview
    """int32 [sequences]."""
    sequence_offsets: memoryview
    """int64 [sequences], bytes."""
    boundaries: memoryview
    """int64 [documents + 1]."""
    tokens: NDArray[np.integer]
    """[tokens], the whole `.bin`."""
    file: mmap.mmap | bytes
    """The same, as it was mapped."""


class IndexedTokens:
    """Read access to one corpus `PREFIX.bin` / `PREFIX.idx`, memory-mapped at the first read.

    A pickle holds the prefix alone and a forked process shares the maps: what a corpus costs a data
    worker is pages of the page cache, those that it reads.

    Attributes:
        prefix, idx_path, bin_path: path without suffix, and with each.
        dtype: of the stored token ids.
        num_documents, num_tokens: totals.
        idx_bytes, bin_bytes: sizes of the two files.

    Raises:
        ValueError: an index that is cut short, of another format, or does not fit its `.bin`.
        FileNotFoundError: one of the two files is missing.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self._layout: Layout = read_layout(self.prefix)
        self.idx_path = self._layout.idx_path
        self.bin_path = self._layout.bin_path
        self.dtype = self._layout.dtype
        self.num_documents = self._layout.num_documents
        self.num_tokens = self._layout.bin_bytes // self.dtype.itemsize
        self.idx_bytes = self._layout.idx_bytes
        self.bin_bytes = self._layout.bin_bytes
        self._maps: _Maps | None = None
        self._document_tokens: NDArray[np.integer] | None = None

    def __len__(self) -> int:
        return self.num_documents

    def check(self, on_bytes: Callable[[int], object] | None = None) -> str:
        """Prove the whole index, reading it once in bounded memory; see `indexed_check.check_index`.

        Args:
            on_bytes: called after each block with its size; they sum to `idx_bytes`.

        Returns:
            Hex sha256 of the `.idx`.

        Raises:
            ValueError: the index is damaged, or does not fit its `.bin`.
        """
        return check_index(self._layout, on_bytes)

    def read(self, document: int, start: int, count: int) -> NDArray[np.integer]:
        """Tokens [start, start + count) of a document: a read-only view into the mapped `.bin`.

        The kernel is asked to fetch them and does not wait for them. Who needs several asks for all
        views before looking into the first; one after the other, each would wait for the disk.

        Args:
            document: in [0, num_documents).
            start, count: tokens inside the document.

        Raises:
            ValueError: the index places them outside the `.bin`.
        """
        maps = self._maps or self._map()
        first = self._byte_offset(maps, document) // self.dtype.itemsize + start
        found = maps.tokens[first : first + count]
        if found.size != count:
            raise self._layout.gap_error()
        if isinstance(maps.file, mmap.mmap):
            begin = first * self.dtype.itemsize
            page = begin - begin % mmap.PAGESIZE
            maps.file.madvise(mmap.MADV_WILLNEED, page, begin + found.nbytes - page)
        return found

    def tokens_of(self, document: int) -> int:
        """Tokens of one document in [0, num_documents), in constant time."""
        maps = self._maps or self._map()
        size = self._byte_offset(maps, document + 1) - self._byte_offset(maps, document)
        return size // self.dtype.itemsize

    def _byte_offset(self, maps: _Maps, document: int) -> int:
        """Where a document begins in the `.bin`; document number D begins at its end."""
        sequence = maps.boundaries[document]
        if sequence == self._layout.num_sequences:
            return self.bin_bytes
        return int(maps.sequence_offsets[sequence])

    @property
    def document_tokens(self) -> NDArray[np.integer]:
        """int32 or int64 [documents], tokens of each; the first use reads all boundaries.

        Where each document is one sequence, as usual, this is a view of the mapped index.
        """
        if self._document_tokens is None:
            maps = self._maps or self._map()
            if self._is_one_sequence_each():
                self._document_tokens = np.frombuffer(maps.sequence_tokens, np.int32)
            else:
                self._document_tokens = self._summed_document_tokens(maps)
        return self._document_tokens

    def _is_one_sequence_each(self) -> bool:
        count = self.num_documents + 1
        if count != self._layout.num_sequences + 1:
            return False
        with open(self.idx_path, "rb") as stream:  # not through the map: its pages would stay resident
            stream.seek(self._layout.boundaries_at)
            for first in range(0, count, BLOCK_ELEMENTS):
                expected = np.arange(first, min(first + BLOCK_ELEMENTS, count))
                if not np.array_equal(np.frombuffer(stream.read(expected.nbytes), np.int64), expected):
                    return False
        return True

    def _summed_document_tokens(self, maps: _Maps) -> NDArray[np.int64]:
        tokens = np.zeros(self.num_documents, dtype=np.int64)
        boundaries = np.frombuffer(maps.boundaries, np.int64)
        offsets = np.frombuffer(maps.sequence_offsets, np.int64)
        for first in range(0, self.num_documents if offsets.size else 0, BLOCK_ELEMENTS):
            sequences = boundaries[first : first + BLOCK_ELEMENTS + 1]
            begins = offsets[np.minimum(sequences, offsets.size - 1)]
            begins[sequences == offsets.size] = self.bin_bytes
            tokens[first : first + BLOCK_ELEMENTS] = np.diff(begins) // self.dtype.itemsize
        return tokens

    def _map(self) -> _Maps:
        layout = self._layout
        index = memoryview(_map_file(self.idx_path, layout.idx_bytes))
        tokens = _map_file(self.bin_path, layout.bin_bytes)
        if isinstance(tokens, mmap.mmap):
            # Or each first touch of a page reads all around it, up to megabytes, for a few hundred tokens.
            tokens.madvise(mmap.MADV_RANDOM)
        boundaries_end = layout.boundaries_at + 8 * (layout.num_documents + 1)
        self._maps = _Maps(
            sequence_tokens=index[HEADER.size : layout.offsets_at].cast("i"),
            sequence_offsets=index[layout.offsets_at : layout.boundaries_at].cast("q"),
            boundaries=index[layout.boundaries_at : boundaries_end].cast("q"),
            tokens=np.frombuffer(tokens, self.dtype),
            file=tokens,
        )
        _release_beyond_limit(self)
        return self._maps

    def release(self) -> None:
        """Close both files. Arrays handed out stay valid, and the next read opens the files again."""
        self._maps = None
        self._document_tokens = None

    def __getstate__(self) -> dict[str, object]:
        """Only the prefix travels to another process; the files are opened again there."""
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["prefix"])  # type: ignore[misc]


def _map_file(path: Path, size: int) -> mmap.mmap | bytes:
    """The first `size` bytes of a file, for reading; an empty file cannot be mapped."""
    if size == 0:
        return b""
    with open(path, "rb") as stream:
        return mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)


_mapped: deque[weakref.ref[IndexedTokens]] = deque()  # those that hold files open, the oldest first


def _release_beyond_limit(corpus: IndexedTokens) -> None:
    """Note that `corpus` is mapped and close the oldest beyond what `ulimit -n` permits.

    Before Python 3.13 a map holds a file descriptor, and a corpus may have thousands of shards. Opening
    one again costs some 0.1 ms: with many shards, raise the limit instead.
    """
    _mapped.append(weakref.ref(corpus))
    permitted, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(1, permitted // OPEN_FILES_A_CORPUS)
    while len(_mapped) > limit:
        oldest = _mapped.popleft()()
        if oldest is not None and oldest is not corpus:
            oldest.release()


class IndexedWriter:
    """Write one corpus, one sequence a document, in the order of the calls.

    The two files are written under the names given; atomicity is the caller's (build in a temporary
    place, rename both, `.idx` last).
    """

    def __init__(self, bin_path: str | Path, idx_path: str | Path, vocab_size: int) -> None:
        self.dtype = token_dtype(vocab_size)
        self._idx_path = Path(idx_path)
        self._bin: BinaryIO = open(bin_path, "wb", buffering=1 << 20)  # noqa: SIM115
        self._lengths = array.array("i")
        self.num_tokens = 0

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add(self, tokens: NDArray[np.integer]) -> None:
        """Append one document: integers [tokens]."""
        self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._lengths.append(len(tokens))
        self.num_tokens += len(tokens)

    def abort(self) -> None:
        """Close the unfinished `.bin` without an error; no `.idx` is written."""
        with contextlib.suppress(OSError):  # the disk is full: that error was raised by `add` already
            self._bin.close()

    def close(self) -> None:
        """Finish the `.bin` and write the `.idx`."""
        self._bin.close()
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        with open(self._idx_path, "wb") as stream:
            stream.writelines(index_blocks(self.dtype, lengths.size, lambda: (lengths,)))
