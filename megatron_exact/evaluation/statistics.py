"""Intervals and tests for macro averages over cells, chosen by simulation (`benchmarks/coverage.py`).

**Units.** What was drawn together is one unit: an example, or all examples of a question. An average over
cells is a sum over units (`Units`), and its uncertainty is how these parts vary. A suite whose questions
come in several cells (every question of NoLiMa at every depth and length, in every set) has one unit per
question for all of them. Treating its cells as independent would count one question many times, and the
interval would be too narrow by a factor that grows with the number of cells.

**Interval.** Student's t over units, within each cell (or over the questions of a suite that shares them),
with Satterthwaite's degrees of freedom where cells are of different size, and with the first term of the
Edgeworth expansion against skewness (Johnson 1978; Hall 1992): a few wins among ties are skewed, and a
plain t interval covers them in 92 % of cases. With several pairs of runs (seeds) units and pairs are
crossed, because every pair answers the same examples. The variance of the mean is that of the pairs' means,
plus that of the units' means, minus what both of them count (the interaction; Cameron, Gelbach and Miller
2011, "Robust inference with multiway clustering").

**Missing intervals.** An interval from few units that differ covers less often than it says, because the
data do not show how rare a rare event is. With fewer than `FEWEST_EVENTS` units that differ from the most
common outcome the result is a reason instead of an interval. The same holds for fewer than `FEWEST_PAIRS`
pairs of runs, where the interval for these seeds remains, which is about other examples
(`of_these_seeds`).

**Test of no difference.** If it does not matter which side answered a unit, the sign of its part is a coin
flip. The p-value is the share of flips whose average lies at least as far from 0 as the observed one, which
is counted as a flip itself (Phipson and Smyth 2010), so it is never 0 and never too small. This test is
about the seeds at hand. The one about other seeds exchanges whole pairs of runs; three pairs give 8
exchanges and a p-value of at least 0.25.

**Cells.** `resampled_means` and `percentiles` give the paper's kind of interval: a bootstrap of the
examples of each cell alone. It exists for comparison with the paper's tables.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special

BLOCK_NUMBERS = 1 << 21
"""Counts drawn at once: 16 MiB, whatever the number of distinct differences."""
CONFIDENCE = 0.95
POWER = 0.8
"""Probability with which the smallest difference that a comparison could have seen is seen."""
FEWEST_EVENTS = 5
"""Units that must differ from the most common outcome for an interval; docs/intervals.md shows why."""
FEWEST_PAIRS = 4
"""Pairs of runs, where there are several, that an interval over other seeds needs."""
MOST_EXACT_PAIRS = 16
"""Most pairs of runs whose exchanges are all listed: 65,536."""
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
    """Exchanges of the test, and resamples of the bootstrap where `kind` is `cells`."""
    seed: int = 0
    """Seed of exchanges and resamples."""
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
    """Return the random numbers of one purpose, independent of other purposes and their order."""
    digest = hashlib.sha256("\n".join(purpose).encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest[:16], dtype="<u4").tolist()])


@dataclass(frozen=True, kw_only=True)
class Units:
    """An average over examples, or over cells, as a sum over the units that were drawn.

    The columns are pairs of runs. A pair that did not answer a unit has 0 there.
    """

    names: tuple[Hashable, ...]
    """[units], what identifies a unit."""
    parts: Array
    """[units, pairs], what a unit adds to the average of a pair; they sum to it."""
    deviations: Array
    """[units, pairs], the parts of the units' differences from the means of their cells; they sum to 0."""
    groups: NDArray[np.int64]
    """[units], the sample that a unit belongs to: units are drawn within it."""
    crossed: NDArray[np.bool_]
    """[units], whether all pairs of runs answered the unit; else only one of them did."""
    kind: str = "examples"
    """What the units are, in the plural, for messages."""

    @property
    def averages(self) -> Array:
        """[pairs], the average of each pair of runs."""
        return np.asarray(self.parts.sum(axis=0))

    def samples(self) -> list[NDArray[np.int64]]:
        """Return the indices of the units of each sample, ascending."""
        order = np.argsort(self.groups, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self.groups[order])) + 1)

    def of_these_seeds(self) -> Units:
        """Return the mean over the pairs of runs as one column, so that examples vary and seeds do not."""
        return Units(
            names=self.names,
            parts=self.parts.mean(axis=1, keepdims=True),
            deviations=self.deviations.mean(axis=1, keepdims=True),
            groups=self.groups,
            crossed=np.ones_like(self.crossed),
            kind=self.kind,
        )


