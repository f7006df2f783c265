"""How many seeds and examples show an effect: power from the stored results of a comparison.

A difference between two sides varies with the seed of training, with the example, and with both together.
`Components` are these three variances, estimated from the units of a comparison in the same way as its
interval (`statistics.student_interval`). Here an example is a unit that was drawn: for a probe a sentence
form, for NoLiMa a question with all its haystacks (`Units.kind`). With P seeds and k times the examples the
mean has variance

    V(P, k) = seeds / P + units / k + both / (P k)

An effect is seen where the interval excludes 0. Its probability is that of a noncentral t with the
interval's degrees of freedom (`expected_power`). `simulated_power` checks it without that formula: it
draws seeds and examples again from the stored units, hierarchically, and lets `student_interval` and the
exchange of whole pairs decide on each draw.

Few pilot seeds say little about the variance between seeds: with 5, its 95 % interval reaches from a third
to 8 times the estimate. Numbers of seeds from a pilot are rough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special

from megatron_exact.evaluation import statistics
from megatron_exact.evaluation.comparison import COMPARISON, POINTS, units_by_regime
from megatron_exact.evaluation.pairing import Regimes
from megatron_exact.evaluation.probe_comparison import units_by_kind
from megatron_exact.evaluation.statistics import CONFIDENCE, FEWEST_PAIRS, POWER, Array, Units
from megatron_exact.json_input import read_json_object, require_shape

SIGNIFICANCE = 1 - CONFIDENCE
FEWEST_SIGNIFICANT_PAIRS = 6
"""Pairs of runs from which on the exchange of whole pairs can give a p-value below 0.05: 2 / 2^6."""
LARGE_FREEDOM = 1e6
"""Degrees of freedom beyond which t is the normal distribution."""
MOST_PAIRS = 512
"""Pairs of runs up to which a number is searched."""


@dataclass(frozen=True, kw_only=True)
class Components:
    """Variances of the difference between two sides, in the square of the unit of the scores."""

    pairs: int
    """Pairs of runs that they were estimated from."""
    seeds: float
    """Of one pair of runs, beyond what its examples explain; 0 is unknown with one pair."""
    units: float
    """Of the average over all examples, the same in every pair."""
    both: float
    """Of the average over all examples, in each pair anew."""

    def variance(self, pairs: int, factor: float = 1.0) -> float:
        """Return V(P, k): of the mean over P pairs of runs and k times the examples.

        With one pair nothing is said about other seeds, so their variance is left out, as in its interval.
        """
        if pairs == 1:
            return (self.units + self.both) / factor
        return self.seeds / pairs + self.units / factor + self.both / (pairs * factor)

    def freedom(self, pairs: int, factor: float = 1.0) -> float:
        """Return the degrees of freedom of the interval, where the examples' variances are well known."""
        of_pairs = self.seeds / pairs + self.both / (pairs * factor)
        if pairs == 1 or of_pairs == 0:
            return math.inf
        return max(self.variance(pairs, factor) ** 2 / of_pairs**2, 1.0) * (pairs - 1)


def components_of(units: Units) -> Components:
    """Estimate the three variances from the units of an average.

    Units that only one pair of runs answered (pairs with examples of their own) count as `both`.
    """
    num_pairs = units.parts.shape[1]
    means = units.deviations.mean(axis=1)
    rests = units.deviations - means[:, None]
    one = both = 0.0
    for inside in units.samples():
        number = len(inside)
        if number < 2:
            continue
        scale = number / (number - 1)
        if units.crossed[inside].all():
            one += scale * float(np.sum(means[inside] ** 2))
            both += scale * float(np.sum(rests[inside] ** 2)) / max(1, num_pairs - 1)
        else:  # one column of deviations is not 0
            both += scale * float(np.sum(units.deviations[inside] ** 2)) / num_pairs
    if num_pairs == 1:
        return Components(pairs=1, seeds=0.0, units=one, both=0.0)
    between = float(np.var(units.averages, ddof=1))
    return Components(
        pairs=num_pairs,
        seeds=max(0.0, between - both),
        units=max(0.0, one - both / num_pairs),
        both=both,
    )


