"""Megatron's indexed datasets (`.bin` and `.idx`): the format byte by byte, reading, writing and checking.

Importing Megatron's own module costs about nine CPU-seconds in every worker process, so this file reads and
writes the format without Megatron or torch; a test compares the bytes with
`megatron.core.datasets.indexed_dataset`.

`PREFIX.bin` contains the token ids of all sequences back to back. `PREFIX.idx`, little-endian:

| bytes | content |
|---|---|
| 9 | magic `MMIDIDX\\0\\0` |
| 8 | version, uint64, 1 |
| 1 | dtype code: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16 (6 and 7, floats: an error) |
| 8 | S, number of sequences, uint64 |
| 8 | D + 1, number of document boundaries, uint64 |
| 4 S | tokens of each sequence, int32 |
| 8 S | byte offset of each sequence in the .bin, int64 |
| 8 (D + 1) | first sequence of each document and, last, S, int64 |
| S | modes, int8: multimodal corpora only, ignored |

Example: 3 documents of one sequence each take 34 + 12 + 24 + 32 = 102 bytes.

Every data worker of a job opens every corpus that it reads, so opening takes constant time (`read_layout`
reads 70 bytes) and the index is never copied. What only a pass over the whole index can verify is
`IndexedTokens.check`: 100 million documents have an index of 2 GB, so packing, `--verify` and the start of
a job make that pass once. It reads blocks instead of a mapping, so that its memory does not depend on the
size of the corpus.

`IndexedWriter` writes a corpus in one go, `GrowingCorpus` over several runs of a job that may be killed.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import os
import resource
import struct
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.corpus_guard import BlockHasher, PartGuard, WatchedFile, changed_while_read
from megatron_exact.data.remote import bin_bytes, open_bin, stand_in

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in DTYPE_OF_CODE.items()}
UINT16_VOCABULARY_LIMIT = 65_500  # as in Megatron's DType.optimal_dtype
BOUNDARIES_PER_BLOCK = 1 << 19
BLOCK_ELEMENTS = 1 << 18
OPEN_FILES_A_CORPUS = 4  # an open corpus has two; the other half of those permitted stays free
INT64 = struct.Struct("<q")
READ_BACK_BYTES = 4 << 20  # a multiple of every item size
WRITE_BUFFER_BYTES = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """Return the dtype in which Megatron stores the ids of a vocabulary of this size."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCABULARY_LIMIT else np.int32)


