"""The closed form of `concat` against brute force over all phases, and against simulated streams."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_exact.exposure import bucket_index, bucket_lower_bounds
from megatron_exact.exposure.buckets import expected_concat, sums_over_phases


def pieces(length: int, offset: int, row_tokens: int) -> list[int]:
    """Segments of one document that begins `offset` inputs into a row, token by token."""
    cut = [0]
    for position in range(length):
        if position and (offset + position) % row_tokens == 0:
            cut.append(position)
    return np.diff([*cut, length]).tolist()


def brute_force(histogram: dict[int, int], row_tokens: int, step: int) -> dict[str, object]:
    ending, continuing = [0] * (row_tokens + 1), [0] * (row_tokens + 1)
    cut = after_cut = 0
    for length, count in histogram.items():
        for offset in range(0, row_tokens, step):
            *others, last = pieces(length, offset, row_tokens)
            ending[last] += count
            for other in others:
                continuing[other] += count
            cut += count * bool(others)
            after_cut += count * sum([*others, last][1:])
    return {"ending": ending, "continuing": continuing, "cut": cut, "after_cut": after_cut}


histograms = st.dictionaries(st.integers(1, 70), st.integers(0, 5), min_size=1, max_size=6)


@settings(deadline=None, max_examples=150)
@given(histogram=histograms, row_tokens=st.integers(1, 24), unit=st.sampled_from([1, 1, 1, 2, 3, 8]))
def test_sums_equal_brute_force_over_all_phases(
    histogram: dict[int, int], row_tokens: int, unit: int
) -> None:
    """In whole numbers, exactly. With a common divisor only its multiples are phases."""
    histogram = {length * unit: count for length, count in sorted(histogram.items())}
    row_tokens *= unit
    used = [length for length, count in histogram.items() if count]
    step = int(np.gcd.reduce([row_tokens, *used]))
    sums = sums_over_phases(list(histogram), list(histogram.values()), row_tokens)
    expected = brute_force(histogram, row_tokens, step)
    assert sums.phases == row_tokens // step
    assert sums.ending.dtype == np.int64
    assert sums.ending.tolist() == expected["ending"]
    assert sums.continuing.tolist() == expected["continuing"]
    assert int(sums.cut_documents) == expected["cut"]
    assert int(sums.tokens_after_cut) == expected["after_cut"]


@settings(deadline=None, max_examples=100)
@given(histogram=histograms, row_tokens=st.integers(1, 80), masked=st.booleans())
@example(histogram={6: 2, 7: 0}, row_tokens=8, masked=False)  # a length of no documents, beside even ones
def test_targets_are_those_of_the_segments(
    histogram: dict[int, int], row_tokens: int, masked: bool
) -> None:
    """Bucket by bucket from a loop over segments; every input has one target without the mask."""
    histogram = dict(sorted(histogram.items()))
    lengths, counts = list(histogram), list(histogram.values())
    found = expected_concat(lengths, counts, row_tokens, mask_cross_document_targets=masked)
    tokens = int(np.dot(lengths, counts))
    assert found.rows == max(0, (tokens - 1) // row_tokens)
    assert found.left_out_tokens == tokens - found.rows * row_tokens
    sums = sums_over_phases(lengths, counts, row_tokens)
    share = found.rows * row_tokens / max(1, tokens) / sums.phases
    expected = np.zeros(len(bucket_lower_bounds(row_tokens)))
    for length in range(1, row_tokens + 1):
        inside = bucket_index(np.arange(1, length), row_tokens)
        np.add.at(expected, inside, (sums.ending[length] + sums.continuing[length]) * share)
        expected[bucket_index(length, row_tokens)] += sums.continuing[length] * share
        expected[0] += 0 if masked else sums.ending[length] * share
    np.testing.assert_allclose(found.counts, expected, rtol=1e-9, atol=1e-9)
    used = found.rows * row_tokens
    assert np.arange(row_tokens + 1) @ found.segments == pytest.approx(used)
    if not masked:
        assert found.counts.sum() == pytest.approx(used)


@pytest.mark.parametrize(
    ("lengths", "counts", "row_tokens"),
    [([7], [10**6], 64), ([1], [10**6], 64), ([1, 10**6], [10**6, 1], 4096), ([100_000], [3], 4096)],
)
def test_extreme_lengths_lose_no_token(lengths: list[int], counts: list[int], row_tokens: int) -> None:
    found = expected_concat(lengths, counts, row_tokens)
    assert np.arange(row_tokens + 1) @ found.segments == pytest.approx(found.rows * row_tokens)
    assert found.counts.sum() == pytest.approx(found.rows * row_tokens)


def test_documents_that_fill_rows_are_never_cut() -> None:
    """With uniform phases nearly all of them would be; the common divisor knows better."""
    found = expected_concat([4096, 8192], [1000, 0], 4096)
    assert (found.rows, found.left_out_tokens) == (999, 4096)
    assert (found.cut_documents, found.tokens_after_cut, found.continuing) == (0, 0, 0)
    assert found.segments[4096] == pytest.approx(999)
    one_token_more = expected_concat([4097], [1000], 4096)
    assert one_token_more.cut_documents > 999


def test_nothing_at_all() -> None:
    found = expected_concat([5], [0], 8)
    assert (found.rows, found.left_out_tokens, found.counts.tolist()) == (0, 0, [0])


@pytest.mark.parametrize("row_tokens", [256, 1000, 1024])
def test_a_shuffled_stream_comes_near(row_tokens: int) -> None:
    """20,000 heavy-tailed documents, cut by a loop: shares within 0.005, tail share within 2 %."""
    rng = np.random.default_rng(row_tokens)
    lengths = np.maximum(1, rng.lognormal(np.log(200), 1.4, 20_000)).astype(int)
    stream = np.repeat(np.arange(lengths.size), lengths)
    rows = (stream.size - 1) // row_tokens
    counts = np.zeros(len(bucket_lower_bounds(row_tokens)))
    for row in range(rows):
        inputs = stream[row * row_tokens : (row + 1) * row_tokens + 1]
        begins = np.append(True, inputs[1:] != inputs[:-1])
        places = np.arange(row_tokens + 1)
        context = places - np.maximum.accumulate(np.where(begins, places, 0))
        counts += np.bincount(bucket_index(context[1:], row_tokens), minlength=counts.size)
    values, times = np.unique(lengths, return_counts=True)
    found = expected_concat(values, times, row_tokens)
    assert found.rows == rows
    difference = np.abs(found.counts - counts) / counts.sum()
    assert difference.max() < 0.005, difference
    tail = slice(-2, None)
    assert found.counts[tail].sum() == pytest.approx(counts[tail].sum(), rel=0.02)
