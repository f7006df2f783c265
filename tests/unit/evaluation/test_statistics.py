"""Resampled means, intervals and exchanged sides against enumeration, scipy and simulation."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_exact.evaluation.statistics import (
    flipped_means,
    generator,
    holm,
    interval,
    pair_level_p,
    pair_weights,
    resampled_means,
    two_sided_p,
)

Array = NDArray[np.float64]
THIRDS = np.array([0.0] * 14 + [1.0] * 9 + [-1.0] * 4 + [0.5] * 3)
FORTIETHS = np.array([0.0] * 20 + [1.0] * 12 + [-1.0] * 6 + [0.5] * 2)


def draw(*values: Array, resamples: int, seed: int = 0, is_shared: bool = True) -> Array:
    """[resamples, pairs]."""
    return resampled_means(
        values, is_shared=is_shared, resamples=resamples, rng=np.random.default_rng(seed)
    )


def test_every_resample_of_three_examples_comes_as_often_as_enumeration_says() -> None:
    values = np.array([0.0, 0.25, 1.0])
    exact = [np.mean(chosen) for chosen in itertools.product(values, repeat=3)]
    means, counts = np.unique(np.round(exact, 9), return_counts=True)
    resamples = 270_000
    seen, times = np.unique(np.round(draw(values, resamples=resamples), 9), return_counts=True)
    assert seen.tolist() == means.tolist()
    expected = counts / 27 * resamples
    assert np.all(np.abs(times - expected) < 5 * np.sqrt(expected))


def test_percentiles_equal_those_of_resampled_indices() -> None:
    rng = np.random.default_rng(7)
    cells = [rng.choice([-1.0, 0.0, 0.5, 1.0], size=size, p=[0.1, 0.5, 0.1, 0.3]) for size in (40, 120)]
    grouped = np.mean([draw(cell, resamples=40_000, seed=3)[:, 0] for cell in cells], axis=0)
    plain = np.mean(
        [cell[rng.integers(0, len(cell), (40_000, len(cell)))].mean(axis=1) for cell in cells], axis=0
    )
    levels = [0.025, 0.25, 0.5, 0.75, 0.975]
    np.testing.assert_allclose(np.quantile(grouped, levels), np.quantile(plain, levels), atol=0.006)
    np.testing.assert_allclose(grouped.std(), plain.std(), rtol=0.02)
    # a control: both cells drawn with one stream of numbers are no independent cells
    wrong = np.mean([draw(cell, resamples=40_000, seed=3)[:, 0] for cell in (cells[0], cells[0])], axis=0)
    assert abs(wrong.std() / plain.std() - 1) > 0.2


def test_intervals_equal_those_of_scipy() -> None:
    # scipy 1.18.1: stats.bootstrap((THIRDS,), np.mean, method="percentile", n_resamples=200000,
    #     rng=np.random.default_rng(0)).confidence_interval
    low, high = interval(draw(THIRDS, resamples=200_000)[:, 0])
    assert (low, high) == pytest.approx((-0.016666666666666666, 0.45))
    # stats.bootstrap((FORTIETHS, THIRDS), lambda a, b, axis: (np.mean(a, axis) + np.mean(b, axis)) / 2,
    #     method="percentile", n_resamples=200000, rng=np.random.default_rng(1))
    cells = [
        draw(values, resamples=200_000, seed=seed)[:, 0] for seed, values in enumerate((FORTIETHS, THIRDS))
    ]
    assert interval(np.mean(cells, axis=0)) == pytest.approx(
        (0.041666666666666664, 0.34791666666666665), abs=3e-3
    )


def test_memory_is_bounded_by_blocks_and_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw(THIRDS, resamples=1000)
    monkeypatch.setattr("megatron_exact.evaluation.statistics.BLOCK_NUMBERS", 300)
    np.testing.assert_array_equal(draw(THIRDS, resamples=1000), whole)


def test_shared_examples_are_drawn_once_for_all_pairs() -> None:
    pair = np.column_stack([THIRDS, THIRDS[::-1]])
    shared = draw(*pair.T, resamples=20_000)
    apart = draw(*pair.T, resamples=20_000, is_shared=False)
    expected = np.corrcoef(pair.T)[0, 1]
    assert np.corrcoef(shared.T)[0, 1] == pytest.approx(expected, abs=0.03)
    assert np.corrcoef(apart.T)[0, 1] == pytest.approx(0, abs=0.03)
    np.testing.assert_allclose(shared.std(axis=0), apart.std(axis=0), rtol=0.03)


def test_pairs_are_drawn_with_replacement() -> None:
    weights = pair_weights(3, 27_000, np.random.default_rng(0))
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert np.mean(np.max(weights, axis=1) == 1) == pytest.approx(3 / 27, abs=0.01)
    assert np.mean(np.max(weights, axis=1) == 1 / 3) == pytest.approx(6 / 27, abs=0.01)
    assert pair_weights(1, 5, np.random.default_rng(0)).tolist() == [[1.0]] * 5


def test_random_numbers_belong_to_a_purpose() -> None:
    first = generator(0, "examples", "ruler", "vt", "1024").random(4).tolist()
    assert generator(0, "examples", "ruler", "vt", "1024").random(4).tolist() == first
    others = [generator(1, "examples", "ruler", "vt", "1024"), generator(0, "signs", "ruler", "vt", "1024")]
    assert all(other.random(4).tolist() != first for other in others)


def coverage(cells: list[Array], truth: float, resamples: int = 500) -> float:
    """Share of simulated experiments whose interval of the macro average holds the truth.

    Args:
        cells: one array [experiments, examples] a cell.
        truth: expected value of the macro average.
    """
    held = 0
    for experiment in range(len(cells[0])):
        means = [
            draw(cell[experiment], resamples=resamples, seed=1000 * experiment + number)[:, 0]
            for number, cell in enumerate(cells)
        ]
        low, high = interval(np.mean(means, axis=0))
        held += low <= truth <= high
    return held / len(cells[0])


def test_coverage_of_right_and_wrong_answers() -> None:
    rng = np.random.default_rng(11)
    chances = [(0.25, 0.15), (0.1, 0.1), (0.4, 0.1), (0.12, 0.08)]  # (wins, losses) of each cell
    cells = [
        rng.choice([1.0, -1.0, 0.0], size=(1200, 120), p=[win, loss, 1 - win - loss])
        for win, loss in chances
    ]
    truth = float(np.mean([win - loss for win, loss in chances]))
    assert 0.93 <= coverage(cells, truth) <= 0.97
    # controls: the same examples counted four times over, and a truth that is another
    assert coverage([np.tile(cell[:300], 4) for cell in cells], truth) < 0.8
    assert coverage([cell[:300] for cell in cells], truth + 0.1) < 0.8


def test_coverage_of_fractions_that_are_skewed() -> None:
    rng = np.random.default_rng(12)
    shapes = [(60, (5, 2), (4, 2)), (90, (1, 3), (1, 4))]  # examples, beta of both sides
    cells = [
        rng.beta(*after, size=(700, n)) - rng.beta(*before, size=(700, n)) for n, after, before in shapes
    ]
    truth = np.mean([a[0] / sum(a) - b[0] / sum(b) for _, a, b in shapes])
    assert 0.93 <= coverage(cells, float(truth), resamples=400) <= 0.97


def seed_coverage(is_shared: bool, experiments: int) -> float:
    """Coverage where 20 pairs of runs answer the same 80 examples: effects of seeds and of examples."""
    rng = np.random.default_rng(13)
    held, pairs, examples, resamples = 0, 20, 80, 300
    for experiment in range(experiments):
        effect = 0.1 * rng.standard_normal((pairs, 1)) + 0.3 * rng.standard_normal(examples)
        draws = draw(*effect, resamples=resamples, seed=experiment, is_shared=is_shared)
        weights = pair_weights(pairs, resamples, np.random.default_rng(experiment))
        low, high = interval(np.sum(draws * weights, axis=1))
        held += low <= 0 <= high
    return held / experiments


def test_coverage_over_seeds_needs_examples_drawn_once() -> None:
    assert 0.93 <= seed_coverage(is_shared=True, experiments=500) <= 0.97
    assert seed_coverage(is_shared=False, experiments=60) < 0.87


TEN = np.array([0.25, 0.5, -0.25, 1.0, 0.75, 0.5, -0.5, 0.25, 1.0, 0.0])


def flip(*values: Array, resamples: int, seed: int = 0, is_shared: bool = True) -> Array:
    """[resamples]."""
    return flipped_means(values, is_shared=is_shared, resamples=resamples, rng=np.random.default_rng(seed))


def enumerated_p(values: Array) -> float:
    """All 2^n signs, one at a time."""
    observed = abs(values.mean())
    signs = itertools.product((1, -1), repeat=len(values))
    return float(np.mean([abs(np.mean(values * sign)) >= observed - 1e-9 for sign in signs]))


def test_p_value_equals_enumeration_and_scipy() -> None:
    # scipy 1.18.1: stats.permutation_test((TEN, np.zeros(10)), lambda x, y, axis: np.mean(x - y, axis),
    #     permutation_type="samples", n_resamples=np.inf, vectorized=True).pvalue
    assert enumerated_p(TEN) == 0.08203125
    p_value = two_sided_p(float(TEN.mean()), flip(TEN, resamples=200_000))
    assert p_value == pytest.approx(0.08203125, abs=0.003)
    assert two_sided_p(float(-TEN.mean()), flip(-TEN, resamples=200_000)) == p_value


def test_exchanged_means_have_the_distribution_of_signs() -> None:
    expected = [np.mean(TEN * sign) for sign in itertools.product((1, -1), repeat=10)]
    means = flip(TEN, resamples=100_000)
    np.testing.assert_allclose(means.std(), np.std(expected), rtol=0.01)
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    np.testing.assert_allclose(np.quantile(means, levels), np.quantile(expected, levels), atol=0.051)


def test_shared_examples_are_exchanged_in_all_pairs() -> None:
    shared = flip(TEN, TEN, resamples=50_000)
    apart = flip(TEN, TEN, resamples=50_000, is_shared=False)
    assert shared.std() / apart.std() == pytest.approx(np.sqrt(2), rel=0.03)
    np.testing.assert_array_equal(flip(TEN, -TEN, resamples=10), np.zeros(10))


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = flip(TEN, resamples=1000)
    monkeypatch.setattr("megatron_exact.evaluation.statistics.BLOCK_NUMBERS", 50)
    np.testing.assert_array_equal(flip(TEN, resamples=1000), whole)


def test_p_is_never_0_and_1_without_a_difference() -> None:
    assert two_sided_p(1.0, np.zeros(99)) == 0.01
    assert two_sided_p(0.0, flip(np.zeros(5), resamples=99)) == 1.0


def test_false_positives_come_at_the_stated_rate() -> None:
    rng = np.random.default_rng(21)
    experiments, cells = 1500, (50, 80)
    p_values = []
    for experiment in range(experiments):
        values = [
            rng.choice([1.0, 0.5, -0.5, -1.0, 0.0], size=n, p=[0.2, 0.1, 0.1, 0.2, 0.4]) for n in cells
        ]
        flipped = [flip(cell, resamples=399, seed=2 * experiment + i) for i, cell in enumerate(values)]
        observed = float(np.mean([cell.mean() for cell in values]))
        p_values.append(two_sided_p(observed, np.mean(flipped, axis=0)))
    for level in (0.05, 0.2):
        margin = 3 * np.sqrt(level * (1 - level) / experiments)
        assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=margin)


def test_whole_pairs_are_exchanged_exactly() -> None:
    # scipy's permutation_test of [1.5, 2.0, -0.5, 3.0] against zeros: 0.25
    assert pair_level_p(np.array([1.5, 2.0, -0.5, 3.0])) == 0.25
    assert pair_level_p(np.array([1.0, 2.0, 0.5])) == 2 / 8
    assert pair_level_p(np.array([0.1, 0.1])) == 0.5
    values = np.random.default_rng(0).standard_normal(9) + 0.4
    assert pair_level_p(values) == enumerated_p(values)
    assert pair_level_p(np.array([3.0])) is None
    assert pair_level_p(np.ones(17)) is None


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


def test_holm_keeps_the_rate_of_the_family() -> None:
    p_values = np.random.default_rng(5).random((4000, 6))
    wrong = np.mean([min(holm(row.tolist())) <= 0.05 for row in p_values])
    assert wrong == pytest.approx(1 - (1 - 0.05 / 6) ** 6, abs=0.011)
    assert np.mean(p_values.min(axis=1) <= 0.05) > 0.2  # without it


UNITS = np.array([0, 0, 1, 2, 2, 2])
VALUES = np.array([1.0, 0.5, -1.0, 0.25, 0.0, -0.5])


def test_units_are_drawn_whole_as_enumeration_says() -> None:
    """Three units have 27 draws, whose means weigh every example alike, however large its unit."""
    expected = Counter(
        round(float(np.concatenate([VALUES[unit == UNITS] for unit in drawn]).mean()), 9)
        for drawn in itertools.product(range(3), repeat=3)
    )
    found = resampled_means(
        [VALUES], is_shared=True, units=[UNITS], resamples=27_000, rng=np.random.default_rng(0)
    )
    counts = Counter(np.round(found[:, 0], 9).tolist())
    assert set(counts) == set(expected)
    for mean, ways in expected.items():
        assert abs(counts[mean] - 1000 * ways) < 5 * np.sqrt(1000 * ways), mean


def test_units_are_exchanged_whole_as_enumeration_says() -> None:
    sums = [VALUES[unit == UNITS].sum() for unit in range(3)]
    expected = {round(float(np.dot(signs, sums)) / 6, 9) for signs in itertools.product((1, -1), repeat=3)}
    found = flipped_means(
        [VALUES], is_shared=True, units=[UNITS], resamples=400, rng=np.random.default_rng(0)
    )
    assert set(np.round(found, 9).tolist()) == expected


def test_units_of_one_example_change_no_bit() -> None:
    values = np.random.default_rng(1).integers(-1, 2, size=(2, 50)).astype(float)
    order = np.random.default_rng(2).permutation(50)
    for is_shared in (True, False):
        for function in (resampled_means, flipped_means):
            plain, alone = (
                function(values, is_shared=is_shared, units=units, resamples=99, rng=generator(3, "x"))
                for units in (None, [order, order])
            )
            assert plain.tobytes() == alone.tobytes()


def test_coverage_of_examples_that_were_drawn_together() -> None:
    """40 questions, each asked 10 times: intervals hold the truth only if questions are drawn whole."""
    rng = np.random.default_rng(7)
    units = np.repeat(np.arange(40), 10)
    hits = {"units": 0, "examples": 0}
    for trial in range(300):
        chance = np.repeat(rng.uniform(-0.5, 0.5, 40), 10)
        values = np.where(rng.random(400) < np.abs(chance), np.sign(chance), 0.0)
        for name, together in (("units", [units]), ("examples", None)):
            draws = resampled_means(
                [values], is_shared=True, units=together, resamples=400, rng=generator(trial, name)
            )
            low, high = interval(draws[:, 0])
            hits[name] += low <= 0 <= high
    assert 0.91 <= hits["units"] / 300 <= 0.98
    assert hits["examples"] / 300 < 0.85  # the negative control
