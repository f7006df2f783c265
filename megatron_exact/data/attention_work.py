"""Attention work of packed rows: how evenly ranks share it, and an order of rows that shares it better.

Everything else in a layer costs the same for every row; attention costs a row of one long document many
times what it costs a row of short ones. Work is counted in pairs of a query and a key that it sees, a
segment of n tokens having n (n + 1) / 2; padding is a segment of its own, as training runs it.

Context-parallel ranks share each row (`attention_balance`). Data-parallel ranks have rows of their own and
wait at the end of a step for the rank with the most work. Which rows a step reads is decided by the seed;
which rank reads which of them changes nothing but the order of sums, so it is free to choose
(`balanced_order`). With Megatron's sampler, rank r of D reads micro-batch k at samples (k D + r) M to
(k D + r) M + M - 1 of a step, M rows a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.lengths import Arrays

ROWS_AT_ONCE = 1 << 14
"""Rows whose attention is counted at once."""


def segment_pairs(tokens: NDArray[np.integer], row_tokens: int) -> int:
    """Return the attention work of one row.

    Args:
        tokens: integers [segments], tokens of each segment of the row.
        row_tokens: inputs of a row; what the segments leave is padding.
    """
    lengths = tokens.astype(np.int64)
    padding = row_tokens - int(lengths.sum())
    return (int((lengths * (lengths + 1)).sum()) + padding * (padding + 1)) // 2


def row_pairs(arrays: Arrays, *, row_tokens: int) -> NDArray[np.int64]:
    """Return the attention work of every row of a split.

    Args:
        arrays: as `pack_arrays.open_arrays` returns them.
        row_tokens: inputs of a row.

    Returns:
        int64 [rows].
    """
    offsets = np.asarray(arrays["row_offsets"])
    work = np.empty(offsets.size - 1, dtype=np.int64)
    for start in range(0, work.size, ROWS_AT_ONCE):
        here = offsets[start : min(start + ROWS_AT_ONCE, work.size) + 1]
        tokens = np.asarray(arrays["segment_tokens"][here[0] : here[-1]]).astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(tokens)])[here - here[0]]
        pairs = np.concatenate([[0], np.cumsum(tokens * (tokens + 1) // 2)])[here - here[0]]
        padding = row_tokens - np.diff(ends)
        work[start : start + here.size - 1] = np.diff(pairs) + padding * (padding + 1) // 2
    return work


@dataclass(frozen=True, kw_only=True)
class StepLayout:
    """How data-parallel ranks share the rows of an optimizer step.

    Raises:
        ValueError: a step that is not a whole number of micro-batches of every rank.
    """

    rows: int
    """Rows of a step, Megatron's global batch size."""
    ranks: int
    """Data-parallel ranks, D."""
    micro_batch_rows: int = 1
    """Rows of a micro-batch, M."""

    def __post_init__(self) -> None:
        sizes = (self.rows, self.ranks, self.micro_batch_rows)
        if min(sizes) < 1 or self.rows % (self.ranks * self.micro_batch_rows):
            raise ValueError(
                f"a step of {self.rows} rows is not a whole number of micro-batches of "
                f"{self.micro_batch_rows} rows for each of {self.ranks} data-parallel ranks: choose "
                "another global batch size"
            )

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each rank in a step."""
        return self.rows // (self.ranks * self.micro_batch_rows)


def balanced_order(work: NDArray[np.int64], layout: StepLayout) -> NDArray[np.int64]:
    """Order the rows of one step so that ranks, and neighboring micro-batches, have nearly equal work.

    Rows are dealt to micro-batches, then micro-batches to ranks, see `_deal`. So the totals of two ranks
    differ by no more than one micro-batch does from another, and a pipeline meets micro-batches of
    descending work, each about as heavy as the last.

    Args:
        work: int64 [rows], work of the rows of the step.
        layout: of the step.

    Returns:
        int64 [rows], a permutation: the row that is read at each sample of the step. It depends on the
        arguments alone; equal work keeps its order.
    """
    assert work.shape == (layout.rows,)
    rows = _deal(work, layout.rows // layout.micro_batch_rows)  # [M, micro-batches]
    places = _deal(work[rows].sum(axis=0), layout.ranks)  # [micro-batches of a rank, D]
    return rows[:, places].transpose(1, 2, 0).reshape(-1)


def _deal(work: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
    """Deal items to bins, as many to each, so that the bins have nearly equal work.

    Sorted by descending work, every next `bins` items go one to a bin, the heaviest to the bin that has the
    least so far. Of two bins the one ahead gets the lighter item, so in the end they differ by no more than
    two items of one such group do.

    Returns:
        int64 [items / bins, bins], indices of items.
    """
    groups = np.argsort(-work, kind="stable").reshape(-1, bins)
    dealt = np.empty_like(groups)
    totals = np.zeros(bins, dtype=np.int64)
    for items, to in zip(groups, dealt, strict=True):
        least_first = np.argsort(totals, kind="stable")
        to[least_first] = items
        totals[least_first] += work[items]
    return dealt


def balance_steps(work: NDArray[np.int64], layout: StepLayout) -> NDArray[np.int64]:
    """Return the work of the rows at each sample once every step is in its balanced order.

    Args:
        work: int64 [n], work of the rows as drawn; an incomplete last step keeps its order.
        layout: of the steps.
    """
    balanced = work.copy()
    for first in range(0, work.size - layout.rows + 1, layout.rows):
        step = work[first : first + layout.rows]
        balanced[first : first + layout.rows] = step[balanced_order(step, layout)]
    return balanced


@dataclass(frozen=True, kw_only=True)
class StepBalance:
    """How evenly data-parallel ranks share the work of steps: work of the busiest rank over the mean's."""

    step_mean: float
    """Over whole steps, for which ranks wait for each other; mean over steps; 1 is even."""
    step_worst: float
    """The same in the worst step."""
    micro_batch_mean: float
    """Over micro-batches that ranks run at the same time, mean."""
    micro_batch_worst: float
    """The same in the worst."""
    waiting: float
    """Share of all ranks' time in which they wait for the busiest of a step, 0..1."""


