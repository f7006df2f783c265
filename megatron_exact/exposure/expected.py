"""What `concat` does to documents of given lengths, in expectation over where in a row each one begins.

`concat` lays shuffled documents end to end and cuts the stream every S = row_tokens inputs. A document of
n tokens whose first input stands at offset S - a of a row has room a there. All offsets are equally
likely, so sum over the rooms a = 1, 2, ..., S (and divide by S afterwards):

* n <= S. For a >= n, that is S - n + 1 times, the document is one segment of n tokens. For each a < n it is
  cut: a segment of a tokens fills the row, and n - a tokens begin the next row and end the document. Both
  lengths run once over 1, ..., n - 1.
* n > S. It is cut for every a. Its first segment has a tokens and runs once over 1, ..., S; its last one
  has (n - a - 1) mod S + 1 tokens and runs once over 1, ..., S as well, since a runs over all residues.
  Between them stand full rows, n - S - 1 of them in all: the tokens of all cases are n S, and both
  triangles hold S (S + 1) / 2 each, so (n S - S (S + 1)) / S is what is left for full rows.

Together, with H(n) documents of n tokens and #(> k) documents of more than k tokens:

    segments of k tokens that end their document      H(k) (S - k + 1) + #(> k)
    of k < S tokens that fill a row, the text goes on #(> k)
    of S tokens, the text goes on                     sum over n > S of (n - S)
    documents that are cut                            sum over n of H(n) min(n - 1, S)
    tokens of first segments, n <= S                  (S - n + 1) n + n (n - 1) / 2
    tokens of first segments, n > S                   S (S + 1) / 2

The last input of a document predicts the first token of another one, with context 0.

Offsets are equally likely only if sums of lengths reach all of them. If every length and S are multiples
of g > 1 (say, all documents fill a row exactly), only multiples of g occur; then everything above holds in
units of g tokens. The stream's first document stands at offset 0, and its last partial row is dropped:
the first is forgotten after a few documents, the second is taken off in proportion.

Cost: O(distinct lengths + row_tokens), whatever the number of documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_exact.exposure.buckets import bucket_lower_bounds


@dataclass(frozen=True, kw_only=True)
class PhaseSums:
    """Sums over all `phases` places where documents can begin; divide by `phases` for expectations."""

    phases: int
    """Equally likely offsets inside a row: row_tokens, or row_tokens / g."""
    ending: NDArray[Any]
    """[row_tokens + 1], segments of each length that end their document."""
    continuing: NDArray[Any]
    """[row_tokens + 1], segments of each length that fill a row and whose document goes on after it."""
    cut_documents: Any
    """Documents of more than one segment."""
    tokens_after_cut: Any
    """Tokens of segments other than their document's first: a cut took context from them."""


@dataclass(frozen=True, kw_only=True)
class ExpectedConcat:
    """One stream packed by `concat`, in expectation."""

    rows: int
    """Full rows."""
    left_out_tokens: int
    """Tokens after the last full row."""
    segments: NDArray[np.float64]
    """[row_tokens + 1], segments of each length."""
    continuing: float
    """Rows whose last document goes on after them."""
    cut_documents: float
    """Documents of more than one segment."""
    tokens_after_cut: float
    """Tokens of segments that begin inside a document."""
    counts: NDArray[np.float64]
    """[buckets], supervised targets."""


def sums_over_phases(lengths: ArrayLike, counts: ArrayLike, row_tokens: int) -> PhaseSums:
    """Sum segments over every place in a row where a document can begin; see the head of this module.

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
    """Entry k of a histogram in units of some tokens, moved to entry k * unit."""
    spread = np.zeros((by_unit.size - 1) * unit + 1, dtype=by_unit.dtype)
    spread[::unit] = by_unit
    return spread


def expected_concat(
    lengths: ArrayLike, counts: ArrayLike, row_tokens: int, *, mask_cross_document_targets: bool = False
) -> ExpectedConcat:
    """Rows, segments and targets that `concat` makes of documents in a random order.

    Args:
        lengths: integers [distinct], ascending, above 0: tokens of a document.
        counts: [distinct], documents of each length; fractions are allowed.
        row_tokens: inputs of a row.
        mask_cross_document_targets: whether targets of context 0 that open a document are unsupervised.

    Returns:
        The whole stream, a last partial row taken off in proportion; its counts sum to rows * row_tokens
        (without the mask).
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
