"""Intervals and tests for macro averages over cells, chosen by simulation (`benchmarks/coverage.py`).

**Units.** What was drawn together is one unit: an example, or all examples of a question. An average over
cells is a sum over units, and its uncertainty is how these parts vary. A suite whose questions come in
several cells (every question of NoLiMa at every depth and length, in every set) has one unit a question
for all of them. Counting its cells as independent counts one question as so many, and the interval becomes
too narrow by a factor that grows with the number of cells.

**Interval.** Student's t over units, within each cell (or over the questions of a suite that shares them),
with Satterthwaite's degrees of freedom where cells are of different size, and with the first term of the
Edgeworth expansion against skewness (Johnson 1978; Hall 1992): a few wins among ties are skewed, and the
plain t covers 92 % of them. With several pairs of runs (seeds) units and pairs are crossed, because every
pair answers the same examples. The variance of the mean is that of the pairs' means, plus that of the
units' means, minus what both of them count (the interaction; Cameron, Gelbach and Miller 2011, "Robust
inference with multiway clustering").

**No interval.** An interval from few units that differ covers less than it says: the data do not tell how
rare a rare event is. Below `FEWEST_EVENTS` units that differ from the most common outcome there is none,
and a reason in its place. Neither is there one over fewer than `FEWEST_PAIRS` pairs of runs: what remains
is the interval for these seeds, about other examples alone (`of_these_seeds`).

**Test of no difference.** If it does not matter which side answered a unit, the sign of its part is a coin.
The test throws these coins: its p-value is the share of throws whose average lies at least as far from 0 as
the one that was observed, both counted with it (Phipson and Smyth 2010), so it is never 0 and never too
small. That holds for the seeds at hand. What holds for other seeds exchanges whole pairs of runs; three
pairs give 8 exchanges and a p-value of 0.25 at least.

**Cells.** `resampled_means` and `percentiles` are the paper's kind of interval: a bootstrap of the examples
of each cell by themselves. It is there to compare with the paper's tables.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

BLOCK_NUMBERS = 1 << 21
"""Counts drawn at once: 16 MiB, whatever the number of distinct differences."""
CONFIDENCE = 0.95
FEWEST_EVENTS = 5
"""Units that must differ from the most common outcome for an interval; docs/intervals.md shows why."""
FEWEST_PAIRS = 4
"""Pairs of runs, if there are several, for an interval over other seeds."""
MOST_EXACT_PAIRS = 16
"""Up to here all exchanges of whole pairs of runs are listed: 65,536."""
TOLERANCE = 1e-12
"""Sums of the same numbers in another order differ by less; scores are of order 1."""
UNITS, CELLS = "units", "cells"
KINDS = (UNITS, CELLS)
"""What an interval resamples; `cells` is the paper's kind."""
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How intervals and tests are made."""

    resamples: int = 10_000
    """Exchanges of the test, and resamples of the bootstrap where `kind` asks for it."""
    seed: int = 0
    """Of both."""
    kind: str = UNITS
    """`units`: Student's t over units and seeds. `cells`: percentiles of resampled seeds and cells."""

    def __post_init__(self) -> None:
        if self.resamples < 1 or self.seed < 0:
            raise ValueError(
                f"resamples {self.resamples}, seed {self.seed}: give at least 1, and a seed of at least 0"
            )
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} cannot be resampled: choose one of {', '.join(KINDS)}")


def generator(seed: int, *purpose: str) -> np.random.Generator:
    """Random numbers for one purpose, independent of which other purposes there are and of their order."""
    digest = hashlib.sha256("\n".join(purpose).encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest[:16], dtype="<u4").tolist()])


# ----------------------------------------------------------------------------------------------------
# Averages as sums over units.


