"""Choosing documents: shares in tokens, repeats, order."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.data.blend import SourceDocuments, choose_documents
from megatron_exact.data.plan import ChosenDocuments

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=25)


def source(lengths: list[int], weight: float | None = None, name: str = "s") -> SourceDocuments:
    # Document numbers with gaps, as after a validation split.
    document = np.arange(len(lengths), dtype=np.int64) * 3 + 1
    return SourceDocuments(name=name, weight=weight, document=document, tokens=np.array(lengths, np.int64))


def count_documents(chosen: ChosenDocuments, index: int) -> Counter[int]:
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
        assert any(share < max(1, max(one.tokens) / 2) + 1 for share, one in shares)
        return
    wanted = target
    if wanted is None:
        wanted = min(one.total * total_weight / (one.weight or 0) for one in sources)
        assert all(use.repeated_tokens == 0 for use in uses)
        assert any(use.unused_tokens == 0 for use in uses)  # the scarcest is used up
    for index, (one, use) in enumerate(zip(sources, uses, strict=True)):
        share = wanted * (one.weight or 0) / total_weight
        assert abs(use.tokens - share) <= max(one.tokens) / 2 + 1
        assert use.documents >= 1
        times = count_documents(chosen, index)
        assert use.documents == times.total()
        if times:  # whole passes: no document is used twice more than another
            all_times = [times[document] for document in one.document.tolist()]
            assert max(all_times) - min(all_times) <= 1
        lengths = dict(zip(one.document.tolist(), one.tokens.tolist(), strict=True))
        assert use.tokens == sum(lengths[document] * count for document, count in times.items())
        once = sum(lengths[document] for document in times)
        assert use.repeated_tokens == use.tokens - once
        assert use.unused_tokens == one.total - once


@pytest.mark.parametrize("weights", [(None, None), (1.0, 1.0)])
def test_a_shortage_names_the_source_and_the_tokens(weights: tuple[float | None, float | None]) -> None:
    sources = [source([10] * 5, weights[0], "web"), source([10] * 90, weights[1], "code")]
    with pytest.raises(ValueError, match=r"web.* 1000 train tokens|web.* 500 train tokens but 50"):
        choose_documents(sources, split="train", seed=0, target_tokens=1000, allow_repeats=False)


def test_unweighted_target_takes_a_shuffled_part() -> None:
    sources = [source([10] * 50), source([10] * 150)]
    chosen, uses = choose_documents(sources, split="train", seed=0, target_tokens=995, allow_repeats=False)
    assert len(chosen) == 100
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
