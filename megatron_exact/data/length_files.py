"""Document lengths without a corpus: a sample of lengths, a histogram counted elsewhere, an index alone.

| suffix | content |
|---|---|
| `.idx` | the index of a corpus; its `.bin` is not looked at |
| `.npy` | whole numbers [documents], one length each |
| `.txt` | one length a line |
| `.csv` | `length,count` a line, with or without that head |
| `.json` | `{"length": count, ...}` or `[[length, count], ...]` |
"""

from __future__ import annotations

import csv
import operator
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.indexed_format import HEADER, MAGIC
from megatron_exact.data.length_histogram import LengthHistogram, require_countable
from megatron_exact.json_input import read_json

SAMPLE_SUFFIXES = (".npy", ".txt")
LENGTH_SUFFIXES = (*SAMPLE_SUFFIXES, ".csv", ".json", ".idx")
NPY_MAGIC = b"\x93NUMPY"
BLOCK_BYTES = 16 << 20
MAX_TOKENS = 1 << 40  # of one document


def is_length_file(path: Path) -> bool:
    """Whether `path` is named like a file of lengths, and not like the prefix of a corpus."""
    return path.suffix in LENGTH_SUFFIXES and not path.with_name(path.name + ".idx").exists()


def read_length_file(path: Path) -> LengthHistogram:
    """Read a sample or a histogram of document lengths, or those in an index.

    Raises:
        ValueError: nothing in it, another format, or a length or count that no corpus can have.
        FileNotFoundError: there is no such file.
    """
    readers = (_read_npy, _read_text, _read_csv, _read_json, _read_index)
    histogram = dict(zip(LENGTH_SUFFIXES, readers, strict=True))[path.suffix](path)
    if not histogram.documents:
        raise _no_length(path)
    if histogram.longest > MAX_TOKENS:
        raise ValueError(f"{path} has a document of {histogram.longest} tokens: at most 2^40 are possible")
    require_countable(float(histogram.lengths.astype(np.float64) @ histogram.counts), str(path))
    return histogram


def _no_length(path: Path) -> ValueError:
    return ValueError(f"{path} holds no length: give at least one document")


def _read_npy(path: Path) -> LengthHistogram:
    with open(path, "rb") as stream:
        is_npy = stream.read(len(NPY_MAGIC)) == NPY_MAGIC
    try:
        if not is_npy:
            raise ValueError("it does not begin as one")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not array.size:
            return LengthHistogram.empty()
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise ValueError(f"{path} is no .npy file of numbers ({error}): save it with numpy.save") from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{path} holds {array.dtype} {array.shape}: one whole number a document is needed")
    _require_positive(path, int(array.min()))
    return LengthHistogram.of(array)


def _read_text(path: Path) -> LengthHistogram:
    def blocks() -> Iterator[NDArray[np.int64]]:
        number = 0
        with open(path, encoding="utf-8") as stream:
            while lines := stream.readlines(BLOCK_BYTES):
                try:
                    block = np.array([int(line) for line in lines if not line.isspace()], dtype=np.int64)
                except (ValueError, OverflowError):
                    bad = next(i for i, line in enumerate(lines) if not _is_length(line))
                    raise ValueError(
                        f"{path} line {number + bad + 1}: {lines[bad].strip()[:40]!r} is no whole number: "
                        "give one length a line (a histogram has the suffix .csv or .json)"
                    ) from None
                number += len(lines)
                _require_positive(path, int(np.min(block, initial=1)))
                yield block

    return LengthHistogram.of_chunks(_text_errors(path, blocks()))


def _is_length(line: str) -> bool:
    try:
        return line.isspace() or -(1 << 63) <= int(line) < 1 << 63
    except ValueError:
        return False


def _text_errors[Item](path: Path, items: Iterable[Item]) -> Iterator[Item]:
    """The same items; bytes that are no text become an error that names the file."""
    try:
        yield from items
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text ({error.reason}): give the suffix that its format has"
        ) from None


