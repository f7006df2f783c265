"""Token-weighting rules: how the targets of a packed training split get their weights.

One table registers them. A rule is a function of the split's counts and of parameters (`bucket_rules.py`);
it returns how weights are dealt out row by row (`row_weights.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_exact.exposure import bucket_rules
from megatron_exact.exposure.confidence import CONFIDENCE_RULES
from megatron_exact.exposure.confidence_rules import confidence_rule, parameters_of
from megatron_exact.exposure.parameters import RuleParameters
from megatron_exact.exposure.row_weights import RowWeights, TableWeights
from megatron_exact.exposure.split_targets import SplitTargets
from megatron_exact.exposure.weights import default_tau

EXACT_PARAMETERS = ("alpha", "gamma", "tau", "cap", "bucket_weights")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row of the table of rules."""

    weigh: Callable[[SplitTargets, RuleParameters], RowWeights]
    """From the split's counts to the weights of rows; `tau` is a number when it is called."""
    parameters: tuple[str, ...] = ()
    """Fields of RuleParameters that it reads; any other changes nothing."""
    divides_by_mass: bool = False
    """Whether the loss is divided by the weight mass instead of the number of targets."""
    summary: str
    """One line for `--help`."""


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """A rule applied to one packed training split."""

    rule: str
    """Name in RULES."""
    row_tokens: int
    """Inputs of a packed row."""
    lower_bounds: NDArray[np.int64]
    """[buckets] of effective context, tokens."""
    counts: NDArray[np.int64]
    """[buckets], supervised targets of the training split by effective context."""
    row_weights: RowWeights
    """Deals out the weights."""
    divides_by_mass: bool
    """Whether the loss is divided by the weight mass instead of the number of targets."""
    parameters: dict[str, float]
    """Those that the rule has, by name."""

    @property
    def table(self) -> TableWeights | None:
        """The weights by bucket and how many targets get each; None for rules without a table."""
        return self.row_weights if isinstance(self.row_weights, TableWeights) else None

    @property
    def bucket_weights(self) -> NDArray[np.float64]:
        """[buckets], the weights of the table; 1 for rules without."""
        return np.ones(self.counts.shape) if self.table is None else self.table.weights

    @property
    def is_uniform(self) -> bool:
        """Whether every target has weight 1."""
        return self.table is not None and bool((self.table.weights == 1).all())

    def describe(self) -> dict[str, Any]:
        """The weighting entry of run.json.

        `by` says what the buckets of the table are buckets of; `counts` and `weights` belong together, so
        `mean_weight`, mass over targets, is theirs.
        """
        table = self.table
        return {
            "rule": self.rule,
            "parameters": self.parameters,
            "by": self.row_weights.by,
            "lower_bounds": self.lower_bounds.tolist(),
            "counts": (self.counts if table is None else table.counts).tolist(),
            "weights": None if table is None else table.weights.tolist(),
            "mean_weight": None if table is None else table.mean_weight,
        }


RULES: dict[str, Rule] = {
    "none": Rule(weigh=bucket_rules.none, summary="standard continued pretraining, every weight 1"),
    "exact": Rule(
        weigh=bucket_rules.exact,
        parameters=EXACT_PARAMETERS,
        summary="EXACT: loss divided by the number of targets",
    ),
    "exact-normalized": Rule(
        weigh=bucket_rules.exact,
        parameters=EXACT_PARAMETERS,
        divides_by_mass=True,
        summary="EXACT weights, loss divided by the mass of the weights",
    ),
    "uniform-tail": Rule(
        weigh=bucket_rules.uniform_tail,
        parameters=("alpha", "tau", "cap", "bucket_weights"),
        summary="1 + alpha on every target of the tail (EXACT with gamma 0)",
    ),
    "packed-position": Rule(
        weigh=bucket_rules.packed_position,
        parameters=EXACT_PARAMETERS,
        summary="EXACT's formula with the position in the packed row instead of effective context",
    ),
    "random-same-mass": Rule(
        weigh=bucket_rules.random_same_mass,
        parameters=EXACT_PARAMETERS,
        summary="EXACT's weights dealt out at random, each exactly as often as EXACT does",
    ),
    "constant": Rule(
        weigh=bucket_rules.constant,
        parameters=EXACT_PARAMETERS,
        summary="the mean of EXACT's weights on every target",
    ),
    **{
        name: Rule(weigh=confidence_rule(name), parameters=parameters_of(name), summary=rule.summary)
        for name, rule in CONFIDENCE_RULES.items()
    },
}


def find_rule(name: str) -> Rule:
    """The row of the table.

    Raises:
        ValueError: an unknown name.
    """
    if name not in RULES:
        raise ValueError(f"unknown token weighting {name!r}: choose one of {', '.join(RULES)}")
    return RULES[name]


def readers(parameter: str) -> tuple[str, ...]:
    """Names of the rules that read a field of RuleParameters."""
    return tuple(name for name, rule in RULES.items() if parameter in rule.parameters)


def build_weighting(
    rule: str,
    counts: ArrayLike,
    lower_bounds: ArrayLike,
    row_tokens: int,
    *,
    position_counts: Callable[[], NDArray[np.int64]] | None = None,
    has_scores: bool = False,
    **parameters: Any,
) -> Weighting:
    """Apply a rule to the counts of a training split.

    Args:
        rule: a name in RULES.
        counts: integers [buckets].
        lower_bounds: integers [buckets].
        row_tokens: inputs of a packed row.
        position_counts, has_scores: see `SplitTargets`.
        parameters: fields of `RuleParameters`.

    Raises:
        ValueError: an unknown rule, a tau above the row length, or parameters that the rule refuses.
    """
    chosen = find_rule(rule)
    given = RuleParameters(**parameters)
    tau = float(default_tau(row_tokens) if given.tau is None else given.tau)
    edges = np.asarray(lower_bounds, dtype=np.int64)
    if "tau" in chosen.parameters and tau > row_tokens and edges.size > 1:
        raise ValueError(
            f"tau {tau:g} is above the row length {row_tokens}: no target can have so much context; "
            f"choose tau <= {edges[-1]}, where the top bucket starts "
            f"(the paper uses {default_tau(row_tokens)})"
        )
    given = replace(given, tau=tau)
    split = SplitTargets(
        row_tokens=row_tokens,
        lower_bounds=edges,
        counts=np.asarray(counts, dtype=np.int64),
        position_counts=position_counts,
        has_scores=has_scores,
    )
    return Weighting(
        rule=rule,
        row_tokens=row_tokens,
        lower_bounds=edges,
        counts=split.counts,
        row_weights=chosen.weigh(split, given),
        divides_by_mass=chosen.divides_by_mass,
        parameters=given.of(chosen.parameters),
    )
