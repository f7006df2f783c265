"""Power: the components of a difference, against experiments drawn from known ones."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_exact.evaluation import power, statistics
from megatron_exact.evaluation.power import Components, components_of, expected_power, simulated_power
from megatron_exact.evaluation.statistics import Units, average_units, cell_units, student_interval

SEEDS, EXAMPLES, BOTH = 1.0, 4.0, 10.0
"""Standard deviations of one seed, one example, and one answer."""
CELLS, PER_CELL = 4, 60
TRUE = Components(
    pairs=5, seeds=SEEDS**2, units=EXAMPLES**2 / (CELLS * PER_CELL), both=BOTH**2 / (CELLS * PER_CELL)
)


def draw(rng: np.random.Generator, pairs: int, effect: float, seeds: float = SEEDS) -> Units:
    """One experiment: the same examples for all seeds."""
    shift = effect + rng.normal(0, seeds, pairs)
    cells = []
    for _ in range(CELLS):
        values: NDArray[np.float64] = (
            shift + rng.normal(0, EXAMPLES, (PER_CELL, 1)) + rng.normal(0, BOTH, (PER_CELL, pairs))
        )
        names = [range(PER_CELL)] * pairs
        cells.append((1.0, cell_units(list(values.T), names, is_shared=True)))
    return average_units(cells, across_cells=False)


def is_seen(units: Units) -> bool:
    ends = student_interval(units).ends
    return ends is not None and not ends[0] <= 0 <= ends[1]


def test_components_are_recovered() -> None:
    rng = np.random.default_rng(0)
    found = [components_of(draw(rng, 8, 0.0)) for _ in range(60)]
    for name in ("seeds", "units", "both"):
        values = [getattr(one, name) for one in found]
        error = np.std(values) / np.sqrt(len(values))
        assert np.mean(values) == pytest.approx(getattr(TRUE, name), abs=4 * error + 0.02), name


@pytest.mark.parametrize(("pairs", "effect"), [(1, 2.0), (4, 2.0), (8, 1.2), (12, 0.0)])
def test_expected_power_is_the_share_of_drawn_experiments(pairs: int, effect: float) -> None:
    rng = np.random.default_rng(pairs)
    seeds = SEEDS if pairs > 1 else 0.0  # one pair: about other examples, not other seeds
    share = np.mean([is_seen(draw(rng, pairs, effect, seeds)) for _ in range(300)])
    assert share == pytest.approx(expected_power(TRUE, effect, pairs), abs=0.09)
    if pairs == 8:  # negative control: without the seeds' variance it would promise far too much
        blind = Components(pairs=5, seeds=0.0, units=TRUE.units, both=TRUE.both)
        assert expected_power(blind, effect, pairs) > share + 0.2


def test_the_simulation_agrees_with_the_formula() -> None:
    units = draw(np.random.default_rng(1), 6, 0.0)
    found = components_of(units)
    effect = power.detectable_effect(found, 10)
    assert effect is not None
    for factor in (1, 2):
        share = simulated_power(
            units, effect, 10, factor=factor, draws=200, rng=np.random.default_rng(factor)
        )
        assert share == pytest.approx(expected_power(found, effect, 10, factor), abs=0.1)
    assert simulated_power(units, 0.0, 10, draws=200, rng=np.random.default_rng(3)) < 0.12


@pytest.mark.parametrize("pairs", [1, 4, 7, 20])
def test_the_detectable_effect_has_its_power(pairs: int) -> None:
    effect = power.detectable_effect(TRUE, pairs)
    assert effect is not None
    assert expected_power(TRUE, effect, pairs) == pytest.approx(0.8, abs=1e-4)
    assert power.detectable_effect(TRUE, 3) is None


def test_more_seeds_and_examples_see_less() -> None:
    seen = [power.detectable_effect(TRUE, pairs) or 0 for pairs in (4, 6, 8, 16, 64)]
    assert seen == sorted(seen, reverse=True)
    more = power.pairs_needed(TRUE, 1.2, 4)
    few = power.pairs_needed(TRUE, 1.2, 1)
    assert more is not None
    assert few is not None
    assert more < few
    assert expected_power(TRUE, 1.2, few) >= 0.8 > expected_power(TRUE, 1.2, few - 1)
    assert power.pairs_needed(TRUE, 0.9 * 2.8 * TRUE.units**0.5) is None  # the examples limit it
    assert power.pairs_needed(TRUE, 50.0) == 7  # fewer are never significant, or only if all agree


def test_what_a_comparison_could_have_seen() -> None:
    units = draw(np.random.default_rng(2), 6, 0.0)
    smallest = statistics.detectable_difference(units)
    planned = power.detectable_effect(components_of(units), 6)
    assert smallest is not None
    assert planned == pytest.approx(smallest, rel=0.05)
    assert statistics.detectable_difference(draw(np.random.default_rng(2), 3, 0.0)) is None
    record = statistics.interval_record(units, 100.0)
    assert record["detectable"] == pytest.approx(100 * smallest)


def test_differences_of_pilot_seeds() -> None:
    found = components_of(power.units_of_deltas([0.1, 0.4, 0.3, 0.2]))
    assert (found.units, found.both) == (0.0, 0.0)
    assert found.seeds == pytest.approx(np.var([0.1, 0.4, 0.3, 0.2], ddof=1))
    with pytest.raises(ValueError, match="1 differences of pilot seeds"):
        power.units_of_deltas([0.1])


def test_pairs_with_examples_of_their_own() -> None:
    rng = np.random.default_rng(4)

    def one() -> Components:
        values = [2 + rng.normal(0, EXAMPLES, PER_CELL) for _ in range(6)]
        return components_of(cell_units(values, [range(PER_CELL)] * 6, is_shared=False))

    found = [one() for _ in range(40)]
    assert all(each.units == 0 for each in found)
    assert np.mean([each.both for each in found]) == pytest.approx(EXAMPLES**2 / PER_CELL, rel=0.1)
