"""The exchange test against enumeration and scipy, its rate of false positives, and Holm's correction."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_exact.evaluation.statistics import flipped_means, holm, pair_level_p, two_sided_p

Array = NDArray[np.float64]
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
