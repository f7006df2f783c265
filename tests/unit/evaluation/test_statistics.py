"""Units, intervals, exchanged sides and resampled cells against plain loops, scipy and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_exact.evaluation import statistics
from megatron_exact.evaluation.statistics import (
    Units,
    average_units,
    cell_units,
    exchange_p,
    exchanged_averages,
    generator,
    holm,
    pair_level_p,
    pair_weights,
    percentiles,
    resampled_means,
    student_interval,
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
    low, high = percentiles(draw(THIRDS, resamples=200_000)[:, 0])
    assert (low, high) == pytest.approx((-0.016666666666666666, 0.45))
    # stats.bootstrap((FORTIETHS, THIRDS), lambda a, b, axis: (np.mean(a, axis) + np.mean(b, axis)) / 2,
    #     method="percentile", n_resamples=200000, rng=np.random.default_rng(1))
    cells = [
        draw(values, resamples=200_000, seed=seed)[:, 0] for seed, values in enumerate((FORTIETHS, THIRDS))
    ]
    assert percentiles(np.mean(cells, axis=0)) == pytest.approx(
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
        low, high = percentiles(np.mean(means, axis=0))
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
        low, high = percentiles(np.sum(draws * weights, axis=1))
        held += low <= 0 <= high
    return held / experiments


def test_coverage_over_seeds_needs_examples_drawn_once() -> None:
    assert 0.93 <= seed_coverage(is_shared=True, experiments=500) <= 0.97
    assert seed_coverage(is_shared=False, experiments=60) < 0.87


TEN = np.array([0.25, 0.5, -0.25, 1.0, 0.75, 0.5, -0.5, 0.25, 1.0, 0.0])


def one_cell(*values: Array, is_shared: bool = True, names: list[object] | None = None) -> Units:
    """One array [examples] a pair of runs."""
    own = list(range(len(values[0]))) if names is None else names
    return cell_units(values, [own] * len(values), is_shared=is_shared)


def flip(*values: Array, resamples: int, seed: int = 0, is_shared: bool = True) -> Array:
    """[resamples]."""
    units = one_cell(*values, is_shared=is_shared)
    return exchanged_averages(units, resamples=resamples, rng=np.random.default_rng(seed))


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


UNITS: list[object] = ["a", "a", "b", "c", "c", "c"]
VALUES = np.array([1.0, 0.5, -1.0, 0.25, 0.0, -0.5])


def test_units_are_exchanged_whole_as_enumeration_says() -> None:
    sums = [sum(value for value, unit in zip(VALUES, UNITS, strict=True) if unit == one) for one in "abc"]
    expected = {round(float(np.dot(signs, sums)) / 6, 9) for signs in itertools.product((1, -1), repeat=3)}
    units = one_cell(VALUES, names=UNITS)
    found = exchanged_averages(units, resamples=400, rng=np.random.default_rng(0))
    assert set(np.round(found, 9).tolist()) == expected
    p_value = exchange_p(units, resamples=9999, rng=np.random.default_rng(0))
    assert p_value == pytest.approx(
        np.mean([abs(mean) >= abs(VALUES.mean()) - 1e-9 for mean in np.dot(
            list(itertools.product((1, -1), repeat=3)), sums) / 6]), abs=0.02)  # fmt: skip


def plain_student(cells: list[list[float]]) -> tuple[float, float]:
    """The corrected interval of equally weighted cells, one unit at a time, with scipy's quantiles."""
    from scipy import stats

    mean = sum(sum(cell) / len(cell) for cell in cells) / len(cells)
    variance, freedom, cubes = 0.0, 0.0, 0.0
    for cell in cells:
        size, middle = len(cell), sum(cell) / len(cell)
        one = sum((value - middle) ** 2 for value in cell) / (size - 1) / size / len(cells) ** 2
        variance, freedom = variance + one, freedom + one**2 / (size - 1)
        third = size / ((size - 1) * (size - 2)) * sum((value - middle) ** 3 for value in cell)
        cubes += third / size**2 / len(cells) ** 3
    critical = stats.t.ppf(0.975, variance**2 / freedom)
    centre = mean + cubes / variance * (2 * critical**2 + 1) / 6
    return centre - critical * variance**0.5, centre + critical * variance**0.5


def test_the_interval_equals_plain_loops() -> None:
    rng = np.random.default_rng(3)
    cells = [rng.choice([-1.0, 0.0, 0.5, 1.0], size=size, p=[0.1, 0.4, 0.1, 0.4]) for size in (40, 120, 15)]
    units = average_units([(1.0, one_cell(cell)) for cell in cells], across_cells=False)
    ends = student_interval(units).ends
    assert ends == pytest.approx(plain_student([cell.tolist() for cell in cells]), rel=1e-9)
    # a control: the same numbers as one cell have another mean, and without the correction another centre
    assert ends != pytest.approx(plain_student([np.concatenate(cells).tolist()]), rel=1e-3)
    assert sum(ends or ()) / 2 != pytest.approx(float(units.averages[0]), rel=1e-3)


