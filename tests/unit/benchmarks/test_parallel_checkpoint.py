"""An export reads what four ranks saved, and never the states of their optimizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from parallel_checkpoint import write_as_ranks

from megatron_exact.conversion.checkpoint_layout import is_training_state
from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.conversion.torch_dist_reader import TorchDistCheckpoint
from megatron_exact.model.shapes import ModelShape
from tests.unit.conversion.small_models import LLAMA, QWEN, random_weights, read_weights, write_model

STATE = (
    "optimizer.distributed.dp_group_idx_{}.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.{}"
)


@pytest.mark.parametrize("shape", [LLAMA, QWEN], ids=["untied", "tied"])
def test_an_export_of_tp2_pp2_with_distributed_optimizer(tmp_path: Path, shape: ModelShape) -> None:
    weights = random_weights(shape, torch.bfloat16)
    write_model(tmp_path / "hf", shape, weights, dtype=torch.bfloat16, num_files=3)
    import_hf(tmp_path / "hf", tmp_path / "c")
    run = tmp_path / "run"
    write_as_ranks(tmp_path / "c", run, shape, tensor=2, pipeline=2, has_states=True)
    files = sorted(path.name for path in (run / "release").glob("*.distcp"))
    assert files == [f"__{rank}_0.distcp" for rank in range(4)]
    export_hf(run, tmp_path / "out", shard_bytes=30_000)
    found = read_weights(tmp_path / "out")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_the_ranks_have_the_parts_and_states_of_a_real_job(tmp_path: Path) -> None:
    """As megatron-core 0.19.2 saves them; tests/distributed/test_distributed_optimizer.py exports one."""
    import_hf(write_model(tmp_path / "hf", LLAMA, dtype=torch.bfloat16), tmp_path / "c")
    write_as_ranks(tmp_path / "c", tmp_path / "run", LLAMA, tensor=2, pipeline=2, has_states=True)
    folder = tmp_path / "run" / "release"

    def places(key: str) -> list[tuple[tuple[int, ...], tuple[int, ...], str]]:
        return [(chunk.offsets, chunk.shape, chunk.file.name) for chunk in stored.tensors[key].chunks]

    with TorchDistCheckpoint(folder, lambda _: True) as stored:
        assert places("embedding.word_embeddings.weight") == [
            ((0, 0), (35, 48), "__0_0.distcp"),
            ((35, 0), (35, 48), "__1_0.distcp"),
        ]
        assert places("decoder.layers.mlp.linear_fc2.weight") == [
            ((0, 0, 0), (1, 48, 28), "__0_0.distcp"),
            ((0, 0, 28), (1, 48, 28), "__1_0.distcp"),
            ((1, 0, 0), (1, 48, 28), "__2_0.distcp"),
            ((1, 0, 28), (1, 48, 28), "__3_0.distcp"),
        ]
        gate_and_up = [((0, row, 0), file) for file in (0, 1) for row in (28 * file, 56 + 28 * file)]
        fc1 = places("decoder.layers.mlp.linear_fc1.weight")
        assert [(offsets, int(file[2])) for offsets, _, file in fc1[:4]] == gate_and_up
        assert {file for *_, file in places("output_layer.weight")} == {"__2_0.distcp", "__3_0.distcp"}
        assert [file for *_, file in places("decoder.final_layernorm.weight")] == ["__2_0.distcp"]
        states = {key for key in stored.tensors if is_training_state(key)}
        kinds = ("param", "exp_avg", "exp_avg_sq")
        assert states == {STATE.format(rank, kind) for rank in range(4) for kind in kinds}
        total = sum(stored.tensors[STATE.format(rank, "param")].shape[0] for rank in range(4))
        assert total == sum(weight.numel() for weight in read_weights(tmp_path / "hf").values())
        # no record stands in their place: an export that read states would end here
        with pytest.raises(ValueError, match="is damaged"):
            stored.read_rows(STATE.format(0, "param"), None, 0, 1, np.empty(4, np.uint8))
