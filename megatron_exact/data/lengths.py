"""Document lengths: histograms, files of lengths, and the lengths in a pack.

Planning and its forecasts need only a histogram of distinct lengths: a corpus of a billion documents has a
few hundred thousand distinct lengths, so a histogram takes megabytes where the lengths take gigabytes.
Rescaling keeps its shape: counts are rounded cumulatively from the shortest document on, so that lengths
with less than one document on average are still represented.

Files give lengths without a corpus (`read_length_file`):

| suffix | content |
|---|---|
| `.idx` | the index of a corpus; its `.bin` is not needed |
| `.npy` | whole numbers [documents], one length each |
| `.txt` | one length per line |
| `.csv` | `length,count` per line, with or without that header |
| `.json` | `{"length": count, ...}` or `[[length, count], ...]` |

`inspect_lengths` measures a pack: the lengths of its documents and of their segments, and what cuts cost.
It reads the pack's mapped arrays in chunks, so a pack of a billion segments needs no more memory than a
small one.
"""

from __future__ import annotations

import csv
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_exact.command_line import describe
from megatron_exact.data.indexed import HEADER, MAGIC
from megatron_exact.data.manifest import Manifest, TokenPlace
from megatron_exact.data.pack_arrays import open_arrays
from megatron_exact.data.shards import Corpus
from megatron_exact.json_input import read_json

CHUNK_DOCUMENTS = 1 << 22
DENSE_TOKENS = 1 << 20  # lengths below are counted in one array, longer ones by sorting
QUANTILES = (0.1, 0.5, 0.9, 0.99)
MAX_CORPUS_TOKENS = 1 << 60  # sums of lengths x counts stay in 64 bits
SAMPLE_SUFFIXES = (".npy", ".txt")
LENGTH_SUFFIXES = (*SAMPLE_SUFFIXES, ".csv", ".json", ".idx")
NPY_MAGIC = b"\x93NUMPY"
BLOCK_BYTES = 16 << 20
MAX_TOKENS = 1 << 40  # limit for one document
CHUNK_SEGMENTS = 1 << 20
Arrays = Mapping[str, NDArray[np.integer]]


def round_keeping_sum(values: ArrayLike) -> NDArray[np.int64]:
    """Return whole numbers near `values` [n] whose partial sums are the rounded ones of `values`."""
    reached = np.floor(np.cumsum(np.asarray(values, dtype=np.float64)) + 0.5).astype(np.int64)
    return np.asarray(np.diff(reached, prepend=0), dtype=np.int64)


def require_countable(tokens: float | Fraction, what: str) -> None:
    """Check that sums of tokens fit 64 bits, which any real corpus does.

    Raises:
        ValueError: `what` has more tokens.
    """
    if tokens > MAX_CORPUS_TOKENS:
        about = float(min(tokens, 10**300))
        raise ValueError(f"{what}: about {about:.1e} tokens are more than the 2^60 that can be counted")


