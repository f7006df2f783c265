"""What a weighting rule reads and what it returns.

A rule is a function `(SplitTargets, RuleParameters) -> RowWeights`. It is called once, with the counts of
the training split. The dataset, or its workers, which receive the returned `RowWeights` as a pickle, then
ask it for the weights of each row (`RowTargets`):

| class | weight of a target |
|---|---|
| `ContextWeights` | that of the bucket of its effective context |
| `PositionWeights` | that of the bucket of its position in the packed row |
| `PermutedWeights` | one of the table, each used exactly as often as its bucket has targets |
| `rules.ConfidenceWeights` | by its scores at long and short context |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_exact.exposure.buckets import bucket_index
from megatron_exact.exposure.confidence import ConfidenceParameters
from megatron_exact.exposure.weights import DEFAULT_ALPHA, DEFAULT_GAMMA

DEFAULT_EVIDENCE_NATS = 0.1
"""A tenth of a nat is more than the rounding of scores, and far less than a copied fact is worth."""


def gains(difference: NDArray[np.floating], nats: float) -> NDArray[np.bool_]:
    """Return which targets the far context helps: their loss with it is lower by more than `nats`.

    Args:
        difference: [S], `RowScores.difference`, loss with the whole context minus that with a short one.
        nats: 0 or more.
    """
    helped: NDArray[np.bool_] = difference < -nats
    return helped


@dataclass(frozen=True, kw_only=True)
class RuleParameters:
    """What a user may choose about any of the rules; each rule says which of these fields it reads."""

    alpha: float = DEFAULT_ALPHA
    """EXACT: mean extra weight of the tail, >= 0."""
    gamma: float = DEFAULT_GAMMA
    """EXACT: exponent of inverse frequency in the tail, >= 0."""
    tau: float | None = None
    """EXACT: first effective context of the tail, tokens; None means a quarter of the row."""
    cap: float | None = None
    """EXACT: largest weight that the formula may give, >= 1; None means no cap (the paper has none)."""
    bucket_weights: tuple[tuple[int, float], ...] = ()
    """EXACT: (lower edge, weight) of buckets whose weight is set by hand, after the cap."""
    match_mass: str | None = None
    """Rules with a table: rule whose mean weight the extra weight is scaled to (`MASSES` in `rules.py`)."""
    evidence_nats: float = DEFAULT_EVIDENCE_NATS
    """exact-evidence: nats by which the far context must lower a target's loss, >= 0."""
    confidence_lambda: float = ConfidenceParameters.lam
    """Confidence rules: `ConfidenceParameters.lam`."""
    confidence_kappa: float | None = ConfidenceParameters.kappa
    """Confidence rules: `ConfidenceParameters.kappa`."""
    confidence_cap: float = ConfidenceParameters.cap
    """Confidence rules: `ConfidenceParameters.cap`."""
    confidence_s: float = ConfidenceParameters.s
    """Confidence rules: `ConfidenceParameters.s`."""
    short_window: int | None = None
    """Confidence rules: tokens of a short window; None means `default_windows`."""
    short_stride: int | None = None
    """Confidence rules: tokens from one short window to the next; None means `default_windows`."""
    short_border: str = "target"
    """Confidence rules: `ShortWindows.border`."""

    def of(self, names: tuple[str, ...]) -> dict[str, float]:
        """Return the named parameters as run.json records them: only numbers, and only those that are set.

        A weight set by hand is recorded as `weight_from_<lower edge>`.
        """
        found: dict[str, float] = {}
        for name in names:
            value = getattr(self, name)
            if name in ("match_mass", "short_border"):
                continue  # not numbers: recorded as the scale that follows, and by `RowWeights.describe`
            if name == "bucket_weights":
                found |= {f"weight_from_{lower}": float(weight) for lower, weight in value}
            elif value is not None:
                found[name] = value
        return found


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
    gaining_counts: Callable[[float], NDArray[np.int64]] | None = None
    """Gives [buckets], the targets that `gains` says of, for this many nats; reads all stored scores."""


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """Stored scores of the targets of one row (`data/score_files.py`)."""

    difference: NDArray[np.floating]
    """[S], cross-entropy with the whole effective context visible minus that with a short window of it,
    nats; 0 where the two are the same or the target is unsupervised."""


class RowTargets(Protocol):
    """The targets of one row of S inputs: target j is the token that input j predicts.

    `data/dataset.py` implements it. A protocol, because this folder imports only numpy. Nothing is computed
    before it is asked for, so a rule pays for what it uses: a rule of buckets costs one table look-up a
    segment.
    """

    @property
    def row_id(self) -> int:
        """Row of the plan."""

    @property
    def supervised(self) -> NDArray[np.bool_]:
        """[S], whether the target's loss counts."""

    @property
    def effective_context(self) -> NDArray[np.int64]:
        """[S], in [0, S]; any value where unsupervised."""

    @property
    def random_places(self) -> NDArray[np.int64]:
        """[supervised targets of the row], in [0, n) for a split of n supervised targets.

        A keyed bijection of [0, n) applied to the numbers of the row's targets in the order of the plan: in
        an epoch every place occurs once, and a target has the same place in every epoch, on every layout.
        """

    @property
    def scores(self) -> RowScores:
        """Stored scores of the row.

        Raises:
            ValueError: the job was given none.
        """

    def by_context[T: np.generic](self, of_context: NDArray[T]) -> NDArray[T]:
        """`of_context[effective_context]` without looking anything up: a slice a segment is copied.

        Args:
            of_context: [S + 1], value at context 0, 1, ..., S.

        Returns:
            [S], of the same dtype, of its own.
        """


