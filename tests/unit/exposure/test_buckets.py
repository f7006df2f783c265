"""Edges and indices of the log2 buckets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import plain_bucket

from megatron_exact.exposure import bucket_index, bucket_lower_bounds


@pytest.mark.parametrize(("row_tokens", "buckets"), [(4096, 10), (8192, 11), (16384, 12)])
def test_power_of_two_rows_have_k_minus_2_buckets(row_tokens: int, buckets: int) -> None:
    edges = bucket_lower_bounds(row_tokens)
    assert edges.dtype == np.int64
    assert edges.tolist() == [0] + [8 * 2**i for i in range(buckets - 1)]
    assert edges[-1] == row_tokens // 2


@pytest.mark.parametrize(
    ("row_tokens", "edges"),
    [(1, [0]), (8, [0]), (9, [0, 8]), (16, [0, 8]), (17, [0, 8, 16]), (100, [0, 8, 16, 32, 64])],
)
def test_rows_of_any_length(row_tokens: int, edges: list[int]) -> None:
    assert bucket_lower_bounds(row_tokens).tolist() == edges


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 5000))
def test_every_context_has_the_bucket_of_the_formula(row_tokens: int) -> None:
    contexts = np.arange(row_tokens + 1)
    expected = [plain_bucket(int(context), row_tokens) for context in contexts]
    found = bucket_index(contexts, row_tokens)
    assert found.tolist() == expected
    edges = bucket_lower_bounds(row_tokens)
    assert (edges[found] <= contexts).all()
    assert set(found.tolist()) == set(range(len(edges)))  # no bucket that nothing can reach


def test_a_context_of_the_whole_row_is_folded_into_the_top_bucket() -> None:
    assert bucket_index([4095, 4096], 4096).tolist() == [9, 9]
    assert bucket_index(np.array([[0, 7], [8, 15]]), 4096).tolist() == [[0, 0], [1, 1]]


def test_contexts_outside_the_row_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0 to 65 does not fit rows of 64 tokens"):
        bucket_index([0, 65], 64)
    with pytest.raises(ValueError, match="-1"):
        bucket_index([-1], 64)
    with pytest.raises(ValueError, match="row_tokens is 0"):
        bucket_lower_bounds(0)
