"""`best-fit`: best-fit decreasing, every token once, no cut but of long documents, well shuffled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_corpora import heavy_tailed_lengths

from megatron_exact.data.plan import ChosenDocuments, Plan
from megatron_exact.data.plan_best_fit import best_fit_patterns, plan_best_fit
from megatron_exact.data.shuffle import KeyedPermutation


def plan_of(lengths: list[int], row_tokens: int, seed: int = 0) -> Plan:
    """Plan in shuffled document order, as packing does."""
    order = KeyedPermutation(len(lengths), 1000 + seed).all()
    chosen = ChosenDocuments(
        source=(order % 3).astype(np.uint16), document=order, tokens=np.array(lengths, np.int64)[order]
    )
    return plan_best_fit(chosen, row_tokens, seed=seed, split="train")


def plain_best_fit_rooms(lengths: list[int], row_tokens: int) -> list[int]:
    """Room left in each row by best-fit decreasing, one piece after the other."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(row_tokens - length)
    return sorted(rooms)


@settings(deadline=None, max_examples=200)
@given(row_tokens=st.integers(1, 60), data=st.data())
def test_patterns_are_those_of_best_fit_decreasing(row_tokens: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, row_tokens), max_size=60))
    patterns = best_fit_patterns(np.bincount(lengths, minlength=row_tokens + 1), row_tokens)
    placed = [length for pieces, rows in patterns for length in pieces * rows]
    assert sorted(placed) == sorted(lengths)
    rooms = [row_tokens - sum(pieces) for pieces, rows in patterns for _ in range(rows)]
    assert sorted(rooms) == plain_best_fit_rooms(lengths, row_tokens)


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 150), max_size=60),
    row_tokens=st.integers(1, 50),
    seed=st.integers(0, 9),
)
@example(lengths=[50] * 20, row_tokens=50, seed=0)
@example(lengths=[1] * 60, row_tokens=50, seed=0)
@example(lengths=[101] * 9, row_tokens=50, seed=0)
def test_every_token_once_and_only_long_documents_cut(
    lengths: list[int], row_tokens: int, seed: int
) -> None:
    plan = plan_of(lengths, row_tokens, seed)
    assert plan.left_out_tokens == 0
    assert plan.next_token is None
    pieces: dict[int, list[tuple[int, int]]] = {document: [] for document in range(len(lengths))}
    for row in range(plan.rows):
        segments = range(plan.row_offsets[row], plan.row_offsets[row + 1])
        assert 0 < sum(int(plan.segment_tokens[index]) for index in segments) <= row_tokens
        for index in segments:
            document = int(plan.segment_document[index])
            assert plan.segment_source[index] == document % 3
            start, length = int(plan.segment_start[index]), int(plan.segment_tokens[index])
            pieces[document].append((start, length))
            if start + length < lengths[document]:  # goes on: a full row of its own
                assert length == row_tokens
                assert len(segments) == 1
    for document, length in enumerate(lengths):
        expected = [(start, row_tokens) for start in range(0, length - row_tokens + 1, row_tokens)]
        if length % row_tokens:
            expected.append((length - length % row_tokens, length % row_tokens))
        assert sorted(pieces[document]) == expected
    remainders = [length % row_tokens for length in lengths if length % row_tokens]
    full_rows = sum(length // row_tokens for length in lengths)
    assert plan.rows == full_rows + len(plain_best_fit_rooms(remainders, row_tokens))


def test_padding_is_small_on_heavy_tailed_lengths() -> None:
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(np.log(900), 1.4, 30_000)).astype(int).tolist()
    plan = plan_of(lengths, 16_384)
    assert 1 - plan.tokens / (plan.rows * 16_384) < 0.001
    assert plan.tokens == sum(lengths)


def test_neither_order_nor_company_follows_corpus_or_length() -> None:
    lengths = sorted(heavy_tailed_lengths(8000, seed=2))  # corpus order is length order: the worst case
    plan = plan_of(lengths, 512)
    row_of_segment = np.repeat(np.arange(plan.rows), np.diff(plan.row_offsets))
    assert abs(np.corrcoef(row_of_segment, plan.segment_document)[0, 1]) < 0.05
    assert abs(np.corrcoef(row_of_segment, plan.segment_tokens)[0, 1]) < 0.05
    sizes = np.diff(plan.row_offsets)
    position = np.arange(plan.segments) - np.repeat(plan.row_offsets[:-1], sizes)
    full = sizes[row_of_segment] > 1
    relative = position[full] / (sizes[row_of_segment][full] - 1)
    assert abs(np.corrcoef(relative, plan.segment_tokens[full])[0, 1]) < 0.05


def test_documents_of_one_length_are_spread_at_random() -> None:
    # 4,000 equal documents, four to a row: neighbours in the corpus must not share rows.
    plan = plan_of([100] * 4000, 400)
    together = plan.segment_document.reshape(-1, 4)
    gaps = np.abs(np.diff(np.sort(together, axis=1), axis=1))
    assert (gaps == 1).mean() < 0.01  # in corpus order it would be 1
    assert abs(gaps.mean() - 800) < 40  # mean gap of 4 sorted draws out of 4,000


def test_seed_decides_alone() -> None:
    lengths = heavy_tailed_lengths(500)
    same, again, other = (plan_of(lengths, 128, seed) for seed in (1, 1, 2))
    for name, array in same.arrays().items():
        assert np.array_equal(array, again.arrays()[name]), name
    assert not np.array_equal(same.segment_document, other.segment_document)


@pytest.mark.parametrize("row_tokens", [1 << 16, (1 << 16) + 1])
def test_rows_around_the_radix_limit(row_tokens: int) -> None:
    lengths = [row_tokens - 1, 1, row_tokens, 40_000, 20_000, 5]
    plan = plan_of(lengths, row_tokens)
    assert plan.rows == 3
    assert plan.tokens == sum(lengths)
