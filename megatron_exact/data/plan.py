"""A plan: which piece of which document fills which row of one split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.manifest import ARRAY_DTYPES, TokenPlace
from megatron_exact.exposure import counts_from_histogram, segment_length_histogram


@dataclass(frozen=True, kw_only=True)
class ChosenDocuments:
    """The documents of one split, in packing order; a repeated document stands there several times."""

    source: NDArray[np.uint16]
    """[documents], index of the source."""
    document: NDArray[np.int64]
    """[documents], document number inside its source."""
    tokens: NDArray[np.int64]
    """[documents], its whole length."""

    def __len__(self) -> int:
        return int(self.document.size)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Rows of segments. Segments of row r: [row_offsets[r], row_offsets[r + 1])."""

    row_offsets: NDArray[np.int64]
    """[rows + 1]."""
    segment_source: NDArray[np.uint16]
    """[segments], index of the source."""
    segment_document: NDArray[np.int64]
    """[segments], document number inside its source."""
    segment_start: NDArray[np.int64]
    """[segments], token offset inside the document."""
    segment_tokens: NDArray[np.int32]
    """[segments], >= 1."""
    left_out_tokens: int
    """Tokens of the chosen documents that are no input of any row."""
    next_token: TokenPlace | None
    """The token after the last row's last input where the stream goes on there, else None."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.row_offsets.size - 1)

    @property
    def segments(self) -> int:
        """Number of segments."""
        return int(self.segment_tokens.size)

    @property
    def tokens(self) -> int:
        """Inputs that are tokens of documents."""
        return int(self.segment_tokens.sum(dtype=np.int64))

    def arrays(self) -> dict[str, NDArray[np.integer]]:
        """The stored arrays by name, in the order and with the dtypes of ARRAY_DTYPES."""
        return {name: getattr(self, name).astype(dtype, copy=False) for name, dtype in ARRAY_DTYPES.items()}


def empty_plan(left_out_tokens: int) -> Plan:
    """A plan of no rows."""
    return Plan(
        row_offsets=np.zeros(1, np.int64),
        segment_source=np.zeros(0, np.uint16),
        segment_document=np.zeros(0, np.int64),
        segment_start=np.zeros(0, np.int64),
        segment_tokens=np.zeros(0, np.int32),
        left_out_tokens=left_out_tokens,
        next_token=None,
    )


def continuing_rows(plan: Plan, final_document_tokens: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Whether the document of each row's last segment goes on after the row.

    Args:
        final_document_tokens: integers [rows], whole length of the document of each row's last segment.

    Returns:
        bool [rows].
    """
    last = plan.row_offsets[1:] - 1
    return plan.segment_start[last] + plan.segment_tokens[last] < final_document_tokens


def plan_exposure(
    plan: Plan,
    row_tokens: int,
    *,
    policy: str,
    mask_cross_document_targets: bool,
    continuing: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """Supervised targets per bucket of a whole plan, in closed form.

    An inner segment ends its document, so its last input predicts another document's first token with
    context 0. A row's last input predicts its own document where that goes on; else the first token of
    the stream's next row under `concat`, nothing under `best-fit`.

    Args:
        continuing: bool [rows], from `continuing_rows`.

    Returns:
        int64 [buckets].
    """
    inner_ends = plan.segments - plan.rows
    row_ends = int(np.count_nonzero(~continuing)) if policy == "concat" else 0
    final_tokens = plan.segment_tokens[plan.row_offsets[1:] - 1]
    return counts_from_histogram(
        segment_length_histogram(plan.segment_tokens, row_tokens),
        continuing=segment_length_histogram(final_tokens[continuing], row_tokens),
        boundary_targets=0 if mask_cross_document_targets else inner_ends + row_ends,
    )
