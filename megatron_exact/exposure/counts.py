"""Targets per bucket of a whole plan, in closed form from segment lengths.

A segment of n tokens has targets of context 1, 2, ..., n - 1 inside itself, so the number of targets of
context k >= 1 is the number of segments longer than k: a reversed cumulative sum over a histogram of
lengths. What is left is one target for each segment's last input: context 0 where it opens another
segment, context n where its document goes on after the row, or none.
Cost: one pass over the lengths (`numpy.bincount`) in blocks, then O(row_tokens); no array of tokens is
made, and a memory-mapped array of lengths stays on disk.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_exact.exposure.buckets import bucket_index, bucket_lower_bounds

BLOCK_SEGMENTS = 1 << 18


def segment_length_histogram(segment_tokens: ArrayLike, row_tokens: int) -> NDArray[np.int64]:
    """How many segments have each length.

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
    """Supervised targets per bucket.

    Args:
        segments: integers [row_tokens + 1], the histogram of all segment lengths.
        continuing: the same for those row-final segments alone whose document goes on after the row;
            None means none.
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
    """Supervised targets per bucket of a plan, from the lengths of its segments.

    Args:
        segment_tokens: integers [segments], lengths of every segment of every row (no padding).
        row_tokens: inputs of a packed row.
        continuing_tokens: integers, lengths of the row-final segments whose document goes on after the
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
