"""The validation split is a function of seed, source content and document number alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.data.blend import validation_documents


@settings(deadline=None, max_examples=60)
@given(count=st.integers(2, 500), fraction=st.floats(0, 0.999), seed=st.integers(0, 2**32))
def test_fraction_of_documents(count: int, fraction: float, seed: int) -> None:
    held = validation_documents(count, fraction, seed=seed, idx_sha256="ab")
    assert held.shape == (count,)
    if fraction == 0:
        assert not held.any()
    else:
        assert 1 <= held.sum() <= count - 1
        assert abs(held.sum() - fraction * count) <= 1


def test_frozen() -> None:
    held = validation_documents(40, 0.1, seed=1234, idx_sha256="ab")
    assert np.flatnonzero(held).tolist() == [1, 19, 35, 37]


def test_larger_fractions_keep_what_smaller_ones_hold_out() -> None:
    small = validation_documents(300, 0.05, seed=3, idx_sha256="ab")
    large = validation_documents(300, 0.2, seed=3, idx_sha256="ab")
    assert (large[small]).all()


def test_seed_and_source_matter() -> None:
    held = [
        tuple(np.flatnonzero(validation_documents(300, 0.1, seed=seed, idx_sha256=sha)))
        for seed, sha in ((1, "ab"), (2, "ab"), (1, "ac"))
    ]
    assert len(set(held)) == 3


def test_a_single_document_is_never_held_out() -> None:
    assert not validation_documents(1, 0.9, seed=0, idx_sha256="ab").any()


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_bad_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match="validation fraction"):
        validation_documents(10, fraction, seed=0, idx_sha256="ab")