@dataclass(frozen=True, kw_only=True)
class Units:
    """An average over examples, or over cells, as a sum over the units that were drawn.

    The columns are pairs of runs. A pair that did not answer a unit has 0 there.
    """

    names: tuple[Hashable, ...]
    """[units], what tells a unit from others."""
    parts: Array
    """[units, pairs], what a unit adds to the average of a pair; they sum to it."""
    deviations: Array
    """[units, pairs], the parts of the units' differences from the means of their cells; they sum to 0."""
    groups: NDArray[np.int64]
    """[units], the sample that a unit belongs to: units are drawn within it."""
    crossed: NDArray[np.bool_]
    """[units], whether all pairs of runs answered the unit; else only one of them did."""

    @property
    def averages(self) -> Array:
        """[pairs]."""
        return np.asarray(self.parts.sum(axis=0))

    def of_these_seeds(self) -> Units:
        """The mean over the pairs of runs as one column: what varies is the examples, not the seeds."""
        return Units(
            names=self.names,
            parts=self.parts.mean(axis=1, keepdims=True),
            deviations=self.deviations.mean(axis=1, keepdims=True),
            groups=self.groups,
            crossed=np.ones_like(self.crossed),
        )


def cell_units(
    differences: Sequence[Array], names: Sequence[Sequence[Hashable]], *, is_shared: bool
) -> Units:
    """One cell.

    Args:
        differences: one array [examples] a pair of runs.
        names: of the unit of each example, one sequence a pair; examples of one name were drawn together.
        is_shared: whether position i is the same example in every pair.
    """
    num_pairs = len(differences)
    if is_shared:
        return _sample(np.stack(differences, axis=1), names[0])
    samples = []
    for pair, (values, own) in enumerate(zip(differences, names, strict=True)):
        columns = np.zeros((len(values), num_pairs))
        columns[:, pair] = values
        samples.append(_sample(columns, [(pair, name) for name in own], only=pair))
    return _joined(samples)


def _sample(values: Array, names: Sequence[Hashable], only: int | None = None) -> Units:
    """[examples, pairs] of one cell; `only`: the pair that answered them where not all did."""
    numbers: dict[Hashable, int] = {}
    units = np.array([numbers.setdefault(name, len(numbers)) for name in names])
    sums, sizes = _by_unit(values, units)
    parts = sums / len(values)
    means = parts.sum(axis=0)
    return Units(
        names=tuple(numbers),
        parts=parts,
        deviations=parts - sizes[:, None] * means / len(values),
        groups=np.full(len(sizes), 0 if only is None else only),
        crossed=np.full(len(sizes), only is None),
    )


def _joined(samples: Sequence[Units]) -> Units:
    """All units of several, none of which are the same."""
    return Units(
        names=tuple(name for one in samples for name in one.names),
        parts=np.concatenate([one.parts for one in samples]),
        deviations=np.concatenate([one.deviations for one in samples]),
        groups=np.concatenate([one.groups for one in samples]),
        crossed=np.concatenate([one.crossed for one in samples]),
    )


def average_units(cells: Sequence[tuple[float, Units]], *, across_cells: bool) -> Units:
    """The weighted mean of cells.

    Args:
        cells: weights, and units as `cell_units` gives them.
        across_cells: whether units of one name in several cells are one unit; else each cell is a sample of
            its own.
    """
    total = sum(weight for weight, _ in cells)
    num_groups = 1 + max(int(units.groups.max()) for _, units in cells)
    scaled = [
        Units(
            names=units.names,
            parts=units.parts * (weight / total),
            deviations=units.deviations * (weight / total),
            groups=units.groups + (0 if across_cells else number * num_groups),
            crossed=units.crossed,
        )
        for number, (weight, units) in enumerate(cells)
    ]
    joined = _joined(scaled)
    if not across_cells:
        return joined
    numbers: dict[tuple[Hashable, bool], int] = {}
    keys = zip(joined.names, joined.crossed.tolist(), strict=True)
    places = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    first = np.unique(places, return_index=True)[1]
    return Units(
        names=tuple(name for name, _ in numbers),
        parts=_by_unit(joined.parts, places)[0],
        deviations=_by_unit(joined.deviations, places)[0],
        groups=joined.groups[first],
        crossed=joined.crossed[first],
    )


