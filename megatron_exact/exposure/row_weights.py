"""How weights are dealt out to the targets of a row.

A rule makes one of these once, from the counts of the training split; the dataset, or its workers, which
receive it as a pickle, then ask it row by row.

| class | weight of a target |
|---|---|
| `ContextWeights` | that of the bucket of its effective context |
| `PositionWeights` | that of the bucket of its position in the packed row |
| `PermutedWeights` | one of the table, each dealt out exactly as often as its bucket has targets |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron_exact.exposure.buckets import bucket_index
from megatron_exact.exposure.row_targets import RowTargets


class RowWeights(ABC):
    """Weights of the targets of rows."""

    by: ClassVar[str]
    """What the weight depends on, for run.json."""
    uses_random_places: ClassVar[bool] = False
    """Whether rows are asked for `random_places`, which the dataset prepares at its start."""
    in_step: bool = False
    """Whether the weights are only known inside the training step: the dataset then gives 1, and training
    replaces it before the loss (`training/run.py`, forward_step)."""

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
    """By effective context."""

    by = "effective context"

    def weigh_row(self, row: RowTargets) -> NDArray[np.float32]:
        return row.by_context(self._of_context)

    @cached_property
    def _of_context(self) -> NDArray[np.float32]:
        contexts = bucket_index(np.arange(self.row_tokens + 1), self.row_tokens)
        return self.weights.astype(np.float32)[contexts]


class PositionWeights(TableWeights):
    """By packed position: the number of inputs that stand before the target in its row, own or not."""

    by = "packed position"

    def weigh_row(self, row: RowTargets) -> NDArray[np.float32]:
        return self._of_position.copy()

    @cached_property
    def _of_position(self) -> NDArray[np.float32]:
        positions = bucket_index(np.arange(1, self.row_tokens + 1), self.row_tokens)
        return self.weights.astype(np.float32)[positions]


class PermutedWeights(TableWeights):
    """By random place: places [0, counts[0]) get the first weight, the next counts[1] the second, ..."""

    by = "random place"
    uses_random_places = True

    def weigh_row(self, row: RowTargets) -> NDArray[np.float32]:
        supervised = row.supervised
        bucket = np.searchsorted(np.cumsum(self.counts), row.random_places, side="right")
        out = np.ones(supervised.size, dtype=np.float32)
        out[supervised] = self.weights.astype(np.float32)[bucket]
        return out
