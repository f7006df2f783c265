"""The table of weighting rules."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from megatron_exact.exposure import MASS_SCALE, RULES, bucket_lower_bounds, build_weighting, exact_weights
from megatron_exact.exposure.row_weights import TableWeights
from megatron_exact.exposure.rules import match_mass

EDGES = bucket_lower_bounds(256)
COUNTS = [900, 800, 700, 600, 300, 50]
POSITION_COUNTS = [140, 160, 320, 640, 1280, 2560]
SAME_MASS = ("random-same-mass", "constant", "uniform-tail", "exact-normalized")
TABLES = ("none", "exact", *SAME_MASS, "packed-position")


def position_counts() -> np.ndarray:
    return np.array(POSITION_COUNTS)


def test_none_is_one_everywhere_whatever_the_parameters() -> None:
    weighting = build_weighting("none", COUNTS, EDGES, 256, alpha=3, tau=999)
    assert (weighting.bucket_weights == 1).all()
    assert weighting.parameters == {}
    assert not weighting.divides_by_mass
    assert (weighting.bucket_weights == np.ones(6)).all()


def test_exact_and_its_normalised_form_share_the_weights() -> None:
    plain = build_weighting("exact", COUNTS, EDGES, 256, alpha=0.3, gamma=1, tau=32)
    normalised = build_weighting("exact-normalized", COUNTS, EDGES, 256, alpha=0.3, gamma=1, tau=32)
    expected = exact_weights(COUNTS, EDGES, alpha=0.3, gamma=1, tau=32)
    np.testing.assert_array_equal(plain.bucket_weights, expected)
    np.testing.assert_array_equal(normalised.bucket_weights, expected)
    assert (plain.divides_by_mass, normalised.divides_by_mass) == (False, True)
    assert plain.parameters == {"alpha": 0.3, "gamma": 1, "tau": 32.0}
    assert not (plain.bucket_weights == 1).all()


def test_tau_defaults_to_a_quarter_of_the_row() -> None:
    weighting = build_weighting("exact", COUNTS, EDGES, 256)
    assert weighting.parameters["tau"] == 64
    assert (weighting.bucket_weights > 1).tolist() == [False] * 4 + [True] * 2


def test_alpha_0_is_uniform() -> None:
    assert (build_weighting("exact", COUNTS, EDGES, 256, alpha=0).bucket_weights == 1).all()


def test_unknown_rule_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown token weighting 'exakt': choose one of none, exact"):
        build_weighting("exakt", COUNTS, EDGES, 256)


def test_every_rule_has_a_summary_and_weights_above_zero() -> None:
    for name, rule in RULES.items():
        assert rule.summary
        weighting = build_weighting(
            *(name, COUNTS, EDGES, 256),
            position_counts=position_counts,
            gaining_counts=lambda nats: np.array(COUNTS) // 3,
        )
        assert (weighting.bucket_weights >= 0).all()
        assert weighting.row_weights.by


@pytest.mark.parametrize("rule", SAME_MASS)
@pytest.mark.parametrize("parameters", [{}, {"alpha": 4.0, "gamma": 1.3, "tau": 32}])
def test_controls_of_the_same_mass(rule: str, parameters: dict[str, float]) -> None:
    exact, control = (
        build_weighting(name, COUNTS, EDGES, 256, **parameters).table for name in ("exact", rule)
    )
    assert exact is not None
    assert control is not None
    assert exact.mean_weight == pytest.approx(np.dot(COUNTS, exact.weights) / sum(COUNTS), rel=1e-14)
    assert control.mean_weight == pytest.approx(exact.mean_weight, rel=1e-14)


def test_uniform_tail_is_one_plus_alpha_there() -> None:
    weighting = build_weighting("uniform-tail", COUNTS, EDGES, 256, alpha=0.4, gamma=9)
    np.testing.assert_allclose(weighting.bucket_weights, [1, 1, 1, 1, 1.4, 1.4], rtol=1e-14)
    assert weighting.parameters == {"alpha": 0.4, "tau": 64}


def test_packed_position_is_the_formula_on_counts_of_its_own() -> None:
    weighting = build_weighting(
        "packed-position", COUNTS, EDGES, 256, position_counts=position_counts, alpha=0.3
    )
    expected = exact_weights(POSITION_COUNTS, EDGES, alpha=0.3, tau=64)
    np.testing.assert_array_equal(weighting.bucket_weights, expected)
    assert weighting.counts.tolist() == COUNTS
    described = weighting.describe()
    assert (described["by"], described["counts"]) == ("packed position", POSITION_COUNTS)
    with pytest.raises(ValueError, match="needs the plan of a pack"):
        build_weighting("packed-position", COUNTS, EDGES, 256)


def test_packed_position_at_the_mass_of_exact() -> None:
    """What docs/weighting.md says about a comparison at one mass."""

    def mean(rule: str, alpha: float) -> float:
        table = build_weighting(
            rule, COUNTS, EDGES, 256, position_counts=position_counts, alpha=alpha
        ).table
        assert table is not None
        return table.mean_weight

    ratio = (mean("exact", 0.3) - 1) / (mean("packed-position", 0.3) - 1)
    assert 0 < ratio < 0.5
    assert mean("packed-position", 0.3 * ratio) == pytest.approx(mean("exact", 0.3), rel=1e-12)


@pytest.mark.parametrize("rule", [name for name in TABLES if name != "none"])
@pytest.mark.parametrize("parameters", [{}, {"alpha": 4.0, "gamma": 1.3, "tau": 32, "cap": 3.0}])
def test_match_mass_gives_every_table_the_mean_of_exact(rule: str, parameters: dict[str, float]) -> None:
    def table(name: str, **more: object) -> TableWeights:
        found = build_weighting(
            *(name, COUNTS, EDGES, 256), position_counts=position_counts, **parameters, **more
        ).table
        assert found is not None
        return found

    own, matched = table(rule), table(rule, match_mass="exact")
    gamma = {} if rule != "uniform-tail" else {"gamma": parameters.get("gamma", 0.5)}
    exact = table("exact", **gamma) if not gamma or "gamma" not in parameters else table("exact")
    assert matched.mean_weight == pytest.approx(exact.mean_weight, rel=1e-14)
    mass = np.dot(matched.counts, matched.weights) / sum(matched.counts)
    assert mass == pytest.approx(np.dot(COUNTS, exact.weights) / sum(COUNTS), rel=1e-14)
    # the same proportions of extra weight
    np.testing.assert_allclose(
        (matched.weights - 1) * (own.mean_weight - 1),
        (own.weights - 1) * (exact.mean_weight - 1),
        atol=1e-13,
    )
    if rule == "packed-position":  # negative control: its own mass is another one
        assert abs(own.mean_weight / exact.mean_weight - 1) > 0.01


def test_match_mass_is_recorded_as_its_scale() -> None:
    weighting = build_weighting(
        *("packed-position", COUNTS, EDGES, 256),
        position_counts=position_counts,
        alpha=0.3,
        match_mass="exact",
    )
    scale = (0.3 * 350 / 3350) / (0.3 * 3840 / 5100)
    assert weighting.parameters == {"alpha": 0.3, "gamma": 0.5, "tau": 64, MASS_SCALE: pytest.approx(scale)}
    assert MASS_SCALE not in build_weighting("exact", COUNTS, EDGES, 256).parameters


@pytest.mark.parametrize(
    ("rule", "parameters", "message"),
    [
        ("none", {}, "none has no extra weight to scale: --match-mass is for exact, exact-normalized"),
        ("dense", {"has_scores": True}, "dense has no extra weight to scale"),
        ("exact", {"match_mass": "longce"}, "no mass of 'longce' to match: choose exact"),
        (
            *("packed-position", {"alpha": 1.0, "bucket_weights": ((0, 0.0),)}),
            r"needs weights from -.* a weight must be finite and >= 0",
        ),
    ],
)
def test_match_mass_without_an_answer(rule: str, parameters: dict[str, Any], message: str) -> None:
    def few_long() -> np.ndarray:
        return np.array([10, 10, 10, 10, 50, 50])

    with pytest.raises(ValueError, match=message):
        build_weighting(
            *(rule, [5000, 10, 10, 10, 300, 50], EDGES, 256),
            position_counts=few_long,
            **{"match_mass": "exact", **parameters},
        )


@pytest.mark.parametrize("parameters", [{}, {"alpha": 4.0, "gamma": 1.3, "tau": 32.0}])
def test_exact_evidence_has_the_mass_of_exact(parameters: dict[str, float]) -> None:
    gaining = np.array([100, 90, 80, 500, 30, 20])
    found = build_weighting(
        *("exact-evidence", COUNTS, EDGES, 256), gaining_counts=lambda nats: gaining, **parameters
    )
    exact = build_weighting("exact", COUNTS, EDGES, 256, **parameters).table
    assert found.table is not None
    assert exact is not None
    assert found.table.mean_weight == pytest.approx(exact.mean_weight, rel=1e-13)
    extra = np.dot(gaining, found.table.weights - 1)
    assert extra == pytest.approx(np.dot(COUNTS, exact.weights - 1), rel=1e-12)
    rarer = found.bucket_weights
    assert rarer[5] > rarer[4] > 1 == rarer[0]
    assert found.describe()["counts"] == gaining.tolist()
    assert found.parameters["evidence_nats"] == 0.1


def test_exact_evidence_without_an_answer() -> None:
    rule = ("exact-evidence", COUNTS, EDGES, 256)
    with pytest.raises(ValueError, match="needs to know which targets gain from the far context: score"):
        build_weighting(*rule)
    with pytest.raises(ValueError, match=r"none of the 350 targets of the tail gains 0\.1 nats"):
        build_weighting(*rule, gaining_counts=lambda nats: np.array([9, 9, 9, 9, 0, 0]))
    with pytest.raises(ValueError, match=r"--exact-evidence-nats is -1\.0: it must be"):
        build_weighting(*rule, gaining_counts=lambda nats: np.zeros(6), evidence_nats=-1.0)


@pytest.mark.parametrize(("gaining", "is_few"), [(87, True), (88, False)])
def test_exact_evidence_warns_where_few_targets_gain(gaining: int, is_few: bool) -> None:
    """The tail has 350 targets: fewer than a quarter of them bear the mass of all."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_weighting(
            *("exact-evidence", COUNTS, EDGES, 256),
            gaining_counts=lambda nats: np.array([0, 0, 0, 0, gaining - 20, 20]),
        )
    said = [str(one.message) for one in caught]
    assert [("only 87 of the 350 targets of the tail" in one) for one in said] == [True] * is_few, said