def step_balance(work: NDArray[np.floating | np.integer], layout: StepLayout) -> StepBalance:
    """Measure how evenly ranks share the work of consecutive steps.

    Args:
        work: [n], work of the row at each sample; an incomplete last step is left out.
        layout: of the steps.

    Raises:
        ValueError: fewer rows than one step.
    """
    steps = work.size // layout.rows
    if not steps:
        raise ValueError(
            f"{work.size} rows are not one step of {layout.rows}: choose a smaller global batch size"
        )
    shape = (steps, layout.micro_batches, layout.ranks, layout.micro_batch_rows)
    micro_batches = work[: steps * layout.rows].reshape(shape).sum(axis=3).astype(np.float64)
    totals = micro_batches.sum(axis=1)  # [steps, D]
    of_step = totals.max(axis=1) / totals.mean(axis=1)
    of_micro_batch = micro_batches.max(axis=2) / micro_batches.mean(axis=2)
    return StepBalance(
        step_mean=float(of_step.mean()),
        step_worst=float(of_step.max()),
        micro_batch_mean=float(of_micro_batch.mean()),
        micro_batch_worst=float(of_micro_batch.max()),
        waiting=float(1 - totals.mean(axis=1).sum() / totals.max(axis=1).sum()),
    )


@dataclass(frozen=True, kw_only=True)
class AttentionBalance:
    """How evenly context-parallel ranks share the attention of rows, as work of the busiest rank."""

    ranks: int
    """Context-parallel ranks, N."""
    mean: float
    """Work of the busiest rank of a row relative to the mean of its ranks, mean over rows; 1 is even."""
    most: float
    """The same in the worst row."""
    waiting: float
    """Share of all ranks' time in attention in which they wait for the busiest one, 0..1."""


def attention_balance(arrays: Arrays, *, row_tokens: int, ranks: int) -> AttentionBalance:
    """Measure how evenly ranks share the attention of rows, each row a micro-batch.

    Work is counted in pairs of a query and a key that it sees. Rank r has the r-th of 2 N spans of a row
    from the front and the r-th from the back (`model/context_parallel.py`), which is even within one long
    document; where documents are short, a span that contains a long one has more work.

    Args:
        arrays: as `pack_arrays.open_arrays` returns them.
        row_tokens: inputs of a row.
        ranks: N.

    Raises:
        ValueError: rows that do not divide into 2 N spans, or no rows.
    """
    if ranks < 1 or row_tokens % (2 * ranks):
        raise ValueError(
            f"--context-parallel {ranks}: rows of {row_tokens} tokens do not divide into {2 * ranks} spans"
        )
    offsets = np.asarray(arrays["row_offsets"])
    edges = np.arange(2 * ranks + 1) * (row_tokens // (2 * ranks))
    sums = np.zeros(2)
    ratios, most = 0.0, 1.0
    num_rows = offsets.size - 1
    if num_rows < 1:
        raise ValueError(f"--context-parallel {ranks}: this split has no rows, choose another --split")
    for start in range(0, num_rows, ROWS_AT_ONCE):
        here = offsets[start : min(start + ROWS_AT_ONCE, num_rows) + 1]
        tokens = np.asarray(arrays["segment_tokens"][here[0] : here[-1]]).astype(np.int64)
        ends = np.concatenate([[0], np.cumsum(tokens)])
        pairs = np.concatenate([[0.0], np.cumsum(tokens * (tokens + 1) / 2)])
        first, last = ends[here[:-1] - here[0]], ends[here[1:] - here[0]]  # tokens before and after a row
        inside = np.minimum(first[:, None] + edges, last[:, None])  # [rows, 2 N + 1]
        segment = np.searchsorted(ends, inside, side="right") - 1
        part = inside - ends[segment]
        padding = np.maximum(edges - (last - first)[:, None], 0)  # attends to itself, as training runs it
        done = pairs[segment] + part * (part + 1) / 2 + padding * (padding + 1) / 2
        spans = np.diff(done, axis=1)
        work = spans[:, :ranks] + spans[:, : ranks - 1 : -1]  # [rows, N]
        busiest, mean = work.max(axis=1), work.mean(axis=1)
        ratios += float((busiest / mean).sum())
        most = max(most, float((busiest / mean).max()))
        sums += busiest.sum(), mean.sum()
    return AttentionBalance(
        ranks=ranks, mean=ratios / num_rows, most=most, waiting=float(1 - sums[1] / sums[0])
    )
