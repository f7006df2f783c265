"""The dataset: an endless sequence of rows, a function of seed and index alone."""

from __future__ import annotations

import itertools
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import heavy_tailed_lengths, plain_bucket, random_documents, write_corpus

from megatron_exact.data.attention_work import StepLayout, balanced_order
from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.rows import RowReader
from megatron_exact.data.shuffle import row_permutation
from megatron_exact.exposure import Weighting, bucket_lower_bounds, build_weighting

pytestmark = pytest.mark.filterwarnings(
    "ignore:no source has a corpus record", "ignore:the validation split"
)
ROW_TOKENS = 48


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pack")
    prefix = write_corpus(root / "c", random_documents(heavy_tailed_lengths(80)))
    options = PackOptions(row_tokens=ROW_TOKENS, policy="best-fit", seed=1, validation_fraction=0.2)
    pack_corpora([prefix], root / "pack", options)
    return root / "pack"


def weigh(pack: Path, rule: str, **parameters: Any) -> Weighting:
    exposure = RowReader(pack, "train").split.exposure
    return build_weighting(rule, exposure.counts, exposure.lower, ROW_TOKENS, **parameters)


def test_an_item_is_a_row(pack: Path) -> None:
    reader = RowReader(pack, "train")
    buckets = len(reader.split.exposure.lower)
    weights = np.linspace(0.5, 2, buckets)
    by_hand = tuple(zip(reader.split.exposure.lower, weights.tolist(), strict=True))
    dataset = PackedDataset(
        pack, "train", shuffle=False, weighting=weigh(pack, "exact", bucket_weights=by_hand)
    )
    assert len(dataset) == len(reader)
    for index in range(len(dataset)):
        item, row = dataset[index], reader.read(index)
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in item.items()} == {
            "tokens": (torch.int64, (ROW_TOKENS,)),
            "labels": (torch.int64, (ROW_TOKENS,)),
            "loss_mask": (torch.float32, (ROW_TOKENS,)),
            "position_ids": (torch.int64, (ROW_TOKENS,)),
            "cu_seqlens": (torch.int32, (ROW_TOKENS + 1,)),
            "max_seqlen": (torch.int32, ()),
            "target_buckets": (torch.int64, (ROW_TOKENS,)),
            "target_weights": (torch.float32, (ROW_TOKENS,)),
            "row_id": (torch.int64, ()),
        }
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert (item[name].numpy() == getattr(row, name)).all(), name
        context = row.by_context(np.arange(ROW_TOKENS + 1)).tolist()
        target_buckets = [plain_bucket(value, ROW_TOKENS) for value in context]
        assert item["target_buckets"].tolist() == target_buckets
        boundaries = row.cu_seqlens.tolist()
        assert item["cu_seqlens"].tolist() == boundaries + [ROW_TOKENS] * (ROW_TOKENS + 1 - len(boundaries))
        pairs = itertools.pairwise(boundaries)
        assert item["position_ids"].tolist() == [position for a, b in pairs for position in range(b - a)]
        expected = weights.astype(np.float32)[target_buckets]
        assert (item["target_weights"].numpy() == expected).all()
        assert (int(item["row_id"]), int(item["max_seqlen"])) == (index, row.max_seqlen)


def test_weights_are_one_unless_told(pack: Path) -> None:
    assert (PackedDataset(pack, "train")[0]["target_weights"] == 1).all()


