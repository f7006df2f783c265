"""The table of weighting rules."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_exact.exposure import RULES, bucket_lower_bounds, build_weighting, exact_weights

EDGES = bucket_lower_bounds(256)
COUNTS = [900, 800, 700, 600, 300, 50]


def test_none_is_one_everywhere_whatever_the_parameters() -> None:
    weighting = build_weighting("none", COUNTS, EDGES, 256, alpha=3, tau=999)
    assert weighting.is_uniform
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
    assert not plain.is_uniform


def test_tau_defaults_to_a_quarter_of_the_row() -> None:
    weighting = build_weighting("exact", COUNTS, EDGES, 256)
    assert weighting.parameters["tau"] == 64
    assert (weighting.bucket_weights > 1).tolist() == [False] * 4 + [True] * 2


def test_alpha_0_is_uniform() -> None:
    assert build_weighting("exact", COUNTS, EDGES, 256, alpha=0).is_uniform


def test_unknown_rule_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown token weighting 'exakt': choose one of none, exact"):
        build_weighting("exakt", COUNTS, EDGES, 256)


def test_every_rule_has_a_summary_and_weights_above_zero() -> None:
    for name, rule in RULES.items():
        assert rule.summary
        assert (build_weighting(name, COUNTS, EDGES, 256).bucket_weights >= 0).all()
