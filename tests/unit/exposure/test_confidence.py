"""Confidence-based weights against a plain target-by-target reference, and their edge cases."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.exposure.confidence import CONFIDENCE_RULES, ConfidenceParameters, confidence_weights
from megatron_exact.exposure.confidence_torch import confidence_weights_of_rows
from tests.recorded.record_confidence_weights import OUTPUT, ROWS, TARGETS, losses

ALL = tuple(CONFIDENCE_RULES)
RECORDED = json.loads(OUTPUT.read_text())


def plain_top(values: list[float], kappa: float) -> list[float]:
    """How much of each value is kept: whole above the edge; those at the edge share what is left."""
    kept = max(1, math.floor(kappa * len(values)))
    edge = sorted(values, reverse=True)[kept - 1]
    above, ties = sum(v > edge for v in values), sum(v == edge for v in values)
    return [1.0 if v > edge else (kept - above) / ties if v == edge else 0.0 for v in values]


def plain_l1(values: list[float]) -> list[float]:
    total = math.fsum(values)
    return [v / total * len(values) for v in values] if total > 0 else [1.0] * len(values)


def plain_weights(rule: str, scores: Sequence[float], p: ConfidenceParameters) -> list[float]:
    """METHOD's table, for supervised targets alone."""
    if not scores:
        return []
    if rule == "longce":
        return [p.cap if -d > math.log(p.cap) else math.exp(-d) for d in scores]
    if rule == "dense":
        return [p.lam + (1 - p.lam) * w for w in plain_l1([abs(d) for d in scores])]
    if rule == "sparse":
        return plain_l1(plain_top([abs(d) for d in scores], 0.2 if p.kappa is None else p.kappa))
    sign = -1 if rule.startswith("ppmi") else 1
    values = [max(sign * d - math.log(p.s), 0.0) for d in scores]
    if p.kappa is not None and any(values):
        shares = plain_top(values, p.kappa)
        is_ours = rule.endswith("-values")
        values = [v * share if is_ours else share for v, share in zip(values, shares, strict=True)]
    return plain_l1(values)


def check(rule: str, d: list[float], mask: list[bool], p: ConfidenceParameters) -> None:
    weights = confidence_weights(rule, d, mask, p)
    expected = iter(plain_weights(rule, [x for x, m in zip(d, mask, strict=True) if m], p))
    plain = [next(expected) if m else 1.0 for m in mask]
    np.testing.assert_allclose(weights, plain, rtol=1e-12, atol=1e-12)
    on_device = confidence_weights_of_rows(rule, torch.tensor([d, d]), torch.tensor([mask, mask]), p)
    in_float32 = np.array(d, dtype=np.float32)  # what a training step has
    np.testing.assert_allclose(
        on_device.numpy(), [confidence_weights(rule, in_float32, mask, p)] * 2, rtol=1e-12, atol=1e-12
    )


PARAMETERS = st.builds(
    ConfidenceParameters,
    lam=st.floats(0, 1),
    kappa=st.none() | st.floats(0.01, 1),
    cap=st.floats(0.1, 20),
    s=st.floats(0.3, 3),
)
SCORES = st.floats(-30, 30, width=32) | st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.25])  # many ties


@given(
    rule=st.sampled_from(ALL),
    row=st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=40),
    parameters=PARAMETERS,
)
@settings(max_examples=150, deadline=None)
def test_weights_are_those_of_the_method(
    rule: str, row: list[tuple[float, bool]], parameters: ConfidenceParameters
) -> None:
    check(rule, [d for d, _ in row], [m for _, m in row], parameters)


@pytest.mark.parametrize("rule", [rule for rule in ALL if rule != "longce"])
@pytest.mark.parametrize("kappa", [None, 0.3])
def test_normalised_rules_have_mean_one_over_the_supervised_targets(rule: str, kappa: float | None) -> None:
    rng = np.random.default_rng(1)
    mask = rng.random(200) < 0.7
    weights = confidence_weights(rule, rng.normal(size=200), mask, ConfidenceParameters(kappa=kappa))
    assert math.isclose(weights[mask].mean(), 1, rel_tol=1e-12)
    assert weights.min() >= 0


@pytest.mark.parametrize("rule", ALL)
def test_a_row_in_which_long_context_changes_nothing_is_uniform(rule: str) -> None:
    weights = confidence_weights(rule, np.zeros(50), np.ones(50, bool), ConfidenceParameters())
    np.testing.assert_allclose(weights, 1, rtol=1e-12)


@pytest.mark.parametrize("rule", ALL)
def test_no_supervised_target_weighs_nothing(rule: str) -> None:
    check(rule, [1.0, 2.0, -3.0], [False] * 3, ConfidenceParameters(kappa=0.5))


