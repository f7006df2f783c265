"""The presets against the published configs, typed a second time on purpose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_exact.model.families import (
    PRESETS,
    family_of,
    matching_preset,
    nearest_preset,
    preset,
    shape_of_hf_config,
)
from megatron_exact.model.shapes import (
    SWITCHES,
    Llama3Scaling,
    check_megatron_can_build,
    compare_shapes,
    flag_of,
    megatron_arguments_of,
    megatron_flags,
    shape_record,
)
from megatron_exact.training.memory_forecast import model_parameters


def qwen(**values: Any) -> dict[str, Any]:
    """Keys of the published files, those without influence left as they are there."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        **values,
    }


def llama(factor: float, **values: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": factor,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
        **values,
    }


def qwen3(**values: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
        **values,
    }


def smollm2(**values: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 49152,
        **values,
    }


def olmo2(**values: Any) -> dict[str, Any]:
    return {
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": 100257,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "model_type": "olmo2",
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 100352,
        **values,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": qwen(
        hidden_size=896,
        intermediate_size=4864,
        max_position_embeddings=32768,
        max_window_layers=24,
        num_attention_heads=14,
        num_hidden_layers=24,
        num_key_value_heads=2,
        sliding_window=32768,
        tie_word_embeddings=True,
        vocab_size=151936,
    ),
    "qwen2.5-1.5b": qwen(
        hidden_size=1536,
        intermediate_size=8960,
        max_position_embeddings=131072,
        max_window_layers=28,
        num_attention_heads=12,
        num_hidden_layers=28,
        num_key_value_heads=2,
        sliding_window=131072,
        tie_word_embeddings=True,
        vocab_size=151936,
    ),
    "qwen2.5-3b": qwen(
        hidden_size=2048,
        intermediate_size=11008,
        max_position_embeddings=32768,
        max_window_layers=36,
        num_attention_heads=16,
        num_hidden_layers=36,
        num_key_value_heads=2,
        sliding_window=32768,
        tie_word_embeddings=True,
        vocab_size=151936,
    ),
    "qwen2.5-7b": qwen(
        hidden_size=3584,
        intermediate_size=18944,
        max_position_embeddings=131072,
        max_window_layers=28,
        num_attention_heads=28,
        num_hidden_layers=28,
        num_key_value_heads=4,
        sliding_window=131072,
        tie_word_embeddings=False,
        vocab_size=152064,
    ),
    "llama-3.2-1b": llama(
        32.0,
        head_dim=64,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_hidden_layers=16,
        tie_word_embeddings=True,
    ),
    "llama-3.2-3b": llama(
        32.0,
        head_dim=128,
        hidden_size=3072,
        intermediate_size=8192,
        num_attention_heads=24,
        num_hidden_layers=28,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": llama(
        8.0,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_hidden_layers=32,
        tie_word_embeddings=False,
    ),
    "smollm2-135m": smollm2(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_hidden_layers=30,
        num_key_value_heads=3,
    ),
    "smollm2-360m": smollm2(
        hidden_size=960,
        intermediate_size=2560,
        num_attention_heads=15,
        num_hidden_layers=32,
        num_key_value_heads=5,
    ),
    "smollm2-1.7b": smollm2(
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_hidden_layers=24,
        num_key_value_heads=32,
        rope_theta=130000,
    ),
    "qwen3-0.6b": qwen3(
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_hidden_layers=28,
        tie_word_embeddings=True,
    ),
    "qwen3-1.7b": qwen3(
        hidden_size=2048,
        intermediate_size=6144,
        num_attention_heads=16,
        num_hidden_layers=28,
        tie_word_embeddings=True,
    ),
    "qwen3-4b": qwen3(
        hidden_size=2560,
        intermediate_size=9728,
        num_attention_heads=32,
        num_hidden_layers=36,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": qwen3(
        hidden_size=4096,
        intermediate_size=12288,
        num_attention_heads=32,
        num_hidden_layers=36,
        tie_word_embeddings=False,
    ),
    "qwen3-14b": qwen3(
        hidden_size=5120,
        intermediate_size=17408,
        num_attention_heads=40,
        num_hidden_layers=40,
        tie_word_embeddings=False,
    ),
    "mistral-7b-v0.3": {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32768,
    },
    "phi-4": {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 100257,
        "embd_pdrop": 0.0,
        "eos_token_id": 100265,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "intermediate_size": 17920,
        "max_position_embeddings": 16384,
        "model_type": "phi3",
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 10,
        "original_max_position_embeddings": 16384,
        "pad_token_id": 100349,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 250000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 100352,
    },
    "olmo2-1b": olmo2(
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=16,
        num_hidden_layers=16,
        num_key_value_heads=16,
    ),
    "olmo2-7b": olmo2(
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=32,
    ),
    "olmo2-13b": olmo2(
        hidden_size=5120,
        intermediate_size=13824,
        num_attention_heads=40,
        num_hidden_layers=40,
        num_key_value_heads=40,
    ),
    "smollm3-3b": {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": 128001,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
}
OTHER_MODELS: dict[str, dict[str, Any]] = {
    # no preset: the chat model promises a longer window than the base model
    "Qwen3-0.6B": qwen3(
        bos_token_id=151643,
        eos_token_id=151645,
        hidden_size=1024,
        intermediate_size=3072,
        max_position_embeddings=40960,
        num_attention_heads=16,
        num_hidden_layers=28,
        tie_word_embeddings=True,
    ),
}
# Millions of parameters that the model cards state, embedding included once where it is tied
STATED_MILLIONS = {
    "qwen2.5-0.5b": 494,
    "qwen2.5-1.5b": 1544,
    "qwen2.5-3b": 3086,
    "qwen2.5-7b": 7616,
    "llama-3.2-1b": 1236,
    "llama-3.2-3b": 3213,
    "llama-3.1-8b": 8030,
    "smollm2-135m": 135,
    "smollm2-360m": 362,
    "smollm2-1.7b": 1711,
    "qwen3-0.6b": 596,
    "qwen3-1.7b": 1721,
    "qwen3-4b": 4022,
    "qwen3-8b": 8191,
    "qwen3-14b": 14768,
    "mistral-7b-v0.3": 7248,
    "phi-4": 14_660,
    "olmo2-1b": 1485,
    "olmo2-7b": 7299,
    "olmo2-13b": 13_716,
    "smollm3-3b": 3075,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_is_the_published_config(name: str) -> None:
    found = shape_of_hf_config(PUBLISHED[name], "config.json")
    assert compare_shapes(found, preset(name)) == []
    assert found == preset(name)
    assert matching_preset(found) == name


def test_no_preset_without_a_published_config() -> None:
    assert set(PRESETS) == set(PUBLISHED)
    with pytest.raises(ValueError, match=r"preset 'qwen4-8b' is unknown: choose one of qwen2\.5-0\.5b"):
        preset("qwen4-8b")


@pytest.mark.parametrize("name", STATED_MILLIONS)
def test_the_number_of_parameters_is_the_stated_one(name: str) -> None:
    shape = PRESETS[name]
    heads = shape.num_attention_heads + 2 * shape.num_query_groups
    layer = (
        shape.hidden_size * heads * shape.head_dim
        + (heads * shape.head_dim if shape.qkv_bias else 0)
        + (
            (shape.num_attention_heads + shape.num_query_groups if shape.post_norm else 2) * shape.head_dim
            if shape.qk_norm
            else 0
        )
        + shape.num_attention_heads * shape.head_dim * shape.hidden_size
        + 3 * shape.hidden_size * shape.ffn_hidden_size
        + 2 * shape.hidden_size
    )
    embeddings = (1 if shape.tied_embeddings else 2) * shape.vocab_size * shape.hidden_size
    total = shape.num_layers * layer + embeddings + shape.hidden_size
    assert round(total / 1e6) == STATED_MILLIONS[name]
    assert model_parameters(shape) == total


def test_a_chat_model_with_a_longer_window_has_no_preset() -> None:
    shape = shape_of_hf_config(OTHER_MODELS["Qwen3-0.6B"], "config.json")
    assert matching_preset(shape) is None
    assert nearest_preset(shape) == ("qwen3-0.6b", ["max_position_embeddings is 40960, expected 32768"])


def test_smollm2_is_a_llama() -> None:
    """Its config says so, and nothing in it asks for anything that a Llama has not."""
    assert {preset(f"smollm2-{size}").architecture for size in ("135m", "360m", "1.7b")} == {"llama"}


def test_a_shape_of_no_family() -> None:
    with pytest.raises(
        ValueError, match="architecture 'gpt2' is not supported: choose one of qwen2, llama"
    ):
        family_of(replace(PRESETS["llama-3.1-8b"], architecture="gpt2"))


def test_an_import_records_what_few_models_have_where_it_is_there() -> None:
    """Records of models without it keep their bytes."""
    assert list(shape_record(PRESETS["qwen2.5-0.5b"]))[-1] == "qkv_bias"
    assert shape_record(PRESETS["qwen3-0.6b"])["qk_norm"] is True
    assert shape_record(PRESETS["smollm3-3b"])["layers_without_rope"] == (3, 7, 11, 15, 19, 23, 27, 31, 35)


def test_layers_without_rotary_embedding_in_megatrons_words() -> None:
    shape = PRESETS["smollm3-3b"]
    flags = megatron_flags(shape)
    assert flags[flags.index("--no-rope-freq") + 1] == "4"
    irregular = megatron_flags(replace(shape, num_layers=4, layers_without_rope=(1, 2)))
    assert irregular[irregular.index("--no-rope-freq") + 1] == "[0,1,1,0]"
    assert "--no-rope-freq" not in megatron_flags(PRESETS["llama-3.1-8b"])
    partial = megatron_flags(replace(PRESETS["phi-4"], rotary_fraction=0.75))
    assert partial[partial.index("--rotary-percent") + 1] == "0.75"
    with pytest.raises(ValueError, match=r"rotary_fraction 0\.01 of a head of 128 is 1 values"):
        replace(shape, rotary_fraction=0.01)
    for skipped in ((2, 1), (1, 1), (-1,), (36,)):
        with pytest.raises(ValueError, match="not ascending numbers of the 36 layers"):
            replace(shape, layers_without_rope=skipped)


def test_each_field_that_differs_is_named() -> None:
    shape = replace(PRESETS["llama-3.2-1b"], num_layers=17, rope_scaling=Llama3Scaling(factor=8.0))
    assert compare_shapes(shape, PRESETS["llama-3.2-1b"]) == [
        "num_layers is 17, expected 16",
        "rope_scaling.factor is 8.0, expected 32.0",
    ]
    assert matching_preset(shape) is None
    assert nearest_preset(shape) == ("llama-3.2-1b", compare_shapes(shape, PRESETS["llama-3.2-1b"]))
    assert nearest_preset(replace(shape, vocab_size=7, hidden_size=64)) is None
    assert nearest_preset(PRESETS["llama-3.2-1b"]) is None
    plain = replace(shape, rope_scaling=None)
    assert "rope_scaling.factor is None, expected 32.0" in compare_shapes(plain, PRESETS["llama-3.2-1b"])
    assert "rope_scaling is None, expected None" not in compare_shapes(plain, PRESETS["llama-3.2-1b"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": True}, "num_layers is True"),
        ({"vocab_size": 2**40}, "vocab_size is"),
        ({"num_query_groups": 3}, "does not divide by num_query_groups 3"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
        ({"norm_epsilon": 0.0}, "norm_epsilon"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_scaling": Llama3Scaling(factor=float("nan"))}, "rope_scaling.factor"),
    ],
)
def test_impossible_shapes_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(PRESETS["llama-3.1-8b"], **values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rope_theta": 10000.5}, "--rotary-base is an integer"),
        (
            {"rope_scaling": Llama3Scaling(factor=8.0, low_freq_factor=2.0)},
            "low_freq_factor is 2.0.*1.0 written",
        ),
        ({"rope_scaling": Llama3Scaling(factor=8.0, high_freq_factor=8.0)}, "high_freq_factor is 8.0"),
        (
            {"rope_scaling": Llama3Scaling(factor=8.0, original_max_position_embeddings=4096)},
            "original_max_position_embeddings is 4096, but Megatron has 8192",
        ),
    ],
)
def test_what_upstream_hard_codes_is_checked(values: dict[str, Any], words: str) -> None:
    shape = replace(PRESETS["llama-3.1-8b"], **values)
    with pytest.raises(ValueError, match=words):
        check_megatron_can_build(shape)
    with pytest.raises(ValueError, match=words):
        megatron_flags(shape)


def test_upstreams_constants_are_those_we_compare_with() -> None:
    """The frequencies themselves, computed by upstream, against the definition."""
    import inspect

    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(RotaryEmbedding._apply_scaling).parameters.items()
    }
    ours = Llama3Scaling(factor=8.0)
    for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
        assert defaults[name] == getattr(ours, name)


@pytest.mark.parametrize("name", {shape.architecture: name for name, shape in PRESETS.items()}.values())
def test_the_flags_come_to_the_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's own parser reads the flags; a typo in a flag or in an argument's name shows."""
    from megatron.training.arguments import parse_args

    flags = megatron_flags(PRESETS[name])
    monkeypatch.setattr("sys.argv", ["job", *flags])
    namespace = parse_args()
    for argument, value in megatron_arguments_of(PRESETS[name]).items():
        assert getattr(namespace, argument) == value, argument


def test_flags_that_are_given_already_are_left_out() -> None:
    flags = megatron_flags(PRESETS["qwen2.5-7b"], without=("--num-layers", "--swiglu"))
    assert "--num-layers" not in flags
    assert "--swiglu" not in flags
    assert flags[flags.index("--hidden-size") + 1] == "3584"
    assert "--add-qkv-bias" in flags
    assert "--use-rope-scaling" not in flags
    assert {flag for flag, _ in SWITCHES.values()} == {flag_of(argument) for argument in SWITCHES}
