"""Paired bootstrap of a macro average over cells.

Examples are resampled with replacement within each cell, both sides of a pair together, so only the
differences d_i = treatment_i - baseline_i of a cell matter. Drawing n of n examples with replacement
changes nothing but how often each *distinct* difference comes, and these counts are multinomial with
probabilities (examples with that difference) / n. Scores are right or wrong, or a fraction of a few
answers, so a cell has a handful of distinct differences however many examples it holds: 10,000 resamples
of a cell of 7,500 examples are 10,000 draws of three numbers, distributed as 75 million indices would be.

Several pairs of runs (seeds) are a second level. The pairs are resampled first, then the examples. Where
all pairs answered the same examples, one draw of examples serves all pairs: a hard example is hard for
every seed, and independent draws would count it as so many examples (Owen 2007, "The pigeonhole
bootstrap"). Where each pair has examples of its own, they are drawn for each by itself.

The interval is that of percentiles (Efron 1979).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_NUMBERS = 1 << 21
"""Counts drawn at once: 16 MiB, whatever the number of distinct differences."""
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How often, and from which seed."""

    resamples: int = 10_000
    """Resamples of the bootstrap, and exchanges of the test."""
    seed: int = 0
    """Of both."""

    def __post_init__(self) -> None:
        if self.resamples < 1 or self.seed < 0:
            raise ValueError(
                f"resamples {self.resamples}, seed {self.seed}: give at least 1, and a seed of at least 0"
            )


def generator(seed: int, *purpose: str) -> np.random.Generator:
    """Random numbers for one purpose, independent of which other purposes there are and of their order."""
    digest = hashlib.sha256("\n".join(purpose).encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest[:16], dtype="<u4").tolist()])


def resampled_means(
    differences: Sequence[NDArray[np.float64]],
    *,
    is_shared: bool,
    resamples: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Means of one cell under resampling of its examples.

    Args:
        differences: one array [examples] a pair of runs.
        is_shared: whether position i is the same example in every pair.
        resamples: how many.
        rng: for this cell alone.

    Returns:
        float64 [resamples, pairs].
    """
    if is_shared:
        return _resample(np.stack(differences, axis=1), resamples, rng)
    return np.hstack([_resample(values[:, None], resamples, rng) for values in differences])


def _resample(values: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """[examples, pairs] -> [resamples, pairs]: means over examples drawn with replacement."""
    num_examples, num_pairs = values.shape
    distinct, sizes = np.unique(values, axis=0, return_counts=True)
    means = np.empty((resamples, num_pairs))
    block = max(1, BLOCK_NUMBERS // len(distinct))
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        counts = rng.multinomial(num_examples, sizes / num_examples, size=stop - start)
        means[start:stop] = counts @ distinct / num_examples
    return means


def pair_weights(num_pairs: int, resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each pair of runs is drawn: float64 [resamples, pairs], rows that sum to 1."""
    counts = rng.multinomial(num_pairs, np.full(num_pairs, 1 / num_pairs), size=resamples)
    return counts / num_pairs


def interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """The percentiles of resampled values [resamples] that hold 95 % between them."""
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [outside, 1 - outside])
    return float(low), float(high)