def test_without_skewness_it_is_scipys_t_interval() -> None:
    from scipy import stats

    values = np.array([-2.0, -1.0, -0.5, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 3.0])
    even = np.concatenate([values, -values]) + 0.4
    expected = stats.ttest_1samp(even, 0.0)
    found = student_interval(one_cell(even))
    assert found.ends == pytest.approx(tuple(expected.confidence_interval()), rel=1e-9)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)


def test_a_question_over_cells_is_one_unit() -> None:
    rng = np.random.default_rng(5)
    questions = [f"q{number}" for number in range(30) for _ in range(4)]
    own = np.repeat(rng.normal(0.1, 0.3, 30), 4)
    cells = [own + rng.normal(0, 0.1, 120) for _ in range(3)]
    members = [(1.0, one_cell(cell, names=list(questions))) for cell in cells]
    whole = student_interval(average_units(members, across_cells=True))
    means = np.mean(cells, axis=0).reshape(30, 4).mean(axis=1)
    assert whole.ends == pytest.approx(plain_student([means.tolist()]), rel=1e-9)
    apart = student_interval(average_units(members, across_cells=False))
    alone = student_interval(average_units([(1.0, one_cell(cell)) for cell in cells], across_cells=False))
    widths = [one.ends[1] - one.ends[0] for one in (whole, apart, alone) if one.ends]
    assert widths[0] > 1.5 * widths[1] > 2 * widths[2]  # the controls count a question as 3 and as 12


def test_units_and_seeds_cross_as_plain_loops_say() -> None:
    rng = np.random.default_rng(8)
    seeds, examples = 6, 50
    table = 0.2 * rng.normal(size=(1, seeds)) + 0.5 * rng.normal(size=(examples, 1))
    table = table + 0.3 * rng.normal(size=(examples, seeds))
    of_seeds = table.mean(axis=0).var(ddof=1) / seeds
    of_examples = table.mean(axis=1).var(ddof=1) / examples
    rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
    of_both = np.sum(rest**2) / (seeds - 1) / (examples - 1) / seeds / examples
    found = student_interval(one_cell(*table.T))
    variance = of_seeds + of_examples - of_both
    noise = of_seeds**2 / 5 + of_examples**2 / 49 + of_both**2 / 49 / 5
    from scipy import stats

    half = stats.t.ppf(0.975, variance**2 / noise) * variance**0.5
    assert found.ends is not None
    assert (found.ends[1] - found.ends[0]) / 2 == pytest.approx(half, rel=1e-6)
    these = student_interval(one_cell(*table.T).of_these_seeds())
    assert these.ends == pytest.approx(plain_student([table.mean(axis=1).tolist()]), rel=1e-9)
    # seeds with examples of their own: the variation of the seeds' means has both in it
    apart = student_interval(one_cell(*table.T, is_shared=False))
    half = stats.t.ppf(0.975, 5) * of_seeds**0.5
    assert apart.ends is not None
    assert (apart.ends[1] - apart.ends[0]) / 2 == pytest.approx(half, rel=1e-9)


def test_no_interval_where_it_would_not_cover() -> None:
    rare = np.array([1.0] * 4 + [0.0] * 196)
    assert student_interval(one_cell(rare)).record("ci95", 100) == {
        "ci95": None,
        "ci95_reason": "only 4 of 200 differ",
    }
    often = np.array([1.0] * 5 + [0.0] * 195)
    assert student_interval(one_cell(often)).ends is not None
    assert student_interval(one_cell(1 - rare)).reason == "only 4 of 200 differ"  # a ceiling is as rare
    assert student_interval(one_cell(np.zeros(50))).reason == "only 0 of 50 differ"
    assert student_interval(one_cell(np.ones(1))).reason == "a cell has one example or unit"
    wide = np.random.default_rng(0).normal(size=100)
    for pairs in (2, 3):
        few = one_cell(*[wide + shift for shift in range(pairs)])
        assert student_interval(few).reason == f"only {pairs} pairs of runs"
        assert student_interval(few.of_these_seeds()).ends is not None
    assert student_interval(one_cell(*[wide + shift for shift in range(4)])).ends is not None
    same = one_cell(*[wide] * 4, is_shared=False)
    assert student_interval(same).reason == "all pairs of runs differ alike"


def test_what_may_be_claimed_is_the_weaker_test() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(0.5, 1, size=(60, 3))
    three = one_cell(*values.T)
    assert statistics.claimed_p(three, 0.001) == 0.25  # three pairs have no more to say
    assert statistics.claimed_p(one_cell(values[:, 0]), 0.001) == 0.001
    many = one_cell(*rng.normal(0.02, 1, size=(60, 8)).T)
    of_pairs, of_t = pair_level_p(many.averages), student_interval(many).p_value
    assert statistics.claimed_p(many, 0.001) == max(of_pairs or 0, of_t or 0)
