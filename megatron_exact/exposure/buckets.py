"""Effective left context, its log2 buckets, and the number of targets in each bucket.

Four steps, from one row to a whole split: `effective_context` of every target of a row (from position ids:
`context_of_positions`), `bucket_index` of a context, `exposure_counts` of a plan in closed form from its
segment lengths, and `expected_concat`, the counts that `concat` gives in expectation before anything is
packed. All arrays are int64 or float64.

Source: EXACT (arXiv 2605.10544), method section.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

FIRST_EDGE_TOKENS = 8
BLOCK_SEGMENTS = 1 << 18


def effective_context(cu_seqlens: ArrayLike, *, last_continues: bool = True) -> Any:
    """Return the effective context of the target of each input position of a row.

    `l_i = i - s(i)` in the paper: the tokens of the target's own segment that the prediction sees. The
    input at row position j predicts token j + 1, so with segment start s the context is `j - s + 1` while
    the target lies in the same segment, and 0 where the target opens the next one.

    Args:
        cu_seqlens: integers [segments + 1], cumulative segment lengths from 0 to row_tokens. Megatron's
            padded form (the last value repeated) is accepted. numpy, sequence or torch tensor.
        last_continues: whether the document of the last segment continues after the row. If so the last
            target has the whole segment as context, else it opens another document and has 0.

    Returns:
        int64 [row_tokens]; a torch tensor on the same device if `cu_seqlens` was one, else numpy.

    Raises:
        ValueError: boundaries that are not one-dimensional, do not start at 0, decrease or contain no
            token.
    """
    device = getattr(cu_seqlens, "device", None) if hasattr(cu_seqlens, "detach") else None
    boundaries = np.asarray(cu_seqlens if device is None else cast("Any", cu_seqlens).detach().cpu())
    if boundaries.ndim != 1 or boundaries.size < 2 or boundaries[0] != 0:
        raise ValueError(
            f"cu_seqlens of shape {boundaries.shape} must be one-dimensional, start at 0 and "
            "name at least one segment"
        )
    lengths = np.asarray(boundaries[1:], np.int64) - np.asarray(boundaries[:-1], np.int64)
    if (lengths < 0).any() or boundaries[-1] == 0:
        raise ValueError("cu_seqlens must not decrease and must end at the row's length, above 0")
    lengths = lengths[lengths > 0]
    ends = np.cumsum(lengths)
    context = np.arange(1, ends[-1] + 1, dtype=np.int64) - np.repeat(ends - lengths, lengths)
    context[ends - 1] = 0
    if last_continues:
        context[-1] = lengths[-1]
    if device is not None:
        import torch

        return torch.from_numpy(context).to(device)
    return context


def context_of_positions(position_ids: Any, *, last_continues: Any = True) -> Any:
    """Return the effective context of the target of each input, from positions that restart per document.

    The same numbers as `effective_context`, for many rows at once and without leaving their device: the
    target of input j lies in its segment where position j + 1 does not restart at 0.

    Args:
        position_ids: integers [..., S], from 0 in each segment; a numpy array or a torch tensor.
        last_continues: whether the document of each row's last segment continues after the row; a bool,
            or booleans [...], an array of the same library.

    Returns:
        [..., S], of the type of `position_ids`.
    """
    context = position_ids + 1
    context[..., :-1] *= position_ids[..., 1:] != 0
    context[..., -1] *= last_continues
    return context


def bucket_lower_bounds(row_tokens: int) -> NDArray[np.int64]:
    """Return the lower edges of the buckets of a row: 0 and every 8 * 2^i below `row_tokens`.

    The paper's buckets are `[0,7], [8,15], [16,31], ...`, that is `b = max(0, floor(log2 l) - 2)`. The top
    one is open.

    Args:
        row_tokens: inputs of a packed row, at least 1.

    Returns:
        int64 [buckets]; 4,096 tokens give 10 buckets, 8,192 give 11, 16,384 give 12.

    Raises:
        ValueError: `row_tokens` is below 1.
    """
    if row_tokens < 1:
        raise ValueError(f"row_tokens is {row_tokens}: a row needs at least one token")
    edges = [0]
    edge = FIRST_EDGE_TOKENS
    while edge < row_tokens:
        edges.append(edge)
        edge *= 2
    return np.array(edges, dtype=np.int64)


def bucket_index(effective_context: ArrayLike, row_tokens: int) -> NDArray[np.int64]:
    """Return the bucket of each effective context; `row_tokens` itself falls into the top bucket.

    A row of T = 2^k tokens has one target with `l = T` for each document that fills it. In a bucket of its
    own it would be nearly alone, and inverse frequency would give it a weight in the tens. So it is folded
    into the top bucket, which is our choice: the paper does not mention it.

    Args:
        effective_context: integers in [0, row_tokens], any shape.
        row_tokens: inputs of a packed row.

    Returns:
        int64, same shape.

    Raises:
        ValueError: a context below 0 or above `row_tokens`.
    """
    context = np.asarray(effective_context)
    if context.size and (context.min() < 0 or context.max() > row_tokens):
        raise ValueError(
            f"effective context from {context.min()} to {context.max()} "
            f"does not fit rows of {row_tokens} tokens: it must lie in [0, {row_tokens}]"
        )
    edges = bucket_lower_bounds(row_tokens)
    return np.asarray(np.searchsorted(edges, context, side="right") - 1, dtype=np.int64)


def segment_length_histogram(segment_tokens: ArrayLike, row_tokens: int) -> NDArray[np.int64]:
    """Count the segments of each length, in blocks, so that a memory-mapped array stays on disk.

    Args:
        segment_tokens: integers [segments], each in [1, row_tokens].

    Returns:
        int64 [row_tokens + 1]; histograms of parts of a plan may be added.

    Raises:
        ValueError: a length below 1 or above `row_tokens`.
    """
    lengths = np.asarray(segment_tokens)
    histogram = np.zeros(row_tokens + 1, dtype=np.int64)
    for first in range(0, lengths.size, BLOCK_SEGMENTS):
        block = lengths[first : first + BLOCK_SEGMENTS]
        if block.min() < 1 or block.max() > row_tokens:
            raise ValueError(
                f"segments of {lengths.min()} to {lengths.max()} tokens do not fit rows of "
                f"{row_tokens} tokens: every length must lie in [1, {row_tokens}]"
            )
        histogram += np.bincount(block, minlength=row_tokens + 1)
    return histogram


def counts_from_histogram(
    segments: ArrayLike,
    *,
    continuing: ArrayLike | None = None,
    boundary_targets: int = 0,
) -> NDArray[np.int64]:
    """Count supervised targets per bucket, in O(row_tokens).

    A segment of n tokens has targets of context 1, 2, ..., n - 1 inside itself, so the number of targets of
    context k >= 1 is the number of segments longer than k: a reversed cumulative sum over the histogram.
    What is left is the target of each segment's last input: context 0 where it opens another segment,
    context n where its document continues after the row, or no target.

    Args:
        segments: integers [row_tokens + 1], the histogram of all segment lengths.
        continuing: the same for those row-final segments alone whose document continues after the row;
            None means that there are no such segments.
        boundary_targets: supervised targets of context 0 (the first token of another segment).

    Returns:
        int64 [buckets], in the order of `bucket_lower_bounds(row_tokens)`.
    """
    histogram = np.asarray(segments, dtype=np.int64)
    row_tokens = histogram.size - 1
    edges = bucket_lower_bounds(row_tokens)
    # longer[k] = segments of more than k tokens = targets of context k, for k >= 1
    longer = histogram.sum() - np.cumsum(histogram)
    targets = longer.copy()
    targets[0] = boundary_targets
    if continuing is not None:
        targets += np.asarray(continuing, dtype=np.int64)
    buckets = bucket_index(np.arange(row_tokens + 1), row_tokens)
    counts = np.zeros(edges.size, dtype=np.int64)
    np.add.at(counts, buckets, targets)
    return counts


def exposure_counts(
    segment_tokens: ArrayLike,
    row_tokens: int,
    *,
    continuing_tokens: ArrayLike = (),
    boundary_targets: int = 0,
) -> NDArray[np.int64]:
    """Count the supervised targets per bucket of a plan from the lengths of its segments.

    Args:
        segment_tokens: integers [segments], lengths of every segment of every row (no padding).
        row_tokens: inputs of a packed row.
        continuing_tokens: integers, lengths of the row-final segments whose document continues after the
            row: the last input of such a row predicts a token of its own document.
        boundary_targets: supervised targets of context 0.

    Returns:
        int64 [buckets].

    Raises:
        ValueError: a length below 1 or above `row_tokens`.
    """
    return counts_from_histogram(
        segment_length_histogram(segment_tokens, row_tokens),
        continuing=segment_length_histogram(continuing_tokens, row_tokens),
        boundary_targets=boundary_targets,
    )


@dataclass(frozen=True, kw_only=True)
class PhaseSums:
    """Sums over all `phases` offsets at which documents can begin; divide by `phases` for expectations."""

    phases: int
    """Equally likely offsets inside a row: row_tokens, or row_tokens / g."""
    ending: NDArray[Any]
    """[row_tokens + 1], segments of each length that end their document."""
    continuing: NDArray[Any]
    """[row_tokens + 1], segments of each length that fill a row and whose document continues after it."""
    cut_documents: Any
    """Documents of more than one segment."""
    tokens_after_cut: Any
    """Tokens of segments other than their document's first: a cut took context from them."""


