"""Hugging Face `config.json` <-> `ModelShape`, with a refusal for all that a shape cannot say.

Both spellings of the rotary parameters are read: `rope_parameters` (transformers 5) and `rope_theta` with
`rope_scaling` (before). The second is written, because both old and new versions of transformers read it.
Defaults of absent keys are those of transformers' Qwen2Config and LlamaConfig. Keys that do not change the
forward pass (token ids, dropout, `use_cache`, ...) are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_exact.model.megatron_flags import check_upstream_can_build
from megatron_exact.model.presets import compare_shapes, matching_preset
from megatron_exact.model.shapes import Architecture, Llama3Scaling, ModelShape

__all__ = ["compare_shapes", "hf_config_of_shape", "matching_preset", "shape_of_hf_config"]

ARCHITECTURES: dict[Architecture, str] = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
DEFAULT_WINDOWS: dict[Architecture, int] = {"qwen2": 32_768, "llama": 2048}
DEFAULT_EPSILON = 1e-6
DEFAULT_THETA = 10_000.0
SUPPORTED = ", ".join(ARCHITECTURES.values())

# key, whether a value is harmless, why any other is refused
REFUSED_KEYS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("quantization_config", (None,), "quantised weights cannot be trained: take the original model"),
    ("compression_config", (None,), "compressed weights cannot be trained: take the original model"),
    ("auto_map", (None, {}), "the model brings code of its own, which is never run here"),
    ("hidden_act", ("silu",), "the MLP of both families is gated SiLU"),
    ("use_sliding_window", (None, False), "sliding-window layers would hide the context that is weighted"),
    ("use_mrope", (None, False), "multimodal rotary embedding is not supported"),
    ("partial_rotary_factor", (None, 1, 1.0), "rotary embedding over part of a head is not supported"),
    ("mlp_bias", (None, False), "a bias in the MLP is not supported"),
)


def shape_of_hf_config(config: Mapping[str, Any], where: str) -> ModelShape:
    """The shape that a `config.json` describes.

    Args:
        config: its content.
        where: its path, for messages.

    Raises:
        ValueError: an unknown architecture, or anything that would change the model and cannot be kept.
    """
    architecture = _architecture(config, where)
    _refuse_keys(config, architecture, where)
    heads = _integer(config, "num_attention_heads", where)
    hidden = _integer(config, "hidden_size", where)
    # LlamaConfig takes one key/value head a query head when it is not told; Qwen2Config always 32
    groups = config.get("num_key_value_heads", heads if architecture == "llama" else 32)
    head_dim = config.get("head_dim")
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise ValueError(
                f"{where}: hidden_size {hidden} does not divide by num_attention_heads {heads}"
            )
        head_dim = hidden // heads
    theta, scaling = _rope(config, where)
    values: dict[str, Any] = {
        "num_layers": _integer(config, "num_hidden_layers", where),
        "ffn_hidden_size": _integer(config, "intermediate_size", where),
        "vocab_size": _integer(config, "vocab_size", where),
        "max_position_embeddings": config.get("max_position_embeddings", DEFAULT_WINDOWS[architecture]),
        "norm_epsilon": _number(config, "rms_norm_eps", where, DEFAULT_EPSILON),
        "tied_embeddings": _boolean(config, "tie_word_embeddings", where),
    }
    try:
        shape = ModelShape(
            architecture=architecture,
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=heads if groups is None else groups,
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            qkv_bias=architecture == "qwen2",
            **values,
        )
        check_upstream_can_build(shape)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return shape


def hf_config_of_shape(shape: ModelShape, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """A `config.json` for a model of this shape that never had one.

    Args:
        shape: the model.
        dtype: of its weights, as torch spells it.
    """
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[shape.architecture]],
        "model_type": shape.architecture,
        "attention_dropout": 0.0,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_query_groups,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": shape.tied_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }
    if shape.architecture == "qwen2":
        config["use_sliding_window"] = False
    else:
        config |= {"attention_bias": False, "mlp_bias": False}
    if shape.rope_scaling is not None:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": shape.rope_scaling.factor,
            "low_freq_factor": shape.rope_scaling.low_freq_factor,
            "high_freq_factor": shape.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": shape.rope_scaling.original_max_position_embeddings,
        }
    return config


def _architecture(config: Mapping[str, Any], where: str) -> Architecture:
    if not isinstance(config, Mapping):
        raise ValueError(f"{where} holds a {type(config).__name__}, not an object: it is no model config")
    model_type = config.get("model_type")
    names = config.get("architectures")
    for architecture, name in ARCHITECTURES.items():
        if model_type == architecture and names in (None, [name]):
            return architecture
    raise ValueError(
        f"{where} describes model_type {_short(model_type)}, architectures {_short(names)}, which is not "
        f"supported: only {SUPPORTED} are"
    )


def _refuse_keys(config: Mapping[str, Any], architecture: Architecture, where: str) -> None:
    for key, harmless, reason in REFUSED_KEYS:
        if key in config and config[key] not in harmless:
            raise ValueError(f"{where}: {key} is {_short(config[key])}: {reason}")
    if architecture == "llama" and config.get("attention_bias"):
        raise ValueError(
            f"{where}: attention_bias is true: it would put a bias on the output projection as well, "
            "which is not supported"
        )
    kinds = config.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    ):
        raise ValueError(
            f"{where}: layer_types are not all full_attention: sliding windows are not supported"
        )


def _rope(config: Mapping[str, Any], where: str) -> tuple[float, Llama3Scaling | None]:
    """rope_theta and scaling; `rope_scaling` goes before `rope_parameters`, as in transformers 5."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old and new and old != new:
        raise ValueError(f"{where}: rope_scaling and rope_parameters contradict each other: remove one")
    parameters = old or new or {}
    if not isinstance(parameters, Mapping) or any(isinstance(v, Mapping) for v in parameters.values()):
        raise ValueError(f"{where}: rotary parameters {_short(parameters)} are not one set for all layers")
    theta = _number({**config, **parameters}, "rope_theta", where, DEFAULT_THETA)
    if parameters.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{where}: rotary embedding over part of a head is not supported")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(
            f"{where}: rope_type {_short(kind)} is not supported, only default and llama3: remove it to "
            "train with the model's own frequencies"
        )
    original = config.get(
        "original_max_position_embeddings", parameters.get("original_max_position_embeddings")
    )
    if not isinstance(original, int):
        raise ValueError(f"{where}: rope_type llama3 needs original_max_position_embeddings")
    return theta, Llama3Scaling(
        factor=_number(parameters, "factor", where),
        low_freq_factor=_number(parameters, "low_freq_factor", where),
        high_freq_factor=_number(parameters, "high_freq_factor", where),
        original_max_position_embeddings=original,
    )


def _integer(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: {key} is {_short(value)}, not an integer")
    return value


def _number(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {key} is {_short(value)}, not a number")
    return float(value)


def _boolean(config: Mapping[str, Any], key: str, where: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {key} is {_short(value)}, not true or false")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
