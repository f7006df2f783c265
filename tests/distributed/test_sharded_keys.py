"""The importer's table is what the local layer spec asks for; `tests/gpu` checks Transformer Engine's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_exact.model.presets import PRESETS
from tests.distributed import sharded_keys


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
    tied, bias = PRESETS[name].tied_embeddings, PRESETS[name].qkv_bias
    assert len(wanted[name]["tensors"]) == 8 + (not tied) + bias
    assert len(wanted[name]["objects"]) == 4 * sharded_keys.LAYERS


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
