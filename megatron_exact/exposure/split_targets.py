"""What a weighting rule starts from: the supervised targets of a training split, counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class SplitTargets:
    """What is known of the supervised targets of a training split before any row is read."""

    row_tokens: int
    """Inputs of a row."""
    lower_bounds: NDArray[np.int64]
    """[buckets], tokens."""
    counts: NDArray[np.int64]
    """[buckets], targets by effective context."""
    position_counts: Callable[[], NDArray[np.int64]] | None = None
    """Gives [buckets], targets by packed position + 1; reads the plan, so only called where needed."""
    has_scores: bool = False
    """Whether stored scores were given, so that rows have `scores`."""