def expected_power(components: Components, effect: float, pairs: int, factor: float = 1.0) -> float:
    """Return the probability that the 95 % interval excludes 0 when the difference is `effect`.

    0 where there would be no interval: with 2 or 3 pairs of runs.
    """
    if 1 < pairs < FEWEST_PAIRS:
        return 0.0
    variance = components.variance(pairs, factor)
    if variance == 0:
        return float(effect != 0)
    freedom = min(components.freedom(pairs, factor), LARGE_FREEDOM)
    shift = abs(effect) / math.sqrt(variance)
    critical = float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2))
    above = 1 - special.nctdtr(freedom, shift, critical)
    return float(above + special.nctdtr(freedom, shift, -critical))


def detectable_effect(
    components: Components, pairs: int, factor: float = 1.0, power: float = POWER
) -> float | None:
    """Return the smallest difference that P pairs and k times the examples show with this power.

    None where there would be no interval, whatever the difference.
    """
    if 1 < pairs < FEWEST_PAIRS:
        return None
    freedom = min(components.freedom(pairs, factor), LARGE_FREEDOM)
    return math.sqrt(components.variance(pairs, factor)) * statistics.needed_shift(freedom, power)


def pairs_needed(
    components: Components, effect: float, factor: float = 1.0, power: float = POWER
) -> int | None:
    """Return the smallest number of pairs of runs that shows a difference over seeds with this power.

    None if MOST_PAIRS are not enough: then the examples limit what can be seen.
    """
    # With fewer nothing is significant over seeds; with 6 only if all pairs have one sign, which t ignores
    low, high = FEWEST_SIGNIFICANT_PAIRS + 1, MOST_PAIRS
    if expected_power(components, effect, high, factor) < power:
        return None
    while low < high:
        middle = (low + high) // 2
        if expected_power(components, effect, middle, factor) < power:
            low = middle + 1
        else:
            high = middle
    return low


def simulated_power(
    units: Units,
    effect: float,
    pairs: int,
    *,
    factor: int = 1,
    draws: int = 400,
    rng: np.random.Generator,
) -> float:
    """Return the share of simulated comparisons in which a difference is significant.

    Each draw takes `pairs` seeds, normal with the variance between the pilot's seeds, and `factor` times
    the units of each sample with replacement, each with the residuals of randomly chosen pilot seeds. The
    draw is judged as `compare_runs` judges: Student's interval excludes 0, and with several pairs the
    exchange of whole pairs gives p < 0.05 (as far as it can be listed).

    Args:
        units: units of the pilot.
        effect: true difference, in the units of the scores.
        pairs: pairs of runs of the planned comparison.
        factor: times the examples of the pilot.
        draws: simulated comparisons.
        rng: random numbers.
    """
    found = components_of(units)
    num_pairs = units.parts.shape[1]
    means = units.deviations.mean(axis=1)
    rests = units.deviations - means[:, None]
    # The mean of n residuals is taken from them, which makes them too small by (n - 1) / n
    if num_pairs > 1:
        rests = rests * math.sqrt(num_pairs / (num_pairs - 1))
        excess = found.both / num_pairs
        own = found.units + excess
        means = means * (math.sqrt(found.units / own) if own > 0 else 0.0)
    samples = units.samples()
    seen = 0
    for _ in range(draws):
        parts, groups = [], []
        for group, inside in enumerate(samples):
            number = factor * len(inside)
            rows = rng.choice(inside, number)
            columns = rng.integers(num_pairs, size=(number, pairs))
            widened = math.sqrt(len(inside) / max(1, len(inside) - 1)) / factor
            values = means[rows, None] * widened
            if num_pairs > 1:
                values = values + rests[rows[:, None], columns] * widened
            parts.append(np.broadcast_to(values, (number, pairs)))
            groups.append(np.full(number, group))
        joined = np.concatenate(parts)
        shifts = effect + rng.normal(0.0, math.sqrt(found.seeds), size=pairs)
        seen += _is_seen(joined, shifts, np.concatenate(groups))
    return seen / draws


