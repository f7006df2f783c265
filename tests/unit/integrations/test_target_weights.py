"""Weights of a batch against those that training on Megatron gives the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_exact.exposure import RULES
from megatron_exact.integrations.exposure_table import ExposureTable, make_table, table_of_pack
from megatron_exact.integrations.packed_rows import PackedRows
from megatron_exact.integrations.target_weights import (
    TargetWeights,
    positions_of_lengths,
    weighted_loss_sum,
)
from tests.distributed import jobs

BY_POSITIONS = ("none", "exact", "exact-normalized", "uniform-tail", "constant", "packed-position")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = jobs.make_corpus(tmp_path_factory.mktemp("corpus") / "docs")
    return jobs.make_pack(corpus, "concat", seed=5)  # five of its rows end with their document


@pytest.fixture
def table() -> ExposureTable:
    return make_table(64, [100, 50, 30, 10])


@pytest.mark.parametrize("rule", BY_POSITIONS)
def test_weights_are_those_of_the_dataset(rule: str, pack: Path) -> None:
    rows = PackedRows(pack, rule=rule, alpha=0.7)
    weigh = TargetWeights(table_of_pack(pack), rule, alpha=0.7)
    assert weigh.divides_by_mass == rows.divides_by_mass == (rule == "exact-normalized")
    batch = torch.utils.data.default_collate([rows[index] for index in range(len(rows))])
    ends = torch.tensor([rows._rows.reader.read(row).last_continues for row in range(len(rows))])
    expected = batch["target_weights"]
    found = weigh(batch["position_ids"], last_continues=ends)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    flat = weigh(batch["position_ids"].reshape(1, -1), last_continues=ends)
    assert torch.equal(flat.reshape(expected.shape), expected)
    for row in range(len(rows)):
        boundaries = batch["cu_seqlens"][row]
        continues = bool(ends[row])
        assert torch.equal(weigh.of_cu_seqlens(boundaries, last_continues=continues), expected[row])
        lengths = boundaries.diff()[boundaries.diff() > 0][None]
        assert torch.equal(weigh.of_lengths(lengths, last_continues=continues)[0], expected[row])
    if rule not in ("none", "constant", "packed-position"):  # negative controls
        assert not torch.equal(weigh(batch["position_ids"], last_continues=True), expected)
        assert not torch.equal(weigh(torch.arange(64).expand(len(rows), 64)), expected)


def test_rules_that_positions_cannot_express(table: ExposureTable, pack: Path) -> None:
    others = set(RULES) - set(BY_POSITIONS)
    for rule in others:
        with pytest.raises(ValueError, match=r"PackedRows|--confidence-scores"):
            TargetWeights(table, rule)
    rows = PackedRows(pack, rule="random-same-mass")
    exact = PackedRows(pack, rule="exact")
    drawn, wanted = (
        torch.cat([each[index]["target_weights"] for index in range(len(each))]) for each in (rows, exact)
    )
    assert torch.equal(drawn.sort().values, wanted.sort().values)
    assert not torch.equal(drawn, wanted)
    for rule in others - {"random-same-mass"}:
        with pytest.raises(ValueError, match="needs stored scores"):
            PackedRows(pack, rule=rule)


def test_the_target_of_a_document_end(table: ExposureTable) -> None:
    positions = positions_of_lengths(torch.tensor([40, 24]))
    row = TargetWeights(table)(positions)
    document = TargetWeights(table, labels="document")(positions)
    assert (row != document).nonzero().flatten().tolist() == [39]  # 40 tokens of context, or none
    assert row[39] == row[0] == 1
    assert document[39] == row[38] > 1
    assert TargetWeights(table)(positions, last_continues=False)[63] == 1 < row[63]


def test_padding_free_batches(table: ExposureTable) -> None:
    positions = positions_of_lengths(torch.tensor([40, 30, 33]))[None]
    with pytest.raises(ValueError, match=r"do not divide into rows of 64.*padding_free"):
        TargetWeights(table)(positions)
    weights = TargetWeights(table, padding_free=True)(positions)
    assert weights.shape == (1, 103)
    assert torch.equal(weights[0, :39], TargetWeights(table)(torch.arange(64))[:39])
    with pytest.raises(ValueError, match="no rows"):
        TargetWeights(
            make_table(64, [1, 1, 1, 1], position_counts=[1, 1, 1, 1]), "packed-position", padding_free=True
        )
    with pytest.raises(ValueError, match=r"needs the plan of a pack|counts by"):
        TargetWeights(table, "packed-position")


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (None, "position_ids is NoneType"),
        (torch.arange(64.0), "integers"),
        (torch.arange(64) + 2, "begin each row with 0"),
        (torch.arange(128), "begin each row with 0"),
        (torch.arange(63), "rows of 64"),
        (torch.tensor(3), "integers"),
    ],
)
def test_batches_that_have_no_weights(positions: Any, message: str, table: ExposureTable) -> None:
    with pytest.raises(ValueError, match=message):
        TargetWeights(table)(positions)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda weigh: weigh.of_cu_seqlens(torch.tensor([0, 70, 128])), "begin each row with 0"),
        (lambda weigh: weigh.of_cu_seqlens(torch.tensor([1, 64])), "start at 0"),
        (lambda weigh: weigh.of_cu_seqlens([0, 64]), "tensor of integers"),
        (lambda weigh: weigh.of_lengths(torch.tensor([[60, 5]])), "sum to 65"),
        (lambda weigh: weigh.of_lengths(torch.tensor([60, 4])), r"\[rows, documents\]"),
    ],
)
def test_boundaries_that_do_not_fit(call: Any, message: str, table: ExposureTable) -> None:
    with pytest.raises(ValueError, match=message):
        call(TargetWeights(table))


def test_the_sum_of_losses() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]])
    weights = torch.tensor([[2.0, 9.0, 1.0], [0.5, 1.0, 9.0]])
    found = weighted_loss_sum(logits, labels, weights)
    plain = -(logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * weights)
    assert found.item() == pytest.approx(plain[labels != -100].sum().item(), rel=1e-6)
    with pytest.raises(ValueError, match="must agree"):
        weighted_loss_sum(logits, labels, weights[:, :2])