@dataclass(frozen=True, kw_only=True)
class ExpectedConcat:
    """Expected numbers of one stream packed by `concat`."""

    rows: int
    """Full rows."""
    left_out_tokens: int
    """Tokens after the last full row."""
    segments: NDArray[np.float64]
    """[row_tokens + 1], segments of each length."""
    continuing: float
    """Rows whose last document continues after them."""
    cut_documents: float
    """Documents of more than one segment."""
    tokens_after_cut: float
    """Tokens of segments that begin inside a document."""
    counts: NDArray[np.float64]
    """[buckets], supervised targets."""


def sums_over_phases(lengths: ArrayLike, counts: ArrayLike, row_tokens: int) -> PhaseSums:
    """Sum segments over every offset in a row at which a document can begin.

    `concat` lays shuffled documents end to end and cuts the stream every S = row_tokens inputs. A document
    of n tokens whose first input stands at offset S - a of a row has room a there. All offsets are equally
    likely, so sum over the rooms a = 1, 2, ..., S (and divide by S afterwards):

    * n <= S. For a >= n, that is S - n + 1 times, the document is one segment of n tokens. For each a < n
      it is cut: a segment of a tokens fills the row, and n - a tokens begin the next row and end the
      document. Both lengths run once over 1, ..., n - 1.
    * n > S. It is cut for every a. Its first segment has a tokens and runs once over 1, ..., S; its last
      one has (n - a - 1) mod S + 1 tokens and runs once over 1, ..., S as well, since a runs over all
      residues. Between them stand full rows, n - S - 1 of them in all: the tokens of all cases are n S, and
      both triangles have S (S + 1) / 2 each, so (n S - S (S + 1)) / S is what is left for full rows.

    Together, with H(n) documents of n tokens and #(> k) documents of more than k tokens:

        segments of k tokens that end their document      H(k) (S - k + 1) + #(> k)
        of k < S tokens that fill a row, text continues   #(> k)
        of S tokens, text continues                       sum over n > S of (n - S)
        documents that are cut                            sum over n of H(n) min(n - 1, S)
        tokens of first segments, n <= S                  (S - n + 1) n + n (n - 1) / 2
        tokens of first segments, n > S                   S (S + 1) / 2

    The last input of a document predicts the first token of another one, with context 0.

    Offsets are equally likely only if sums of lengths reach all of them. If every length and S are
    multiples of g > 1 (for instance, all documents fill a row exactly), only multiples of g occur; then
    everything above holds in units of g tokens.

    The cost is O(distinct lengths + row_tokens), whatever the number of documents.

    Args:
        lengths: integers [distinct], ascending, above 0: tokens of a document.
        counts: [distinct], documents of each length. Whole numbers give exact whole sums, which must stay
            below 2^63 (the largest is tokens * row_tokens); floats give floats.
        row_tokens: inputs of a row.
    """
    size, times = np.asarray(lengths, dtype=np.int64), np.asarray(counts)
    if times.dtype.kind in "iu":
        times = times.astype(np.int64)
    size, times = size[times > 0], times[times > 0]  # a length without documents is no multiple of the unit
    unit = int(np.gcd.reduce(np.append(size, row_tokens)))
    size, phases = size // unit, row_tokens // unit
    fits = size <= phases
    short, short_times = size[fits], times[fits]
    long, long_times = size[~fits], times[~fits]
    exactly = np.zeros(phases + 1, dtype=times.dtype)
    exactly[short] = short_times
    longer = times.sum() - np.cumsum(exactly)
    ending, continuing = longer.copy(), longer.copy()
    ending[short] += short_times * (phases - short + 1)
    continuing[phases] = (long_times * (long - phases)).sum()
    ending[0] = continuing[0] = 0
    first = ((phases - short + 1) * short + short * (short - 1) // 2) * short_times
    after_cut = (
        (size * times).sum() * phases - first.sum() - long_times.sum() * (phases * (phases + 1) // 2)
    )
    return PhaseSums(
        phases=phases,
        ending=_spread(ending, unit),
        continuing=_spread(continuing, unit),
        cut_documents=(times * np.minimum(size - 1, phases)).sum(),
        tokens_after_cut=after_cut * unit,
    )


def _spread(by_unit: NDArray[Any], unit: int) -> NDArray[Any]:
    """Move entry k of a histogram in units of `unit` tokens to entry k * unit."""
    spread = np.zeros((by_unit.size - 1) * unit + 1, dtype=by_unit.dtype)
    spread[::unit] = by_unit
    return spread


def expected_concat(
    lengths: ArrayLike, counts: ArrayLike, row_tokens: int, *, mask_cross_document_targets: bool = False
) -> ExpectedConcat:
    """Return the rows, segments and targets that `concat` is expected to make of shuffled documents.

    The stream's first document stands at offset 0 and its last partial row is dropped. The first effect is
    forgotten after a few documents; the second is subtracted in proportion.

    Args:
        lengths: integers [distinct], ascending, above 0: tokens of a document.
        counts: [distinct], documents of each length; fractions are allowed.
        row_tokens: inputs of a row.
        mask_cross_document_targets: whether targets of context 0 that open a document are unsupervised.

    Returns:
        The whole stream; its counts sum to rows * row_tokens (without the mask).
    """
    times = np.asarray(counts, dtype=np.float64)
    tokens = round(float(np.asarray(lengths, dtype=np.float64) @ times))
    rows = max(0, (tokens - 1) // row_tokens)
    sums = sums_over_phases(lengths, times, row_tokens)
    share = rows * row_tokens / max(1, tokens) / sums.phases
    segments = (sums.ending + sums.continuing) * share
    targets = segments.sum() - np.cumsum(segments)  # of context k >= 1: one in each longer segment
    targets[0] = 0 if mask_cross_document_targets else sums.ending.sum() * share
    targets += sums.continuing * share
    return ExpectedConcat(
        rows=rows,
        left_out_tokens=tokens - rows * row_tokens,
        segments=segments,
        continuing=float(sums.continuing.sum() * share),
        cut_documents=float(sums.cut_documents * share),
        tokens_after_cut=float(sums.tokens_after_cut * share),
        counts=np.add.reduceat(targets, bucket_lower_bounds(row_tokens)),
    )
