"""Token-weighting rules: how the targets of a packed training split get their weights.

EXACT (arXiv 2605.10544) and the controls of its Table 3 weigh by a table of buckets. They start from the
same table of EXACT's weights, so a cap, or a weight set by hand, changes them alike:

| rule | mass of an epoch, against `exact` with the same parameters |
|---|---|
| random-same-mass, constant | the same |
| uniform-tail | the same, unless a cap or a weight of a tail bucket changes it |
| exact-normalized | the loss is divided by it |
| packed-position | its own: the tail of packed positions is nearly always the larger one |

With `match_mass` every rule with a table has the mass of `exact`: `match_mass` scales its extra weight.

The confidence rules weigh by scores of each target (`confidence.py`). RULES names all rules; a new one is
one function and one line in that table (docs/extending.md).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_exact.exposure.confidence import (
    CONFIDENCE_RULES,
    ConfidenceParameters,
    ShortWindows,
    border_record,
    confidence_weights,
    default_windows,
)
from megatron_exact.exposure.row_weights import (
    ContextWeights,
    EvidenceWeights,
    PermutedWeights,
    PositionWeights,
    RowTargets,
    RowWeights,
    RuleParameters,
    SplitTargets,
    TableWeights,
)
from megatron_exact.exposure.weights import EmptyTailError, default_tau, exact_weights, shape_weights

FEW_GAINING = 0.25
"""Share of the tail's targets below which exact-evidence warns: their mean extra weight is over 4 alpha."""


def none(split: SplitTargets, parameters: RuleParameters) -> ContextWeights:
    """Give every target weight 1."""
    return by_context(split, np.ones(split.counts.shape))


def exact(split: SplitTargets, parameters: RuleParameters) -> ContextWeights:
    """Weigh by EXACT: `exact_weights` of the bucket of effective context, then cap and weights by hand."""
    return by_context(split, _exact_table(split.counts, split, parameters))


def uniform_tail(split: SplitTargets, parameters: RuleParameters) -> ContextWeights:
    """Give the whole tail weight 1 + alpha: EXACT with gamma 0."""
    return exact(split, replace(parameters, gamma=0.0))


def constant(split: SplitTargets, parameters: RuleParameters) -> ContextWeights:
    """Give every target the mean of EXACT's weights, and so its loss scale alone."""
    mean = exact(split, parameters).mean_weight
    return by_context(split, np.full(split.counts.shape, mean))


def packed_position(split: SplitTargets, parameters: RuleParameters) -> PositionWeights:
    """Apply EXACT's formula to the position in the packed row + 1 in place of the effective context.

    Frequencies are those of packed positions, and so is the tail.

    Raises:
        ValueError: the counts by packed position are not known.
    """
    if split.position_counts is None:
        raise ValueError(
            "packed-position needs the plan of a pack: counts by effective context do not give those by "
            "position"
        )
    counts = np.asarray(split.position_counts(), dtype=np.int64)
    return PositionWeights(
        row_tokens=split.row_tokens,
        lower_bounds=split.lower_bounds,
        counts=counts,
        weights=_exact_table(counts, split, parameters),
    )


def random_same_mass(split: SplitTargets, parameters: RuleParameters) -> PermutedWeights:
    """Permute the multiset of EXACT's weights over the supervised targets of the split."""
    return PermutedWeights(
        row_tokens=split.row_tokens,
        lower_bounds=split.lower_bounds,
        counts=split.counts,
        weights=_exact_table(split.counts, split, parameters),
    )


