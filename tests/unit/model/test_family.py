"""config.json <-> shape, against transformers' own reading of the same file."""

from __future__ import annotations

import contextlib
import copy
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.model.families import PRESETS, family_of, hf_config_of_shape, shape_of_hf_config
from megatron_exact.model.shapes import ModelShape, YarnScaling
from tests.unit.model.test_families import OTHER_MODELS, PUBLISHED

LLAMA3 = PUBLISHED["llama-3.1-8b"]["rope_scaling"]


def qwen(**changes: Any) -> dict[str, Any]:
    return {**PUBLISHED["qwen2.5-0.5b"], **changes}


def llama(**changes: Any) -> dict[str, Any]:
    return {**PUBLISHED["llama-3.1-8b"], **changes}


def read_by_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of it, under the names of a shape."""
    import transformers

    kind = type(transformers.AutoConfig.for_model(config["model_type"]))
    loaded = kind.from_dict(copy.deepcopy(config))
    rope = loaded.rope_parameters
    return {
        "num_layers": loaded.num_hidden_layers,
        "hidden_size": loaded.hidden_size,
        "ffn_hidden_size": loaded.intermediate_size,
        "num_attention_heads": loaded.num_attention_heads,
        "num_query_groups": loaded.num_key_value_heads,
        "head_dim": getattr(loaded, "head_dim", None) or loaded.hidden_size // loaded.num_attention_heads,
        "vocab_size": loaded.vocab_size,
        "max_position_embeddings": loaded.max_position_embeddings,
        "norm_epsilon": loaded.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "factor": rope.get("factor"),
        "tied_embeddings": loaded.tie_word_embeddings,
        "rotary_fraction": rope.get("partial_rotary_factor", 1.0),
        "layers_without_rope": tuple(
            layer
            for layer, rotates in enumerate(getattr(loaded, "no_rope_layers", ()))
            if not rotates and layer < loaded.num_hidden_layers
        ),
    }


def qwen3(**changes: Any) -> dict[str, Any]:
    return {**OTHER_MODELS["Qwen3-0.6B"], **changes}


def mistral(**changes: Any) -> dict[str, Any]:
    return {**PUBLISHED["mistral-7b-v0.3"], **changes}


def smollm3(**changes: Any) -> dict[str, Any]:
    return {**PUBLISHED["smollm3-3b"], **changes}


def phi3(**changes: Any) -> dict[str, Any]:
    return {**PUBLISHED["phi-4"], **changes}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}


def check_against_transformers(config: dict[str, Any]) -> ModelShape:
    shape = shape_of_hf_config(config, "config.json")
    for name, value in read_by_transformers(config).items():
        if name == "factor":
            assert (shape.rope_scaling.factor if shape.rope_scaling else None) == value
        else:
            assert getattr(shape, name) == value, name
    return shape


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


NEW_ROPE = {"rope_type": "default", "rope_theta": 1000000.0}
SCALED = {**PUBLISHED["llama-3.1-8b"]["rope_scaling"], "rope_theta": 500000.0}
READABLE: dict[str, dict[str, Any]] = {
    **PUBLISHED,
    **OTHER_MODELS,
    "qwen3 without head_dim": without(qwen3(), "head_dim"),
    "qwen3 without groups": without(qwen3(num_attention_heads=32), "num_key_value_heads"),
    "qwen3 without a window": without(qwen3(), "max_position_embeddings"),
    "qwen3 with a sliding window not in use": qwen3(sliding_window=4096),
    "mistral without groups and window": without(
        mistral(), "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"
    ),
    "mistral with heads of its own": mistral(head_dim=64),
    "mistral, full attention everywhere": mistral(layer_types=["full_attention"] * 32),
    "phi3 with heads that turn in part": phi3(partial_rotary_factor=0.75),
    "phi3 with heads that turn in part, new": without(
        phi3(rope_parameters={"rope_type": "default", "rope_theta": 25e4, "partial_rotary_factor": 0.75}),
        "rope_theta",
        "rope_scaling",
    ),
    "phi3 with its defaults": without(phi3(), "max_position_embeddings", "rms_norm_eps", "rope_theta"),
    "phi3 without groups": without(phi3(), "num_key_value_heads"),
    "olmo2 with its defaults": without(
        PUBLISHED["olmo2-1b"], "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"
    ),
    "smollm3 by its interval": without(smollm3(), "no_rope_layers"),
    "smollm3 with another interval": without(smollm3(no_rope_layer_interval=3), "no_rope_layers"),
    "smollm3 without a word on its layers": without(
        smollm3(num_hidden_layers=10, layer_types=None), "no_rope_layers", "no_rope_layer_interval"
    ),
    "smollm3 with more numbers than layers": smollm3(num_hidden_layers=5, layer_types=None),
    "smollm3 with RoPE everywhere": smollm3(no_rope_layers=[1] * 36),
    "smollm3 without RoPE": smollm3(no_rope_layers=[0] * 36),
    "smollm3 with its defaults": without(
        smollm3(), "rope_theta", "tie_word_embeddings", "num_key_value_heads", "max_position_embeddings"
    ),
    "new spelling": without(qwen(rope_parameters=NEW_ROPE), "rope_theta"),
    "new spelling, llama3": without(
        llama(rope_parameters={**LLAMA3, "rope_theta": 500000.0}), "rope_theta", "rope_scaling"
    ),
    "theta beside new parameters": qwen(rope_parameters={"rope_type": "default"}),
    "theta beside equal parameters": qwen(rope_parameters={"rope_type": "default", "rope_theta": 1000000}),
    "theta beside is null": qwen(rope_theta=None, rope_parameters=NEW_ROPE),
    "both spellings, equal": llama(rope_parameters={**LLAMA3}),
    "both spellings, equal, with theta": llama(rope_parameters={**LLAMA3, "rope_theta": 500000.0}),
    "both spellings, theta in both": llama(
        rope_scaling={**LLAMA3, "rope_theta": 500000}, rope_parameters={**LLAMA3, "rope_theta": 500000.0}
    ),
    "both spellings, whole numbers": llama(rope_parameters={**LLAMA3, "factor": 8, "rope_theta": 500000}),
    "both spellings, one by type": llama(
        rope_scaling={"type": "llama3", **without(LLAMA3, "rope_type")}, rope_parameters=LLAMA3
    ),
    "both spellings, plain": qwen(
        rope_scaling={"type": "default"}, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}
    ),
    "null scaling beside parameters": without(
        llama(rope_scaling=None, rope_parameters={**LLAMA3, "rope_theta": 500000.0}), "rope_theta"
    ),
    "empty scaling beside parameters": llama(rope_scaling={}, rope_parameters={**LLAMA3}),
    "type and rope_type": llama(rope_scaling={**LLAMA3, "type": "llama3"}),
    "original beside and inside": llama(original_max_position_embeddings=8192),
    "no rope at all": without(qwen(), "rope_theta"),
    "llama3 in qwen": qwen(rope_scaling=LLAMA3),
    "null scaling": qwen(rope_scaling=None),
    "yarn": qwen(rope_scaling=YARN),
    "yarn with bounds": llama(rope_scaling={**YARN, "beta_fast": 16.0, "beta_slow": 2.0}),
    "type instead of rope_type": qwen(rope_scaling={"type": "default"}),
    "llama without groups": without(llama(), "num_key_value_heads"),
    "groups are null": qwen(num_key_value_heads=None),
    "head_dim of its own": llama(head_dim=64),
    "head_dim is null": llama(head_dim=None),
    "no epsilon": without(qwen(), "rms_norm_eps"),
    "no window": without(llama(), "max_position_embeddings", "rope_scaling"),
    "not said whether tied": without(qwen(), "tie_word_embeddings"),
    "full attention everywhere": qwen(layer_types=["full_attention"] * 24),
    "no architectures": without(qwen(), "architectures"),
    "architectures are null": qwen(architectures=None),
    "architectures are empty": llama(architectures=[]),
    "saved from the base model": qwen(architectures=["Qwen2Model"]),
    "silu by its other name": llama(hidden_act="swish"),
    "nulls that transformers takes": llama(
        layer_types=None,
        rope_parameters=None,
        partial_rotary_factor=None,
        quantization_config=None,
        per_layer_config=None,
        original_max_position_embeddings=None,
    ),
    "sliding window not in use": qwen(use_sliding_window=False, sliding_window=4096),
}


@pytest.mark.parametrize("name", READABLE)
def test_reads_what_transformers_reads(name: str) -> None:
    check_against_transformers(READABLE[name])


@pytest.mark.parametrize("name", READABLE)
def test_another_base_replaces_the_old_one_wherever_it_stands(name: str) -> None:
    config = READABLE[name]
    shape = shape_of_hf_config(config, "config.json")
    before = copy.deepcopy(config)
    wanted = replace(shape, rope_theta=123_456.0)
    changed = family_of(shape).config_with_rope(config, wanted)
    assert config == before
    assert shape_of_hf_config(changed, "config.json") == wanted
    check_against_transformers(changed)
    if shape.rope_scaling is None and shape.architecture not in ("phi3", "smollm3"):
        wanted = replace(wanted, rope_scaling=YarnScaling(factor=3.0, original_max_position_embeddings=77))
        changed = family_of(shape).config_with_rope(config, wanted)
        assert shape_of_hf_config(changed, "config.json") == wanted
        check_against_transformers(changed)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another family": (
        qwen(model_type="gemma3_text", architectures=["Gemma3ForCausalLM"]),
        "gemma3_text.*not supported: only Qwen2ForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM, Mistral",
    ),
    "experts": (qwen3(model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"]), "not supported"),
    "qwen3 with biases": (qwen3(attention_bias=True), "attention_bias is True: it would put a bias on"),
    "qwen3 with a sliding window": (qwen3(use_sliding_window=True), "use_sliding_window is True"),
    "mistral with a sliding window": (
        mistral(sliding_window=4096),
        "sliding_window is 4096: it would hide the context that is weighted: set it to null to train",
    ),
    "phi3 with LongRoPE": (
        phi3(rope_scaling=LONGROPE),
        "rope_type 'longrope' is not supported: it divides every frequency by a number of its own, which "
        "Megatron's RotaryEmbedding cannot; take a version of the model without it",
    ),
    "phi3 with LongRoPE by its older name": (phi3(rope_scaling={**LONGROPE, "type": "su"}), "'su' is not"),
    "phi3 with a sliding window": (phi3(sliding_window=2047), "sliding_window is 2047: it would hide"),
    "phi3 with code of its own": (phi3(auto_map={"AutoModel": "m.M"}), "code of its own"),
    "phi3 with heads that hardly turn": (phi3(partial_rotary_factor=0.01), "is 1 values, which cannot"),
    "phi3 with heads that turn too far": (phi3(partial_rotary_factor=1.5), "rotary_fraction is 1.5, not"),
    "phi3 with a part that is no number": (
        phi3(partial_rotary_factor=math.nan),
        "partial_rotary_factor is nan, not a finite number: copy",
    ),
    "phi3 with a part that is no number, twice": (
        phi3(
            partial_rotary_factor=math.nan,
            rope_parameters={"rope_type": "default", "rope_theta": 25e4, "partial_rotary_factor": math.nan},
        ),
        "partial_rotary_factor is nan, not a finite number: copy",
    ),
    "llama with a part that is no number": (
        llama(partial_rotary_factor=math.nan),
        "partial_rotary_factor is nan, not a finite number: copy",
    ),
    "an infinite theta": (qwen(rope_theta=math.inf), "rope_theta is inf, not a finite number"),
    "phi3 with a part in words": (phi3(partial_rotary_factor="all"), "factor is 'all', not a number"),
    "phi3 with the scaling of Llama 3": (
        without(phi3(rope_scaling=LLAMA3), "original_max_position_embeddings"),
        "rope_type llama3 is not supported for phi3: remove it",
    ),
    "olmo2 with biases": (
        {**PUBLISHED["olmo2-1b"], "attention_bias": True},
        "attention_bias is True: it would put",
    ),
    "the third olmo": (
        {**PUBLISHED["olmo2-1b"], "model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"]},
        "olmo3.*not supported",
    ),
    "smollm3 with too few numbers": (
        smollm3(no_rope_layers=[1, 1, 1, 0]),
        r"no_rope_layers \[1, 1, 1, 0\] is not a list of a 0 .* for each of the 36 layers: copy",
    ),
    "smollm3 with another number": (smollm3(no_rope_layers=[2] * 36), "no_rope_layers .2, 2"),
    "smollm3 with text": (smollm3(no_rope_layers="1110"), "no_rope_layers '1110' is not a list"),
    "smollm3 with an interval of zero": (
        without(smollm3(no_rope_layer_interval=0), "no_rope_layers"),
        "no_rope_layer_interval is 0, not an integer of 1 or more",
    ),
    "smollm3 with windows": (smollm3(use_sliding_window=True), "use_sliding_window is True"),
    "smollm3 with biases": (smollm3(attention_bias=True), "attention_bias is True: it would put"),
    "smollm3 stretched": (
        smollm3(rope_scaling=YARN),
        "rope_type yarn is not supported for smollm3, where a part of the heads or layers",
    ),
    "a llama with the layers of a smollm3": (
        smollm3(model_type="llama"),
        "architectures .*SmolLM3ForCausalLM.*not supported",
    ),
    "mistral with the sliding window that goes without saying": (
        without(mistral(), "sliding_window"),
        "sliding_window is missing, which means 4096: it would hide",
    ),
    "another head": (qwen(architectures=["Qwen2ForSequenceClassification"]), "SequenceClassification"),
    "two that disagree": (qwen(architectures=["LlamaForCausalLM"]), "not supported"),
    "nothing said": ({}, "model_type None"),
    "quantised": (qwen(quantization_config={"quant_method": "gptq"}), "quantized"),
    "own code": (qwen(auto_map={"AutoModel": "m.M"}), "code of its own"),
    "sliding window": (qwen(use_sliding_window=True), "use_sliding_window is True"),
    "sliding layers": (qwen(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    "attention bias": (llama(attention_bias=True), "attention_bias"),
    "mlp bias": (llama(mlp_bias=True), "mlp_bias"),
    "activation": (llama(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "yarn of no window": (
        qwen(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        "yarn needs original_max",
    ),
    "yarn with a factor of attention": (
        qwen(rope_scaling={**YARN, "attention_factor": 1.0}),
        "attention_factor is 1.0",
    ),
    "yarn of a phi3, whose heads all rotate": (
        phi3(rope_scaling={**YARN, "original_max_position_embeddings": 16_384}),
        "rope_type yarn is not supported for phi3, where a part of the heads or layers",
    ),
    "yarn with a factor that vLLM alone reads": (
        qwen(rope_scaling={**YARN, "attn_factor": 0.8}),
        "attn_factor is 0.8: only YaRN's own",
    ),
    "yarn with mscale": (qwen(rope_scaling={**YARN, "mscale": 0.7}), "mscale is 0.7: only YaRN's own"),
    "yarn with a ramp between pairs": (
        qwen(rope_scaling={**YARN, "truncate": False}),
        "truncate is not true",
    ),
    "yarn without a factor": (qwen(rope_scaling=without(YARN, "factor")), "factor is None"),
    "yarn with bounds upside down": (
        qwen(rope_scaling={**YARN, "beta_fast": 0.5}),
        "beta_slow 1.0 is not between",
    ),
    "linear": (llama(rope_scaling={"type": "linear", "factor": 2.0}), "linear"),
    "part of a head": (llama(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "part of a head, new": (
        qwen(rope_parameters={**NEW_ROPE, "partial_rotary_factor": 0.5}),
        "part of a head",
    ),
    "two scalings": (
        llama(rope_parameters={**LLAMA3, "factor": 32.0}),
        "rope_scaling.factor is 8.0, but rope_parameters.factor is 32.0: they contradict",
    ),
    "two thetas": (
        qwen(rope_parameters={"rope_type": "default", "rope_theta": 5000.0}),
        "rope_parameters.rope_theta is 5000.0, but rope_theta is 1000000.0: they contradict",
    ),
    "two thetas, scaled": (
        llama(rope_parameters={**SCALED, "rope_theta": 10000.0}),
        "rope_theta is 500000.0, but rope_parameters.rope_theta is 10000.0",
    ),
    "a theta that transformers would not see": (
        without(llama(rope_parameters=SCALED), "rope_theta"),
        "rope_theta defaults to 10000.0, but rope_parameters.rope_theta is 500000.0",
    ),
    "scaled in one spelling, plain in the other": (
        llama(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        "rope_scaling.rope_type is 'llama3', but rope_parameters.rope_type is 'default'",
    ),
    "type against rope_type": (
        llama(rope_scaling={**LLAMA3, "type": "default"}),
        "rope_scaling.rope_type is 'llama3', but its type is 'default'",
    ),
    "two original windows": (
        llama(original_max_position_embeddings=4096),
        "embeddings is 4096, but rope_scaling.original_max_position_embeddings is 8192",
    ),
    "theta is null": (qwen(rope_theta=None), "rope_theta is None, not a number"),
    "theta beyond floats": (qwen(rope_theta=10**400), "rope_theta is 1000.*too large for a float"),
    "epsilon beyond floats": (qwen(rms_norm_eps=10**400), "rms_norm_eps is 1000.*too large for a float"),
    "factor beyond floats": (llama(rope_scaling={**LLAMA3, "factor": 10**400}), "factor is 1.*too large"),
    "layers that differ": (llama(per_layer_config={"0": {"head_dim": 4}}), "per_layer_config"),
    "weights elsewhere": (llama(transformers_weights="other.safetensors"), "under another name"),
    "the base model of another family": (qwen(architectures=["LlamaModel"]), "not supported"),
    "by layer type": (qwen(rope_parameters={"full_attention": NEW_ROPE}), "one set for all layers"),
    "low": (llama(rope_scaling={**LLAMA3, "low_freq_factor": 2.0}), "low_freq_factor is 2.0"),
    "high": (llama(rope_scaling={**LLAMA3, "high_freq_factor": 2.0}), "high_freq_factor is 2.0"),
    "original": (llama(rope_scaling={**LLAMA3, "original_max_position_embeddings": 1024}), "1024.*8192"),
    "original missing": (
        llama(rope_scaling=without(LLAMA3, "original_max_position_embeddings")),
        "needs orig",
    ),
    "factor missing": (llama(rope_scaling=without(LLAMA3, "factor")), "factor is None"),
    "theta": (qwen(rope_theta=1e6 + 0.5), "integer"),
    "theta is text": (qwen(rope_theta="1e6"), "rope_theta is '1e6', not a number"),
    "no layers": (without(qwen(), "num_hidden_layers"), "num_hidden_layers is None, not an integer"),
    "layers are a fraction": (qwen(num_hidden_layers=24.0), "num_hidden_layers is 24.0, not an integer"),
    "heads are true": (qwen(num_attention_heads=True), "num_attention_heads is True, not an integer"),
    "head_dim is a fraction": (llama(head_dim=64.0), "head_dim is 64.0, not an integer"),
    "groups are true": (llama(num_key_value_heads=True), "num_query_groups is True, not an integer"),
    "a window of true": (llama(max_position_embeddings=True), "max_position_embeddings is True"),
    "a window of 400 digits": (llama(max_position_embeddings=10**400), "max_position_embeddings is 1"),
    "negative width": (llama(hidden_size=-4096), "hidden_size"),
    "tied is null": (qwen(tie_word_embeddings=None), "tie_word_embeddings is None, not true or false"),
    "negative": (qwen(num_hidden_layers=-1), "num_layers is -1"),
    "layers that fill the memory": (qwen(num_hidden_layers=2**27), "num_layers is 134217728, more than"),
    "intervals that fill the memory": (smollm3(num_hidden_layers=2**27), "num_layers is 134217728, more"),
    "layers beyond any range": (
        smollm3(num_hidden_layers=10**30, no_rope_layers=[1]),
        "num_layers is 10{30}, not an integer of 1",
    ),
    "huge": (qwen(vocab_size=10**12), "vocab_size is 10"),
    "heads of zero": (qwen(num_attention_heads=0), "num_attention_heads"),
    "groups do not divide": (qwen(num_key_value_heads=3), "num_query_groups 3"),
    "width does not divide": (qwen(hidden_size=897), "897"),
    "tied is text": (qwen(tie_word_embeddings="yes"), "tie_word_embeddings"),
    "multimodal": (qwen(use_mrope=True), "use_mrope"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_a_reason_on_one_line(name: str) -> None:
    config, words = REFUSED[name]
    with pytest.raises(ValueError, match=words) as caught:
        shape_of_hf_config(config, "there/config.json")
    assert str(caught.value).startswith("there/config.json")
    assert str(caught.value).count("there/config.json") == 1
    assert "\n" not in str(caught.value)


def test_something_else_than_an_object() -> None:
    with pytest.raises(ValueError, match="contains a list"):
        shape_of_hf_config([1], "config.json")  # type: ignore[arg-type]


SHAPES: dict[str, ModelShape] = {
    **PRESETS,
    **{name: shape_of_hf_config(config, name) for name, config in OTHER_MODELS.items()},
}


@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back(name: str) -> None:
    config = hf_config_of_shape(SHAPES[name])
    assert check_against_transformers(config) == SHAPES[name]


@settings(deadline=None, max_examples=60)
@given(
    base=st.sampled_from(sorted(SHAPES)),
    layers=st.integers(1, 200),
    groups=st.integers(1, 16),
    per_group=st.integers(1, 12),
    head_dim=st.integers(1, 128).map(lambda half: 2 * half),
    hidden=st.integers(1, 9000),
    vocabulary=st.integers(1, 300_000),
    theta=st.integers(2, 10_000_000),
    tied=st.booleans(),
)
def test_any_shape_there_and_back(
    base: str,
    layers: int,
    groups: int,
    per_group: int,
    head_dim: int,
    hidden: int,
    vocabulary: int,
    theta: int,
    tied: bool,
) -> None:
    shape = replace(
        SHAPES[base],
        num_layers=layers,
        num_query_groups=groups,
        num_attention_heads=groups * per_group,
        head_dim=head_dim,
        hidden_size=hidden,
        vocab_size=vocabulary,
        rope_theta=float(theta),
        tied_embeddings=tied,
    )
    assert shape_of_hf_config(hf_config_of_shape(shape), "config.json") == shape


CONFIGS = {**PUBLISHED, **OTHER_MODELS}


@settings(deadline=None, max_examples=200)
@given(
    key=st.sampled_from(
        sorted({key for config in CONFIGS.values() for key in config} | {"rope_parameters"})
    ),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
        max_leaves=4,
    ),
    base=st.sampled_from(sorted(CONFIGS)),
)
def test_any_value_gives_a_shape_or_one_error(key: str, value: Any, base: str) -> None:
    shape = None
    with contextlib.suppress(ValueError):  # any other exception fails
        shape = shape_of_hf_config({**CONFIGS[base], key: value}, "config.json")
    assert shape is None or shape.num_layers >= 1
