"""How evenly context-parallel ranks share the attention of rows, against counting query by query."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_exact.data.lengths import attention_balance


def rows_of(*rows: list[int]) -> dict[str, np.ndarray]:
    """The arrays of a split from the segments of its rows; what is left of a row is padding."""
    return {
        "row_offsets": np.cumsum([0, *map(len, rows)]),
        "segment_tokens": np.array([tokens for row in rows for tokens in row], dtype=np.int32),
    }


def plain_work(row: list[int], row_tokens: int, ranks: int) -> list[int]:
    """Pairs of each rank, from the keys that every single query sees."""
    padding = row_tokens - sum(row)
    keys = [place + 1 for tokens in (*row, padding) for place in range(tokens)]
    length = row_tokens // (2 * ranks)
    spans = [sum(keys[start : start + length]) for start in range(0, row_tokens, length)]
    return [spans[rank] + spans[2 * ranks - 1 - rank] for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_work_is_that_of_counting_queries(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_exact.data.lengths.ROWS_AT_ONCE", 3)
    random, row_tokens = np.random.default_rng(ranks), 64
    rows = []
    for _ in range(20):
        cuts = np.unique(random.integers(1, row_tokens, 4))
        lengths = np.diff([0, *cuts, row_tokens]).tolist()
        rows.append(lengths[:-1] if random.random() < 0.4 else lengths)  # some end with padding
    works = [plain_work(row, row_tokens, ranks) for row in rows]
    ratios = [max(work) / np.mean(work) for work in works]
    found = attention_balance(rows_of(*rows), row_tokens=row_tokens, ranks=ranks)
    assert found.mean == pytest.approx(np.mean(ratios), rel=1e-12)
    assert found.most == pytest.approx(max(ratios), rel=1e-12)
    idle = 1 - sum(np.mean(work) for work in works) / sum(map(max, works))
    assert found.waiting == pytest.approx(idle, abs=1e-12)
    assert (found.waiting > 0.01) == (ranks > 1)


def test_one_document_a_row_is_even_and_one_beside_short_ones_is_not() -> None:
    whole = attention_balance(rows_of([64], [64]), row_tokens=64, ranks=2)
    assert (whole.mean, whole.most, whole.waiting) == pytest.approx((1, 1, 0))
    mixed = attention_balance(rows_of([32, *[1] * 32]), row_tokens=64, ranks=2)
    # the first half is one document: 136 + 16 of spans 0 and 3, 392 + 16 of spans 1 and 2
    assert mixed.most == pytest.approx(408 / 280)


def test_rows_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ValueError, match="rows of 60 tokens do not divide into 8 spans"):
        attention_balance(rows_of([60]), row_tokens=60, ranks=4)


def test_a_split_without_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="this split has no rows"):
        attention_balance(rows_of(), row_tokens=64, ranks=2)