@dataclass(frozen=True, kw_only=True)
class LengthHistogram:
    """Numbers of documents (or segments) by length."""

    lengths: NDArray[np.int64]
    """[distinct], lengths in tokens, ascending, each at least 1."""
    counts: NDArray[np.int64]
    """[distinct], documents of each length, at least 1."""

    @classmethod
    def of(cls, lengths: ArrayLike) -> LengthHistogram:
        """Count lengths, in chunks.

        Args:
            lengths: integers [documents], at least 1 each; may be memory-mapped.

        Raises:
            ValueError: a length below 1.
        """
        array = np.asarray(lengths)
        return cls.of_chunks(
            array[start : start + CHUNK_DOCUMENTS] for start in range(0, array.size, CHUNK_DOCUMENTS)
        )

    @classmethod
    def of_chunks(cls, chunks: Iterable[NDArray[np.integer]]) -> LengthHistogram:
        """Count lengths given in pieces; memory depends on the distinct lengths only."""
        dense = np.zeros(0, dtype=np.int64)
        sparse = cls.empty()
        for chunk in chunks:
            if not chunk.size:
                continue
            if chunk.min() < 1:
                raise ValueError(f"a length of {chunk.min()}: every document needs at least one token")
            is_long = chunk >= DENSE_TOKENS
            if is_long.any():
                distinct, counts = np.unique(chunk[is_long].astype(np.int64), return_counts=True)
                sparse = cls.merged([sparse, cls(lengths=distinct, counts=counts)])
                chunk = chunk[~is_long]
            found = np.bincount(chunk, minlength=dense.size)
            found[: dense.size] += dense
            dense = found
        short = np.flatnonzero(dense)
        return cls.merged([cls(lengths=short, counts=dense[short]), sparse])

    @classmethod
    def empty(cls) -> LengthHistogram:
        """Return the histogram of no document."""
        return cls(lengths=np.zeros(0, np.int64), counts=np.zeros(0, np.int64))

    @classmethod
    def merged(cls, parts: Sequence[LengthHistogram]) -> LengthHistogram:
        """Return the histogram of all documents of several histograms."""
        lengths = np.concatenate([part.lengths for part in parts])
        distinct, place = np.unique(lengths, return_inverse=True)
        counts = np.zeros(distinct.size, dtype=np.int64)
        np.add.at(counts, place, np.concatenate([part.counts for part in parts]))
        return cls(lengths=distinct, counts=counts)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self.counts.sum())

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths @ self.counts)

    @property
    def longest(self) -> int:
        """The largest length, 0 without documents."""
        return int(self.lengths[-1]) if self.lengths.size else 0

    def scaled(self, factor: Fraction) -> LengthHistogram:
        """Return `factor` times the documents, rounded to whole documents at every length."""
        if factor == 1:
            return self
        counts = round_keeping_sum(self.counts * float(factor))
        return LengthHistogram(lengths=self.lengths[counts > 0], counts=counts[counts > 0])

    def quantile(self, fraction: float) -> int:
        """Return the smallest length that at least `fraction` of the documents do not exceed."""
        reached = np.cumsum(self.counts)
        return int(self.lengths[np.searchsorted(reached, fraction * reached[-1])])

    def summary(self) -> dict[str, Any]:
        """Numbers for a report.

        Returns:
            {`documents`, `tokens`, `mean`, `quantiles` {`p10`, `p50`, `p90`, `p99`, `max`}, `bins`
            [{`lower`, `documents`, `tokens`}]}, the bins from powers of two; quantiles and mean are None
            without documents.
        """
        exponents = np.log2(self.lengths).astype(np.int64)  # exact below 2^48
        documents = np.bincount(exponents, weights=self.counts)
        tokens = np.bincount(exponents, weights=self.lengths * self.counts)
        names = [f"p{round(fraction * 100)}" for fraction in QUANTILES]
        some = self.documents > 0
        quantiles = {
            name: self.quantile(fraction) if some else None
            for name, fraction in zip(names, QUANTILES, strict=True)
        }
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "mean": self.tokens / self.documents if some else None,
            "quantiles": {**quantiles, "max": self.longest if some else None},
            "bins": [
                {"lower": 1 << exponent, "documents": int(documents[exponent]), "tokens": int(total)}
                for exponent, total in enumerate(tokens)
            ],
        }


def is_length_file(path: Path) -> bool:
    """Return whether `path` is named like a file of lengths, and not like the prefix of a corpus."""
    return path.suffix in LENGTH_SUFFIXES and not path.with_name(path.name + ".idx").exists()


