"""Token-weighting rules: how the counts of a pack become the weight of each target.

One table registers them. A rule turns counts into bucket weights and says whether the loss is divided
by the number of supervised targets (EXACT) or by the mass of their weights (its normalised variant).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_exact.exposure.weights import DEFAULT_ALPHA, DEFAULT_GAMMA, default_tau, exact_weights


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """A rule applied to the counts of one packed training split."""

    rule: str
    """Name in RULES."""
    row_tokens: int
    """Inputs of a packed row."""
    lower_bounds: NDArray[np.int64]
    """[buckets], tokens."""
    counts: NDArray[np.int64]
    """[buckets], supervised targets of the training split."""
    bucket_weights: NDArray[np.float64]
    """[buckets], weight of a target of each bucket, >= 0."""
    divides_by_mass: bool
    """Whether the loss is divided by the weight mass instead of the number of targets."""
    parameters: dict[str, float]
    """alpha, gamma and tau where the rule has them."""

    @property
    def is_uniform(self) -> bool:
        """Whether every target has weight 1."""
        return bool((self.bucket_weights == 1).all())


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row of the table of rules."""

    weigh: Callable[..., NDArray[np.float64]]
    """(counts, lower_bounds, alpha=, gamma=, tau=) -> float64 [buckets]."""
    has_parameters: bool
    """Whether alpha, gamma and tau matter."""
    divides_by_mass: bool
    """See `Weighting.divides_by_mass`."""
    summary: str
    """One line for `--help`."""


def _ones(counts: ArrayLike, lower_bounds: ArrayLike, **_: float) -> NDArray[np.float64]:
    return np.ones(np.asarray(counts).shape)


RULES: dict[str, Rule] = {
    "none": Rule(
        weigh=_ones,
        has_parameters=False,
        divides_by_mass=False,
        summary="standard continued pretraining, every weight 1",
    ),
    "exact": Rule(
        weigh=exact_weights,
        has_parameters=True,
        divides_by_mass=False,
        summary="EXACT: loss divided by the number of targets",
    ),
    "exact-normalized": Rule(
        weigh=exact_weights,
        has_parameters=True,
        divides_by_mass=True,
        summary="EXACT weights, loss divided by the mass of the weights",
    ),
}


def build_weighting(
    rule: str,
    counts: ArrayLike,
    lower_bounds: ArrayLike,
    row_tokens: int,
    *,
    alpha: float = DEFAULT_ALPHA,
    gamma: float = DEFAULT_GAMMA,
    tau: float | None = None,
) -> Weighting:
    """Apply a rule to the counts of a training split.

    Args:
        rule: a name in RULES.
        counts: integers [buckets].
        lower_bounds: integers [buckets].
        row_tokens: inputs of a packed row.
        alpha: see `exact_weights`.
        gamma: see `exact_weights`.
        tau: in tokens; None means row_tokens / 4.

    Raises:
        ValueError: an unknown rule, a tau above the row length, or parameters `exact_weights` refuses.
    """
    if rule not in RULES:
        raise ValueError(f"unknown token weighting {rule!r}: choose one of {', '.join(RULES)}")
    chosen = RULES[rule]
    tau = default_tau(row_tokens) if tau is None else tau
    edges = np.asarray(lower_bounds)
    if chosen.has_parameters and tau > row_tokens and edges.size > 1:
        raise ValueError(
            f"tau {tau:g} is above the row length {row_tokens}: no target can have so much context; "
            f"choose tau <= {edges[-1]}, where the top bucket starts "
            f"(the paper uses {default_tau(row_tokens)})"
        )
    parameters = {"alpha": alpha, "gamma": gamma, "tau": float(tau)}
    return Weighting(
        rule=rule,
        row_tokens=row_tokens,
        lower_bounds=np.asarray(lower_bounds, dtype=np.int64),
        counts=np.asarray(counts, dtype=np.int64),
        bucket_weights=chosen.weigh(counts, lower_bounds, **parameters),
        divides_by_mass=chosen.divides_by_mass,
        parameters=parameters if chosen.has_parameters else {},
    )
