"""Tests of "no difference" by exchanging the sides of pairs, and the correction for making several.

If it does not matter which side answered an example, the sign of its difference is a coin. The test throws
these coins: its p-value is the share of throws whose macro average lies at least as far from 0 as the one
that was observed, both counted with it (Phipson and Smyth 2010), so it is never 0 and never too small.
Examples of one size of difference are interchangeable, so a throw is one binomial number a size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK_NUMBERS = 1 << 21
MOST_EXACT_PAIRS = 16
"""Up to here all exchanges of whole pairs of runs are listed: 65,536."""
TOLERANCE = 1e-12
"""Sums of the same numbers in another order differ by less; scores are of order 1."""


def flipped_means(
    differences: Sequence[NDArray[np.float64]],
    *,
    is_shared: bool,
    resamples: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Means of one cell with the sides of its examples exchanged at random.

    Args:
        differences: one array [examples] a pair of runs.
        is_shared: whether position i is the same example in every pair; then it is exchanged in all.
        resamples: how many.
        rng: for this cell alone.

    Returns:
        float64 [resamples], averaged over the pairs of runs.
    """
    if is_shared:
        return _flip(np.mean(differences, axis=0), resamples, rng)
    total = np.zeros(resamples)
    for values in differences:
        total += _flip(values, resamples, rng)
    return total / len(differences)


def _flip(values: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    sizes, examples = np.unique(np.abs(values), return_counts=True)
    means = np.empty(resamples)
    block = max(1, BLOCK_NUMBERS // len(sizes))
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        positive = rng.binomial(examples, 0.5, size=(stop - start, len(sizes)))
        means[start:stop] = (2 * positive - examples) @ sizes / len(values)
    return means


def two_sided_p(observed: float, flipped: NDArray[np.float64]) -> float:
    """p-value of an observed mean among [resamples] means under the hypothesis."""
    extreme = np.count_nonzero(np.abs(flipped) >= abs(observed) - TOLERANCE)
    return float((extreme + 1) / (len(flipped) + 1))


def pair_level_p(pair_means: NDArray[np.float64]) -> float | None:
    """Exact two-sided p-value of exchanging whole pairs of runs; it cannot be below 2 / 2^pairs.

    Args:
        pair_means: [pairs], macro average of the differences of each pair of runs.

    Returns:
        None for one pair, or for more pairs than can be listed.
    """
    num_pairs = len(pair_means)
    if not 2 <= num_pairs <= MOST_EXACT_PAIRS:
        return None
    bits = np.arange(1 << num_pairs)[:, None] >> np.arange(num_pairs) & 1
    means = (1 - 2 * bits) @ pair_means / num_pairs
    return float(np.mean(np.abs(means) >= abs(pair_means.mean()) - TOLERANCE))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values that hold together (Holm 1979): below 0.05 in one of them wrongly, 5 % of the time at most.

    Valid however the tests depend on each other.
    """
    adjusted = [1.0] * len(p_values)
    floor = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted
