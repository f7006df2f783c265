from __future__ import annotations

import pytest
import torch

from megatron_exact.conversion.checkpoint_layout import (
    extra_state_keys,
    hf_shapes,
    in_model_order,
    is_extra_state,
    is_training_state,
    megatron_shapes,
)
from megatron_exact.model.families import PRESETS, hf_config_of_shape, shape_of_hf_config
from tests.unit.conversion.small_models import LLAMA, QWEN, SHAPES
from tests.unit.model.test_families import OTHER_MODELS

CONFIGS = {
    **{name: hf_config_of_shape(shape) for name, shape in {**SHAPES, **PRESETS}.items()},
    **OTHER_MODELS,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    import transformers

    config = CONFIGS[name]
    shape = shape_of_hf_config(config, "config.json")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    parameters = {key: tuple(value.shape) for key, value in model.named_parameters()}  # tied ones once
    assert hf_shapes(shape) == parameters


def test_keys_of_a_llama() -> None:
    assert megatron_shapes(LLAMA) == {
        "embedding.word_embeddings.weight": (70, 48),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (2, 48),
        "decoder.layers.self_attention.linear_qkv.weight": (2, (4 + 2 * 2) * 16, 48),
        "decoder.layers.self_attention.linear_proj.weight": (2, 48, 64),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight": (2, 48),
        "decoder.layers.mlp.linear_fc1.weight": (2, 112, 48),
        "decoder.layers.mlp.linear_fc2.weight": (2, 48, 56),
        "decoder.final_layernorm.weight": (48,),
        "output_layer.weight": (70, 48),
    }


def test_a_tied_qwen_has_a_bias_and_no_output_layer() -> None:
    differing = set(megatron_shapes(QWEN)) ^ set(megatron_shapes(LLAMA))
    assert differing == {"decoder.layers.self_attention.linear_qkv.bias", "output_layer.weight"}
    assert megatron_shapes(QWEN)["decoder.layers.self_attention.linear_qkv.bias"] == (2, 6 * 16)


def test_model_order_names_every_tensor_once() -> None:
    pairs = [(name.megatron, layer) for name, layer in in_model_order(LLAMA)]
    assert len(pairs) == len(set(pairs)) == 3 + 2 * 6
    assert pairs[0][0].startswith("embedding")
    assert pairs[-1][0].startswith("output_layer")


@pytest.mark.parametrize(
    ("key", "training", "extra"),
    [
        ("optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight", True, False),
        ("optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.float32).exp_avg", True, False),
        ("chained_0.optimizer.state.exp_avg.output_layer.weight", True, False),
        ("rng_state/shard_0.0_1.1", True, False),
        ("rerun_state_machine_state/shard_0_1", True, False),
        ("common_state/shard_0_1", True, False),
        ("decoder.layers.mlp.linear_fc1._extra_state/shard_0_4", False, True),
        ("decoder.layers.mlp.linear_fc1.weight", False, False),
        ("decoder.layers.mlp.router.weight", False, False),
    ],
)
def test_what_belongs_to_the_model(key: str, training: bool, extra: bool) -> None:
    assert is_training_state(key) is training
    assert is_extra_state(key) is extra


def test_extra_states() -> None:
    keys = extra_state_keys(3)
    assert len(keys) == len(set(keys)) == 13
    assert "decoder.layers.mlp.linear_fc2._extra_state/shard_2_3" in keys
    assert all(map(is_extra_state, keys))
