"""How long the documents of a pack are, how long the segments that became of them, and what cuts cost.

Everything comes from the pack's mapped arrays in chunks, so a pack of a billion segments needs no more
memory than a small one. Whole documents' lengths are in the corpora's indices; the rest does without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.command_line import describe
from megatron_exact.data.length_histogram import LengthHistogram
from megatron_exact.data.manifest import Manifest, TokenPlace
from megatron_exact.data.rows import open_arrays
from megatron_exact.data.shards import Corpus

CHUNK_SEGMENTS = 1 << 20
Arrays = Mapping[str, NDArray[np.integer]]


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
    """Lengths of all segments of a split; `arrays`: as `rows.open_arrays` returns them."""
    tokens = arrays["segment_tokens"]
    return LengthHistogram.of_chunks(np.asarray(tokens[part]) for part in _slices(tokens.size))


def document_lengths(arrays: Arrays, corpora: Sequence[Corpus]) -> LengthHistogram:
    """Whole lengths of the documents whose first token is in the split, repeats counted each time.

    Args:
        arrays: as `rows.open_arrays` returns them.
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
        arrays: as `rows.open_arrays` returns them.
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
            goes_on = (starts[offsets[after]] if after < rows else _start(next_token)) > 0
            cut += int(np.count_nonzero(ends & np.append(begins[1:], goes_on)))
    return Truncation(cut_documents=cut, rows_inside=inside, tokens_after_cut=after_cut)


def _start(place: TokenPlace | None) -> int:
    return 0 if place is None else place.start


def describe_lengths(
    *,
    documents: LengthHistogram | None,
    segments: LengthHistogram,
    truncation: Truncation,
    rows: int,
    chosen_documents: int,
    padding_tokens: int,
    left_out_tokens: int,
) -> dict[str, Any]:
    """The `lengths` entry of `inspect_pack.py --json`, all whole numbers but the shares and means."""
    inputs = segments.tokens
    return {
        "documents": None if documents is None else documents.summary(),
        "segments": segments.summary(),
        "truncation": {
            "cut_documents": truncation.cut_documents,
            "cut_documents_share": truncation.cut_documents / max(1, chosen_documents),
            "rows_inside_document": truncation.rows_inside,
            "rows_inside_document_share": truncation.rows_inside / max(1, rows),
            "tokens_after_cut": truncation.tokens_after_cut,
            "tokens_after_cut_share": truncation.tokens_after_cut / max(1, inputs),
        },
        "padding": {"tokens": padding_tokens, "share": padding_tokens / max(1, inputs + padding_tokens)},
        "left_out_tokens": left_out_tokens,
    }


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
        See `describe_lengths`, and a note if the lengths of whole documents could not be had.

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
    described = describe_lengths(
        documents=documents,
        segments=segment_lengths(arrays),
        truncation=truncation,
        rows=entry.rows,
        chosen_documents=sum(use.documents for use in entry.sources),
        padding_tokens=entry.padding_tokens,
        left_out_tokens=entry.left_out_tokens,
    )
    return described, note