def test_each_epoch_reads_every_row_once_in_an_order_of_its_own(pack: Path) -> None:
    rows = len(RowReader(pack, "train"))
    dataset = PackedDataset(pack, "train", num_samples=3 * rows + 5, seed=4)
    order = [dataset.row_of(index) for index in range(len(dataset))]
    epochs = [order[start : start + rows] for start in range(0, 3 * rows, rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != list(range(rows))
    other = PackedDataset(pack, "train", num_samples=rows, seed=5)
    assert [other.row_of(index) for index in range(rows)] != epochs[0]


def test_the_row_of_an_index_depends_on_nothing_else(pack: Path) -> None:
    """A resumed run with another number of samples, reading in any order, sees the same rows."""
    long = PackedDataset(pack, "train", num_samples=1000, seed=4)
    short = PackedDataset(pack, "train", num_samples=600, seed=4)
    assert [short.row_of(index) for index in (599, 3, 300)] == [long.row_of(i) for i in (599, 3, 300)]
    assert int(short[599]["row_id"]) == long.row_of(599)


def rows_of_batches(
    dataset: PackedDataset, consumed: int, batches: int, *, global_batch: int, ranks: int, micro_batch: int
) -> list[list[int]]:
    """Rows of each global batch as Megatron's sampler deals them: rank r of d has slice r of each d * b.

    A job's sampler knows how many samples were consumed, and nothing else of the past.
    """
    stride = ranks * micro_batch
    drawn: list[list[int]] = []
    for _ in range(batches):
        batch = []
        for first in range(consumed, consumed + global_batch, stride):
            for rank in range(ranks):
                slice_start = first + rank * micro_batch
                batch += [dataset.row_of(index) for index in range(slice_start, slice_start + micro_batch)]
        drawn.append(batch)
        consumed += global_batch
    return drawn


LAYOUTS = st.sampled_from([(1, 1), (1, 4), (2, 3), (3, 2), (4, 1), (6, 2), (12, 1)])


@settings(deadline=None, max_examples=60)
@given(
    parts=st.lists(st.tuples(st.integers(1, 9), LAYOUTS), min_size=1, max_size=4), seed=st.integers(0, 9)
)
def test_a_resumed_run_goes_on_with_the_same_rows_on_any_layout(
    pack: Path, parts: list[tuple[int, tuple[int, int]]], seed: int
) -> None:
    """Over several epochs and stops, each part with data-parallel and micro-batch size of its own."""
    global_batch, total = 12, sum(batches for batches, _ in parts)
    whole = PackedDataset(pack, "train", num_samples=total * global_batch, seed=seed)
    expected = rows_of_batches(whole, 0, total, global_batch=global_batch, ranks=1, micro_batch=1)
    found: list[list[int]] = []
    for batches, (ranks, micro_batch) in parts:
        fresh = pickle.loads(pickle.dumps(whole))  # noqa: S301
        found += rows_of_batches(
            fresh,
            len(found) * global_batch,
            batches,
            global_batch=global_batch,
            ranks=ranks,
            micro_batch=micro_batch,
        )
    assert found == expected
    rows = len(whole.reader)
    for epoch, start in enumerate(range(0, total * global_batch, rows)):
        order = row_permutation(rows, seed, epoch).all().tolist()
        stream = [row for batch in found for row in batch][start : start + rows]
        assert stream == order[: len(stream)]


@pytest.mark.filterwarnings("ignore")  # upstream's own, when imported
def test_the_samplers_rule_is_megatrons(pack: Path) -> None:
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    dataset = PackedDataset(pack, "train", num_samples=120, seed=1)
    for ranks, micro_batch in ((1, 4), (2, 3), (3, 2)):
        samplers = [
            iter(MegatronPretrainingSampler(120, 24, micro_batch, rank, ranks)) for rank in range(ranks)
        ]
        steps = 12 // (ranks * micro_batch)
        batch = [dataset.row_of(i) for _ in range(steps) for sampler in samplers for i in next(sampler)]
        expected = rows_of_batches(dataset, 24, 1, global_batch=12, ranks=ranks, micro_batch=micro_batch)
        assert batch == expected[0]


@pytest.mark.parametrize("layout", [(12, 3, 1), (12, 2, 3), (7, 7, 1)])
def test_balanced_steps_have_the_rows_that_they_have_without(
    pack: Path, layout: tuple[int, int, int]
) -> None:
    """Over several epochs, from any index on, and whatever the number of samples."""
    size, ranks, micro_batch_rows = layout
    balance = StepLayout(rows=size, ranks=ranks, micro_batch_rows=micro_batch_rows)
    rows = len(RowReader(pack, "train"))
    steps = 3 * rows // size + 1
    plain = PackedDataset(pack, "train", num_samples=steps * size, seed=4)
    balanced = PackedDataset(pack, "train", num_samples=steps * size, seed=4, balance=balance)
    short = PackedDataset(pack, "train", num_samples=size + 1, seed=4, balance=balance)
    orders = [[data.row_of(index) for index in range(steps * size)] for data in (plain, balanced)]
    for first in range(0, steps * size, size):
        before, after = (order[first : first + size] for order in orders)
        assert sorted(before) == sorted(after)
        work = plain.reader.attention_pairs(before)
        assert after == [before[place] for place in balanced_order(work, balance)]
    assert orders[0] != orders[1]
    assert short.row_of(size) == orders[1][size]
    copy = pickle.loads(pickle.dumps(balanced))  # noqa: S301
    assert [copy.row_of(index) for index in (5, 2 * size, 0)] == [orders[1][i] for i in (5, 2 * size, 0)]
    other = PackedDataset(pack, "train", num_samples=steps * size, seed=5)
    firsts = [sorted(data.row_of(index) for index in range(size)) for data in (plain, other)]
    assert firsts[0] != firsts[1]  # another seed does change the rows of a step


def test_attention_pairs_count_what_is_read(pack: Path) -> None:
    reader = RowReader(pack, "train")
    for row, pairs in enumerate(reader.attention_pairs(range(len(reader)))):
        lengths = np.diff(reader.read(row).cu_seqlens)
        assert pairs == sum(length * (length + 1) // 2 for length in lengths.tolist())


@pytest.mark.parametrize("array", ["row_offsets", "segment_tokens"])
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_attention_pairs_name_the_array_that_is_damaged(
    pack: Path, tmp_path: Path, array: str, damage: str
) -> None:
    shutil.copytree(pack, tmp_path / "pack")
    reader = RowReader(tmp_path / "pack", "train")
    path = tmp_path / "pack" / "train" / f"{array}.npy"
    header, values = path.read_bytes()[:128], path.read_bytes()[128:]
    # reversed bytes are numbers far beyond the array
    path.write_bytes(header + (values[: len(values) // 2] if damage == "cut" else values[::-1]))
    what = "truncated" if damage == "cut" else "overwritten while a job read it"
    with pytest.raises(ValueError, match=rf"{array}\.npy .*{what}"):
        reader.attention_pairs([len(reader) - 1])


def test_frozen_order() -> None:
    orders = [row_permutation(9, seed=4, epoch=epoch).all().tolist() for epoch in range(2)]
    assert orders == [[7, 6, 3, 8, 2, 0, 4, 1, 5], [1, 6, 2, 5, 3, 7, 4, 8, 0]]


def test_cycle_reads_the_same_rows_again(pack: Path) -> None:
    dataset = PackedDataset(pack, "validation", num_samples=30, shuffle=False, cycle=4)
    rows = len(RowReader(pack, "validation"))
    assert [dataset.row_of(index) for index in range(30)] == [(index % 4) % rows for index in range(30)]


def test_workers_and_pickles_give_the_same_items(pack: Path) -> None:
    dataset = PackedDataset(pack, "train", seed=2)
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    loader = torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=2)
    for index, batch in enumerate(loader):
        for name, tensor in dataset[index].items():
            assert (batch[name][0] == tensor).all(), name
            assert (copy[index][name] == tensor).all(), name


def test_indices_out_of_range(pack: Path) -> None:
    dataset = PackedDataset(pack, "train", num_samples=5)
    for index in (-1, 5):
        with pytest.raises(IndexError, match="not in"):
            dataset[index]


def test_a_split_without_rows(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c", random_documents([100]))
    pack_corpora([prefix], tmp_path / "pack", PackOptions(row_tokens=10, policy="concat", seed=0))
    assert len(PackedDataset(tmp_path / "pack", "validation")) == 0
    with pytest.raises(ValueError, match="has no rows but 8 samples"):
        PackedDataset(tmp_path / "pack", "validation", num_samples=8)


def test_a_weighting_of_other_rows(pack: Path) -> None:
    other = build_weighting("exact", [5, 4, 3, 2], bucket_lower_bounds(64), 64)
    with pytest.raises(ValueError, match="a weighting of rows of 64 tokens"):
        PackedDataset(pack, "train", weighting=other)
