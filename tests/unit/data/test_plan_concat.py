"""`concat` is the stream cut every row_tokens, and exactly what stock GPTDataset reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_arrays import PlanArrays, choose, collect, pool_of
from small_corpora import heavy_tailed_lengths, random_documents, write_corpus

from megatron_exact.data import plan as plan_module
from megatron_exact.data.document_pool import ChosenDocuments, DocumentPool
from megatron_exact.data.plan import ConcatPlan


def plan_of(lengths: list[int], row_tokens: int, order: list[int] | None = None) -> PlanArrays:
    return collect(ConcatPlan(choose(pool_of(lengths), order), row_tokens))


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=30),
    row_tokens=st.integers(1, 50),
    block=st.integers(1, 40),
)
def test_equals_a_stream_cut_by_hand(lengths: list[int], row_tokens: int, block: int) -> None:
    order = list(range(len(lengths)))[::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "BLOCK_DOCUMENTS", block)
        plan = plan_of(lengths, row_tokens, order)
    stream = [(document, position) for document in order for position in range(lengths[document])]
    rows = max(0, (len(stream) - 1) // row_tokens)
    assert plan.rows == rows
    assert plan.left_out_tokens == len(stream) - rows * row_tokens
    read = []
    for row in range(rows):
        mine = []
        for segment in range(plan.row_offsets[row], plan.row_offsets[row + 1]):
            start, length = int(plan.segment_start[segment]), int(plan.segment_tokens[segment])
            document = int(plan.segment_document[segment])
            assert length >= 1
            assert plan.continues[segment] == (start + length < lengths[document])
            mine += [(document, start + index) for index in range(length)]
        assert len(mine) == row_tokens
        read += mine
    assert read == stream[: rows * row_tokens]
    documents_in_rows = [set(read[row * row_tokens : (row + 1) * row_tokens]) for row in range(rows)]
    assert plan.segments == sum(len({document for document, _ in tokens}) for tokens in documents_in_rows)
    if rows:
        assert plan.next_token is not None
        assert (plan.next_token.document, plan.next_token.start) == stream[rows * row_tokens]
    else:
        assert plan.next_token is None


def test_one_huge_document_among_tiny_ones() -> None:
    plan = plan_of([1] * 100 + [1_000_000] + [1] * 100, 1000)
    assert plan.rows == 1000
    assert plan.segments == 100 + 1000
    assert plan.left_out_tokens == 200


def test_next_token_names_its_source() -> None:
    plan = collect(ConcatPlan(choose(pool_of([4], [], [4, 4]), [0, 1, 2]), 4))
    assert plan.next_token is not None
    assert (plan.next_token.source, plan.next_token.document, plan.next_token.start) == (2, 1, 0)


@pytest.mark.parametrize(("count", "row_tokens"), [(150, 32), (40, 64), (300, 7)])
def test_equals_stock_gpt_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, row_tokens: int
) -> None:
    """Same document order, same `.idx`: every tensor of every row is equal."""
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset")
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    from megatron_exact.data import pack
    from megatron_exact.data.dataset import PackedDataset

    lengths = heavy_tailed_lengths(count, seed=count)
    lengths[5] = row_tokens  # documents that end where rows do
    prefix = write_corpus(tmp_path / "corpus", random_documents(lengths, seed=1))
    config = gpt.GPTDatasetConfig(
        random_seed=3,
        sequence_length=row_tokens,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=SimpleNamespace(eod=0, vocab_size=1000, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        inter_document_masking=True,
    )
    documents = np.arange(count, dtype=np.int32)
    stock = gpt.GPTDataset(IndexedDataset(prefix), prefix, documents, None, Split.train, config)
    order = np.asarray(stock.document_index, dtype=np.uint32)
    choose_documents = pack.choose_documents

    def stock_order(pool: DocumentPool, sources: Any, *, split: str, **options: Any) -> Any:
        ours, uses = choose_documents(pool, sources, split=split, **options)
        return (ChosenDocuments(pool=pool, numbers=order, key=None) if split == "train" else ours), uses

    monkeypatch.setattr(pack, "choose_documents", stock_order)
    options = pack.PackOptions(row_tokens=row_tokens, policy="concat", seed=0)
    with pytest.warns(UserWarning, match="tokenizer"):
        manifest = pack.pack_corpora([prefix], tmp_path / "pack", options)
    ours = PackedDataset(tmp_path / "pack", "train", shuffle=False)
    assert len(ours) == len(stock) == manifest.splits["train"].rows > 10
    for index in range(len(stock)):
        expected, found = stock[index], ours[int(stock.shuffle_index[index])]
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert found[name].shape == tensor.shape, name
            assert (found[name] == tensor).all(), name