def exact_evidence(split: SplitTargets, parameters: RuleParameters) -> EvidenceWeights:
    """Give the extra mass of EXACT's tail to those of its targets that gain from the far context.

    Ours, not the paper's. The formula is EXACT's, over the counts of these targets, and its alpha is raised
    by (targets of the tail / those that gain), so that the mass of an epoch is that of `exact`.

    Raises:
        ValueError: no stored scores, a negative number of nats, or no target of the tail gains.
    """
    nats = parameters.evidence_nats
    if split.gaining_counts is None:
        raise ValueError(
            "exact-evidence needs to know which targets gain from the far context: score the pack "
            "(megatron-exact score) and name the scores with --confidence-scores"
        )
    if not (math.isfinite(nats) and nats >= 0):
        raise ValueError(f"--exact-evidence-nats is {nats}: it must be a finite number >= 0")
    assert parameters.tau is not None, "build_weighting fills it in"
    counts = np.asarray(split.gaining_counts(nats), dtype=np.int64)
    assert (counts <= split.counts).all(), "they are some of the targets"
    in_tail = split.lower_bounds >= parameters.tau
    gaining, tail = int(counts[in_tail].sum()), int(split.counts[in_tail].sum())
    if parameters.alpha > 0 and tail and not gaining:
        raise EmptyTailError(
            f"none of the {tail:,} targets of the tail gains {nats:g} nats or more from the far context: "
            "choose a smaller --exact-evidence-nats, or score with a model that uses long contexts"
        )
    alpha = parameters.alpha * tail / gaining if gaining else parameters.alpha
    weights = exact_weights(
        counts, split.lower_bounds, alpha=alpha, gamma=parameters.gamma, tau=parameters.tau
    )
    if parameters.alpha > 0 and gaining < FEW_GAINING * tail:
        warnings.warn(
            f"only {gaining:,} of the {tail:,} targets of the tail gain from the far context, and bear all "
            f"of its extra mass, with weights up to {weights.max():.3g}: by these scores long contexts are "
            "hardly needed, and these targets may gain by chance (docs/controls.md has such a case, where "
            "the loss rose)",
            stacklevel=2,
        )
    return EvidenceWeights(
        row_tokens=split.row_tokens,
        lower_bounds=split.lower_bounds,
        counts=counts,
        weights=weights,
        evidence_nats=nats,
        targets=int(split.counts.sum()),
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


MASSES: dict[str, Callable[[SplitTargets, RuleParameters], TableWeights]] = {"exact": exact}
"""Rules whose mass others can be given, by the name that `--match-mass` takes."""
MASS_SCALE = "mass_scale"
"""Name of the factor of `match_mass` among the recorded parameters."""


def match_mass(weights: TableWeights, mean_weight: float) -> tuple[TableWeights, float]:
    """Scale the extra weight of a table, `w - 1`, so that its mean weight over the split is another one.

    `w' = 1 + scale (w - 1)` with `scale = (mean' - 1) / (mean - 1)`: the same targets are raised, in the
    same proportions. The choice is ours; the paper's controls differ in mass (its Table 3).

    Args:
        weights: table of a rule.
        mean_weight: mass over number of targets that the new table has.

    Returns:
        The table, and the scale.

    Raises:
        ValueError: the table's mean weight is 1, so no scale reaches another one, or a scaled weight would
            be negative or beyond float32.
    """
    before = weights.mean_weight
    if math.isclose(before, mean_weight, rel_tol=1e-15, abs_tol=0):
        return weights, 1.0
    if abs(before - 1) < LEAST_EXTRA_WEIGHT:
        raise ValueError(
            f"the weights average {before:.15g}, so their extra weight is 0 and cannot be scaled to a mean "
            f"weight of {mean_weight:.6g}: choose alpha above 0, or leave out --match-mass"
        )
    scale = (mean_weight - 1) / (before - 1)
    scaled = 1 + scale * (weights.weights - 1)
    if not np.isfinite(scaled.astype(np.float32)).all() or (scaled < 0).any():
        raise ValueError(
            f"a mean weight of {mean_weight:.6g} in place of {before:.6g} needs weights from "
            f"{scaled.min():.6g} to {scaled.max():.6g}, and a weight must be finite and >= 0: choose a "
            "smaller alpha, other --exact-bucket-weights, or leave out --match-mass"
        )
    return replace(weights, weights=scaled), scale


LEAST_EXTRA_WEIGHT = 1e-12
"""Mean weights closer to 1 than this differ from it by rounding alone."""


def by_context(split: SplitTargets, weights: NDArray[np.float64]) -> ContextWeights:
    """Wrap weights of the buckets of effective context, [buckets], as a rule returns them."""
    return ContextWeights(
        row_tokens=split.row_tokens,
        lower_bounds=split.lower_bounds,
        counts=split.counts,
        weights=weights,
    )


@dataclass(frozen=True, kw_only=True)
class ConfidenceWeights(RowWeights):
    """Weigh a target by its scores.

    With stored scores (*frozen*) the dataset weighs a row as for any other rule. Without them (*unfrozen*)
    the scores are those of the model in training, which only the training step knows
    (`training/short_scores.py`).
    """

    by = "confidence"
    rule: str
    """A name in CONFIDENCE_RULES."""
    parameters: ConfidenceParameters
    """Parameters of the rule."""
    windows: ShortWindows
    """Windows of the short context."""
    in_step: bool
    """Whether the scores come from the model in training instead of files."""

    def describe(self) -> dict[str, str]:
        return border_record(self.windows.border)

    def weigh_row(self, row: RowTargets) -> NDArray[np.float32]:
        weights = confidence_weights(self.rule, row.scores.difference, row.supervised, self.parameters)
        return weights.astype(np.float32)


def confidence_rule(rule: str) -> Callable[[SplitTargets, RuleParameters], ConfidenceWeights]:
    """Make the function of a confidence rule, for its row of RULES."""

    def weigh(split: SplitTargets, parameters: RuleParameters) -> ConfidenceWeights:
        return ConfidenceWeights(
            rule=rule,
            parameters=ConfidenceParameters(
                lam=parameters.confidence_lambda,
                kappa=parameters.confidence_kappa,
                cap=parameters.confidence_cap,
                s=parameters.confidence_s,
            ),
            windows=default_windows(
                split.row_tokens,
                window=parameters.short_window,
                stride=parameters.short_stride,
                border=parameters.short_border,
            ),
            in_step=not split.has_scores,
        )

    return weigh


def parameters_of(rule: str) -> tuple[str, ...]:
    """Return the fields of RuleParameters that a confidence rule reads."""
    own = {"lam": "lambda"}
    names = (f"confidence_{own.get(name, name)}" for name in CONFIDENCE_RULES[rule].parameters)
    return (*names, "short_window", "short_stride", "short_border")


EXACT_PARAMETERS = ("alpha", "gamma", "tau", "cap", "bucket_weights", "match_mass")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One row of the table of rules."""

    weigh: Callable[[SplitTargets, RuleParameters], RowWeights]
    """From the split's counts to the weights of rows; `tau` is a number when it is called."""
    parameters: tuple[str, ...] = ()
    """Fields of RuleParameters that it reads; any other changes nothing."""
    divides_by_mass: bool = False
    """Whether the loss is divided by the weight mass instead of the number of targets."""
    reads_scores: bool = False
    """Whether it reads stored scores (`--confidence-scores`)."""
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
    """What gives each row its weights."""
    divides_by_mass: bool
    """Whether the loss is divided by the weight mass instead of the number of targets."""
    parameters: dict[str, float]
    """Parameters of the rule, by name."""

    @property
    def table(self) -> TableWeights | None:
        """The weights by bucket and how many targets get each; None for rules without a table."""
        return self.row_weights if isinstance(self.row_weights, TableWeights) else None

    @property
    def bucket_weights(self) -> NDArray[np.float64]:
        """[buckets], the weights of the table; 1 for rules without a table."""
        return np.ones(self.counts.shape) if self.table is None else self.table.weights

    def describe(self) -> dict[str, Any]:
        """Return the weighting entry of run.json.

        `by` says what the buckets of the table are buckets of; `counts` and `weights` belong together, so
        `mean_weight`, mass over targets, is theirs.
        """
        table = self.table
        return {
            "rule": self.rule,
            "parameters": self.parameters,
            "by": self.row_weights.by,
            **self.row_weights.describe(),
            "lower_bounds": self.lower_bounds.tolist(),
            "counts": (self.counts if table is None else table.counts).tolist(),
            "weights": None if table is None else table.weights.tolist(),
            "mean_weight": None if table is None else table.mean_weight,
        }


RULES: dict[str, Rule] = {
    "none": Rule(weigh=none, summary="standard continued pretraining, every weight 1"),
    "exact": Rule(
        weigh=exact,
        parameters=EXACT_PARAMETERS,
        summary="EXACT: loss divided by the number of targets",
    ),
    "exact-normalized": Rule(
        weigh=exact,
        parameters=EXACT_PARAMETERS,
        divides_by_mass=True,
        summary="EXACT weights, loss divided by the mass of the weights",
    ),
    "uniform-tail": Rule(
        weigh=uniform_tail,
        parameters=("alpha", "tau", "cap", "bucket_weights", "match_mass"),
        summary="1 + alpha on every target of the tail (EXACT with gamma 0)",
    ),
    "packed-position": Rule(
        weigh=packed_position,
        parameters=EXACT_PARAMETERS,
        summary="EXACT's formula with the position in the packed row instead of effective context",
    ),
    "random-same-mass": Rule(
        weigh=random_same_mass,
        parameters=EXACT_PARAMETERS,
        summary="EXACT's weights at random targets, each used exactly as often as in EXACT",
    ),
    "constant": Rule(
        weigh=constant,
        parameters=EXACT_PARAMETERS,
        summary="the mean of EXACT's weights on every target: its loss scale alone",
    ),
    "exact-evidence": Rule(
        weigh=exact_evidence,
        parameters=("alpha", "gamma", "tau", "evidence_nats"),
        reads_scores=True,
        summary="ours: EXACT's mass on those targets of the tail that gain from the far context, by stored "
        "scores",
    ),
    **{
        name: Rule(
            weigh=confidence_rule(name),
            parameters=parameters_of(name),
            reads_scores=True,
            summary=rule.summary,
        )
        for name, rule in CONFIDENCE_RULES.items()
    },
}


def find_rule(name: str) -> Rule:
    """Return the rule of this name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in RULES:
        raise ValueError(f"unknown token weighting {name!r}: choose one of {', '.join(RULES)}")
    return RULES[name]


def readers(parameter: str) -> tuple[str, ...]:
    """Return the names of the rules that read a field of RuleParameters."""
    return tuple(name for name, rule in RULES.items() if parameter in rule.parameters)


def score_readers() -> tuple[str, ...]:
    """Return the names of the rules that read stored scores."""
    return tuple(name for name, rule in RULES.items() if rule.reads_scores)


def build_weighting(
    rule: str,
    counts: ArrayLike,
    lower_bounds: ArrayLike,
    row_tokens: int,
    *,
    position_counts: Callable[[], NDArray[np.int64]] | None = None,
    has_scores: bool = False,
    gaining_counts: Callable[[float], NDArray[np.int64]] | None = None,
    **parameters: Any,
) -> Weighting:
    """Apply a rule to the counts of a training split.

    Args:
        rule: a name in RULES.
        counts: integers [buckets].
        lower_bounds: integers [buckets].
        row_tokens: inputs of a packed row.
        position_counts: gives the targets by packed position, see `SplitTargets`.
        has_scores: whether stored scores were given, see `SplitTargets`.
        gaining_counts: gives the targets that gain from the far context, see `SplitTargets`.
        parameters: fields of `RuleParameters`.

    Raises:
        ValueError: an unknown rule, a tau above the row length, or parameters that are not valid for the
            rule.
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
        gaining_counts=gaining_counts,
    )
    row_weights, recorded = chosen.weigh(split, given), given.of(chosen.parameters)
    if given.match_mass is not None:
        if given.match_mass not in MASSES:
            raise ValueError(f"no mass of {given.match_mass!r} to match: choose {', '.join(MASSES)}")
        if not isinstance(row_weights, TableWeights) or "match_mass" not in chosen.parameters:
            raise ValueError(
                f"{rule} has no extra weight to scale: --match-mass is for "
                f"{', '.join(readers('match_mass'))}"
            )
        mean_weight = MASSES[given.match_mass](split, given).mean_weight
        row_weights, recorded[MASS_SCALE] = match_mass(row_weights, mean_weight)
    return Weighting(
        rule=rule,
        row_tokens=row_tokens,
        lower_bounds=edges,
        counts=split.counts,
        row_weights=row_weights,
        divides_by_mass=chosen.divides_by_mass,
        parameters=recorded,
    )