def read_length_file(path: Path) -> LengthHistogram:
    """Read a sample or a histogram of document lengths, or those in an index.

    Raises:
        ValueError: an empty file, another format, or an impossible length or count.
        FileNotFoundError: the file does not exist.
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
    return ValueError(f"{path} contains no lengths: give at least one document")


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
        raise ValueError(
            f"{path} is not a .npy file of numbers ({error}): save it with numpy.save"
        ) from None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{path} contains {array.dtype} {array.shape}: one whole number a document is needed"
        )
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
                        f"{path} line {number + bad + 1}: {lines[bad].strip()[:40]!r} is not a whole "
                        "number: give one length a line (a histogram has the suffix .csv or .json)"
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
    """Yield the same items; bytes that are not text become an error that names the file."""
    try:
        yield from items
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text ({error.reason}): give the suffix that its format has"
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
        raise ValueError(f'{path} contains neither {{"length": count}} nor [[length, count]] pairs')
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


@dataclass(frozen=True, kw_only=True)
class Truncation:
    """What cutting documents at row ends did to one split."""

    cut_documents: int
    """Documents that do not stand in one piece in one row, repeats counted each time."""
    rows_inside: int
    """Rows whose first token is not the first of its document."""
    tokens_after_cut: int
    """Tokens of segments that begin inside a document: a cut took context from them."""


def _slices(size: int) -> Iterator[slice]:
    for start in range(0, size, CHUNK_SEGMENTS):
        yield slice(start, min(start + CHUNK_SEGMENTS, size))


def segment_lengths(arrays: Arrays) -> LengthHistogram:
    """Lengths of all segments of a split; `arrays`: as `pack_arrays.open_arrays` returns them."""
    tokens = arrays["segment_tokens"]
    return LengthHistogram.of_chunks(np.asarray(tokens[part]) for part in _slices(tokens.size))


def document_lengths(arrays: Arrays, corpora: Sequence[Corpus]) -> LengthHistogram:
    """Whole lengths of the documents whose first token is in the split, repeats counted each time.

    Args:
        arrays: as `pack_arrays.open_arrays` returns them.
        corpora: in the order of the manifest's sources.
    """
    lengths = [np.asarray(corpus.document_tokens) for corpus in corpora]

    def chunks() -> Iterator[NDArray[np.integer]]:
        for part in _slices(arrays["segment_start"].size):
            opens = arrays["segment_start"][part] == 0
            source = arrays["segment_source"][part][opens]
            document = arrays["segment_document"][part][opens]
            for index in np.unique(source):
                yield lengths[index][document[source == index]]

    return LengthHistogram.of_chunks(chunks())


def measure_truncation(
    arrays: Arrays, *, policy: str, row_tokens: int, next_token: TokenPlace | None
) -> Truncation:
    """Count cuts.

    `best-fit` cuts documents into whole rows, so each cut document has one segment that starts at exactly
    row_tokens. Under `concat` each has one row end between a segment that starts at 0 and the next token.

    Args:
        arrays: as `pack_arrays.open_arrays` returns them.
        policy: of the pack.
        row_tokens: inputs of a row.
        next_token: of the manifest's split.
    """
    starts, tokens, offsets = arrays["segment_start"], arrays["segment_tokens"], arrays["row_offsets"]
    cut = inside = after_cut = 0
    for part in _slices(starts.size):
        start = np.asarray(starts[part])
        after_cut += int(tokens[part].sum(dtype=np.int64, where=start > 0))
        cut += int(np.count_nonzero(start == row_tokens)) if policy == "best-fit" else 0
    rows = offsets.size - 1
    for part in _slices(rows):
        begins = starts[offsets[part]] > 0
        inside += int(np.count_nonzero(begins))
        if policy == "concat":
            ends = starts[offsets[part.start + 1 : part.stop + 1] - 1] == 0
            after = part.stop
            next_start = 0 if next_token is None else next_token.start
            continues = (starts[offsets[after]] if after < rows else next_start) > 0
            cut += int(np.count_nonzero(ends & np.append(begins[1:], continues)))
    return Truncation(cut_documents=cut, rows_inside=inside, tokens_after_cut=after_cut)


def inspect_lengths(
    pack_dir: str | Path, manifest: Manifest, split: str, *, source_root: str | Path | None = None
) -> tuple[dict[str, Any], str | None]:
    """Measure one split of a pack.

    Args:
        pack_dir: a packed dataset.
        manifest: of it.
        split: its name.
        source_root: where the corpora lie now, if not where the manifest says.

    Returns:
        The `lengths` entry of `inspect_pack.py --json`, all whole numbers but the shares and means; and a
        note if the lengths of whole documents, which are in the corpora's indices, could not be read.

    Raises:
        ValueError: an array that is missing, damaged or of another shape than the manifest says.
    """
    entry = manifest.splits[split]
    arrays = open_arrays(Path(pack_dir) / split, entry)
    documents, note = None, None
    try:
        corpora = [
            manifest.open_source(index, pack_dir, source_root) for index in range(len(manifest.sources))
        ]
        documents = document_lengths(arrays, corpora)
    except (OSError, ValueError, IndexError) as error:
        note = f"note: lengths of whole documents are not shown: {describe(error)}"
    truncation = measure_truncation(
        arrays, policy=manifest.policy, row_tokens=manifest.row_tokens, next_token=entry.next_token
    )
    segments = segment_lengths(arrays)
    inputs, padding = segments.tokens, entry.padding_tokens
    chosen_documents = sum(use.documents for use in entry.sources)
    described = {
        "documents": None if documents is None else documents.summary(),
        "segments": segments.summary(),
        "truncation": {
            "cut_documents": truncation.cut_documents,
            "cut_documents_share": truncation.cut_documents / max(1, chosen_documents),
            "rows_inside_document": truncation.rows_inside,
            "rows_inside_document_share": truncation.rows_inside / max(1, entry.rows),
            "tokens_after_cut": truncation.tokens_after_cut,
            "tokens_after_cut_share": truncation.tokens_after_cut / max(1, inputs),
        },
        "padding": {"tokens": padding, "share": padding / max(1, inputs + padding)},
        "left_out_tokens": entry.left_out_tokens,
    }
    return described, note