def _read_csv(path: Path) -> LengthHistogram:
    with open(path, encoding="utf-8", newline="") as stream:
        lines = list(_text_errors(path, csv.reader(stream)))
    if lines and [cell.strip() for cell in lines[0]] == ["length", "count"]:
        lines = lines[1:]
    return _from_pairs(path, [line for line in lines if line])


def _read_json(path: Path) -> LengthHistogram:
    content = read_json(path, "write the histogram again")
    if not isinstance(content, dict | list):
        raise ValueError(f'{path} holds neither {{"length": count}} nor [[length, count]] pairs')
    return _from_pairs(path, list(content.items()) if isinstance(content, dict) else content)


def _from_pairs(path: Path, pairs: list[Any]) -> LengthHistogram:
    lengths, counts = [], []
    for number, pair in enumerate(pairs, start=1):
        try:
            length, count = (_whole_number(value) for value in pair)
        except (TypeError, ValueError):
            raise ValueError(
                f"{path}, pair {number}: {str(pair)[:60]} is not a length and a count, both whole numbers"
            ) from None
        _require_positive(path, length)
        if not 0 <= count < 1 << 50:
            raise ValueError(f"{path}: {count} documents of {length} tokens: a count lies in [0, 2^50)")
        lengths.append(min(length, MAX_TOKENS + 1))
        counts.append(count)
    require_countable(sum(map(operator.mul, lengths, counts)), str(path))  # before sums can wrap around
    whole = LengthHistogram(lengths=np.array(lengths, np.int64), counts=np.array(counts, np.int64))
    merged = LengthHistogram.merged([whole])
    occurs = merged.counts > 0
    return LengthHistogram(lengths=merged.lengths[occurs], counts=merged.counts[occurs])


def _read_index(path: Path) -> LengthHistogram:
    lengths = _index_lengths(path)
    return LengthHistogram.of(lengths[lengths > 0])


def read_index_lengths(path: Path) -> NDArray[np.integer]:
    """Tokens of each document of an `.idx` whose `.bin` is not looked at.

    Returns:
        int32 or int64 [documents], in order, 0 for one without a token; mapped where each document is one
        sequence.

    Raises:
        ValueError: no index, one that is cut short, or one without documents.
        FileNotFoundError: there is no such file.
    """
    lengths = _index_lengths(path)
    if not lengths.size:
        raise _no_length(path)
    return lengths


def _index_lengths(path: Path) -> NDArray[np.integer]:
    with open(path, "rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise ValueError(f"{path} is not a Megatron index: tokenize the corpus again")
    _, _, _, sequences, boundaries = HEADER.unpack(header)
    if boundaries < 1 or path.stat().st_size < HEADER.size + 12 * sequences + 8 * boundaries:
        raise ValueError(f"{path} is shorter than its header asks for: copy it again, or tokenize again")
    if sequences == 0:
        return np.zeros(0, dtype=np.int32)
    tokens = np.memmap(path, "<i4", mode="r", offset=HEADER.size, shape=(sequences,))
    place = HEADER.size + 12 * sequences
    first = np.memmap(path, "<i8", mode="r", offset=place, shape=(boundaries,))
    if first[0] != 0 or first[-1] != sequences or (first[1:] < first[:-1]).any():
        raise ValueError(f"{path} has document boundaries out of order: tokenize the corpus again")
    if int(tokens.min()) < 0:
        raise ValueError(f"{path} has a sequence of {tokens.min()} tokens: tokenize the corpus again")
    is_one_each = boundaries == sequences + 1 and (first[1:] > first[:-1]).all()
    if is_one_each:
        return tokens
    ends = np.concatenate(([0], np.cumsum(tokens, dtype=np.int64)))
    lengths: NDArray[np.int64] = np.diff(ends[first])
    return lengths


def _whole_number(value: Any) -> int:
    if isinstance(value, str):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise TypeError


def _require_positive(path: Path, least: int) -> None:
    if least < 1:
        raise ValueError(
            f"{path} has a length of {least}: every document needs at least one token; leave empty ones out"
        )
