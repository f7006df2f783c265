"""A pack as a torch dataset and as a Hugging Face dataset."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_exact.data.dataset import PackedDataset
from megatron_exact.integrations.packed_rows import PackedRows, hf_dataset
from tests.distributed import jobs


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.make_pack(jobs.make_corpus(tmp_path_factory.mktemp("corpus") / "docs"), "best-fit")


def test_rows_are_those_of_training(pack: Path) -> None:
    trained = PackedDataset(pack, "train", seed=7)
    rows, plan = PackedRows(pack, order_seed=7), PackedRows(pack)
    assert len(rows) == len(trained) == len(plan)
    order = [int(row["row_id"]) for row in rows]  # a plain loop ends at the end
    assert order == [trained.row_of(index) for index in range(len(trained))]
    assert order != list(range(len(plan))) == [int(row["row_id"]) for row in plan]
    item, row = trained[0], rows[0]
    assert set(row) == {"tokens", "labels", "loss_mask", "position_ids", "cu_seqlens", "row_id"}
    for key in set(row) - {"labels"}:
        assert torch.equal(row[key], item[key])
    supervised = item["loss_mask"] > 0
    assert torch.equal(row["labels"][supervised], item["labels"][supervised])
    assert (row["labels"][~supervised] == -100).all()
    assert not supervised.all()
    assert torch.equal(rows[-1]["tokens"], rows[len(rows) - 1]["tokens"])
    batch = next(iter(torch.utils.data.DataLoader(rows, batch_size=3)))
    assert batch["cu_seqlens"].shape == (3, jobs.ROW_TOKENS + 1)


def test_a_hugging_face_dataset(pack: Path, tmp_path: Path) -> None:
    rows = PackedRows(pack, rule="exact")
    table = hf_dataset(rows, cache_dir=tmp_path)
    assert len(table) == len(rows)
    for index in (0, len(rows) - 1):
        row, record = rows[index], table[index]
        assert record["input_ids"] == row["tokens"].tolist()
        assert record["shift_labels"] == row["labels"].tolist()
        assert record["labels"] == [-100, *row["labels"].tolist()[:-1]]
        assert record["target_weights"] == row["target_weights"].tolist()
        lengths = record["seq_lengths"]
        assert sum(lengths) == jobs.ROW_TOKENS
        assert record["position_ids"] == [place for length in lengths for place in range(length)]
    assert next(iter(hf_dataset(rows, streaming=True))) == table[0]
    other = hf_dataset(PackedRows(pack, rule="uniform-tail", alpha=3.0), cache_dir=tmp_path)
    assert other[0]["target_weights"] != table[0]["target_weights"], "another rule from the same cache"
    assert "target_weights" not in hf_dataset(PackedRows(pack), cache_dir=tmp_path).column_names


def test_what_is_refused(pack: Path) -> None:
    with pytest.raises(ValueError, match="alpha without a rule"):
        PackedRows(pack, alpha=0.3)
    with pytest.raises(ValueError, match="unknown token weighting"):
        PackedRows(pack, rule="exakt")
    with pytest.raises(ValueError, match="no split"):
        PackedRows(pack, "test")
