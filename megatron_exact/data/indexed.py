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
import resource
import struct
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.corpus_guard import PartGuard, changed_while_read
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
from megatron_exact.data.watched_file import WatchedFile

__all__ = [
    "CODE_OF_DTYPE",
    "HEADER",
    "MAGIC",
    "VERSION",
    "IndexedTokens",
    "IndexedWriter",
    "token_dtype",
]

OPEN_FILES_A_CORPUS = 4  # an open corpus holds two; the other half of those permitted stays free
INT64 = struct.Struct("<q")


Place = tuple["IndexedTokens", int, int]
"""Corpus, first byte in its `.bin`, bytes."""


@dataclass(frozen=True, kw_only=True)
class _Files:
    """The open files of one corpus."""

    index: WatchedFile
    """The `.idx`."""
    tokens: WatchedFile
    """The `.bin`."""


class IndexedTokens:
    """Read access to one corpus `PREFIX.bin` / `PREFIX.idx`, opened at the first read.

    A pickle holds the prefix alone. Nothing is mapped or kept: what a corpus costs a data worker is pages
    of the kernel's cache, those that it reads. `protect` says what the content has to be.

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
        self._files: _Files | None = None
        self._guard: PartGuard | None = None
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

    def protect(self, guard: PartGuard) -> None:
        """Compare the content with what it has to be: blocks as they are read, files when they change."""
        self._guard = guard

    def read(self, document: int, start: int, count: int) -> NDArray[np.integer]:
        """Tokens [start, start + count) of a document, read-only.

        Args:
            document: in [0, num_documents).
            start: first token inside the document.
            count: number of tokens.

        Raises:
            ValueError: the index places them outside the `.bin`, or the content is not what it has to be.
        """
        return self.fetch(self.place(document, start, count))

    def place(self, document: int, start: int, count: int) -> Place:
        """Where tokens lie in the `.bin`; the kernel is asked to fetch them and does not wait for them.

        Who needs several asks for all places before the first `fetch`; one after the other, each would wait
        for the disk.
        """
        files = self._files or self._open()
        begin = self._byte_offset(files, document) + start * self.dtype.itemsize
        size = count * self.dtype.itemsize
        if begin < 0 or begin + size > self.bin_bytes:
            raise self._layout.gap_error()
        files.tokens.will_need(begin, size)
        return self, begin, size

    def fetch(self, place: Place) -> NDArray[np.integer]:
        """The tokens at a place of this corpus."""
        files = self._files or self._open()
        _, begin, size = place
        if self._guard is not None:
            self._guard.require_blocks(files.tokens, begin, size)
        return np.frombuffer(files.tokens.read(begin, size), self.dtype)

    def is_as_opened(self) -> bool:
        """Whether what was read since the last call can be believed; looked at after reading, not before.

        A file whose size and time have not changed can. Of one that was written to meanwhile everything is
        compared again: the index at once, the tokens as they are read, so what was read must be read again.

        Raises:
            ValueError: a file whose content has changed, or cannot be compared.
        """
        files = self._files
        if files is None or not (files.index.has_changed() or files.tokens.has_changed()):
            return True
        for file in (files.index, files.tokens):
            if file.has_changed():
                file.require_size()
                if self._guard is None:
                    raise changed_while_read(file.path)
                self._guard.compare_again(file, self)
                file.accept_change()
        return False

    def tokens_of(self, document: int) -> int:
        """Tokens of one document in [0, num_documents), in constant time."""
        files = self._files or self._open()
        size = self._byte_offset(files, document + 1) - self._byte_offset(files, document)
        return size // self.dtype.itemsize

    def _byte_offset(self, files: _Files, document: int) -> int:
        """Where a document begins in the `.bin`; document number D begins at its end."""
        (sequence,) = INT64.unpack(files.index.read(self._layout.boundaries_at + 8 * document, 8))
        if sequence == self._layout.num_sequences:
            return self.bin_bytes
        if not 0 <= sequence < self._layout.num_sequences:
            raise self._layout.boundaries_error()
        (offset,) = INT64.unpack(files.index.read(self._layout.offsets_at + 8 * sequence, 8))
        return int(offset)

    @property
    def document_tokens(self) -> NDArray[np.integer]:
        """int32 or int64 [documents], tokens of each; the first use reads all boundaries.

        Where each document is one sequence, as usual, this is a mapping of the index.
        """
        if self._document_tokens is None:
            if self._is_one_sequence_each():
                self._document_tokens = self._map("<i4", HEADER.size, self._layout.num_sequences)
            else:
                self._document_tokens = self._summed_document_tokens()
        return self._document_tokens

    def _map(self, dtype: str, offset: int, count: int) -> NDArray[np.integer]:
        """An array of the index; an empty one cannot be mapped."""
        if count == 0:
            return np.zeros(0, dtype)
        return np.memmap(self.idx_path, dtype, "r", offset, count).view(np.ndarray)

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

    def _summed_document_tokens(self) -> NDArray[np.int64]:
        tokens = np.zeros(self.num_documents, dtype=np.int64)
        boundaries = self._map("<i8", self._layout.boundaries_at, self.num_documents + 1)
        offsets = self._map("<i8", self._layout.offsets_at, self._layout.num_sequences)
        for first in range(0, self.num_documents if offsets.size else 0, BLOCK_ELEMENTS):
            sequences = boundaries[first : first + BLOCK_ELEMENTS + 1]
            begins = offsets[np.minimum(sequences, offsets.size - 1)]
            begins[sequences == offsets.size] = self.bin_bytes
            tokens[first : first + BLOCK_ELEMENTS] = np.diff(begins) // self.dtype.itemsize
        return tokens

    def _open(self) -> _Files:
        idx_stamp, bin_stamp = (None, None) if self._guard is None else self._guard.stamps
        self._files = _Files(
            index=WatchedFile(self.idx_path, idx_stamp, is_random=True),
            tokens=WatchedFile(self.bin_path, bin_stamp, is_random=True),
        )
        _release_beyond_limit(self)
        return self._files

    def release(self) -> None:
        """Close both files. Arrays handed out stay valid, and the next read opens the files again."""
        self._files = None
        self._document_tokens = None

    def __getstate__(self) -> dict[str, object]:
        """Only the prefix travels to another process; the files are opened again there."""
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["prefix"])  # type: ignore[misc]


_opened: deque[weakref.ref[IndexedTokens]] = deque()  # those that hold files open, the oldest first


def _release_beyond_limit(corpus: IndexedTokens) -> None:
    """Note that `corpus` is open and close the oldest beyond what `ulimit -n` permits.

    A corpus may have thousands of shards. Opening one again costs some 0.1 ms: with many shards, raise the
    limit instead.
    """
    _opened.append(weakref.ref(corpus))
    permitted, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(1, permitted // OPEN_FILES_A_CORPUS)
    while len(_opened) > limit:
        oldest = _opened.popleft()()
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
