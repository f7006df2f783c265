"""Effective context, buckets, counts and weights (EXACT, arXiv 2605.10544).

A **target** is the token that an input position predicts. Its **effective left context** is how many
tokens of its own document are visible to that prediction in the packed row. Targets are counted in
log2 **buckets**; the buckets from `tau` tokens upwards are the **tail**.
"""

from megatron_exact.exposure.buckets import (
    bucket_index,
    bucket_lower_bounds,
    context_of_positions,
    counts_from_histogram,
    effective_context,
    exposure_counts,
    segment_length_histogram,
)
from megatron_exact.exposure.row_weights import RowScores, RowTargets, RowWeights, RuleParameters, gains
from megatron_exact.exposure.rules import (
    MASS_SCALE,
    MASSES,
    RULES,
    Weighting,
    build_weighting,
    find_rule,
    readers,
    score_readers,
)
from megatron_exact.exposure.weights import (
    DEFAULT_ALPHA,
    DEFAULT_EPS,
    DEFAULT_GAMMA,
    TAU_ROW_FRACTION,
    default_tau,
    exact_weights,
)

__all__ = [
    "DEFAULT_ALPHA",
    "DEFAULT_EPS",
    "DEFAULT_GAMMA",
    "MASSES",
    "MASS_SCALE",
    "RULES",
    "TAU_ROW_FRACTION",
    "RowScores",
    "RowTargets",
    "RowWeights",
    "RuleParameters",
    "Weighting",
    "bucket_index",
    "bucket_lower_bounds",
    "build_weighting",
    "context_of_positions",
    "counts_from_histogram",
    "default_tau",
    "effective_context",
    "exact_weights",
    "exposure_counts",
    "find_rule",
    "gains",
    "readers",
    "score_readers",
    "segment_length_histogram",
]
