"""Megatron's indexed token files, read and written without Megatron.

Importing upstream's module costs about nine CPU-seconds in every worker process, so this small reader
and writer stands beside it; a test compares bytes with `megatron.core.datasets.indexed_dataset`.

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
"""

from __future__ import annotations

import array
import contextlib
import struct
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


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """dtype in which upstream stores ids of a vocabulary of this size."""
    return np.dtype(np.uint16 if vocab_size < UINT16_VOCABULARY_LIMIT else np.int32)


class IndexedTokens:
    """Read access to one corpus `PREFIX.bin` / `PREFIX.idx`, memory-mapped and checked when opened.

    Attributes:
        prefix: path without suffix.
        dtype: of the stored token ids.
        document_tokens: int32 or int64 [documents], tokens of each document.
        num_documents, num_tokens: totals.

    Raises:
        ValueError: an index that is damaged, of another format, or does not fit its `.bin`.
        FileNotFoundError: one of the two files is missing.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.idx_path = self.prefix.with_name(self.prefix.name + ".idx")
        self.bin_path = self.prefix.with_name(self.prefix.name + ".bin")
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path} is missing: a source is the common prefix of a .bin and an .idx file"
                )
        num_sequences, num_boundaries = self._read_header()
        self._map_arrays(num_sequences, num_boundaries)
        self.num_documents = num_boundaries - 1
        self.num_tokens = int(self._sequence_tokens.sum(dtype=np.int64))
        self.bin_bytes = self.bin_path.stat().st_size
        self._check_fit()
        self._bin: NDArray[np.integer] | None = None

    def _read_header(self) -> tuple[int, int]:
        size = self.idx_path.stat().st_size
        with open(self.idx_path, "rb") as stream:
            header = stream.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise ValueError(f"{self.idx_path} is not a Megatron index: tokenize the corpus again")
        _, version, code, sequences, boundaries = HEADER.unpack(header)
        if version != VERSION or code not in DTYPE_OF_CODE:
            raise ValueError(
                f"{self.idx_path} has version {version} and dtype code {code}: "
                f"only version {VERSION} with whole-number tokens is supported"
            )
        self.dtype = np.dtype(DTYPE_OF_CODE[code])
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if boundaries < 1 or size not in (expected, expected + sequences):
            raise ValueError(
                f"{self.idx_path} is {size} bytes but its header asks for {expected}: "
                "the index is damaged, tokenize the corpus again"
            )
        return sequences, boundaries

    def _map_arrays(self, num_sequences: int, num_boundaries: int) -> None:
        def view(offset: int, dtype: type[np.integer], count: int) -> NDArray[np.integer]:
            if count == 0:
                return np.zeros(0, dtype=dtype)
            return np.memmap(self.idx_path, dtype, mode="r", offset=offset, shape=(count,))

        offset = HEADER.size
        self._sequence_tokens = view(offset, np.int32, num_sequences)
        self._sequence_offsets = view(offset + 4 * num_sequences, np.int64, num_sequences)
        boundaries = view(offset + 12 * num_sequences, np.int64, num_boundaries)
        if boundaries[0] != 0 or boundaries[-1] != num_sequences or (np.diff(boundaries) < 0).any():
            raise ValueError(
                f"{self.idx_path} names document boundaries that do not cover its "
                f"{num_sequences} sequences in order: the index is damaged, tokenize again"
            )
        # Usually one sequence a document, and then no copy is made.
        self._one_sequence_each = num_boundaries == num_sequences + 1 and (np.diff(boundaries) == 1).all()
        self._boundaries = boundaries
        if self._one_sequence_each:
            self.document_tokens = self._sequence_tokens
        else:
            totals = np.concatenate(([0], np.cumsum(self._sequence_tokens, dtype=np.int64)))
            self.document_tokens = np.diff(totals[boundaries])

    def _check_fit(self) -> None:
        itemsize = self.dtype.itemsize
        if self.bin_bytes != self.num_tokens * itemsize:
            raise ValueError(
                f"{self.bin_path} has {self.bin_bytes} bytes but its index describes "
                f"{self.num_tokens} tokens of {itemsize} bytes ({self.num_tokens * itemsize}): "
                "one of the two is truncated or belongs to another corpus, tokenize again"
            )
        tokens, offsets = self._sequence_tokens, self._sequence_offsets
        contiguous = tokens.size == 0 or (
            offsets[0] == 0 and bool((np.diff(offsets) == tokens[:-1].astype(np.int64) * itemsize).all())
        )
        if not contiguous or (tokens < 0).any():
            raise ValueError(
                f"{self.idx_path} places sequences that do not lie back to back in the .bin: "
                "the index is damaged, tokenize again"
            )

    def __len__(self) -> int:
        return self.num_documents

    def read(self, document: int, start: int, count: int) -> NDArray[np.integer]:
        """Tokens [start, start + count) of a document, a view into the mapped `.bin`."""
        if self._bin is None:
            if self.num_tokens == 0:
                self._bin = np.zeros(0, dtype=self.dtype)
            else:
                self._bin = np.memmap(self.bin_path, self.dtype, mode="r")
        sequence = document if self._one_sequence_each else int(self._boundaries[document])
        first = int(self._sequence_offsets[sequence]) // self.dtype.itemsize + start
        return self._bin[first : first + count]

    def __getstate__(self) -> dict[str, object]:
        """Only the prefix travels to another process; the files are mapped again there."""
        return {"prefix": self.prefix}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["prefix"])  # type: ignore[misc]


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
        offsets = np.zeros(lengths.size, dtype=np.int64)
        np.cumsum(lengths[:-1], out=offsets[1:], dtype=np.int64)
        offsets *= self.dtype.itemsize
        code = CODE_OF_DTYPE[self.dtype]
        with open(self._idx_path, "wb") as stream:
            stream.write(HEADER.pack(MAGIC, VERSION, code, lengths.size, lengths.size + 1))
            stream.write(lengths.tobytes())
            stream.write(offsets.tobytes())
            stream.write(np.arange(lengths.size + 1, dtype=np.int64).tobytes())
