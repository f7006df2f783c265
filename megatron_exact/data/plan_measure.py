"""What a plan holds: sizes, lengths of segments, supervised targets by effective context.

All of it follows from the histogram of segment lengths and a few sums, so it is counted while a plan's
blocks go by and costs a fraction of planning.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.plan import Plan, PlanBlock
from megatron_exact.exposure import counts_from_histogram, segment_length_histogram


@dataclass(kw_only=True)
class PlanMeasure:
    """Sums over the segments of a plan, or of the part of it that was added so far."""

    row_tokens: int
    """Inputs of a row."""
    first_target: NDArray[np.int32] | None = None
    """See `DocumentPool`; then every segment is a whole document."""
    rows: int = 0
    """Rows that have ended."""
    segments: int = 0
    """Segments."""
    tokens: int = 0
    """Inputs that are tokens of documents."""
    segment_histogram: NDArray[np.int64] = field(init=False)
    """[row_tokens + 1], segments of each length."""
    continuing_histogram: NDArray[np.int64] = field(init=False)
    """[row_tokens + 1], those row-final segments whose document goes on after the row."""
    prompt_histogram: NDArray[np.int64] = field(init=False)
    """[row_tokens + 1], segments by the number of tokens before their first supervised target."""

    def __post_init__(self) -> None:
        self.segment_histogram = np.zeros(self.row_tokens + 1, dtype=np.int64)
        self.continuing_histogram = np.zeros(self.row_tokens + 1, dtype=np.int64)
        self.prompt_histogram = np.zeros(self.row_tokens + 1, dtype=np.int64)

    @property
    def padding_tokens(self) -> int:
        """Inputs that are padding."""
        return self.rows * self.row_tokens - self.tokens

    def add(self, block: PlanBlock) -> None:
        """Count one block."""
        self.rows += int(np.count_nonzero(block.ends_row))
        self.segments += block.tokens.size
        self.tokens += int(block.tokens.sum(dtype=np.int64))
        self.segment_histogram += segment_length_histogram(block.tokens, self.row_tokens)
        cut = block.tokens[block.ends_row & block.goes_on]
        self.continuing_histogram += segment_length_histogram(cut, self.row_tokens)
        if self.first_target is not None:
            prompts = self.first_target[block.number]
            self.prompt_histogram += segment_length_histogram(prompts, self.row_tokens)

    def counts(self, *, policy: str, mask_cross_document_targets: bool) -> NDArray[np.int64]:
        """Supervised targets per bucket, in closed form.

        An inner segment ends its document, so its last input predicts another document's first token with
        context 0. A row's last input predicts its own document where that goes on; else the first token
        of the stream's next row under `concat`, nothing under `best-fit`. Of a segment of n tokens whose
        first supervised target is token a, the targets have contexts a to n - 1: those of a segment of n
        tokens without those of one of a tokens.

        Returns:
            int64 [buckets].
        """
        boundary_targets = 0
        if not mask_cross_document_targets:
            boundary_targets = self.segments - self.rows
            if policy == "concat":
                boundary_targets += self.rows - int(self.continuing_histogram.sum())
        counts = counts_from_histogram(
            self.segment_histogram,
            continuing=self.continuing_histogram,
            boundary_targets=boundary_targets,
        )
        return counts - counts_from_histogram(self.prompt_histogram)


def measure_plan(plan: Plan) -> PlanMeasure:
    """Read a plan through and measure it; nothing is kept of it."""
    measure = PlanMeasure(row_tokens=plan.row_tokens, first_target=plan.pool.first_target)
    for block in plan.blocks():
        measure.add(block)
    return measure
