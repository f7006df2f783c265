"""EXACT weights of the buckets (arXiv 2605.10544, in the notation of its method section).

`q_b = N_b / sum_T N_j`, `r_b = (q_b + eps)^(-gamma)`, `rbar = sum_T q_b r_b`, `w_b = 1 + alpha r_b / rbar`
on the tail T = {b : lower(b) >= tau}, 1 elsewhere. The mean extra weight of the tail,
`sum_T q_b (w_b - 1)`, is alpha exactly: rarer tail buckets get more, the tail as a whole a fixed amount.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_exact.exposure.buckets import FIRST_EDGE_TOKENS

DEFAULT_ALPHA = 0.15
DEFAULT_GAMMA = 0.5
DEFAULT_EPS = 1e-6  # not stated in the paper; guards the power against q = 0 only
TAU_ROW_FRACTION = 4  # 1K, 2K, 4K for rows of 4K, 8K, 16K: two tail buckets in every stage


class EmptyTailError(ValueError):
    """Raised when no target lies in the tail, so that the rule would change nothing."""


def default_tau(row_tokens: int) -> int:
    """Return the paper's tail threshold for a stage, row_tokens / 4, in tokens."""
    return max(1, row_tokens // TAU_ROW_FRACTION)


def exact_weights(
    counts: ArrayLike,
    lower_bounds: ArrayLike,
    *,
    alpha: float = DEFAULT_ALPHA,
    gamma: float = DEFAULT_GAMMA,
    tau: float,
    eps: float = DEFAULT_EPS,
) -> NDArray[np.float64]:
    """Compute the weight of each bucket.

    Args:
        counts: integers [buckets], supervised targets of the packed training split.
        lower_bounds: integers [buckets], `bucket_lower_bounds(row_tokens)`.
        alpha: mean extra weight of the tail, >= 0 (0 gives 1 everywhere).
        gamma: exponent of inverse frequency, >= 0 (0 gives 1 + alpha on the whole tail).
        tau: effective context, in tokens, from which a bucket belongs to the tail.
        eps: added to q before the power, > 0.

    Returns:
        float64 [buckets]. An empty bucket in a tail with targets gets 1 and a warning.

    Raises:
        EmptyTailError: alpha is above 0 but no target lies in the tail, or rows are so short that they
            have one bucket and no tail.
        ValueError: shapes that differ, a negative count, a parameter out of range, a tau above the lower
            edge of every bucket, or weights beyond float64.
    """
    counts = np.asarray(counts, dtype=np.float64)
    edges = np.asarray(lower_bounds, dtype=np.float64)
    _check_parameters(alpha=alpha, gamma=gamma, tau=tau, eps=eps)
    if counts.shape != edges.shape or counts.ndim != 1:
        raise ValueError(
            f"{counts.shape} counts for {edges.shape} buckets: one count for each bucket is needed"
        )
    if not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError("counts must be finite and not negative")
    in_tail = edges >= tau
    if edges.size == 1:
        raise EmptyTailError(
            "rows this short have one bucket of effective context, so no tau leaves a tail: "
            f"pack rows of more than {FIRST_EDGE_TOKENS} tokens"
        )
    if not in_tail.any():
        raise ValueError(
            f"tau {tau:g} leaves no tail: the top bucket starts at {edges[-1]:g} tokens; "
            f"choose tau <= {edges[-1]:g}"
        )
    tail = in_tail & (counts > 0)
    if alpha > 0 and not tail.any():
        occupied = edges[counts > 0]
        found = (
            f"the longest lie in the bucket from {occupied[-1]:g}" if occupied.size else "there are none"
        )
        raise EmptyTailError(
            f"no target has an effective context of tau {tau:g} tokens or more ({found}), so the weighting "
            "would change nothing: choose a smaller tau, or pack longer documents"
        )
    if alpha > 0 and not tail.all(where=in_tail):
        empty = [int(edge) for edge in edges[in_tail & ~tail]]
        warnings.warn(f"no targets in the tail buckets from {empty}: weight 1", stacklevel=2)
    weights = np.ones(counts.size)
    if tail.any():
        q = counts[tail] / counts[tail].sum()
        with np.errstate(all="ignore"):  # values that are not finite are an error below
            r = (q + eps) ** -gamma
            weights[tail] = 1 + alpha * r / (q * r).sum()
    if not np.isfinite(weights).all():
        raise ValueError(
            f"gamma {gamma:g} and alpha {alpha:g} give weights that are not finite: choose smaller ones "
            f"(the paper uses gamma {DEFAULT_GAMMA:g} and alpha {DEFAULT_ALPHA:g})"
        )
    return weights


def shape_weights(
    weights: ArrayLike,
    lower_bounds: ArrayLike,
    *,
    cap: float | None = None,
    bucket_weights: Sequence[tuple[int, float]] = (),
) -> NDArray[np.float64]:
    """Apply a cap and weights set by hand to the formula's weights.

    The paper has neither; both are off by default. Either changes the mass: the mean extra weight of the
    tail is then no longer alpha.

    Args:
        weights: floats [buckets].
        lower_bounds: integers [buckets].
        cap: no weight of the formula exceeds it, >= 1.
        bucket_weights: (lower edge, weight) pairs; these weights, >= 0, replace those of the formula, of
            the short buckets as of the tail's, and are not capped.

    Returns:
        float64 [buckets].

    Raises:
        ValueError: a cap below 1 or infinite, an edge that no bucket has or that is named twice, a weight
            that is negative or not finite in float32, in which losses are weighted, or only zeros.
    """
    shaped = np.array(weights, dtype=np.float64)
    edges = np.asarray(lower_bounds).tolist()
    if cap is not None:
        if not cap >= 1:
            raise ValueError(f"cap is {cap}: below 1 it would lower every weight; choose >= 1")
        if math.isinf(cap):
            raise ValueError("cap is inf, which caps nothing: leave it out")
        shaped = np.minimum(shaped, cap)
    for lower, weight in bucket_weights:
        if lower not in edges:
            raise ValueError(
                f"no bucket starts at {lower} tokens: the lower edges are {', '.join(map(str, edges))}"
            )
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"weight {weight} of the bucket from {lower}: it must be a finite number >= 0")
        shaped[edges.index(lower)] = weight
    if len({lower for lower, _ in bucket_weights}) < len(bucket_weights):
        raise ValueError(f"a bucket has two weights in {list(bucket_weights)}: name each once")
    largest = float(shaped.max())
    if largest > float(np.finfo(np.float32).max):
        raise ValueError(f"a weight is {largest:g}, beyond float32: choose smaller ones")
    if not shaped.any():
        raise ValueError("every weight is 0, so nothing would be trained: leave a bucket above 0")
    return shaped


def _check_parameters(*, alpha: float, gamma: float, tau: float, eps: float) -> None:
    for name, value, low_is_legal in (
        ("alpha", alpha, True),
        ("gamma", gamma, True),
        ("tau", tau, False),
        ("eps", eps, False),
    ):
        if not math.isfinite(value) or value < 0 or (value == 0 and not low_is_legal):
            raise ValueError(
                f"{name} is {value}: it must be a finite number {'>=' if low_is_legal else '>'} 0"
            )