def index_blocks(
    dtype: np.dtype[np.integer], documents: int, length_blocks: Callable[[], Iterable[NDArray[np.int32]]]
) -> Iterator[bytes]:
    """Yield the bytes of an `.idx` whose documents are one sequence each, in blocks.

    Args:
        dtype: dtype of the stored token ids.
        documents: D = S.
        length_blocks: returns the tokens of each document, in blocks; it is called twice, so that the
            lengths need not be kept in memory.
    """
    yield HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dtype], documents, documents + 1)
    for lengths in length_blocks():
        yield lengths.tobytes()
    end = 0
    for lengths in length_blocks():
        sizes = lengths.astype(np.int64) * dtype.itemsize
        ends = np.cumsum(sizes) + end
        yield (ends - sizes).tobytes()
        end += int(sizes.sum())
    for first in range(0, documents + 1, BOUNDARIES_PER_BLOCK):
        yield np.arange(first, min(first + BOUNDARIES_PER_BLOCK, documents + 1), dtype=np.int64).tobytes()


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the arrays of one corpus lie in its files."""

    idx_path: Path
    """Path of the `.idx`."""
    bin_path: Path
    """Path of the `.bin`."""
    header: bytes
    """The first bytes of the `.idx`."""
    dtype: np.dtype[np.integer]
    """dtype of the stored token ids."""
    num_sequences: int
    """Number of sequences, S."""
    num_documents: int
    """Number of documents, D."""
    idx_bytes: int
    """Size of the `.idx`."""
    bin_bytes: int
    """Size of the `.bin`."""

    @property
    def offsets_at(self) -> int:
        """Where in the `.idx` the byte offsets of the sequences begin."""
        return HEADER.size + 4 * self.num_sequences

    @property
    def boundaries_at(self) -> int:
        """Where in the `.idx` the document boundaries begin."""
        return HEADER.size + 12 * self.num_sequences

    def boundaries_error(self) -> ValueError:
        """Make the error of boundaries that do not cover the sequences."""
        return ValueError(
            f"{self.idx_path} names document boundaries that do not cover its "
            f"{self.num_sequences} sequences in order: the index is damaged, tokenize again"
        )

    def size_error(self, described_tokens: int) -> ValueError:
        """Make the error of a `.bin` whose size is not the one that the index describes."""
        itemsize = self.dtype.itemsize
        return ValueError(
            f"{self.bin_path} has {self.bin_bytes} bytes but its index describes "
            f"{described_tokens} tokens of {itemsize} bytes ({described_tokens * itemsize}): "
            "one of the two is truncated or belongs to another corpus, tokenize again"
        )

    def gap_error(self) -> ValueError:
        """Make the error of sequences with gaps or overlaps."""
        return ValueError(
            f"{self.idx_path} places sequences that do not lie back to back in the .bin: "
            "the index is damaged, tokenize again"
        )


def read_layout(prefix: Path) -> Layout:
    """Open a corpus in constant time: the header, and both ends of each array.

    Raises:
        ValueError: an index that is cut short, of another format, or does not fit its `.bin`.
        FileNotFoundError: one of the two files is missing.
    """
    idx_path, bin_path = (prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin"))
    for path in (idx_path, bin_path):
        if not path.is_file() and not stand_in(path).is_file():
            unfinished = prefix.with_name(f".{prefix.name}.tokenizing")
            raise FileNotFoundError(
                f"{path} is missing: "
                + (
                    f"its tokenizing was interrupted ({unfinished.name}); call megatron-exact tokenize "
                    "again"
                    if unfinished.is_dir()
                    else "a source is the common prefix of a .bin and an .idx file"
                )
            )
    with open(idx_path, "rb", buffering=0) as stream:
        layout = _read_header(stream, idx_path, bin_path)
        _check_ends(stream, layout)
    return layout


def _read_header(stream: BinaryIO, idx_path: Path, bin_path: Path) -> Layout:
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{idx_path} is not a Megatron index: tokenize the corpus again")
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    if version != VERSION or code not in DTYPE_OF_CODE:
        raise ValueError(
            f"{idx_path} has version {version} and dtype code {code}: "
            f"only version {VERSION} with whole-number tokens is supported"
        )
    size = idx_path.stat().st_size
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if boundaries < 1 or size not in (expected, expected + sequences):
        raise ValueError(
            f"{idx_path} is {size} bytes but its header asks for {expected}: "
            "the index is damaged, tokenize the corpus again"
        )
    return Layout(
        idx_path=idx_path,
        bin_path=bin_path,
        header=header,
        dtype=np.dtype(DTYPE_OF_CODE[code]),
        num_sequences=sequences,
        num_documents=boundaries - 1,
        idx_bytes=size,
        bin_bytes=bin_bytes(bin_path),
    )


def _check_ends(stream: BinaryIO, layout: Layout) -> None:
    """Check what the totals need, which also finds the most common kinds of damage."""

    def read(place: int, form: str) -> tuple[int, ...]:
        stream.seek(place)
        return struct.unpack(form, stream.read(struct.calcsize(form)))

    (first_boundary,) = read(layout.boundaries_at, "<q")
    (last_boundary,) = read(layout.boundaries_at + 8 * layout.num_documents, "<q")
    if first_boundary != 0 or last_boundary != layout.num_sequences:
        raise layout.boundaries_error()
    described_bytes, first_offset, itemsize = 0, 0, layout.dtype.itemsize
    if layout.num_sequences:
        last_length, first_offset = read(layout.offsets_at - 4, "<iq")  # one ends where the other begins
        (last_offset,) = read(layout.boundaries_at - 8, "<q")
        described_bytes = last_offset + last_length * itemsize
    if described_bytes != layout.bin_bytes:
        raise layout.size_error(described_bytes // itemsize)
    if first_offset != 0 or described_bytes % itemsize:
        raise layout.gap_error()


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
        """Yield the next `count` elements in blocks."""
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
    """Check that each offset is the sum of the lengths before it, which are read a second time for this."""
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
    """Check that boundaries do not decrease; opening has compared the first and the last one."""
    last = 0
    for boundaries in reader.blocks(layout.num_documents + 1, np.dtype(np.int64)):
        if boundaries[0] < last or (boundaries[1:] < boundaries[:-1]).any():
            raise layout.boundaries_error()
        last = int(boundaries[-1])


Place = tuple["IndexedTokens", int, int]
"""Corpus, first byte in its `.bin`, bytes."""


def will_need(places: Iterable[Place]) -> None:
    """Ask for the bytes of several places of any corpora, without waiting for them."""
    ranges: dict[IndexedTokens, list[tuple[int, int]]] = {}
    for part, begin, size in places:
        ranges.setdefault(part, []).append((begin, size))
    for part, mine in ranges.items():
        part.will_need(*mine)


@dataclass(frozen=True, kw_only=True)
class _Files:
    """The open files of one corpus."""

    index: WatchedFile
    """The `.idx`."""
    tokens: WatchedFile
    """The `.bin`."""


class IndexedTokens:
    """Read access to one corpus `PREFIX.bin` / `PREFIX.idx`, opened at the first read.

    A pickle contains the prefix alone. Nothing is mapped or kept in memory: a corpus costs a data worker
    only those pages of the kernel's cache that it reads. `protect` sets what the content must be.

    Attributes:
        prefix: path without suffix.
        idx_path: path of the `.idx`.
        bin_path: path of the `.bin`.
        dtype: dtype of the stored token ids.
        num_documents: documents of the corpus.
        num_tokens: tokens of the corpus.
        idx_bytes: size of the `.idx`.
        bin_bytes: size of the `.bin`.

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
        """Verify that sequences lie back to back in the `.bin` and that documents cover them in order.

        Reads the whole index once, in bounded memory.

        Args:
            on_bytes: called after each block with its size; they sum to `idx_bytes`.

        Returns:
            Hex sha256 of the `.idx`.

        Raises:
            ValueError: the index is damaged, or does not fit its `.bin`.
        """
        layout = self._layout
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

    def protect(self, guard: PartGuard) -> None:
        """Compare the content with a guard from now on: blocks as they are read, files when they change."""
        self._guard = guard

    def read(self, document: int, start: int, count: int) -> NDArray[np.integer]:
        """Read the tokens [start, start + count) of a document; the array is read-only.

        Args:
            document: number in [0, num_documents).
            start: first token inside the document.
            count: number of tokens.

        Raises:
            ValueError: the index places them outside the `.bin`, or the content is not what was packed.
        """
        return self.fetch(self.place(document, start, count))

    def place(self, document: int, start: int, count: int) -> Place:
        """Return where tokens lie in the `.bin`.

        A caller that needs several ranges calls `will_need` with all places before the first `fetch`; one
        after the other, each would wait for the disk or for the network.
        """
        files = self._files or self._open()
        begin = self._byte_offset(files, document) + start * self.dtype.itemsize
        size = count * self.dtype.itemsize
        if begin < 0 or begin + size > self.bin_bytes:
            raise self._layout.gap_error()
        return self, begin, size

    def will_need(self, *ranges: tuple[int, int]) -> None:
        """Ask for (first byte, bytes) of the `.bin`: of the kernel, or of a remote store."""
        files = self._files or self._open()
        files.tokens.will_need(*ranges)

    def fetch(self, place: Place) -> NDArray[np.integer]:
        """Read the tokens at a place of this corpus."""
        files = self._files or self._open()
        _, begin, size = place
        if self._guard is not None:
            self._guard.require_blocks(files.tokens, begin, size)
        return np.frombuffer(files.tokens.read(begin, size), self.dtype)

    def is_as_opened(self) -> bool:
        """Return whether what was read since the last call is valid; call this after reading.

        It is if size and time of both files have not changed. A file that was written to meanwhile is
        compared again, the index at once and the tokens as they are read; the caller must then read again.

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
                self._guard.compare_again(file, self.check)
                file.accept_change()
        return False

    def tokens_of(self, document: int) -> int:
        """Return the tokens of one document in [0, num_documents), in constant time."""
        files = self._files or self._open()
        size = self._byte_offset(files, document + 1) - self._byte_offset(files, document)
        return size // self.dtype.itemsize

    def _byte_offset(self, files: _Files, document: int) -> int:
        """Return where a document begins in the `.bin`; document number D begins at the end of the file."""
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
        """Map an array of the index; an empty one cannot be mapped."""
        if count == 0:
            return np.zeros(0, dtype)
        return np.memmap(self.idx_path, dtype, "r", offset, count).view(np.ndarray)

    def _is_one_sequence_each(self) -> bool:
        count = self.num_documents + 1
        if count != self._layout.num_sequences + 1:
            return False
        with open(self.idx_path, "rb") as stream:  # no mapping: its pages would stay resident
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
            tokens=open_bin(self.bin_path, bin_stamp),
        )
        _release_beyond_limit(self)
        return self._files

    def release(self) -> None:
        """Close both files. Returned arrays stay valid, and the next read opens the files again."""
        self._files = None
        self._document_tokens = None

    def __getstate__(self) -> dict[str, object]:
        """Only the prefix travels to another process; the files are opened again there."""
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["prefix"])  # type: ignore[misc]


_opened: deque[weakref.ref[IndexedTokens]] = deque()  # corpora with open files, the oldest first


def _release_beyond_limit(corpus: IndexedTokens) -> None:
    """Note that `corpus` is open, and close the oldest ones beyond what `ulimit -n` permits.

    A corpus may have thousands of shards. Opening one again costs about 0.1 ms, so raise the limit where
    there are many shards.
    """
    _opened.append(weakref.ref(corpus))
    permitted, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(1, permitted // OPEN_FILES_A_CORPUS)
    while len(_opened) > limit:
        oldest = _opened.popleft()()
        if oldest is not None and oldest is not corpus:
            oldest.release()


class IndexedWriter:
    """Write one corpus, one sequence per document, in the order of the calls.

    The two files are written under the given names. The caller makes this atomic: it writes to a temporary
    place and renames both, the `.idx` last.
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