def cell_units(
    differences: Sequence[Array], names: Sequence[Sequence[Hashable]], *, is_shared: bool
) -> Units:
    """Make the units of one cell.

    Args:
        differences: one array [examples] for each pair of runs.
        names: name of the unit of each example, one sequence for each pair; examples with the same name
            were drawn together.
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
    """Make the units of values [examples, pairs] that were drawn as one sample.

    `only` is the pair of runs that answered them, where not all pairs did.
    """
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
    """Concatenate samples that have no unit in common."""
    return Units(
        names=tuple(name for one in samples for name in one.names),
        parts=np.concatenate([one.parts for one in samples]),
        deviations=np.concatenate([one.deviations for one in samples]),
        groups=np.concatenate([one.groups for one in samples]),
        crossed=np.concatenate([one.crossed for one in samples]),
    )


def scaled_units(units: Units, scale: float) -> Units:
    """Return the units of an average in another unit, such as points instead of scores 0..1."""
    return replace(units, parts=units.parts * scale, deviations=units.deviations * scale)


def average_units(cells: Sequence[tuple[float, Units]], *, across_cells: bool) -> Units:
    """Return the weighted mean of cells.

    Args:
        cells: weights, and units as `cell_units` returns them.
        across_cells: whether units with the same name in several cells are one unit; otherwise each cell is
            a sample of its own.
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
    """Sum values [examples, pairs] by unit: sums [units, pairs] and numbers of examples [units]."""
    sizes = np.bincount(units)
    sums = np.column_stack([np.bincount(units, weights=column) for column in values.T])
    return sums, sizes.astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Student's interval of an average, or the reason why there is no interval."""

    ends: tuple[float, float] | None
    """Lower and upper end, in the units of the scores; None without an interval."""
    reason: str
    """Why there is no interval, in a few words; empty where there is one."""
    p_value: float | None
    """Two-sided p-value of no difference, below 0.05 where the interval excludes 0; None without one."""

    def record(self, name: str, scale: float) -> dict[str, object]:
        """Return the ends under a name, or null with `NAME_reason`, for JSON files."""
        if self.ends is None:
            return {name: None, f"{name}_reason": self.reason}
        return {name: [scale * end for end in self.ends]}


def student_interval(units: Units) -> Interval:
    """Return the interval of the mean over pairs of runs: about other units, and other pairs if several."""
    average, num_pairs = float(units.averages.mean()), units.parts.shape[1]
    if 1 < num_pairs < FEWEST_PAIRS:
        return Interval(ends=None, reason=f"only {num_pairs} pairs of runs", p_value=None)
    samples = units.samples()
    if min(map(len, samples)) < 2:
        return Interval(ends=None, reason="a cell has one example or unit", p_value=None)
    num_events = _events(units, samples)
    if num_events < FEWEST_EVENTS:
        whole = math.floor(num_events + TOLERANCE)
        return Interval(ends=None, reason=f"only {whole} of {len(units.names):,} differ", p_value=None)
    spread = _spread(units, samples)
    if not spread.variance > 0:
        return Interval(ends=None, reason="all pairs of runs differ alike", p_value=None)
    error = math.sqrt(spread.variance)
    critical = float(special.stdtrit(spread.freedom, (1 + CONFIDENCE) / 2))
    skewness = spread.third_cumulant / max(spread.variance, spread.of_units)
    center = average + skewness * (2 * critical**2 + 1) / 6
    p_value = float(2 * special.stdtr(spread.freedom, -abs(center) / error))
    half = critical * error
    return Interval(ends=(center - half, center + half), reason="", p_value=p_value)


def interval_of_pairs(values: Array) -> Interval:
    """Return Student's interval of the mean of one number for each pair of runs.

    For numbers without units of their own, such as a difference of losses; about other seeds.

    Args:
        values: [pairs].
    """
    num_pairs = len(values)
    if num_pairs < FEWEST_PAIRS:
        noun = "pair" if num_pairs == 1 else "pairs"
        return Interval(ends=None, reason=f"only {num_pairs} {noun} of runs", p_value=None)
    average, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(num_pairs)
    if not error > 0:
        return Interval(ends=None, reason="all pairs of runs differ alike", p_value=None)
    half = float(special.stdtrit(num_pairs - 1, (1 + CONFIDENCE) / 2)) * error
    p_value = float(2 * special.stdtr(num_pairs - 1, -abs(average) / error))
    return Interval(ends=(average - half, average + half), reason="", p_value=p_value)