def _by_unit(values: Array, units: NDArray[np.int64]) -> tuple[Array, Array]:
    """[examples, pairs] -> sums [units, pairs] and numbers of examples [units]."""
    sizes = np.bincount(units)
    sums = np.column_stack([np.bincount(units, weights=column) for column in values.T])
    return sums, sizes.astype(np.float64)


# ----------------------------------------------------------------------------------------------------
# What can be said of an average.


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Student's interval of an average, or why there is none."""

    ends: tuple[float, float] | None
    """In the units of the scores."""
    reason: str
    """Why there is none, in a few words; empty where there is one."""
    p_value: float | None
    """Two-sided, of no difference: below 0.05 where the interval excludes 0; None without an interval."""

    def record(self, name: str, scale: float) -> dict[str, object]:
        """The ends under a name, or null with `NAME_reason`, for JSON files."""
        if self.ends is None:
            return {name: None, f"{name}_reason": self.reason}
        return {name: [scale * end for end in self.ends]}


def student_interval(units: Units) -> Interval:
    """Interval of the mean over pairs of runs: about other units, and other pairs if there are several."""
    average, num_pairs = float(units.averages.mean()), units.parts.shape[1]
    if 1 < num_pairs < FEWEST_PAIRS:
        return Interval(ends=None, reason=f"only {num_pairs} pairs of runs", p_value=None)
    num_events, num_units = _events(units)
    if num_units < 2:
        return Interval(ends=None, reason="a cell has one example or unit", p_value=None)
    if num_events < FEWEST_EVENTS:  # a single size of difference counts as the plain number
        told = math.floor(num_events + TOLERANCE)
        return Interval(ends=None, reason=f"only {told} of {num_units:,} differ", p_value=None)
    variance, freedom, of_units = _variance(units)
    if not variance > 0:
        return Interval(ends=None, reason="all pairs of runs differ alike", p_value=None)
    error = math.sqrt(variance)
    critical = float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2))
    centre = average + _third_cumulant(units) / max(variance, of_units) * (2 * critical**2 + 1) / 6
    p_value = float(2 * special.stdtr(freedom, -abs(centre) / error))
    half = critical * error
    return Interval(ends=(centre - half, centre + half), reason="", p_value=p_value)


def interval_record(units: Units, scale: float) -> dict[str, object]:
    """`ci95`, and with several pairs of runs `ci95_these_seeds`; a reason beside each that is null."""
    record = student_interval(units).record("ci95", scale)
    if units.parts.shape[1] > 1:
        these = student_interval(units.of_these_seeds())
        record |= these.record("ci95_these_seeds", scale)
    return record


def _events(units: Units) -> tuple[float, int]:
    """The effective number of units that differ from the most common one of their sample, and of all.

    A unit counts by the square of its difference: (sum of squares)^2 / sum of fourth powers, which is the
    plain number where all differ by as much.

    Returns:
        0 units where a sample has a single one.
    """
    means = units.parts.mean(axis=1)
    squares = np.zeros(len(means))
    for group in np.unique(units.groups):
        inside = units.groups == group
        if np.count_nonzero(inside) < 2:
            return 0.0, 0
        rounded = np.round(means[inside], 12)
        values, times = np.unique(rounded, return_counts=True)
        squares[inside] = (rounded - values[times.argmax()]) ** 2
    total = squares.sum()
    return (0.0 if total == 0 else float(total**2 / np.sum(squares**2) + TOLERANCE)), len(means)