@dataclass(frozen=True, kw_only=True)
class CorpusTotals:
    """What a `GrowingCorpus` contains."""

    documents: int = 0
    """Documents so far."""
    tokens: int = 0
    """Tokens so far."""
    bin_digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    """sha256 of the bytes of the tokens; copied, never updated in place."""
    largest_id: int = -1
    """Largest token id so far, -1 before the first."""
    bin_blocks: BlockHasher = field(default_factory=BlockHasher)
    """sha256 of each block of these bytes."""


class GrowingCorpus:
    """A corpus that is written over several runs: appended, flushed, cut back to a journal entry.

    Memory does not grow with the number of documents: the index is written from the file of lengths.

    Args:
        folder: existing folder of `bin` (tokens) and `lengths` (int32, one a document); both are made if
            missing.
        dtype: dtype of the stored token ids.

    Attributes:
        totals: what `add` has appended; replaced as a whole, so that an interrupt finds it consistent.
    """

    def __init__(self, folder: Path, dtype: np.dtype[np.integer]) -> None:
        self.dtype = dtype
        self.bin_path, self._lengths_path = folder / "bin", folder / "lengths"
        self.totals = CorpusTotals()
        with contextlib.ExitStack() as stack:
            self._bin = stack.enter_context(_open_for_update(self.bin_path))
            self._lengths = stack.enter_context(_open_for_update(self._lengths_path))
            self._files = stack.pop_all()

    def restore(
        self, documents: int, tokens: int, bin_sha256: str, on_bytes: Callable[[int], object]
    ) -> None:
        """Cut both files to what the journal says, and verify what remains.

        Args:
            documents, tokens, bin_sha256: the numbers and the hash of the last journal entry.
            on_bytes: called with the number of bytes after each block.

        Raises:
            ValueError: fewer or other bytes than the journal says.
        """
        damaged = ValueError(
            f"{self.bin_path.parent} does not contain the {documents:,} documents of {tokens:,} tokens of "
            "its journal: the disk lost something, remove that folder to start over"
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
        """Append documents.

        Args:
            ids: [tokens] of `dtype`, documents back to back.
            lengths: [documents], tokens of each.
        """
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
        """Flush everything that was appended to disk."""
        for stream in (self._bin, self._lengths):
            stream.flush()
            os.fsync(stream.fileno())

    def write_index(self, path: Path) -> str:
        """Write the `.idx` to `path`, flush it to disk, and return its hex sha256."""
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
        """Close both files, even if their buffers cannot be written."""
        with contextlib.suppress(OSError):  # the disk is full: that error was raised by `add` already
            self._files.close()


def _open_for_update(path: Path) -> BinaryIO:
    path.touch()
    return open(path, "r+b", buffering=WRITE_BUFFER_BYTES)


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    stream.seek(0)
    while block := stream.read(READ_BACK_BYTES):
        yield block