def interval_record(units: Units, scale: float) -> dict[str, object]:
    """Return `ci95`, and with several pairs of runs `ci95_these_seeds`; a null comes with its reason."""
    record = student_interval(units).record("ci95", scale)
    smallest = detectable_difference(units)
    record["detectable"] = None if smallest is None else scale * smallest
    if units.parts.shape[1] > 1:
        these = student_interval(units.of_these_seeds())
        record |= these.record("ci95_these_seeds", scale)
    return record


def detectable_difference(units: Units) -> float | None:
    """Return the difference whose interval would exclude 0 with probability `POWER`, given this spread.

    None where there is no interval. `power.py` asks the same for other numbers of seeds and examples.
    """
    if student_interval(units).ends is None:
        return None
    spread = _spread(units, units.samples())
    return math.sqrt(spread.variance) * needed_shift(spread.freedom, POWER)


def needed_shift(freedom: float, power: float) -> float:
    """Return the difference, in standard errors, that a two-sided t test at 5 % shows with this power."""
    critical = float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2))
    return float(special.nctdtrinc(freedom, 1 - power, critical))


def _events(units: Units, samples: Sequence[NDArray[np.int64]]) -> float:
    """Return the effective number of units that differ from the most common one of their sample.

    A unit counts by the square of its difference: (sum of squares)^2 / sum of fourth powers, which is the
    plain number of units where all differ by the same amount.
    """
    means = np.round(units.parts.mean(axis=1), 12)
    squares = np.zeros(len(means))
    for inside in samples:
        values, times = np.unique(means[inside], return_counts=True)
        squares[inside] = (means[inside] - values[times.argmax()]) ** 2
    total = squares.sum()
    return 0.0 if total == 0 else float(total**2 / np.sum(squares**2) + TOLERANCE)


@dataclass(frozen=True, kw_only=True)
class _Spread:
    """How far the mean over pairs of runs may lie from its expectation."""

    variance: float
    """Variance of the mean."""
    freedom: float
    """Degrees of freedom of the variance."""
    of_units: float
    """The part of the variance that comes from the units."""
    third_cumulant: float
    """Third cumulant of the average over units, for the correction of skewness."""


def _spread(units: Units, samples: Sequence[NDArray[np.int64]]) -> _Spread:
    """Estimate the spread of the mean over pairs of runs from the deviations within each sample."""
    num_pairs = units.parts.shape[1]
    means = units.deviations.mean(axis=1)
    interactions = np.sum((units.deviations - means[:, None]) ** 2, axis=1)
    of_units = of_both = noise = third = 0.0
    for inside in samples:
        number = len(inside)
        if number > 2:
            third += number**2 / ((number - 1) * (number - 2)) * float(np.sum(means[inside] ** 3))
        crossed = inside[units.crossed[inside]]
        number = len(crossed)
        if number < 2:
            continue
        scale = number / (number - 1)
        one = scale * float(np.sum(means[crossed] ** 2))
        both = scale * float(np.sum(interactions[crossed])) / max(1, num_pairs - 1) / num_pairs
        of_units, of_both = of_units + one, of_both + both
        noise += (one**2 + both**2 / max(1, num_pairs - 1)) / (number - 1)
    if num_pairs == 1:
        variance, freedom = of_units, of_units**2 / noise
    else:
        variance, freedom = float(np.var(units.averages, ddof=1)) / num_pairs, float(num_pairs - 1)
        if of_units > of_both:  # otherwise no sign of examples that are hard for all seeds
            of_pairs = variance
            variance = of_pairs + of_units - of_both
            freedom = max(variance**2 / (of_pairs**2 / (num_pairs - 1) + noise), freedom)
    return _Spread(variance=variance, freedom=freedom, of_units=of_units, third_cumulant=third)


def exchange_p(units: Units, *, resamples: int, rng: np.random.Generator) -> float:
    """Return the p-value of exchanging the two sides of each unit at random, for these seeds."""
    exchanged = exchanged_averages(units, resamples=resamples, rng=rng)
    return two_sided_p(float(units.averages.mean()), exchanged)


