"""The `concat` policy: documents end to end in one stream, cut every row_tokens.

Every row is full, and a document that crosses a row's edge is cut there and loses its context: the rows
are those of stock Megatron's `GPTDataset` with inter-document masking for the same document order.
The stream needs one token more than its inputs, the last label, so T tokens give (T - 1) // row_tokens
rows; what is left over is dropped and counted.
"""

from __future__ import annotations

import numpy as np

from megatron_exact.data.manifest import TokenPlace
from megatron_exact.data.plan import ChosenDocuments, Plan, empty_plan


def plan_concat(chosen: ChosenDocuments, row_tokens: int) -> Plan:
    """Cut the stream of the chosen documents, in their order, into rows.

    Args:
        chosen: documents of at least one token each.
        row_tokens: inputs of a row.

    Returns:
        A plan whose row r continues where row r - 1 ended. No row when there are too few tokens.
    """
    stream_ends = np.cumsum(chosen.tokens, dtype=np.int64)
    total = int(stream_ends[-1]) if len(chosen) else 0
    rows = max(0, (total - 1) // row_tokens)
    if rows == 0:
        return empty_plan(left_out_tokens=total)
    used = rows * row_tokens
    stream_starts = stream_ends - chosen.tokens
    row_starts = np.arange(rows, dtype=np.int64) * row_tokens
    # A segment begins wherever a document or a row does. Both lists are sorted: timsort merges them.
    inside = np.concatenate((stream_starts[: np.searchsorted(stream_starts, used)], row_starts))
    inside.sort(kind="stable")
    starts = inside[np.concatenate(([True], inside[1:] != inside[:-1]))]
    which = np.searchsorted(stream_starts, starts, side="right") - 1
    next_document = int(np.searchsorted(stream_ends, used, side="right"))
    return Plan(
        row_offsets=np.searchsorted(starts, np.append(row_starts, used)).astype(np.int64),
        segment_source=chosen.source[which],
        segment_document=chosen.document[which],
        segment_start=starts - stream_starts[which],
        segment_tokens=np.diff(starts, append=used).astype(np.int32),
        left_out_tokens=total - used,
        next_token=TokenPlace(
            source=int(chosen.source[next_document]),
            document=int(chosen.document[next_document]),
            start=used - int(stream_starts[next_document]),
        ),
    )
