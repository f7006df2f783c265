"""The two files of an indexed corpus: what stands where, and what opening them can prove.

`PREFIX.bin` holds the token ids of all sequences back to back. `PREFIX.idx`, little-endian:

| bytes | content |
|---|---|
| 9 | magic `MMIDIDX\\0\\0` |
| 8 | version, uint64, 1 |
| 1 | dtype code: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16 (6 and 7 are floats: refused) |
| 8 | S, number of sequences, uint64 |
| 8 | D + 1, number of document boundaries, uint64 |
| 4 S | tokens of each sequence, int32 |
| 8 S | byte offset of each sequence in the .bin, int64 |
| 8 (D + 1) | first sequence of each document and, last, S, int64 |
| S | modes, int8: multimodal corpora only, ignored |

Example: 3 documents of one sequence each take 34 + 12 + 24 + 32 = 102 bytes.

`read_layout` reads 70 bytes, whatever the size of the index; the rest is for `indexed_check`.
`index_blocks` writes an index.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

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
UINT16_VOCABULARY_LIMIT = 65_500  # upstream's DType.optimal_dtype
BOUNDARIES_PER_BLOCK = 1 << 19


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """dtype in which upstream stores ids of a vocabulary of this size."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCABULARY_LIMIT else np.int32)


def index_blocks(
    dtype: np.dtype[np.integer], documents: int, length_blocks: Callable[[], Iterable[NDArray[np.int32]]]
) -> Iterator[bytes]:
    """The bytes of an `.idx` whose documents are one sequence each, in blocks.

    Args:
        dtype: of the stored token ids.
        documents: D = S.
        length_blocks: the tokens of each document, in blocks; called twice, so that they need not be held.
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
    """Where the arrays of one corpus lie."""

    idx_path: Path
    """The `.idx`."""
    bin_path: Path
    """The `.bin`."""
    header: bytes
    """The first bytes of the `.idx`."""
    dtype: np.dtype[np.integer]
    """Of the stored token ids."""
    num_sequences: int
    """S."""
    num_documents: int
    """D."""
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
        """Boundaries that are no cover of the sequences."""
        return ValueError(
            f"{self.idx_path} names document boundaries that do not cover its "
            f"{self.num_sequences} sequences in order: the index is damaged, tokenize again"
        )

    def size_error(self, described_tokens: int) -> ValueError:
        """A `.bin` of another size than the index describes."""
        itemsize = self.dtype.itemsize
        return ValueError(
            f"{self.bin_path} has {self.bin_bytes} bytes but its index describes "
            f"{described_tokens} tokens of {itemsize} bytes ({described_tokens * itemsize}): "
            "one of the two is truncated or belongs to another corpus, tokenize again"
        )

    def gap_error(self) -> ValueError:
        """Sequences with gaps or overlaps."""
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
        if not path.is_file():
            unfinished = prefix.with_name(f".{prefix.name}.tokenizing")
            raise FileNotFoundError(
                f"{path} is missing: "
                + (
                    f"its tokenising was interrupted ({unfinished.name}); call tokenize_corpus.py again"
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
        bin_bytes=bin_path.stat().st_size,
    )


def _check_ends(stream: BinaryIO, layout: Layout) -> None:
    """Enough for the totals, and for the most common kinds of damage."""

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