def test_weight_zero_keeps_the_number_of_targets() -> None:
    d, mask = np.array([-1.0, 2.0, -3.0, 5.0]), np.array([True, True, True, False])
    weights = confidence_weights("ppmi", d, mask, ConfidenceParameters())
    # 3 targets share a mass of 3, the one of weight 0 included
    assert weights.tolist() == [0.75, 0.0, 2.25, 1.0]


def test_ties_at_kappa_share_what_is_left_wherever_they_stand() -> None:
    d = np.array([0.1, -0.5, 0.5, 0.9, 0.5])
    mask = np.ones(5, bool)
    p = ConfidenceParameters(kappa=0.4)  # 2 of 5: 0.9 and one of three that tie
    weights = confidence_weights("sparse", d, mask, p)
    np.testing.assert_allclose(weights, np.array([0, 1 / 3, 1 / 3, 1, 1 / 3]) * 5 / 2)
    order = np.random.default_rng(0).permutation(5)
    np.testing.assert_array_equal(confidence_weights("sparse", d[order], mask, p), weights[order])
    assert weights.max() <= 1 / p.kappa + 1e-12  # type: ignore[operator]


def test_longce_is_capped_and_not_normalised() -> None:
    p = ConfidenceParameters(cap=5)
    weights = confidence_weights("longce", [-1000.0, -1.0, 0.0, 1000.0], [True] * 4, p)
    np.testing.assert_allclose(weights, [5, math.e, 1, 0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"target 1 of a row is .* score the pack again"):
        confidence_weights("dense", [0.0, bad], [True, True], ConfidenceParameters())
    assert confidence_weights("dense", [0.0, bad], [True, False], ConfidenceParameters()).tolist() == [1, 1]
    rows = torch.tensor([[0.0, bad], [0.0, 1.0]])
    on_device = confidence_weights_of_rows(
        "dense", rows, torch.ones(2, 2, dtype=bool), ConfidenceParameters()
    )
    assert on_device.isnan().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lam", -0.1),
        ("lam", 1.1),
        ("kappa", 0.0),
        ("kappa", 1.5),
        ("cap", 0.0),
        ("cap", math.inf),
        ("s", 0.0),
    ]
    + [(field, math.nan) for field in ("lam", "kappa", "cap", "s")],
)
def test_parameters_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match="--confidence-"):
        ConfidenceParameters(**{field: value})


def test_unknown_rule_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="choose one of dense"):
        confidence_weights("dens", [0.0], [True], ConfidenceParameters())
    with pytest.raises(ValueError, match="one score for each"):
        confidence_weights("dense", [0.0], [True, True], ConfidenceParameters())


def test_the_comparison_would_see_another_normalisation() -> None:
    d, mask = [1.0, 2.0, 4.0, 0.5], [True, True, False, True]
    weights = confidence_weights("dense", d, mask, ConfidenceParameters(lam=0))
    over_all = np.abs(d) / np.sum(np.abs(d)) * 4
    assert not np.allclose(weights[:2], over_all[:2], rtol=1e-3)


@pytest.mark.parametrize("recorded", RECORDED["weights"], ids=lambda r: f"{r['rule']}-{r['parameters']}")
def test_weights_are_those_of_the_authors_code(recorded: dict[str, Any]) -> None:
    """`tests/recorded/record_confidence_weights.py` recorded them, in float64."""
    long, short = losses()
    parameters = ConfidenceParameters(**recorded["parameters"])
    mask = np.ones(TARGETS, dtype=bool)
    for row in range(ROWS):
        weights = confidence_weights(recorded["rule"], long[row] - short[row], mask, parameters)
        np.testing.assert_allclose(weights, recorded["rows"][row], rtol=1e-12, atol=1e-12)
    if recorded["rule"] in ("ppmi", "npmi") and parameters.kappa is not None:  # the control: ours
        ours = confidence_weights(f"{recorded['rule']}-values", long[0] - short[0], mask, parameters)
        assert not np.allclose(ours, recorded["rows"][0], rtol=1e-3)


def test_the_example_of_both_kinds_with_kappa() -> None:
    d, mask, parameters = [-4.0, -2.0, -1.0, 0.5], np.ones(4, bool), ConfidenceParameters(kappa=0.5)
    assert confidence_weights("ppmi", d, mask, parameters).tolist() == [2, 2, 0, 0]
    ours = confidence_weights("ppmi-values", d, mask, parameters)
    np.testing.assert_allclose(ours, [8 / 3, 4 / 3, 0, 0])
