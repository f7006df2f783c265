"""EXACT (arXiv 2605.10544) and the controls of its Table 3: the rules that weigh by a table of buckets.

All start from the same table of EXACT's weights, so a cap, or a weight set by hand, changes them alike.

| rule | mass of an epoch, against `exact` with the same parameters |
|---|---|
| random-same-mass, constant | the same |
| uniform-tail | the same, unless a cap or a weight of a tail bucket enters |
| exact-normalized | the loss is divided by it |
| packed-position | its own: the tail of packed positions is nearly always the larger one |
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_exact.exposure.parameters import RuleParameters
from megatron_exact.exposure.row_weights import ContextWeights, PermutedWeights, PositionWeights
from megatron_exact.exposure.split_targets import SplitTargets
from megatron_exact.exposure.weights import exact_weights, shape_weights


def none(split: SplitTargets, parameters: RuleParameters) -> ContextWeights:
    """Every weight 1."""
    return by_context(split, np.ones(split.counts.shape))


def exact(split: SplitTargets, parameters: RuleParameters) -> ContextWeights:
    """EXACT: `exact_weights` of the bucket of effective context, then cap and weights set by hand."""
    return by_context(split, _exact_table(split.counts, split, parameters))


def uniform_tail(split: SplitTargets, parameters: RuleParameters) -> ContextWeights:
    """1 + alpha on the whole tail: EXACT with gamma 0."""
    return exact(split, replace(parameters, gamma=0.0))


def constant(split: SplitTargets, parameters: RuleParameters) -> ContextWeights:
    """The mean of EXACT's weights on every target: its loss scale, and nothing else of it."""
    mean = exact(split, parameters).mean_weight
    return by_context(split, np.full(split.counts.shape, mean))


def packed_position(split: SplitTargets, parameters: RuleParameters) -> PositionWeights:
    """The formula of EXACT with the position in the packed row + 1 in place of the effective context.

    Frequencies are those of packed positions, and so is the tail.

    Raises:
        ValueError: the split does not tell them.
    """
    if split.position_counts is None:
        raise ValueError("packed-position needs a pack's plan: counts of effective context do not tell")
    counts = np.asarray(split.position_counts(), dtype=np.int64)
    return PositionWeights(
        row_tokens=split.row_tokens,
        lower_bounds=split.lower_bounds,
        counts=counts,
        weights=_exact_table(counts, split, parameters),
    )


def random_same_mass(split: SplitTargets, parameters: RuleParameters) -> PermutedWeights:
    """The multiset of EXACT's weights, permuted over the supervised targets of the split."""
    return PermutedWeights(
        row_tokens=split.row_tokens,
        lower_bounds=split.lower_bounds,
        counts=split.counts,
        weights=_exact_table(split.counts, split, parameters),
    )


def _exact_table(
    counts: NDArray[np.int64], split: SplitTargets, parameters: RuleParameters
) -> NDArray[np.float64]:
    assert parameters.tau is not None, "build_weighting fills it in"
    weights = exact_weights(
        counts, split.lower_bounds, alpha=parameters.alpha, gamma=parameters.gamma, tau=parameters.tau
    )
    weights = shape_weights(
        weights, split.lower_bounds, cap=parameters.cap, bucket_weights=parameters.bucket_weights
    )
    if counts.any() and not weights[counts > 0].any():
        raise ValueError(
            "every bucket with targets has weight 0, so nothing would be trained: leave one above 0"
        )
    return weights


def by_context(split: SplitTargets, weights: NDArray[np.float64]) -> ContextWeights:
    """Weights of the buckets of effective context, [buckets], as a rule returns them."""
    return ContextWeights(
        row_tokens=split.row_tokens,
        lower_bounds=split.lower_bounds,
        counts=split.counts,
        weights=weights,
    )
