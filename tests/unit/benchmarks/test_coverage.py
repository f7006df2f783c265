"""Candidates for intervals against scipy and plain references, and a small study with fixed seeds."""

from __future__ import annotations

import coverage
import numpy as np
import pytest
from scipy import stats

VALUES = np.array([1.0] * 14 + [-1.0] * 5 + [0.0] * 31)
SKEWED = np.random.default_rng(4).exponential(size=40)


def drawn(resamples: int = 20_000) -> coverage.Bootstrapped:
    return coverage.bootstrap([SKEWED], resamples, np.random.default_rng(0))


@pytest.mark.parametrize(("name", "method"), [("percentile", "percentile"), ("bca", "BCa")])
def test_bootstraps_equal_those_of_scipy(name: str, method: str) -> None:
    expected = stats.bootstrap(
        (SKEWED,), np.mean, method=method, n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    found = getattr(coverage, name)(drawn())
    assert found == pytest.approx((expected.low, expected.high), abs=0.02)
    other = coverage.percentile(drawn()) if name == "bca" else coverage.bca(drawn())
    assert other != pytest.approx((expected.low, expected.high), abs=0.02)  # a control


def test_studentised_equals_plain_indices() -> None:
    rng = np.random.default_rng(2)
    found = SKEWED[rng.integers(0, 40, (20_000, 40))]
    error = SKEWED.std(ddof=1) / 40**0.5
    ratios = (found.mean(axis=1) - SKEWED.mean()) / (found.std(axis=1, ddof=1) / 40**0.5)
    low, high = np.quantile(ratios, [0.025, 0.975])
    plain = (SKEWED.mean() - high * error, SKEWED.mean() - low * error)
    assert coverage.studentised(drawn()) == pytest.approx(plain, abs=0.02)


def test_student_equals_scipy() -> None:
    expected = stats.ttest_1samp(SKEWED, 0.0).confidence_interval()
    assert coverage.student([SKEWED]) == pytest.approx((expected.low, expected.high))


def test_exact_bounds_equal_scipys() -> None:
    wins, losses = (
        stats.binomtest(count, 50).proportion_ci(confidence_level=0.975, method="exact")
        for count in (14, 5)
    )
    assert coverage.exact(VALUES) == pytest.approx((wins.low - losses.high, wins.high - losses.low))
    assert coverage.exact(np.zeros(50)) == pytest.approx((0.0125 ** (1 / 50) - 1, 1 - 0.0125 ** (1 / 50)))


def test_score_interval_inverts_a_constrained_likelihood() -> None:
    """At each end the score statistic is the normal quantile; rates by a plain search."""
    wins, losses, number = 14, 5, 50
    ends = coverage.score_interval(VALUES)
    assert ends is not None
    for delta, expected in zip(ends, (1.959964, -1.959964), strict=True):
        rates = np.linspace(max(0, -delta) + 1e-6, (1 - delta) / 2 - 1e-6, 400_001)
        likelihood = (
            wins * np.log(rates + delta)
            + losses * np.log(rates)
            + (number - wins - losses) * np.log(1 - 2 * rates - delta)
        )
        rate = rates[likelihood.argmax()]
        variance = number * (2 * rate + delta - delta**2)
        assert (wins - losses - number * delta) / variance**0.5 == pytest.approx(expected, abs=1e-3)


def score(scenario: coverage.Scenario, name: str, experiments: int = 300) -> coverage.Score:
    study = coverage.Study(experiments=experiments, resamples=150, seed=1)
    measure = coverage.many_seeds if " seeds" in scenario.name else coverage.one_pair
    return measure(study, scenario)[name]


def test_a_small_study_finds_what_covers() -> None:
    one = coverage.right_or_wrong(200, 0.1, 0.08)
    assert 0.91 <= score(one, "offered").coverage <= 0.985
    few = coverage.right_or_wrong(20, 0.05, 0.0)
    assert score(few, "percentile").coverage < 0.8  # the control: rare differences
    assert score(few, "offered").offered < 0.05
    asked = coverage.questions(0.15, cells=4, depths=20)
    assert score(asked, "examples (percentile)", 80).coverage < 0.8  # the control: questions in pieces
    assert score(asked, "offered", 100).coverage > 0.88
    several = coverage.seeds(5, 100, 0.12, 0.1)
    assert score(several, "these seeds", 200).coverage < 0.8  # the control: other seeds are left out
    assert score(several, "offered", 200).coverage > 0.9
    assert score(coverage.seeds(3, 50, 0.05, 0.1), "offered", 20).offered == 0


def test_tests_reject_as_often_as_they_say() -> None:
    study = coverage.Study(experiments=200, resamples=99, seed=2)
    exchanged, pairs, claimed = coverage.rejections(study, coverage.seeds(3, 100, 0.12, 0.1))
    assert exchanged > 0.2  # why it is named "these seeds"
    assert (pairs, claimed) == (0, 0)


def test_the_page_says_what_was_found() -> None:
    scores = coverage.Score()
    for ends in ((-0.01, 0.02), (0.01, 0.03), None, (-0.1, -0.05)):
        scores.add(ends, 0.0)
    assert (scores.offered, scores.coverage) == (0.75, pytest.approx(1 / 3))
    assert scores.text() == "33.3 / 3.3 / 50 (75)"
    lines = coverage.verdict({"a scenario": {"offered": scores}})
    assert "Outside of 93 to 97 %: a scenario (33.3 %, offered in 75 %)." in lines
