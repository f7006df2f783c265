"""Counts in closed form against a count over every token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from plans import PlainRow, plain_counts, plans

from megatron_exact.exposure import (
    bucket_index,
    bucket_lower_bounds,
    counts_from_histogram,
    effective_context,
    exposure_counts,
    segment_length_histogram,
)


def closed_form(row_tokens: int, rows: list[PlainRow]) -> np.ndarray:
    inner_ends = sum(len(row.lengths) - 1 for row in rows)
    return exposure_counts(
        [length for row in rows for length in row.lengths],
        row_tokens,
        continuing_tokens=[row.lengths[-1] for row in rows if row.ending == "continues"],
        boundary_targets=inner_ends + sum(row.ending == "opens" for row in rows),
    )


@settings(deadline=None, max_examples=200)
@given(plans())
def test_closed_form_equals_a_count_over_tokens(plan: tuple[int, list[PlainRow]]) -> None:
    row_tokens, rows = plan
    assert closed_form(row_tokens, rows).tolist() == plain_counts(row_tokens, rows)


@settings(deadline=None, max_examples=50)
@given(plans(max_row_tokens=300))
def test_closed_form_equals_the_contexts_of_each_row(plan: tuple[int, list[PlainRow]]) -> None:
    row_tokens, rows = plan
    rows = [PlainRow(row.lengths, "continues") for row in rows]
    counts = np.zeros(len(bucket_lower_bounds(row_tokens)), dtype=np.int64)
    for row in rows:
        context = effective_context([0, *np.cumsum(row.lengths)])
        counts += np.bincount(bucket_index(context, row_tokens), minlength=counts.size)
    assert closed_form(row_tokens, rows).tolist() == counts.tolist()


def test_rows_of_one_document_of_4k() -> None:
    counts = exposure_counts([4096] * 3, 4096, continuing_tokens=[4096] * 3)
    assert counts.tolist() == [3 * n for n in [7, 8, 16, 32, 64, 128, 256, 512, 1024, 2049]]


def test_one_token_documents_have_no_context() -> None:
    counts = exposure_counts([1] * 64, 64, boundary_targets=64)
    assert counts.tolist() == [64, 0, 0, 0]


def test_histograms_of_parts_may_be_added() -> None:
    first, second = [3, 9, 20, 32], [32, 32, 1]
    whole = segment_length_histogram(first + second, 32)
    parts = segment_length_histogram(first, 32) + segment_length_histogram(np.array(second, np.int32), 32)
    np.testing.assert_array_equal(whole, parts)
    assert counts_from_histogram(whole).sum() == sum(first + second) - len(first + second)


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"segments of 0 to 5 .* rows of 8"):
        exposure_counts([0, 5], 8)
    with pytest.raises(ValueError, match="9"):
        exposure_counts([9], 8)
