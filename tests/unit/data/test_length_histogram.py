"""Histograms of lengths against plain counting."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.data import lengths as lengths_module
from megatron_exact.data.lengths import LengthHistogram, round_keeping_sum

lengths_lists = st.lists(st.one_of(st.integers(1, 40), st.integers(1, 1 << 22)), max_size=60)


@settings(deadline=None, max_examples=80)
@given(lengths=lengths_lists, chunk=st.integers(1, 20))
def test_counting_in_chunks(lengths: list[int], chunk: int) -> None:
    chunks = [np.array(lengths[i : i + chunk], np.int32) for i in range(0, len(lengths), chunk)]
    found = LengthHistogram.of_chunks(chunks)
    expected = sorted(Counter(lengths).items())
    assert list(zip(found.lengths.tolist(), found.counts.tolist(), strict=True)) == expected
    assert (found.documents, found.tokens) == (len(lengths), sum(lengths))
    assert found.longest == max(lengths, default=0)
    whole = LengthHistogram.of(np.array(lengths, np.uint64).astype(np.int64))
    assert whole.lengths.tolist() == found.lengths.tolist()


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_quantiles_and_bins(lengths: list[int]) -> None:
    histogram = LengthHistogram.of(np.array(lengths))
    ordered = sorted(lengths)
    for fraction in (0.1, 0.5, 0.9, 0.99, 1.0):
        expected = next(x for i, x in enumerate(ordered, 1) if i >= fraction * len(ordered))
        assert histogram.quantile(fraction) == expected
    summary = histogram.summary()
    assert summary["quantiles"]["max"] == max(lengths)
    assert summary["mean"] == pytest.approx(sum(lengths) / len(lengths))
    for one in summary["bins"]:
        inside = [x for x in lengths if one["lower"] <= x < 2 * one["lower"]]
        assert (one["documents"], one["tokens"]) == (len(inside), sum(inside))
    assert sum(one["documents"] for one in summary["bins"]) == len(lengths)


def test_bins_at_powers_of_two() -> None:
    lengths = [value for power in range(1, 40) for value in ((1 << power) - 1, 1 << power)]
    for one in LengthHistogram.of(np.array(lengths)).summary()["bins"]:
        assert one["documents"] == sum(one["lower"] <= x < 2 * one["lower"] for x in lengths)


def test_no_documents() -> None:
    empty = LengthHistogram.of(np.zeros(0, np.int64))
    assert (empty.documents, empty.tokens, empty.longest) == (0, 0, 0)
    assert empty.summary()["quantiles"] == dict.fromkeys(("p10", "p50", "p90", "p99", "max"))
    assert empty.summary()["bins"] == []


@pytest.mark.parametrize("bad", [0, -3])
def test_lengths_below_one_are_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=f"a length of {bad}"):
        LengthHistogram.of(np.array([5, bad]))


@settings(deadline=None, max_examples=60)
@given(lengths=lengths_lists, factor=st.fractions(0, 5))
def test_scaling_keeps_the_distribution(lengths: list[int], factor: Fraction) -> None:
    """The documents up to any length are `factor` times as many, to the nearest whole one."""
    histogram = LengthHistogram.of(np.array(lengths, np.int64))
    scaled = histogram.scaled(factor)
    assert (scaled.counts > 0).all()
    for limit in histogram.lengths.tolist():
        before = sum(x <= limit for x in lengths)
        after = int(scaled.counts[scaled.lengths <= limit].sum())
        assert abs(after - factor * before) <= Fraction(1, 2) + Fraction(1, 10**9)


def test_a_rare_tail_survives_scaling_down() -> None:
    """A thousand lengths of one document each, a hundredth of them: each alone would be none."""
    scaled = LengthHistogram.of(np.arange(1000, 2000)).scaled(Fraction(1, 100))
    assert scaled.documents == 10
    assert scaled.tokens == pytest.approx(14_995, rel=0.01)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1e6), max_size=30))
def test_rounding_keeps_the_sum(values: list[float]) -> None:
    rounded = round_keeping_sum(values)
    assert (rounded >= 0).all()
    assert np.abs(np.cumsum(rounded) - np.cumsum(values)).max(initial=0) <= 0.5 + 1e-6
    assert np.abs(rounded - np.array(values)).max(initial=0) <= 1 + 1e-6


def test_long_arrays_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths_module, "CHUNK_DOCUMENTS", 7)
    lengths = np.random.default_rng(0).integers(1, 30, 100)
    assert LengthHistogram.of(lengths).counts.tolist() == np.unique(lengths, return_counts=True)[1].tolist()