def _variance(units: Units) -> tuple[float, float, float]:
    """Variance of the mean over pairs of runs, its degrees of freedom, and the part of the units in it."""
    num_pairs = units.parts.shape[1]
    means = units.deviations.mean(axis=1)
    interactions = np.sum((units.deviations - means[:, None]) ** 2, axis=1)
    of_units = of_both = noise = 0.0
    for group in np.unique(units.groups):
        inside = (units.groups == group) & units.crossed
        number = int(np.count_nonzero(inside))
        if number < 2:
            continue
        scale = number / (number - 1)
        one = scale * float(np.sum(means[inside] ** 2))
        both = scale * float(np.sum(interactions[inside])) / max(1, num_pairs - 1) / num_pairs
        of_units, of_both = of_units + one, of_both + both
        noise += (one**2 + both**2 / max(1, num_pairs - 1)) / (number - 1)
    if num_pairs == 1:
        return of_units, of_units**2 / noise, of_units
    of_pairs = float(np.var(units.averages, ddof=1)) / num_pairs
    if of_units <= of_both:  # nothing speaks for examples that are hard for all seeds
        return of_pairs, num_pairs - 1, of_units
    variance = of_pairs + of_units - of_both
    freedom = variance**2 / (of_pairs**2 / (num_pairs - 1) + noise)
    return variance, max(freedom, num_pairs - 1), of_units


def _third_cumulant(units: Units) -> float:
    """Estimate the third cumulant of the average over units, for the correction of skewness."""
    means = units.deviations.mean(axis=1)
    total = 0.0
    for group in np.unique(units.groups):
        inside = units.groups == group
        number = int(np.count_nonzero(inside))
        if number > 2:
            total += number**2 / ((number - 1) * (number - 2)) * float(np.sum(means[inside] ** 3))
    return total


def exchange_p(units: Units, *, resamples: int, rng: np.random.Generator) -> float:
    """p-value of exchanging the two sides of each unit at random, for these seeds."""
    exchanged = exchanged_averages(units, resamples=resamples, rng=rng)
    return two_sided_p(float(units.averages.mean()), exchanged)