def test_match_mass_needs_extra_weight() -> None:
    ones = build_weighting("none", COUNTS, EDGES, 256).table
    assert ones is not None
    assert match_mass(ones, 1.0) == (ones, 1.0)
    with pytest.raises(ValueError, match=r"average 1, so their extra weight is 0 .* mean weight of 1\.2"):
        match_mass(ones, 1.2)


@pytest.mark.parametrize("rule", TABLES)
def test_run_json_tells_the_table_and_its_mean(rule: str) -> None:
    entry = build_weighting(rule, COUNTS, EDGES, 256, position_counts=position_counts).describe()
    assert set(entry) == {"rule", "parameters", "by", "lower_bounds", "counts", "weights", "mean_weight"}
    mean = np.dot(entry["counts"], entry["weights"]) / sum(entry["counts"])
    assert entry["mean_weight"] == pytest.approx(mean, rel=1e-14)
    assert all(isinstance(value, float) for value in entry["parameters"].values())


def test_a_cap_and_weights_set_by_hand_change_every_rule_alike() -> None:
    chosen = {"alpha": 1.0, "cap": 2.0, "bucket_weights": ((0, 0.0), (8, 1.5))}
    exact = build_weighting("exact", COUNTS, EDGES, 256, **chosen)
    plain = exact_weights(COUNTS, EDGES, alpha=1, tau=64)
    assert plain[5] > 2 > plain[4]
    np.testing.assert_array_equal(exact.bucket_weights, [0, 1.5, 1, 1, plain[4], 2])
    assert exact.parameters == {
        **{"alpha": 1.0, "gamma": 0.5, "tau": 64.0, "cap": 2.0},
        **{"weight_from_0": 0.0, "weight_from_8": 1.5},
    }
    random, constant = (
        build_weighting(name, COUNTS, EDGES, 256, **chosen) for name in ("random-same-mass", "constant")
    )
    np.testing.assert_array_equal(random.bucket_weights, exact.bucket_weights)
    mean = np.dot(COUNTS, exact.bucket_weights) / sum(COUNTS)
    np.testing.assert_allclose(constant.bucket_weights, mean, rtol=1e-14)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"cap": 0.5}, "cap is 0.5: below 1"),
        ({"cap": float("nan")}, "cap is nan"),
        ({"cap": float("inf")}, "cap is inf, which caps nothing"),
        ({"alpha": 1e39}, "beyond float32"),
        ({"bucket_weights": ((8, 1e39),)}, "beyond float32"),
        ({"bucket_weights": ((9, 1.0),)}, "no bucket starts at 9 tokens: the lower edges are 0, 8, 16"),
        ({"bucket_weights": ((8, -1.0),)}, "weight -1.0 of the bucket from 8"),
        ({"bucket_weights": ((8, float("inf")),)}, "weight inf of the bucket from 8"),
        ({"bucket_weights": ((8, 1.0), (8, 2.0))}, "has two weights"),
        ({"bucket_weights": tuple((int(edge), 0.0) for edge in EDGES)}, "every weight is 0"),
    ],
)
def test_what_is_set_by_hand_is_checked(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_weighting("exact", COUNTS, EDGES, 256, **parameters)


@pytest.mark.parametrize("rule", ["exact", "constant", "random-same-mass"])
def test_no_weight_where_all_targets_are_is_refused(rule: str) -> None:
    edges, counts = [0, 8, 16, 32], [50, 20, 0, 5]  # the bucket from 16 keeps its weight and has no targets
    nothing = ((0, 0.0), (8, 0.0), (32, 0.0))
    with (
        pytest.warns(UserWarning, match="no targets"),
        pytest.raises(ValueError, match="one above 0"),
    ):
        build_weighting(rule, counts, edges, 64, bucket_weights=nothing)
