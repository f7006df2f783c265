"""Intervals and tests for macro averages over cells: paired bootstrap, exchanged sides, Holm's correction.

**Bootstrap.** What was drawn together (by default each example by itself) is resampled with replacement
within each cell, both sides of a pair together, so only the differences d_i = treatment_i - baseline_i of a
cell matter. Drawing n of n units with replacement changes only how often each *distinct* unit (its sum of
differences and its size) comes, and these counts are multinomial with probabilities (units like it) / n.
Scores are right or wrong, or a fraction of a few answers, so a cell has a handful of distinct differences
however many examples it holds: 10,000 resamples of a cell of 7,500 examples are 10,000 draws of three
numbers, distributed as 75 million indices would be.

Several pairs of runs (seeds) are a second level. The pairs are resampled first, then the examples. Where
all pairs answered the same examples, one draw of examples serves all pairs: a hard example is hard for
every seed, and independent draws would count it as so many examples (Owen 2007, "The pigeonhole
bootstrap"). Where each pair has examples of its own, they are drawn for each by itself.

The interval is that of percentiles (Efron 1979).

**Test of no difference.** If it does not matter which side answered a unit, the sign of its difference is a
coin. The test throws these coins: its p-value is the share of throws whose macro average lies at least as
far from 0 as the one that was observed, both counted with it (Phipson and Smyth 2010), so it is never 0 and
never too small. Units of one size of difference are interchangeable, so a throw is one binomial number a
size.
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
FEW_EXAMPLES = 30
"""Below, an interval of percentiles is visibly too narrow: by sqrt(1 - 1/n), and more where skewed."""
MOST_EXACT_PAIRS = 16
"""Up to here all exchanges of whole pairs of runs are listed: 65,536."""
TOLERANCE = 1e-12
"""Sums of the same numbers in another order differ by less; scores are of order 1."""
Units = NDArray[np.int64]
"""[examples], numbers from 0: examples with the same number were drawn together."""


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
    units: Sequence[Units] | None = None,
) -> NDArray[np.float64]:
    """Means of one cell under resampling of its examples.

    Args:
        differences: one array [examples] a pair of runs.
        is_shared: whether position i is the same example in every pair.
        resamples: how many.
        rng: for this cell alone.
        units: which examples were drawn together, one array a pair; None: each by itself.

    Returns:
        float64 [resamples, pairs].
    """
    drawn = units or [np.arange(len(values)) for values in differences]
    if is_shared:
        return _resample(np.stack(differences, axis=1), drawn[0], resamples, rng)
    return np.hstack(
        [
            _resample(values[:, None], unit, resamples, rng)
            for values, unit in zip(differences, drawn, strict=True)
        ]
    )


def _resample(
    values: NDArray[np.float64], units: Units, resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """[examples, pairs] -> [resamples, pairs]: means over units drawn with replacement."""
    num_pairs = values.shape[1]
    sums, sizes = _by_unit(values, units)
    distinct, repeats = np.unique(np.column_stack([sums, sizes]), axis=0, return_counts=True)
    distinct_sums = np.ascontiguousarray(distinct[:, :num_pairs])
    means = np.empty((resamples, num_pairs))
    block = max(1, BLOCK_NUMBERS // len(distinct))
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        counts = rng.multinomial(len(sums), repeats / len(sums), size=stop - start)
        means[start:stop] = counts @ distinct_sums / (counts @ distinct[:, num_pairs:])
    return means


def _by_unit(values: NDArray[np.float64], units: Units) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[examples, pairs] -> sums [units, pairs] and numbers of examples [units]."""
    sizes = np.bincount(units)
    sums = np.zeros((len(sizes), values.shape[1]))
    np.add.at(sums, units, values)
    return sums, sizes.astype(np.float64)


def pair_weights(num_pairs: int, resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each pair of runs is drawn: float64 [resamples, pairs], rows that sum to 1."""
    counts = rng.multinomial(num_pairs, np.full(num_pairs, 1 / num_pairs), size=resamples)
    return counts / num_pairs


def interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """The percentiles of resampled values [resamples] that hold 95 % between them."""
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [outside, 1 - outside])
    return float(low), float(high)


def flipped_means(
    differences: Sequence[NDArray[np.float64]],
    *,
    is_shared: bool,
    resamples: int,
    rng: np.random.Generator,
    units: Sequence[Units] | None = None,
) -> NDArray[np.float64]:
    """Means of one cell with the sides of its examples exchanged at random.

    Args:
        differences: one array [examples] a pair of runs.
        is_shared: whether position i is the same example in every pair; then it is exchanged in all.
        resamples: how many.
        rng: for this cell alone.
        units: which examples were drawn together, one array a pair, and are exchanged together; None: each
            by itself.

    Returns:
        float64 [resamples], averaged over the pairs of runs.
    """
    drawn = units or [np.arange(len(values)) for values in differences]
    if is_shared:
        return _flip(np.mean(differences, axis=0), drawn[0], resamples, rng)
    total = np.zeros(resamples)
    for values, unit in zip(differences, drawn, strict=True):
        total += _flip(values, unit, resamples, rng)
    return total / len(differences)


def _flip(
    values: NDArray[np.float64], units: Units, resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    sums, _ = _by_unit(values[:, None], units)
    sizes, repeats = np.unique(np.abs(sums[:, 0]), return_counts=True)
    means = np.empty(resamples)
    block = max(1, BLOCK_NUMBERS // len(sizes))
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        positive = rng.binomial(repeats, 0.5, size=(stop - start, len(sizes)))
        means[start:stop] = (2 * positive - repeats) @ sizes / len(values)
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
