"""Choosing documents: shares in tokens, repeats, order."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.data import blend
from megatron_exact.data import plan as plan_module
from megatron_exact.data.document_pool import DocumentPool
from megatron_exact.data.manifest import SourceUse

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=25)


@dataclass
class Source:
    """One source of which every third document is in the split, as after a validation split."""

    lengths: list[int]
    weight: float | None = None
    name: str = "s"

    @property
    def document(self) -> np.ndarray:
        return np.arange(len(self.lengths)) * 3 + 1

    @property
    def total(self) -> int:
        return sum(self.lengths)


@dataclass
class Chosen:
    """All that was chosen, in order."""

    source: np.ndarray
    document: np.ndarray
    tokens: np.ndarray


def source(lengths: list[int], weight: float | None = None, name: str = "s") -> Source:
    return Source(lengths, weight, name)


def choose_documents(
    sources: list[Source],
    *,
    split: str,
    seed: int,
    target_tokens: int | None,
    allow_repeats: bool,
    weight_unit: str = "tokens",
) -> tuple[Chosen, tuple[SourceUse, ...]]:
    first = np.concatenate(([0], np.cumsum([3 * len(one.lengths) + 2 for one in sources])))
    tokens = np.full(first[-1], 77_777)  # of documents that must not be chosen
    held_out = []
    for one, start in zip(sources, first, strict=False):
        tokens[start + one.document] = one.lengths
        held = np.ones(3 * len(one.lengths) + 2, dtype=bool)
        held[one.document] = False
        held_out.append(held)
    pool = DocumentPool(tokens=tokens, first=first)
    names, weights = [one.name for one in sources], [one.weight for one in sources]
    members = blend.split_members(pool, names, weights, held_out, train=True)
    chosen, uses = blend.choose_documents(
        pool,
        members,
        split=split,
        seed=seed,
        target_tokens=target_tokens,
        allow_repeats=allow_repeats,
        weight_unit=weight_unit,
    )
    numbers, lengths, _ = map(np.concatenate, zip(*chosen.in_order(), strict=True))
    in_any_order = np.concatenate(list(chosen.as_they_stand()))
    assert np.array_equal(np.sort(in_any_order), np.sort(lengths))
    source_index, document = pool.locate(numbers.astype(np.int64))
    return Chosen(source_index, document, lengths), uses


def count_documents(chosen: Chosen, index: int) -> Counter[int]:
    return Counter(chosen.document[chosen.source == index].tolist())


@settings(deadline=None, max_examples=40)
@given(corpora=st.lists(LENGTHS, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_without_weights_everything_once(corpora: list[list[int]], seed: int) -> None:
    sources = [source(lengths) for lengths in corpora]
    chosen, uses = choose_documents(
        sources, split="train", seed=seed, target_tokens=None, allow_repeats=False
    )
    for index, (one, use) in enumerate(zip(sources, uses, strict=True)):
        assert count_documents(chosen, index) == Counter(one.document.tolist())
        assert (use.tokens, use.repeated_tokens, use.unused_tokens) == (one.total, 0, 0)
    assert int(chosen.tokens.sum()) == sum(map(sum, corpora))


@settings(deadline=None, max_examples=60)
@given(
    corpora=st.lists(LENGTHS, min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 50), min_size=4, max_size=4),
    target=st.one_of(st.none(), st.integers(1, 2000)),
    seed=st.integers(0, 99),
)
def test_weighted_shares(
    corpora: list[list[int]], weights: list[int], target: int | None, seed: int
) -> None:
    sources = [source(lengths, weight / 10) for lengths, weight in zip(corpora, weights, strict=False)]
    total_weight = sum(one.weight or 0 for one in sources)
    try:
        chosen, uses = choose_documents(
            sources, split="train", seed=seed, target_tokens=target, allow_repeats=True
        )
    except ValueError as error:
        if "would give nothing" not in str(error):
            raise
        wanted = target or min(one.total * total_weight / (one.weight or 0) for one in sources)
        shares = [(wanted * (one.weight or 0) / total_weight, one) for one in sources]
        assert any(share < max(1, max(one.lengths) / 2) + 1 for share, one in shares)
        return
    wanted = target
    if wanted is None:
        wanted = min(one.total * total_weight / (one.weight or 0) for one in sources)
        assert all(use.repeated_tokens == 0 for use in uses)
        assert any(use.unused_tokens == 0 for use in uses)  # the scarcest is used up
    for index, (one, use) in enumerate(zip(sources, uses, strict=True)):
        share = wanted * (one.weight or 0) / total_weight
        assert abs(use.tokens - share) <= max(one.lengths) / 2 + 1
        assert use.documents >= 1
        times = count_documents(chosen, index)
        assert use.documents == times.total()
        if times:  # whole passes: no document is used twice more than another
            all_times = [times[document] for document in one.document.tolist()]
            assert max(all_times) - min(all_times) <= 1
        lengths = dict(zip(one.document.tolist(), one.lengths, strict=True))
        assert use.tokens == sum(lengths[document] * count for document, count in times.items())
        once = sum(lengths[document] for document in times)
        assert use.repeated_tokens == use.tokens - once
        assert use.unused_tokens == one.total - once


@settings(deadline=None, max_examples=60)
@given(
    corpora=st.lists(LENGTHS, min_size=1, max_size=4),
    weights=st.lists(st.integers(1, 9), min_size=4, max_size=4),
    target=st.one_of(st.none(), st.integers(1, 2000)),
    seed=st.integers(0, 99),
)
def test_shares_of_documents(
    corpora: list[list[int]], weights: list[int], target: int | None, seed: int
) -> None:
    sources = [source(lengths, weight) for lengths, weight in zip(corpora, weights, strict=False)]
    shares = [Fraction(one.weight or 0) for one in sources]
    shares = [share / sum(shares) for share in shares]
    means = [Fraction(one.total, len(one.lengths)) for one in sources]
    if target is None:
        wanted = min(len(one.lengths) / share for one, share in zip(sources, shares, strict=True))
    else:
        wanted = target / sum(share * mean for share, mean in zip(shares, means, strict=True))
    counts = [int(wanted * share) for share in shares]
    options: dict[str, Any] = {"split": "train", "seed": seed, "target_tokens": target}
    if not all(counts):
        with pytest.raises(ValueError, match="it would give nothing"):
            choose_documents(sources, **options, allow_repeats=True, weight_unit="documents")
        return
    chosen, uses = choose_documents(sources, **options, allow_repeats=True, weight_unit="documents")
    assert [use.documents for use in uses] == counts
    for index, (one, use) in enumerate(zip(sources, uses, strict=True)):
        times = count_documents(chosen, index)
        lengths = dict(zip(one.document.tolist(), one.lengths, strict=True))
        assert use.tokens == sum(lengths[document] * count for document, count in times.items())
        assert use.unused_tokens == one.total - sum(lengths[document] for document in times)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [source([5, 3, 9] * 40, 1.0), source([2] * 200, 2.0)]
    options: dict[str, Any] = {"split": "train", "seed": 3, "target_tokens": 700, "allow_repeats": True}
    whole, uses = choose_documents(sources, **options)
    for module in (plan_module, blend):
        monkeypatch.setattr(module, "BLOCK_DOCUMENTS", 7)
    cut, again = choose_documents(sources, **options)
    assert uses == again
    assert np.array_equal(whole.document, cut.document)


@pytest.mark.parametrize("weights", [(None, None), (1.0, 1.0)])
def test_a_shortage_names_the_source_and_the_tokens(weights: tuple[float | None, float | None]) -> None:
    sources = [source([10] * 5, weights[0], "web"), source([10] * 90, weights[1], "code")]
    with pytest.raises(ValueError, match=r"web.* 1000 train tokens|web.* 500 train tokens but 50"):
        choose_documents(sources, split="train", seed=0, target_tokens=1000, allow_repeats=False)


def test_unweighted_target_takes_a_shuffled_part() -> None:
    sources = [source([10] * 50), source([10] * 150)]
    chosen, uses = choose_documents(sources, split="train", seed=0, target_tokens=995, allow_repeats=False)
    assert chosen.tokens.size == 100
    assert sum(use.unused_tokens for use in uses) == 1000
    assert 10 < uses[0].documents < 40  # about a quarter of the pool


def test_passes_have_orders_of_their_own_and_sources_are_interleaved() -> None:
    sources = [source([1] * 300, 1.0), source([1] * 300, 1.0)]
    order = {}
    for seed in (1, 2):
        chosen, _ = choose_documents(
            sources, split="train", seed=seed, target_tokens=None, allow_repeats=False
        )
        order[seed] = chosen
        switches = int(np.count_nonzero(np.diff(chosen.source.astype(int))))
        assert 250 < switches < 350  # two blocks would have 1, strict alternation 599
        assert abs(np.corrcoef(np.arange(600), chosen.document)[0, 1]) < 0.15
    assert not np.array_equal(order[1].document, order[2].document)


@pytest.mark.parametrize(("target", "taken"), [(14, 10), (15, 20), (16, 20), (24, 20), (30, 30)])
def test_the_last_document_is_taken_only_if_that_is_nearer(target: int, taken: int) -> None:
    for weight in (None, 1.0):
        _, uses = choose_documents(
            [source([10] * 5, weight)], split="train", seed=0, target_tokens=target, allow_repeats=False
        )
        assert uses[0].tokens == taken


@pytest.mark.parametrize("target", [40, 400])
def test_a_weighted_source_that_would_give_nothing_is_refused(target: int) -> None:
    sources = [source([10] * 90, 99.0, "web"), source([10] * 90, 1.0, "data/code")]
    share = target // 100
    with pytest.raises(ValueError, match=f"data/code of weight 1 should give {share} train tokens, less"):
        choose_documents(sources, split="train", seed=0, target_tokens=target, allow_repeats=False)


def test_a_shortage_speaks_of_weights_only_where_there_are_some() -> None:
    for weight, remedy in (
        (None, "lower --train-tokens, add"),
        (1.0, "lower --train-tokens or the weight,"),
    ):
        with pytest.raises(ValueError, match=remedy):
            choose_documents(
                [source([10], weight)], split="train", seed=0, target_tokens=99, allow_repeats=False
            )