def _is_seen(noise: Array, shifts: Array, groups: Any) -> bool:
    """Judge one simulated comparison: noise [units, pairs] around the shift of each pair."""
    sizes = np.bincount(groups)
    number = len(sizes)
    parts = noise + shifts / (number * sizes[groups])[:, None]
    sums = np.stack([np.bincount(groups, weights=column) for column in parts.T], axis=1)
    units = Units(
        names=tuple(range(len(parts))),
        parts=parts,
        deviations=parts - sums[groups] / sizes[groups][:, None],
        groups=groups,
        crossed=np.ones(len(parts), dtype=np.bool_),
    )
    ends = statistics.student_interval(units).ends
    if ends is None or ends[0] <= 0 <= ends[1]:
        return False
    over_pairs = statistics.pair_level_p(units.averages)
    return over_pairs is None or over_pairs <= SIGNIFICANCE


def units_of_comparison(folder: str | Path) -> dict[str, tuple[Units, float, str]]:
    """Read the results that a comparison names again.

    Args:
        folder: of `compare_runs.py`; its result folders still lie where they were.

    Returns:
        By name of the average: its units, the factor to what is reported, and the unit of that.

    Raises:
        ValueError: comparison.json is damaged, or results are missing or do not fit.
    """
    path = Path(folder) / COMPARISON
    content = read_json_object(path, "run megatron-exact compare again")
    try:
        require_shape(
            content,
            {
                "runs": [{"baseline": {"results": str}, "treatment": {"results": str}}],
                "aggregates": [{"suite": str, "regime": str}],
                "options": {},
            },
        )
    except ValueError as error:
        remedy = "run megatron-exact compare again"
        raise ValueError(f"{path} is not a comparison ({error}): {remedy}") from None
    sides = [[run[side]["results"] for run in content["runs"]] for side in ("baseline", "treatment")]
    found: dict[str, tuple[Units, float, str]] = {}
    if content["aggregates"]:
        regimes = Regimes.of_record(content["options"])
        for (suite, regime), units in units_by_regime(*sides, regimes=regimes).items():
            found[f"{suite} {regime}"] = (units, float(POINTS), "points")
    if "probe" in content:
        spans = [tuple(kind["distances"]) for kind in content["probe"]["kinds"]]
        for (kind, span, measure), units in units_by_kind(*sides, ranges=spans).items():
            unit = "points" if measure in ("correct", "answer_effect") else "nats"
            found[f"probe {kind} {span[0]}-{span[1]} {measure}"] = (units, 1.0, unit)
    if not found:
        raise ValueError(f"{path} has no averages: evaluate or probe the models, and compare again")
    return found


def units_of_deltas(deltas: Sequence[float]) -> Units:
    """Return the differences of pilot seeds as units without examples: seeds alone vary.

    Raises:
        ValueError: fewer than two, or one that is not a finite number.
    """
    values = np.asarray(deltas, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"{len(values)} differences of pilot seeds: give the finite differences of two or more"
        )
    return Units(
        names=("all",),
        parts=values[None, :],
        deviations=np.zeros((1, len(values))),
        groups=np.zeros(1, dtype=np.int64),
        crossed=np.ones(1, dtype=np.bool_),
    )


def plan_record(
    components: Components,
    *,
    kind: str,
    effect: float | None,
    pairs: Sequence[int],
    factors: Sequence[int],
    power: float = POWER,
) -> dict[str, Any]:
    """Return the plan of one average, for printing and JSON.

    Args:
        components: from `components_of`.
        kind: what the units are, as `Units.kind`.
        effect: difference that is to be seen; None leaves out `pairs_needed`.
        pairs: numbers of pairs of runs to show.
        factors: times the examples of the pilot.
        power: probability of seeing it.
    """
    return {
        "pairs": components.pairs,
        "units": kind,
        "standard_deviations": {
            "seeds": math.sqrt(components.seeds) if components.pairs > 1 else None,
            "units": math.sqrt(components.units),
            "both": math.sqrt(components.both) if components.pairs > 1 else None,
        },
        "detectable": [
            {
                "pairs": number,
                "examples_factor": factor,
                "effect": detectable_effect(components, number, factor, power),
                "is_over_seeds": number >= FEWEST_SIGNIFICANT_PAIRS,
            }
            for factor in factors
            for number in pairs
        ],
        "pairs_needed": None
        if effect is None or components.pairs == 1
        else [
            {"examples_factor": factor, "pairs": pairs_needed(components, effect, factor, power)}
            for factor in factors
        ],
    }
