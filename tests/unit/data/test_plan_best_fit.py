"""`best-fit`: best-fit decreasing, every token once, no cut but of long documents, well shuffled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plan_arrays import PlanArrays, choose, collect, pool_of
from small_corpora import heavy_tailed_lengths

from megatron_exact.data import document_pool
from megatron_exact.data import plan as plan_module
from megatron_exact.data.document_pool import ChosenDocuments, Passes
from megatron_exact.data.plan import BestFitPlan, best_fit_patterns


def plan_of(lengths: list[int], row_tokens: int, seed: int = 0, repeats: int = 1) -> PlanArrays:
    """Plan in shuffled document order, as packing does."""
    chosen = choose(pool_of(lengths), key=1000 + seed, repeats=repeats)
    return collect(BestFitPlan(chosen, row_tokens, seed=seed, split="train"))


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
            start, length = int(plan.segment_start[index]), int(plan.segment_tokens[index])
            pieces[document].append((start, length))
            assert plan.continues[index] == (start + length < lengths[document])
            if plan.continues[index]:  # a full row of its own
                assert length == row_tokens
                assert len(segments) == 1
    for document, length in enumerate(lengths):
        expected = [(start, row_tokens) for start in range(0, length - row_tokens + 1, row_tokens)]
        if length % row_tokens:
            expected.append((length - length % row_tokens, length % row_tokens))
        assert sorted(pieces[document]) == expected
    assert plan.rows == plan_of_rooms(lengths, row_tokens)


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
    for name in ("row_offsets", "segment_document", "segment_start", "segment_tokens"):
        assert np.array_equal(getattr(same, name), getattr(again, name)), name
    assert not np.array_equal(same.segment_document, other.segment_document)


def test_a_repeated_document_is_packed_each_time() -> None:
    lengths = [*heavy_tailed_lengths(40), 1000]
    plan = plan_of(lengths, 64, repeats=3)
    for document, length in enumerate(lengths):
        mine = plan.segment_document == document
        assert int(plan.segment_tokens[mine].sum()) == 3 * length
        pieces = set(zip(plan.segment_start[mine], plan.segment_tokens[mine], strict=True))
        assert int(np.count_nonzero(mine)) == 3 * len(pieces)


def shared_rows(plan: PlanArrays, row: np.ndarray) -> int:
    """Pieces that stand in a row with another copy of themselves, beyond the first."""
    places = zip(row.tolist(), plan.segment_document.tolist(), plan.segment_start.tolist(), strict=True)
    return plan.segments - len(set(places))


def nearest_copies(plan: PlanArrays, row: np.ndarray) -> np.ndarray:
    """Rows between a piece and its nearest other copy, of pieces that have one: ascending."""
    rows_of: dict[tuple[int, int], list[int]] = {}
    for place in zip(
        plan.segment_document.tolist(), plan.segment_start.tolist(), row.tolist(), strict=True
    ):
        rows_of.setdefault(place[:2], []).append(place[2])
    return np.sort(np.concatenate([np.diff(np.sort(rows)) for rows in rows_of.values() if len(rows) > 1]))


@pytest.mark.parametrize("repeats", [2, 3, 7])
def test_copies_of_a_document_do_not_meet(repeats: int) -> None:
    """Never in one row, and the share of copies in neighbouring rows is that of shuffled rows."""
    lengths = [*heavy_tailed_lengths(1500, seed=repeats), 1000]
    plan = plan_of(lengths, 256, repeats=repeats)
    row = np.repeat(np.arange(plan.rows), np.diff(plan.row_offsets))
    assert shared_rows(plan, row) == 0
    rng = np.random.default_rng(0)
    # Chance: whole rows in random order, and for rows themselves every piece in a random row.
    chance_near = [(nearest_copies(plan, rng.permutation(plan.rows)[row]) <= 2).mean() for _ in range(10)]
    assert (nearest_copies(plan, row) <= 2).mean() <= 1.3 * max(chance_near)
    assert min(shared_rows(plan, rng.permutation(row)) for _ in range(10)) > 0
    padding = 1 - plan.tokens / (plan.rows * 256)
    assert padding < 0.01


def test_without_passes_copies_would_meet() -> None:
    """The control: the same documents, told to be different ones, and lengths that few share."""
    lengths = heavy_tailed_lengths(1500, seed=2)
    chosen = choose(pool_of(lengths), list(range(len(lengths))) * 2, key=1002)
    plan = collect(BestFitPlan(chosen, 256, seed=2, split="train"))
    row = np.repeat(np.arange(plan.rows), np.diff(plan.row_offsets))
    rng = np.random.default_rng(0)
    assert shared_rows(plan, row) > 2 * max(shared_rows(plan, rng.permutation(row)) for _ in range(10)) + 10


def test_sources_of_different_passes_stay_mixed() -> None:
    """One source four times, another once: both are in every round, in their shares."""
    often, once = heavy_tailed_lengths(400, seed=1), heavy_tailed_lengths(1600, seed=2)
    pool = pool_of(often, once)
    numbers = np.concatenate([*[np.arange(400)] * 4, 400 + np.arange(1600)]).astype(np.uint32)
    ends, taken = np.cumsum([400] * 4 + [1600]), np.array([0, 1, 2, 3, 0])
    chosen = ChosenDocuments(pool=pool, numbers=numbers, key=5, passes=Passes(ends=ends, number=taken))
    plan = collect(BestFitPlan(chosen, 256, seed=0, split="train"))
    row = np.repeat(np.arange(plan.rows), np.diff(plan.row_offsets))
    assert shared_rows(plan, row * 2 + plan.segment_source) == 0
    mixed = np.bincount(row, plan.segment_source) / np.bincount(row)
    several = np.bincount(row) > 8
    assert np.mean((mixed[several] > 0) & (mixed[several] < 1)) > 0.95


def test_too_many_copies_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"taken 300 times.* at most 255 copies apart"):
        BestFitPlan(choose(pool_of([5, 6]), repeats=300), 1 << 16, seed=0, split="train")


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    lengths = heavy_tailed_lengths(300, seed=5)
    whole = plan_of(lengths, 100)
    monkeypatch.setattr(plan_module, "BLOCK_DOCUMENTS", block)
    monkeypatch.setattr(document_pool, "BLOCK_DOCUMENTS", block)
    cut = plan_of(lengths, 100)
    assert np.array_equal(whole.row_offsets, cut.row_offsets)
    assert np.array_equal(whole.segment_document, cut.segment_document)
    assert np.array_equal(whole.segment_start, cut.segment_start)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("sweeps", [1, 4, 1000])
def test_a_scratch_file_does_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweeps: int, repeats: int
) -> None:
    lengths = [*heavy_tailed_lengths(2000, seed=5), 4000, 700]  # some fill whole rows
    chosen = choose(pool_of(lengths), key=7, repeats=repeats)
    monkeypatch.setattr(plan_module, "BLOCK_DOCUMENTS", 64)
    in_memory = collect(BestFitPlan(chosen, 300, seed=2, split="train"))
    monkeypatch.setattr(document_pool, "SCRATCH_BYTES", 0)
    monkeypatch.setattr(plan_module, "SWEEPS", sweeps)
    monkeypatch.setattr(plan_module, "WINDOW_BITS", 6)
    plan = BestFitPlan(chosen, 300, seed=2, split="train", scratch=tmp_path)
    assert plan._sort_pieces().is_mapped
    mapped = collect(plan)
    for name in ("row_offsets", "segment_document", "segment_start", "segment_tokens", "continues"):
        assert np.array_equal(getattr(in_memory, name), getattr(mapped, name)), name
    assert not list(tmp_path.iterdir())


def test_other_pieces_in_the_scratch_file_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the rows of a mapped plan are those that its file names."""
    chosen = choose(pool_of(heavy_tailed_lengths(2000, seed=5)), key=7)
    monkeypatch.setattr(document_pool, "SCRATCH_BYTES", 0)
    plan = BestFitPlan(chosen, 300, seed=2, split="train", scratch=tmp_path)
    whole = collect(plan)
    pieces = plan._sort_pieces()
    pieces.number[:2] = pieces.number[1::-1].copy()
    monkeypatch.setattr(plan, "_sort_pieces", lambda: pieces)
    assert not np.array_equal(whole.segment_document, collect(plan).segment_document)


