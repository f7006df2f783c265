"""EXACT weights: the paper's invariants, its own figure, and a plain reference."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.exposure import (
    DEFAULT_EPS,
    bucket_lower_bounds,
    build_weighting,
    default_tau,
    exact_weights,
    exposure_counts,
)
from megatron_exact.exposure.weights import EmptyTailError

EDGES = bucket_lower_bounds(4096)
counts_4k = st.lists(st.integers(0, 10**12), min_size=10, max_size=10)
alphas = st.floats(0, 10)
gammas = st.floats(0, 2)


def plain_weights(
    counts: list[int], edges: list[int], alpha: float, gamma: float, tau: float
) -> list[float]:
    """METHOD's table, written out with Python floats."""
    tail = [b for b, edge in enumerate(edges) if edge >= tau and counts[b] > 0]
    total = sum(counts[b] for b in tail)
    q = {b: counts[b] / total for b in tail}
    r = {b: (q[b] + DEFAULT_EPS) ** (-gamma) for b in tail}
    mean = math.fsum(q[b] * r[b] for b in tail)
    return [1 + alpha * r[b] / mean if b in q else 1.0 for b in range(len(edges))]


def quiet_weights(counts: list[int], *, alpha: float, gamma: float, tau: float = 1024) -> np.ndarray:
    """The weights without the warning; where the tail is empty, the refusal is checked and 1 returned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if alpha > 0 and not np.array(counts)[tau <= EDGES].any():
            with pytest.raises(EmptyTailError):
                exact_weights(counts, EDGES, alpha=alpha, gamma=gamma, tau=tau)
            return np.ones(len(counts))
        return exact_weights(counts, EDGES, alpha=alpha, gamma=gamma, tau=tau)


@settings(deadline=None, max_examples=150)
@given(counts_4k, alphas, gammas, st.sampled_from([1, 8, 100, 256, 1024, 2048]))
def test_matches_the_formulas(counts: list[int], alpha: float, gamma: float, tau: float) -> None:
    expected = plain_weights(counts, EDGES.tolist(), alpha, gamma, tau)
    found = quiet_weights(counts, alpha=alpha, gamma=gamma, tau=tau)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@settings(deadline=None, max_examples=150)
@given(counts_4k, alphas, gammas, st.sampled_from([8, 256, 1024]))
def test_mean_extra_weight_of_the_tail_is_alpha(
    counts: list[int], alpha: float, gamma: float, tau: float
) -> None:
    weights = quiet_weights(counts, alpha=alpha, gamma=gamma, tau=tau)
    tail = tau <= EDGES
    mass = np.array(counts, dtype=np.float64)[tail]
    if mass.sum() == 0:
        assert (weights == 1).all()
        return
    extra = math.fsum(mass / mass.sum() * (weights[tail] - 1))
    assert extra == pytest.approx(alpha, rel=1e-9, abs=1e-12)
    assert (weights[~tail] == 1).all()


@settings(deadline=None, max_examples=100)
@given(counts_4k, st.floats(0.01, 10), st.floats(0.01, 2))
def test_rarer_tail_buckets_never_get_less(counts: list[int], alpha: float, gamma: float) -> None:
    weights = quiet_weights(counts, alpha=alpha, gamma=gamma, tau=64)
    tail = [(count, weight) for count, weight in zip(counts[4:], weights[4:], strict=True) if count]
    by_rarity = [weight for _, weight in sorted(tail, key=lambda pair: -pair[0])]
    assert all(later >= earlier * (1 - 1e-12) for earlier, later in itertools.pairwise(by_rarity))


def test_clearly_rarer_is_clearly_more() -> None:
    weights = exact_weights([0] * 8 + [900, 100], EDGES, alpha=0.15, gamma=0.5, tau=1024)
    assert weights[9] - 1 == pytest.approx(3 * (weights[8] - 1), rel=1e-4)  # (900 / 100) ** 0.5


@settings(deadline=None, max_examples=50)
@given(counts_4k.filter(lambda counts: min(counts) > 0), alphas)
def test_gamma_0_is_uniform_on_the_tail(counts: list[int], alpha: float) -> None:
    weights = exact_weights(counts, EDGES, alpha=alpha, gamma=0, tau=1024)
    np.testing.assert_allclose(weights, [1] * 8 + [1 + alpha] * 2, rtol=1e-14)


def test_alpha_0_is_bitwise_one() -> None:
    assert (exact_weights(range(1, 11), EDGES, alpha=0, gamma=0.5, tau=1024) == 1).all()


def test_an_empty_tail_bucket_gets_1_and_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"\[2048\]: weight 1"):
        weights = exact_weights([5] * 9 + [0], EDGES, tau=1024)
    assert weights[9] == 1
    assert weights[8] == pytest.approx(1.15)


def test_a_wholly_empty_tail_is_refused() -> None:
    with pytest.raises(EmptyTailError, match=r"tau 1024 tokens or more \(the longest lie in the .* 512\)"):
        exact_weights([5] * 8 + [0, 0], EDGES, tau=1024)
    assert (exact_weights([5] * 8 + [0, 0], EDGES, tau=1024, alpha=0) == 1).all()


def test_rows_of_one_bucket_have_no_tail() -> None:
    with pytest.raises(EmptyTailError, match="no tau leaves a tail: pack rows of more than 8 tokens"):
        build_weighting("exact", [5], [0], 8)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.15, 1e9), (1e308, 500.0)])
def test_weights_beyond_float64_are_refused(alpha: float, gamma: float) -> None:
    with pytest.raises(ValueError, match="weights that are not finite"):
        exact_weights([5] * 8 + [100_000, 1], EDGES, alpha=alpha, gamma=gamma, tau=1024)


def test_the_papers_own_figure() -> None:
    """METHOD: a tail share of .274 with alpha .15 becomes 30.27 %; the paper prints 30.3 %."""
    counts = np.array([726_000] + [0] * 7 + [137_000, 137_000])
    weights = exact_weights(counts, EDGES, alpha=0.15, gamma=0.5, tau=1024)
    weighted = counts * weights
    assert weighted[8:].sum() / weighted.sum() == pytest.approx(0.3027, abs=5e-5)


def test_why_the_top_bucket_is_folded() -> None:
    """Targets of context 4,096 in a bucket of their own would ruin a run; folded they change nothing."""
    documents = 40  # full-row documents among ordinary ones
    lengths = [4096] * documents + [2500] * 20_000
    folded_counts = exposure_counts(lengths, 4096, continuing_tokens=[4096] * documents)
    folded = exact_weights(folded_counts, EDGES, tau=1024)
    stray_counts = np.append(folded_counts, documents)
    stray_counts[9] -= documents
    stray = exact_weights(stray_counts, np.append(EDGES, 4096), tau=1024)
    assert folded.max() < 1.3
    assert stray[10] > 20  # in the tens
    assert stray[10] > 15 * folded.max()
    np.testing.assert_allclose(stray[8:10], folded[8:10], rtol=0.01)


@pytest.mark.parametrize("name", ["alpha", "gamma", "tau", "eps"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_parameters_are_named(name: str, value: float) -> None:
    parameters = {"alpha": 0.15, "gamma": 0.5, "tau": 1024.0, "eps": 1e-6, name: value}
    with pytest.raises(ValueError, match=f"^{name} is"):
        exact_weights([1] * 10, EDGES, **parameters)


def test_tau_without_a_tail_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tau 2049 leaves no tail.*choose tau <= 2048"):
        exact_weights([1] * 10, EDGES, tau=2049)
    with pytest.raises(ValueError, match=r"tau 4097 is above the row length 4096.*choose tau <= 2048"):
        build_weighting("exact", [1] * 10, EDGES, 4096, tau=4097)


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one count for each bucket"):
        exact_weights([1] * 9, EDGES, tau=1024)
    with pytest.raises(ValueError, match="not negative"):
        exact_weights([1] * 9 + [-1], EDGES, tau=1024)
    with pytest.raises(ValueError, match="finite"):
        exact_weights([1.0] * 9 + [math.nan], EDGES, tau=1024)


def test_default_tau_leaves_two_tail_buckets() -> None:
    for row_tokens, tau in ((4096, 1024), (8192, 2048), (16384, 4096)):
        assert default_tau(row_tokens) == tau
        assert (bucket_lower_bounds(row_tokens) >= tau).sum() == 2
