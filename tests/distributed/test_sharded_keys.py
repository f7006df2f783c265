"""The importer's table is what the local layer spec asks for; `tests/gpu` checks Transformer Engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.model.families import PRESETS
from tests.distributed import hf_models, sharded_keys


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    shapes = {name: sharded_keys.reduced(shape) for name, shape in PRESETS.items()}
    return sharded_keys.wanted_keys(shapes, "local", tmp_path_factory.mktemp("keys"))


@pytest.mark.parametrize("name", PRESETS)
def test_the_local_spec_asks_for_what_the_importer_writes(
    name: str, wanted: dict[str, dict[str, Any]]
) -> None:
    expected = sharded_keys.expected_keys(sharded_keys.reduced(PRESETS[name]))
    assert sharded_keys.differences(wanted[name], expected) == []
    shape = PRESETS[name]
    norms = 2 * shape.qk_norm
    assert len(wanted[name]["tensors"]) == 8 + (not shape.tied_embeddings) + shape.qkv_bias + norms
    assert len(wanted[name]["objects"]) == (4 + norms) * sharded_keys.LAYERS + 1


def test_the_comparison_sees_each_kind_of_difference(wanted: dict[str, dict[str, Any]]) -> None:
    qwen, llama = (
        sharded_keys.expected_keys(sharded_keys.reduced(PRESETS[name]))
        for name in ("qwen2.5-0.5b", "llama-3.1-8b")
    )
    lines = sharded_keys.differences(wanted["qwen2.5-0.5b"], llama)
    assert any(line.startswith("output_layer.weight: the model asks for None") for line in lines)
    assert any("linear_qkv.bias" in line and "the importer writes None" in line for line in lines)
    assert any(
        line.startswith("decoder.final_layernorm.weight: the model asks for [112]") for line in lines
    )
    fewer = {**qwen, "objects": qwen["objects"][1:]}
    (line,) = sharded_keys.differences(wanted["qwen2.5-0.5b"], fewer)
    assert line == f"{qwen['objects'][0]}: an object of one side only"


def test_a_model_built_with_another_switch_asks_for_other_keys(tmp_path: Path) -> None:
    """Negative control on the side of the model."""
    shape = sharded_keys.reduced(PRESETS["llama-3.1-8b"])

    def tie(config: Any) -> None:
        config.share_embeddings_and_output_weights = True

    found = sharded_keys.wanted_keys({"tied": shape}, "local", tmp_path, tie)["tied"]
    (line,) = sharded_keys.differences(found, sharded_keys.expected_keys(shape))
    assert line.startswith("output_layer.weight: the model asks for None")


@pytest.mark.parametrize("name", hf_models.CONFIGS)
def test_there_and_back_is_the_same_bits(name: str, tmp_path: Path) -> None:
    """Hugging Face > import > local model, every key accounted for > save > export."""
    import_hf(hf_models.save_model(name, tmp_path / "hf"), tmp_path / "checkpoint")
    sharded_keys.load_and_save(tmp_path / "checkpoint", "local", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "exported")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("exported", "hf"))
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
