"""How evenly ranks share the attention of rows, and the order that shares it better, against counting."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_exact.data.attention_work import (
    StepLayout,
    attention_balance,
    balanced_order,
    row_pairs,
    segment_pairs,
    step_balance,
)


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
    monkeypatch.setattr("megatron_exact.data.attention_work.ROWS_AT_ONCE", 3)
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


def test_pairs_of_rows_are_those_of_counting_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_exact.data.attention_work.ROWS_AT_ONCE", 2)
    rows = [[64], [30, 30], [1] * 64, [5, 40], [63]]
    expected = [sum(plain_work(row, 64, 1)) for row in rows]
    assert row_pairs(rows_of(*rows), row_tokens=64).tolist() == expected
    assert [segment_pairs(np.array(row), 64) for row in rows] == expected
    assert len(set(expected)) == len(rows)


def plain_totals(work: list[int], layout: StepLayout) -> list[list[int]]:
    """Work of each micro-batch of each rank of one step, sample by sample as Megatron's sampler deals."""
    found = [[0] * layout.micro_batches for _ in range(layout.ranks)]
    for sample, pairs in enumerate(work):
        micro_batch, place = divmod(sample, layout.ranks * layout.micro_batch_rows)
        found[place // layout.micro_batch_rows][micro_batch] += pairs
    return found


SHAPES = [(8, 2, 1), (64, 8, 1), (64, 4, 4), (48, 16, 3), (6, 6, 1), (12, 1, 4), (256, 8, 2)]


@pytest.mark.parametrize(("rows", "ranks", "micro_batch_rows"), SHAPES)
def test_a_balanced_step_has_the_same_rows_and_ranks_of_nearly_equal_work(
    rows: int, ranks: int, micro_batch_rows: int
) -> None:
    layout = StepLayout(rows=rows, ranks=ranks, micro_batch_rows=micro_batch_rows)
    random = np.random.default_rng(rows + ranks)
    drawn, dealt = [], []
    for _ in range(40):
        work = np.clip(random.lognormal(6, 1.2, rows), 1, 40_000).astype(np.int64)
        order = balanced_order(work, layout)
        assert sorted(order.tolist()) == list(range(rows))
        assert (balanced_order(work, layout) == order).all()
        found = plain_totals(work[order].tolist(), layout)
        totals = [sum(rank) for rank in found]
        # no farther apart than two micro-batches that run at the same time
        assert max(totals) - min(totals) <= max(max(m) - min(m) for m in zip(*found, strict=True))
        drawn.append(plain_totals(work.tolist(), layout))
        dealt.append(found)
        measured = step_balance(work[order], layout)
        assert measured.step_mean == pytest.approx(max(totals) / np.mean(totals), rel=1e-12)

    def mean_ratio(steps: list[list[list[int]]]) -> float:
        totals = [[sum(rank) for rank in step] for step in steps]
        return float(np.mean([max(step) / np.mean(step) for step in totals]))

    if rows == ranks * micro_batch_rows == ranks or ranks == 1:
        assert mean_ratio(dealt) == mean_ratio(drawn)  # one row a rank: nothing to choose
    else:
        assert mean_ratio(dealt) - 1 < 0.8 * (mean_ratio(drawn) - 1)


def test_sorting_alone_is_worse_with_several_rows_a_micro_batch() -> None:
    """The control: what dealing is for. Sorted rows give one rank all the heavy ones."""
    layout = StepLayout(rows=64, ranks=16, micro_batch_rows=4)
    work = np.clip(np.random.default_rng(0).lognormal(6, 1.2, 64), 1, 40_000).astype(np.int64)
    drawn = step_balance(work, layout).step_mean
    assert step_balance(np.sort(work), layout).step_mean > drawn
    assert step_balance(work[balanced_order(work, layout)], layout).step_mean < drawn


def test_step_balance_by_hand() -> None:
    layout = StepLayout(rows=4, ranks=2)
    found = step_balance(np.array([1, 3, 1, 3, 2, 2, 6, 2, 9]), layout)  # the last row is left out
    assert (found.step_mean, found.step_worst) == pytest.approx(((1.5 + 8 / 6) / 2, 1.5))
    assert (found.micro_batch_mean, found.micro_batch_worst) == pytest.approx((1.375, 1.5))
    assert found.waiting == pytest.approx(1 - (4 + 6) / (6 + 8))


def test_steps_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ValueError, match="not a whole number of micro-batches of 2 rows for each of 3"):
        StepLayout(rows=8, ranks=3, micro_batch_rows=2)
    with pytest.raises(ValueError, match="7 rows are not one step of 8"):
        step_balance(np.ones(7), StepLayout(rows=8, ranks=2))


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
