"""The micro-batches of the check: one as the job would read it, and edits of it.

Labels never change with tokens, so a loss that changes tells of a hidden state that changed.

b = micro-batch rows, S = row tokens, T = b * S. The rows of a micro-batch are flattened into one stream of
T tokens, as in training; a *place* counts in that stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron_exact.data.rows import PADDING_TOKEN

Batch = dict[str, Tensor]
"""Collated samples of `PackedDataset`: [b, S], `cu_seqlens` int32 [b, S + 1], `max_seqlen` int32 [b]."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The part of a document in a row."""

    start: int
    """Place of its first token."""
    end: int
    """Place after its last one."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A micro-batch and what was done to it."""

    kind: str
    """unchanged, repeated, changed, alone, merged or merged-changed."""
    batch: Batch
    """To be read instead of the job's own."""
    segment: int = -1
    """Number of the segment that was changed or isolated."""
    place: int = -1
    """Of the changed token."""


def segments_of(batch: Batch) -> list[Segment]:
    """All segments of a micro-batch in order; padding at the end of a row counts as one."""
    size = batch["tokens"].shape[1]
    segments = []
    for row, boundaries in enumerate(batch["cu_seqlens"]):
        for start, end in pairwise(boundaries.unique_consecutive().tolist()):
            segments.append(Segment(start=row * size + start, end=row * size + end))
    return segments


def choose_segments(segments: list[Segment], limit: int) -> list[int]:
    """Numbers of the segments to test: first, longest, last, shortest, then the others in order."""
    by_length = sorted(range(len(segments)), key=lambda i: segments[i].end - segments[i].start)
    preferred = [0, by_length[-1], len(segments) - 1, by_length[0], *range(len(segments))]
    return list(dict.fromkeys(preferred))[:limit]


def make_variants(batch: Batch, limit: int, vocabulary: int) -> list[Variant]:
    """All micro-batches of a check; the first is the unchanged one.

    Args:
        batch: of the job.
        limit: documents to change and to isolate.
        vocabulary: ids.
    """
    segments = segments_of(batch)
    merged = without_boundaries(batch)
    variants = [
        Variant(kind="unchanged", batch=batch),
        Variant(kind="repeated", batch=batch),
        Variant(kind="merged", batch=merged),
        Variant(kind="merged-changed", batch=with_token_changed(merged, 0, vocabulary), segment=0, place=0),
    ]
    for number in choose_segments(segments, limit):
        segment = segments[number]
        for place in dict.fromkeys((segment.start, segment.end - 1)):
            changed = with_token_changed(batch, place, vocabulary)
            variants.append(Variant(kind="changed", batch=changed, segment=number, place=place))
        variants.append(Variant(kind="alone", batch=alone(batch, segment), segment=number))
    return variants


def with_token_changed(batch: Batch, place: int, vocabulary: int) -> Batch:
    """The same micro-batch with another token at one place."""
    tokens = batch["tokens"].clone()
    flat = tokens.view(-1)
    flat[place] = (flat[place] + 1) % vocabulary
    return {**batch, "tokens": tokens}


def without_boundaries(batch: Batch) -> Batch:
    """The same tokens, each row one single document: what training without document masking sees."""
    rows, size = batch["tokens"].shape
    return {**batch, **_boundaries([[0, size]] * rows, size)}


def alone(batch: Batch, segment: Segment) -> Batch:
    """One segment at the beginning of the stream, where nothing precedes it; padding in small pieces after.

    The micro-batch keeps its shape, because pipeline and context parallel ranks count on it.
    """
    rows, size = batch["tokens"].shape
    length = segment.end - segment.start
    tokens = torch.full_like(batch["tokens"], PADDING_TOKEN)
    labels = torch.zeros_like(batch["labels"])
    for filled, key in ((tokens, "tokens"), (labels, "labels")):
        filled.view(-1)[:length] = batch[key].reshape(-1)[segment.start : segment.end]
    piece = int(batch["max_seqlen"].max())
    first = [0, *range(length, size, piece), size]
    others = [*range(0, size, piece), size]
    return {
        **batch,
        **_boundaries([first, *[others] * (rows - 1)], size),
        "tokens": tokens,
        "labels": labels,
    }


def _boundaries(rows: list[list[int]], size: int) -> Batch:
    """The entries that carry boundaries, from 0 to S in each row, as `PackedDataset` makes them."""
    cu_seqlens = torch.full((len(rows), size + 1), size, dtype=torch.int32)
    positions = torch.arange(size).repeat(len(rows), 1)
    longest = []
    for row, boundaries in enumerate(rows):
        cu_seqlens[row, : len(boundaries)] = torch.tensor(boundaries, dtype=torch.int32)
        for start, end in pairwise(boundaries):
            positions[row, start:end] -= start
        longest.append(max(end - start for start, end in pairwise(boundaries)))
    return {
        "cu_seqlens": cu_seqlens,
        "position_ids": positions,
        "max_seqlen": torch.tensor(longest, dtype=torch.int32),
    }
