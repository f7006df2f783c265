"""One cell, and the macro average of several: estimates, counts, resamples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.evaluation import bootstrap, permutation
from megatron_exact.evaluation.matching import CellScores
from megatron_exact.evaluation.result_folders import Cell

POINTS = 100
"""Scores are 0..1 in files and 0..100 in everything that is reported."""


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What is kept of one cell."""

    cell: Cell
    """Which."""
    examples: int
    """Of one run; the mean over the pairs of runs, rounded, where they differ."""
    baseline: NDArray[np.float64]
    """[pairs], mean score 0..1 of each run."""
    treatment: NDArray[np.float64]
    """[pairs]."""
    signs: NDArray[np.int64]
    """[3], examples of all pairs that the treatment wins, loses, ties."""
    resampled: NDArray[np.float64]
    """[resamples, pairs], mean differences under resampling of examples."""
    flipped: NDArray[np.float64]
    """[resamples], mean differences with the sides of examples exchanged at random."""


def cell_result(scores: CellScores, *, resamples: int, seed: int) -> CellResult:
    """Means, counts and resamples of a cell; its random numbers depend on the seed and its name alone."""
    differences = scores.differences
    pooled = np.concatenate(differences)
    purpose = (scores.cell.suite, scores.cell.task, str(scores.cell.length))
    return CellResult(
        cell=scores.cell,
        examples=round(len(pooled) / len(differences)),
        baseline=np.array([values.mean() for values in scores.baseline]),
        treatment=np.array([values.mean() for values in scores.treatment]),
        signs=np.array([np.sum(pooled > 0), np.sum(pooled < 0), np.sum(pooled == 0)]),
        resampled=bootstrap.resampled_means(
            differences,
            is_shared=scores.is_shared,
            resamples=resamples,
            rng=bootstrap.generator(seed, "examples", *purpose),
        ),
        flipped=permutation.flipped_means(
            differences,
            is_shared=scores.is_shared,
            resamples=resamples,
            rng=bootstrap.generator(seed, "signs", *purpose),
        ),
    )


@dataclass(kw_only=True)
class MacroAverage:
    """Mean over cells with equal weights; a sum, so that the resamples of a cell need not be kept."""

    cells: int = 0
    """How many were added."""
    examples: int = 0
    """Their examples, of one run."""
    cell_signs: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, dtype=np.int64))
    """[3], cells whose mean over all pairs the treatment wins, loses, ties."""
    signs: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, dtype=np.int64))
    """[3], examples of all pairs that the treatment wins, loses, ties."""
    baseline: Any = 0.0
    """[pairs], sum of the cells' means, as `treatment`, `resampled` and `flipped` are sums of theirs."""
    treatment: Any = 0.0
    """[pairs]."""
    resampled: Any = 0.0
    """[resamples, pairs]."""
    flipped: Any = 0.0
    """[resamples]."""

    def add(self, cell: CellResult) -> None:
        """Let a cell enter."""
        self.cells += 1
        self.examples += cell.examples
        self.signs = self.signs + cell.signs
        sign = np.sign(np.round(np.mean(cell.treatment - cell.baseline), 12))
        self.cell_signs[{1: 0, -1: 1, 0: 2}[int(sign)]] += 1
        self.baseline = self.baseline + cell.baseline
        self.treatment = self.treatment + cell.treatment
        self.resampled = self.resampled + cell.resampled
        self.flipped = self.flipped + cell.flipped

    def estimate(self, pair_weights: NDArray[np.float64]) -> dict[str, Any]:
        """Averages in points, with the interval under resampling of pairs of runs and examples.

        Args:
            pair_weights: [resamples, pairs], from `bootstrap.pair_weights`.
        """
        baseline = POINTS * float(np.mean(self.baseline)) / self.cells
        treatment = POINTS * float(np.mean(self.treatment)) / self.cells
        draws = POINTS * np.sum(self.resampled * pair_weights, axis=1) / self.cells
        return {
            "cells": self.cells,
            "examples": self.examples,
            "baseline": baseline,
            "treatment": treatment,
            "delta": treatment - baseline,
            "ci95": list(bootstrap.interval(draws)),
            "relative_lift_percent": 100 * (treatment - baseline) / baseline if baseline > 0 else None,
            "example_signs": _signs(self.signs),
        }

    def tests(self) -> dict[str, Any]:
        """Counts of cells, the delta of each pair of runs, and p-values before any correction."""
        pair_means = (self.treatment - self.baseline) / self.cells
        return {
            "cell_signs": _signs(self.cell_signs),
            "pair_deltas": [POINTS * float(value) for value in pair_means],
            "p_value": permutation.two_sided_p(float(np.mean(pair_means)), self.flipped / self.cells),
            "pair_level_p_value": permutation.pair_level_p(pair_means),
        }


def _signs(counts: Sequence[int] | NDArray[np.int64]) -> dict[str, int]:
    return dict(zip(("wins", "losses", "ties"), map(int, counts), strict=True))