class RowWeights(ABC):
    """Gives the targets of a row their weights."""

    by: ClassVar[str]
    """What the weight depends on, for run.json."""
    uses_random_places: ClassVar[bool] = False
    """Whether rows are asked for `random_places`, which the dataset prepares at its start."""
    in_step: bool = False
    """Whether the weights are only known inside the training step: the dataset then gives 1, and training
    replaces it before the loss (`training/run.py`, forward_step)."""

    def describe(self) -> dict[str, str]:
        """Return what run.json records of these weights beside the numbers."""
        return {}

    @abstractmethod
    def weigh_row(self, row: RowTargets) -> NDArray[np.float32]:
        """Weight of each target of a row, [S], >= 0; any finite value where unsupervised."""


@dataclass(frozen=True, kw_only=True)
class TableWeights(RowWeights):
    """Weights that come from a table of buckets."""

    row_tokens: int
    """Inputs of a row, S."""
    lower_bounds: NDArray[np.int64]
    """[buckets], tokens."""
    counts: NDArray[np.int64]
    """[buckets], supervised targets of the training split that get this weight."""
    weights: NDArray[np.float64]
    """[buckets], >= 0."""

    @property
    def mean_weight(self) -> float:
        """Mass of an epoch over its number of targets; 1 without targets."""
        targets = int(self.counts.sum())
        mass = math.fsum(
            count * weight
            for count, weight in zip(self.counts.tolist(), self.weights.tolist(), strict=True)
        )
        return mass / targets if targets else 1.0


class ContextWeights(TableWeights):
    """Weigh a target by the bucket of its effective context."""

    by = "effective context"

    def weigh_row(self, row: RowTargets) -> NDArray[np.float32]:
        return row.by_context(self.of_context)

    @cached_property
    def of_context(self) -> NDArray[np.float32]:
        """[row_tokens + 1], the weight at effective context 0, 1, ..."""
        contexts = bucket_index(np.arange(self.row_tokens + 1), self.row_tokens)
        return self.weights.astype(np.float32)[contexts]


@dataclass(frozen=True, kw_only=True)
class EvidenceWeights(TableWeights):
    """Weigh the targets that gain from the far context by the bucket of their effective context.

    `counts` has these targets alone; all others have weight 1.
    """

    by = "effective context, of targets that gain from it"
    evidence_nats: float
    """Nats that a target must gain."""
    targets: int
    """Supervised targets of the training split, those of weight 1 among them."""

    @property
    def mean_weight(self) -> float:
        """Mass of an epoch over its number of targets, all of them; 1 without targets."""
        extra = math.fsum(
            count * (weight - 1)
            for count, weight in zip(self.counts.tolist(), self.weights.tolist(), strict=True)
        )
        return 1 + extra / self.targets if self.targets else 1.0

    def weigh_row(self, row: RowTargets) -> NDArray[np.float32]:
        weights = row.by_context(self._of_context)
        weights[~gains(row.scores.difference, self.evidence_nats)] = 1.0
        return weights

    @cached_property
    def _of_context(self) -> NDArray[np.float32]:
        contexts = bucket_index(np.arange(self.row_tokens + 1), self.row_tokens)
        return self.weights.astype(np.float32)[contexts]


class PositionWeights(TableWeights):
    """Weigh a target by its packed position: the inputs before it in its row, of whatever document."""

    by = "packed position"

    def weigh_row(self, row: RowTargets) -> NDArray[np.float32]:
        return self.of_position.copy()

    @cached_property
    def of_position(self) -> NDArray[np.float32]:
        """[row_tokens], the weight of the target of each input of a row."""
        positions = bucket_index(np.arange(1, self.row_tokens + 1), self.row_tokens)
        return self.weights.astype(np.float32)[positions]


class PermutedWeights(TableWeights):
    """Weigh a target by its random place: places [0, counts[0]) get the first weight, the next counts[1]
    places the second, and so on."""

    by = "random place"
    uses_random_places = True

    def weigh_row(self, row: RowTargets) -> NDArray[np.float32]:
        supervised = row.supervised
        bucket = np.searchsorted(np.cumsum(self.counts), row.random_places, side="right")
        out = np.ones(supervised.size, dtype=np.float32)
        out[supervised] = self.weights.astype(np.float32)[bucket]
        return out
