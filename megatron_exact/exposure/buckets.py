"""Log2 buckets of effective context, the top one open.

EXACT (arXiv 2605.10544) buckets `[0,7], [8,15], [16,31], ...`: `b = max(0, floor(log2 l) - 2)`.
A row of T = 2^k tokens holds one target with `l = T` for each full-row document. A bucket of its own
for it would be nearly empty and inverse frequency would give it a weight in the tens, so it is folded
into the top bucket (our choice; the paper does not say).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FIRST_EDGE_TOKENS = 8


def bucket_lower_bounds(row_tokens: int) -> NDArray[np.int64]:
    """Lower edges of the buckets of a row: 0 and every 8 * 2^i below `row_tokens`.

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
    """Bucket of each effective context; `row_tokens` itself falls into the top bucket.

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
