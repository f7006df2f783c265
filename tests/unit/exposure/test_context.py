"""Effective context of one row against a walk over its tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import PlainRow, plain_contexts

from megatron_exact.exposure import effective_context

segments = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def boundaries(lengths: list[int]) -> list[int]:
    return [0, *np.cumsum(lengths).tolist()]


@settings(deadline=None, max_examples=150)
@given(segments, st.booleans())
def test_matches_the_walk(lengths: list[int], last_continues: bool) -> None:
    row = PlainRow(lengths, "continues" if last_continues else "opens")
    found = effective_context(boundaries(lengths), last_continues=last_continues)
    assert found.dtype == np.int64
    assert found.tolist() == plain_contexts(row)


@settings(deadline=None, max_examples=50)
@given(segments, st.integers(0, 9))
def test_padded_cu_seqlens_mean_the_same(lengths: list[int], padding: int) -> None:
    plain = boundaries(lengths)
    padded = np.array(plain + [plain[-1]] * padding, dtype=np.int32)
    np.testing.assert_array_equal(effective_context(padded), effective_context(plain))


def test_written_out() -> None:
    assert effective_context([0, 3, 4, 8]).tolist() == [1, 2, 0, 0, 1, 2, 3, 4]
    assert effective_context([0, 3, 4, 8], last_continues=False).tolist() == [1, 2, 0, 0, 1, 2, 3, 0]


def test_a_row_of_one_document() -> None:
    assert effective_context([0, 100]).tolist() == list(range(1, 101))


def test_a_row_of_one_token_documents() -> None:
    assert effective_context(range(21), last_continues=False).tolist() == [0] * 20
    assert effective_context(range(21)).tolist() == [0] * 19 + [1]


def test_a_tensor_gives_a_tensor() -> None:
    found = effective_context(torch.tensor([0, 3, 8, 8, 8], dtype=torch.int32))
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.int64
    assert found.tolist() == effective_context([0, 3, 8]).tolist()


@pytest.mark.parametrize("wrong", [[], [0], [1, 5], [0, 5, 3], [0, 0], [[0, 5]]])
def test_what_is_no_cu_seqlens_is_refused(wrong: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        effective_context(wrong)