def exchanged_averages(units: Units, *, resamples: int, rng: np.random.Generator) -> Array:
    """Averages with the two sides of each unit exchanged at random, in all pairs of runs together.

    Units of one size are interchangeable, so that a throw is one binomial number a size.

    Args:
        units: of the average.
        resamples: throws.
        rng: for this average alone.

    Returns:
        float64 [resamples].
    """
    parts = units.parts.mean(axis=1)
    sizes, repeats = np.unique(np.round(np.abs(parts), 15), return_counts=True)
    averages = np.empty(resamples)
    block = max(1, BLOCK_NUMBERS // len(sizes))
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        positive = rng.binomial(repeats, 0.5, size=(stop - start, len(sizes)))
        averages[start:stop] = (2 * positive - repeats) @ sizes
    return averages


def two_sided_p(observed: float, exchanged: Array) -> float:
    """p-value of an observed mean among [resamples] means under the hypothesis."""
    extreme = np.count_nonzero(np.abs(exchanged) >= abs(observed) - TOLERANCE)
    return float((extreme + 1) / (len(exchanged) + 1))


def pair_level_p(pair_means: Array) -> float | None:
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


def claimed_p(units: Units, of_these_seeds: float) -> float:
    """The p-value that may be claimed.

    Args:
        units: of the average.
        of_these_seeds: from `exchange_p`.

    Returns:
        With one pair of runs `of_these_seeds`: nothing is known about others. With several, the larger of
        `pair_level_p` and of the interval's: it holds for other seeds and for other examples. 1 where there
        is neither.
    """
    if units.parts.shape[1] == 1:
        return of_these_seeds
    known = (pair_level_p(units.averages), student_interval(units).p_value)
    return max((p for p in known if p is not None), default=1.0)


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


# ----------------------------------------------------------------------------------------------------
# The paper's kind: a bootstrap of the examples of each cell.


def resampled_means(
    differences: Sequence[Array], *, is_shared: bool, resamples: int, rng: np.random.Generator
) -> Array:
    """Means of one cell under resampling of its examples.

    Drawing n of n with replacement changes only how often each *distinct* difference comes, and these
    counts are multinomial. A cell has a handful of distinct differences however many examples it contains.

    Args:
        differences: one array [examples] a pair of runs.
        is_shared: whether position i is the same example in every pair: one draw of examples then serves
            all pairs (Owen 2007, "The pigeonhole bootstrap").
        resamples: how many.
        rng: for this cell alone.

    Returns:
        float64 [resamples, pairs].
    """
    groups = [np.stack(differences, axis=1)] if is_shared else [values[:, None] for values in differences]
    return np.hstack([_resample(values, resamples, rng) for values in groups])


def _resample(values: Array, resamples: int, rng: np.random.Generator) -> Array:
    """[examples, pairs] -> [resamples, pairs]."""
    distinct, repeats = np.unique(values, axis=0, return_counts=True)
    means = np.empty((resamples, values.shape[1]))
    block = max(1, BLOCK_NUMBERS // len(distinct))
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        counts = rng.multinomial(len(values), repeats / len(values), size=stop - start)
        means[start:stop] = counts @ distinct / len(values)
    return means


def pair_weights(num_pairs: int, resamples: int, rng: np.random.Generator) -> Array:
    """How often each pair of runs is drawn: float64 [resamples, pairs], rows that sum to 1."""
    counts = rng.multinomial(num_pairs, np.full(num_pairs, 1 / num_pairs), size=resamples)
    return counts / num_pairs


def mean_over_pairs(draws: Array, sampling: Sampling) -> Array:
    """Draw the pairs of runs with replacement: [resamples, pairs] -> [resamples].

    The pairs that are drawn are the same for every average of a comparison.
    """
    rng = generator(sampling.seed, "pairs of runs")
    return np.asarray(np.sum(draws * pair_weights(draws.shape[1], len(draws), rng), axis=1))


def percentiles(draws: Array) -> tuple[float, float]:
    """The percentiles of resampled values [resamples] that hold 95 % between them."""
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [outside, 1 - outside])
    return float(low), float(high)


# ----------------------------------------------------------------------------------------------------
# In words.


def interval_methods(num_pairs: int, sampling: Sampling, unit: str) -> dict[str, str]:
    """How intervals were made, for `methods` of comparison.json.

    Args:
        num_pairs: of runs.
        sampling: of the comparison.
        unit: what was drawn, such as `example`.
    """
    alone = "each interval stands for itself"
    if sampling.kind == CELLS:
        pairs = "" if num_pairs == 1 else f"the {num_pairs} pairs of runs, then "
        return {
            "ci95": f"percentiles of {sampling.resamples:,} bootstrap resamples of {pairs}the examples of "
            f"each cell as independent (the paper's kind): too narrow where they are not; {alone}"
        }
    none = f"none where fewer than {FEWEST_EVENTS} differ from the most common outcome"
    about = "about other examples, not other seeds"
    one = f"Student's t over the differences of each {unit}, corrected for skewness; {none}; {alone}"
    if num_pairs == 1:
        return {"ci95": f"{one}; {about}"}
    return {
        "ci95": f"Student's t over the {num_pairs} pairs of runs and over the differences of each {unit}, "
        f"which cross; {none}, and none with fewer than {FEWEST_PAIRS} pairs; {alone}",
        "ci95_these_seeds": f"{one}; {about}",
    }


def sampling_notes(num_pairs: int, sampling: Sampling) -> list[str]:
    """Limits of the intervals and tests that belong beside the numbers."""
    notes = []
    if num_pairs == 1:
        notes.append(
            "one pair of runs: intervals and p-values are about other examples, not other training seeds"
        )
    elif 2 / (1 << num_pairs) > 1 - CONFIDENCE:
        notes.append(
            f"{num_pairs} pairs of runs: a test over seeds cannot give less than p = "
            f"{2 / (1 << num_pairs):g}, "
            'so no difference can be significant at 0.05; what is named "these seeds" holds for these '
            "models alone"
        )
    if sampling.kind == CELLS:
        notes.append(
            "--resample cells: intervals of the paper's kind, which count all examples and cells as "
            "independent; with few seeds or repeated questions they are too narrow"
        )
    return notes
