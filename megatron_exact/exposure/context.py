"""Effective left context of every target of one packed row, from its segment boundaries.

METHOD: `l_i = i - s(i)`, the tokens of the target's own segment that the prediction sees. The input at
row position j predicts token j + 1, so with segment start s the context is `j - s + 1` while the target
lies in the same segment, and 0 where the target opens the next one.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike


def effective_context(cu_seqlens: ArrayLike, *, last_continues: bool = True) -> Any:
    """Effective context of the target of each input position of a row.

    Args:
        cu_seqlens: integers [segments + 1], cumulative segment lengths from 0 to row_tokens. Megatron's
            padded form (the last value repeated) is accepted. numpy, sequence or torch tensor.
        last_continues: whether the document of the last segment goes on after the row. If so the last
            target has the whole segment as context, else it opens another document and has 0.

    Returns:
        int64 [row_tokens]; a torch tensor on the same device if `cu_seqlens` was one, else numpy.

    Raises:
        ValueError: boundaries that are not one-dimensional, do not start at 0, decrease or hold no token.
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