@pytest.mark.parametrize("row_tokens", [1 << 16, (1 << 16) + 1, 1 << 17])
def test_rows_around_the_radix_limit(row_tokens: int) -> None:
    lengths = [row_tokens - 1, 1, row_tokens, 40_000, 20_000, 5]
    plan = plan_of(lengths, row_tokens)
    assert plan.rows == 2 + -(-60_005 // row_tokens)
    assert plan.tokens == sum(lengths)


@pytest.mark.parametrize(
    "lengths",
    [
        [700] * 3000,
        [1] * 5000,
        [5000] * 300,
        [1] * 3000 + [400_000],
        [1024] * 500,
        [1023] * 500 + [1] * 499,
    ],
    ids=["equal", "one token", "all long", "one huge", "exactly a row", "fill up"],
)
def test_adversarial_lengths(lengths: list[int]) -> None:
    plan = plan_of(lengths, 1024)
    rows = plan_of_rooms(lengths, 1024)
    assert plan.rows == rows
    assert plan.tokens == sum(lengths)
    sizes = np.add.reduceat(plan.segment_tokens, plan.row_offsets[:-1])
    assert sizes.max() <= 1024


def plan_of_rooms(lengths: list[int], row_tokens: int) -> int:
    """Rows that best-fit decreasing needs, counted one piece after the other."""
    remainders = [length % row_tokens for length in lengths if length % row_tokens]
    full_rows = sum(length // row_tokens for length in lengths)
    return full_rows + len(plain_best_fit_rooms(remainders, row_tokens))
