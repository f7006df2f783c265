"""A whole plan in arrays, and choices made by hand, for tests that look at plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_exact.data.document_pool import ChosenDocuments, DocumentPool, Passes
from megatron_exact.data.manifest import TokenPlace
from megatron_exact.data.plan import Plan


@dataclass
class PlanArrays:
    """What a pack of this plan would hold."""

    row_offsets: np.ndarray
    segment_source: np.ndarray
    segment_document: np.ndarray
    segment_start: np.ndarray
    segment_tokens: np.ndarray
    continues: np.ndarray
    left_out_tokens: int
    next_token: TokenPlace | None

    @property
    def rows(self) -> int:
        return self.row_offsets.size - 1

    @property
    def segments(self) -> int:
        return self.segment_tokens.size

    @property
    def tokens(self) -> int:
        return int(self.segment_tokens.sum())


def collect(plan: Plan) -> PlanArrays:
    """Read a plan through."""
    blocks = list(plan.blocks())
    columns = {
        name: np.concatenate([np.zeros(0, np.int64), *(getattr(block, name) for block in blocks)])
        for name in ("number", "start", "tokens", "continues", "ends_row")
    }
    source, document = plan.pool.locate(columns["number"].astype(np.int64))
    arrays = PlanArrays(
        row_offsets=np.concatenate(([0], np.flatnonzero(columns["ends_row"]) + 1)),
        segment_source=source,
        segment_document=document,
        segment_start=columns["start"].astype(np.int64),
        segment_tokens=columns["tokens"].astype(np.int64),
        continues=columns["continues"].astype(bool),
        left_out_tokens=plan.left_out_tokens,
        next_token=plan.next_token,
    )
    assert arrays.rows == plan.rows
    return arrays


def pool_of(*sources: Sequence[int]) -> DocumentPool:
    """Documents of these lengths, source by source."""
    return DocumentPool(
        tokens=np.concatenate([np.zeros(0, np.int64), *(np.array(one, np.int64) for one in sources)]),
        first=np.concatenate(([0], np.cumsum([len(one) for one in sources]))).astype(np.int64),
    )


def choose(
    pool: DocumentPool, numbers: Sequence[int] | None = None, key: int | None = None, repeats: int = 1
) -> ChosenDocuments:
    """These documents, in this order unless there is a key; all of the pool `repeats` times."""
    chosen = None if numbers is None else np.array(numbers, dtype=np.uint32)
    passes = None
    if repeats > 1:
        chosen = np.tile(np.arange(len(pool), dtype=np.uint32), repeats)
        passes = Passes(ends=len(pool) * np.arange(1, repeats + 1), number=np.arange(repeats))
    return ChosenDocuments(pool=pool, numbers=chosen, key=key, passes=passes)