def exchanged_averages(units: Units, *, resamples: int, rng: np.random.Generator) -> Array:
    """Draw averages with the two sides of each unit exchanged at random, in all pairs of runs together.

    Units of one size are interchangeable, so that a draw is one binomial number for each size.

    Args:
        units: units of the average.
        resamples: number of draws.
        rng: random numbers for this average alone.

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
    """Return the p-value of an observed mean among [resamples] means under the hypothesis."""
    extreme = np.count_nonzero(np.abs(exchanged) >= abs(observed) - TOLERANCE)
    return float((extreme + 1) / (len(exchanged) + 1))


def pair_level_p(pair_means: Array) -> float | None:
    """Return the exact two-sided p-value of exchanging whole pairs of runs, at least 2 / 2^pairs.

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
    """Return the p-value that may be claimed.

    Args:
        units: units of the average.
        of_these_seeds: from `exchange_p`.

    Returns:
        With one pair of runs `of_these_seeds`, since other seeds are unknown. With several, the larger of
        `pair_level_p` and of the interval's p-value: it holds for other seeds and for other examples. 1
        where both are missing.
    """
    if units.parts.shape[1] == 1:
        return of_these_seeds
    known = (pair_level_p(units.averages), student_interval(units).p_value)
    return max((p for p in known if p is not None), default=1.0)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979), whatever the dependence between the tests.

    The chance that any of them is below 0.05 without a difference is then at most 5 %.
    """
    adjusted = [1.0] * len(p_values)
    floor = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = floor
    return adjusted


def resampled_means(
    differences: Sequence[Array], *, is_shared: bool, resamples: int, rng: np.random.Generator
) -> Array:
    """Draw means of one cell under resampling of its examples: the paper's kind of interval.

    Drawing n of n with replacement changes only how often each *distinct* difference occurs, and these
    counts are multinomial. A cell has a handful of distinct differences however many examples it contains.

    Args:
        differences: one array [examples] for each pair of runs.
        is_shared: whether position i is the same example in every pair: one draw of examples then serves
            all pairs (Owen 2007, "The pigeonhole bootstrap").
        resamples: number of draws.
        rng: random numbers for this cell alone.

    Returns:
        float64 [resamples, pairs].
    """
    groups = [np.stack(differences, axis=1)] if is_shared else [values[:, None] for values in differences]
    return np.hstack([_resample(values, resamples, rng) for values in groups])


def _resample(values: Array, resamples: int, rng: np.random.Generator) -> Array:
    """Draw means [resamples, pairs] of values [examples, pairs]."""
    distinct, repeats = np.unique(values, axis=0, return_counts=True)
    means = np.empty((resamples, values.shape[1]))
    block = max(1, BLOCK_NUMBERS // len(distinct))
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        counts = rng.multinomial(len(values), repeats / len(values), size=stop - start)
        means[start:stop] = counts @ distinct / len(values)
    return means


def pair_weights(num_pairs: int, resamples: int, rng: np.random.Generator) -> Array:
    """Draw how often each pair of runs is taken: float64 [resamples, pairs], rows that sum to 1."""
    counts = rng.multinomial(num_pairs, np.full(num_pairs, 1 / num_pairs), size=resamples)
    return counts / num_pairs


def mean_over_pairs(draws: Array, sampling: Sampling) -> Array:
    """Draw the pairs of runs with replacement: [resamples, pairs] -> [resamples].

    The drawn pairs are the same for every average of a comparison.
    """
    rng = generator(sampling.seed, "pairs of runs")
    return np.asarray(np.sum(draws * pair_weights(draws.shape[1], len(draws), rng), axis=1))


def percentiles(draws: Array) -> tuple[float, float]:
    """Return the percentiles of resampled values [resamples] between which 95 % of them lie."""
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws, [outside, 1 - outside])
    return float(low), float(high)


def interval_methods(
    num_pairs: int, sampling: Sampling, unit: str, *, units: str = "examples"
) -> dict[str, str]:
    """Describe in words how intervals were made, for `methods` of comparison.json.

    Args:
        num_pairs: pairs of runs.
        sampling: options of the comparison.
        unit: name of what was drawn, such as `example`, with what there is to say about it.
        units: its plain plural.
    """
    alone = "each interval stands for itself"
    if sampling.kind == CELLS:
        pairs = "" if num_pairs == 1 else f"the {num_pairs} pairs of runs, then "
        return {
            "ci95": f"percentiles of {sampling.resamples:,} bootstrap resamples of {pairs}the examples of "
            f"each cell as independent (the paper's kind): too narrow where they are not; {alone}"
        }
    none = f"none where fewer than {FEWEST_EVENTS} differ from the most common outcome"
    about = f"about other {units}, not other seeds"
    one = f"Student's t over the differences of each {unit}, corrected for skewness; {none}; {alone}"
    if num_pairs == 1:
        return {"ci95": f"{one}; {about}"}
    return {
        "ci95": f"Student's t over the {num_pairs} pairs of runs and over the differences of each {unit}, "
        f"which cross; {none}, and none with fewer than {FEWEST_PAIRS} pairs; {alone}",
        "ci95_these_seeds": f"{one}; {about}",
    }


def sampling_notes(num_pairs: int, sampling: Sampling) -> list[str]:
    """Return the limits of the intervals and tests that belong beside the numbers."""
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
