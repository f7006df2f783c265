"""The validation split is a function of seed, source content and document number alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.data import blend
from megatron_exact.data.blend import validation_documents
from megatron_exact.data.document_pool import DocumentPool, NumbersWithGaps


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


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_numbers_with_gaps_are_the_array_without_them(
    dtype: type[np.unsignedinteger], data: st.DataObject
) -> None:
    documents = data.draw(st.integers(1, 2000))
    is_missing = np.zeros(documents, np.bool_)
    is_missing[data.draw(st.lists(st.integers(0, documents - 1), max_size=documents))] = True
    is_missing[: data.draw(st.integers(0, documents))] |= data.draw(st.booleans())
    first = data.draw(st.integers(0, (1 << 32) - 2000 if dtype is np.uint32 else 1 << 40))
    wanted = (np.flatnonzero(~is_missing) + first).astype(dtype)
    numbers = NumbersWithGaps(first, documents, np.flatnonzero(is_missing), dtype)
    assert numbers.size == wanted.size
    found = np.asarray(numbers)
    assert found.dtype == dtype
    assert np.array_equal(found, wanted)
    where = np.random.default_rng(0).permutation(wanted.size)
    assert np.array_equal(numbers[where], wanted[where])
    assert np.array_equal(numbers[3:7], wanted[3:7])


@pytest.mark.parametrize("empty", [0, 1, 40])
def test_a_train_split_without_few_documents_is_the_one_of_an_array(
    monkeypatch: pytest.MonkeyPatch, empty: int
) -> None:
    """Documents held out, and without a token; the factor decides only how the numbers are stored."""
    tokens = np.random.default_rng(1).integers(1, 50, 400).astype(np.int32)
    tokens[:empty] = 0
    pool = DocumentPool(tokens=tokens, first=np.array([0, 150, 400]))
    held = [np.arange(150) % 40 == 3, np.arange(250) % 50 == 7]
    splits = {}
    for factor in (blend.GAP_FACTOR, 1 << 40):
        monkeypatch.setattr(blend, "GAP_FACTOR", factor)
        splits[factor] = blend.split_members(pool, ["a", "b"], [None, None], held, train=True)
    for few, all_ in zip(*splits.values(), strict=True):
        assert isinstance(all_.numbers, np.ndarray)
        assert np.array_equal(np.asarray(few.numbers), all_.numbers)
        assert np.asarray(few.numbers).dtype == all_.numbers.dtype
        assert (few.tokens, few.documents) == (all_.tokens, all_.documents)
    assert isinstance(splits[16][1].numbers, NumbersWithGaps)
