"""Hugging Face `config.json` <-> `ModelShape`, with a refusal for all that a shape cannot say.

Both spellings of the rotary parameters are read: `rope_parameters` (transformers 5) and `rope_theta` with
`rope_scaling` (before). A config may have both if they agree. The second is written, because both old and
new versions of transformers read it. Defaults of absent keys are those of transformers' Qwen2Config and
LlamaConfig, and null counts as absent where transformers takes it so. Keys that do not change the forward
pass (token ids, dropout, `use_cache`, ...) are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_exact.model.megatron_flags import check_upstream_can_build
from megatron_exact.model.presets import compare_shapes, matching_preset
from megatron_exact.model.shapes import Architecture, Llama3Scaling, ModelShape

__all__ = ["compare_shapes", "hf_config_of_shape", "matching_preset", "shape_of_hf_config"]

ARCHITECTURES: dict[Architecture, str] = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
BASE_MODELS: dict[Architecture, str] = {"qwen2": "Qwen2Model", "llama": "LlamaModel"}
"""The classes without an output layer; a tied model that one of them saved is whole."""
DEFAULT_WINDOWS: dict[Architecture, int] = {"qwen2": 32_768, "llama": 2048}
DEFAULT_EPSILON = 1e-6
DEFAULT_THETA = 10_000.0
SUPPORTED = ", ".join(ARCHITECTURES.values())

# key, whether a value is harmless, why any other is refused
REFUSED_KEYS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("quantization_config", (None,), "quantised weights cannot be trained: take the original model"),
    ("compression_config", (None,), "compressed weights cannot be trained: take the original model"),
    ("auto_map", (None, {}), "the model brings code of its own, which is never run here"),
    ("per_layer_config", (None, {}), "layers that differ from one another are not supported"),
    (
        "transformers_weights",
        (None,),
        "weights under another name are not supported: call the file model.safetensors, remove the key",
    ),
    ("hidden_act", ("silu", "swish"), "the MLP of both families is gated SiLU"),
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
    names = config.get("architectures") or []
    for architecture, name in ARCHITECTURES.items():
        known = (name, BASE_MODELS[architecture])
        if model_type == architecture and isinstance(names, list) and all(one in known for one in names):
            return architecture
    raise ValueError(
        f"{where} describes model_type {_short(model_type)}, architectures {_short(names or None)}, which "
        f"is not supported: only {SUPPORTED} are"
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
    """rope_theta and scaling, from the places that transformers 5.23 takes them from.

    `rope_scaling` goes before `rope_parameters`; a `rope_theta` inside goes before the one beside it, an
    `original_max_position_embeddings` beside goes before the one inside
    (`RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`). A place that would be ignored must agree.
    """
    inside: dict[str, Mapping[str, Any]] = {}
    for key in ("rope_scaling", "rope_parameters"):
        parameters = config.get(key) or {}
        if not isinstance(parameters, Mapping) or any(isinstance(v, Mapping) for v in parameters.values()):
            raise ValueError(f"{where}: {key} {_short(parameters)} is not one set for all layers")
        if parameters:
            inside[key] = {**parameters, "rope_type": _rope_type(parameters, f"{where}: {key}")}
    first = next(iter(inside), "")

    def value_of(key: str, *order: str, default: Any = None) -> Any:
        """What counts: the value in the first place of `order` that has one."""
        places = {**inside, **({"": config} if "" in order else {})}
        said = {place: values[key] for place, values in places.items() if values.get(key) is not None}
        winner = next((place for place in order if place in said), None)
        counts = default if winner is None else said[winner]
        for place, value in said.items():
            if value != counts:
                taken = f"{key} defaults to" if winner is None else f"{_path(winner, key)} is"
                raise ValueError(
                    f"{where}: {taken} {_short(counts)}, but {_path(place, key)} is {_short(value)}: they "
                    "contradict each other, keep the one that the model was trained with"
                )
        return counts

    # transformers takes no default for null
    is_null = any(values.get("rope_theta", 0) is None for values in (config, *inside.values()))
    theta = value_of("rope_theta", first, "", default=None if is_null else DEFAULT_THETA)
    theta = _number({"rope_theta": theta}, "rope_theta", where)
    if any(parameters.get("partial_rotary_factor") not in (None, 1) for parameters in inside.values()):
        raise ValueError(f"{where}: rotary embedding over part of a head is not supported")
    kind = value_of("rope_type", first, default="default")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(
            f"{where}: rope_type {_short(kind)} is not supported, only default and llama3: remove it to "
            "train with the model's own frequencies"
        )
    original = value_of("original_max_position_embeddings", "", first)
    if original is None:
        raise ValueError(f"{where}: rope_type llama3 needs original_max_position_embeddings")
    numbers = {
        key: _number({key: value_of(key, first)}, key, where)
        for key in ("factor", "low_freq_factor", "high_freq_factor")
    }
    key = "original_max_position_embeddings"
    return theta, Llama3Scaling(
        **numbers, original_max_position_embeddings=_integer({key: original}, key, where)
    )


def _rope_type(parameters: Mapping[str, Any], where: str) -> Any:
    """`rope_type`, or `type`, as it was called before transformers 4.43; None without either."""
    new, old = parameters.get("rope_type"), parameters.get("type")
    if new is not None and old is not None and new != old:
        raise ValueError(
            f"{where}.rope_type is {_short(new)}, but its type is {_short(old)}: they contradict each "
            "other, keep the one that the model was trained with"
        )
    return old if new is None else new


def _path(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _integer(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}: {key} is {_short(value)}, not an integer")
    return value


def _number(config: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: {key} is {_short(value)}, not a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{where}: {key} is {_short(value)}, beyond any float") from None


def _boolean(config: Mapping[str, Any], key: str, where: str) -> bool:
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {key} is {_short(value)}, not true or false: write which it is")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
