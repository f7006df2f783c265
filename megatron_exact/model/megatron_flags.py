"""The Megatron arguments that follow from a shape, and what megatron-core 0.19.2 cannot express."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from megatron_exact.model.shapes import Llama3Scaling, ModelShape


def megatron_arguments_of(shape: ModelShape) -> dict[str, Any]:
    """What the flags of a shape come to in Megatron's namespace: name -> value.

    Raises:
        ValueError: a shape that megatron-core 0.19.2 cannot express.
    """
    check_upstream_can_build(shape)
    scaling = shape.rope_scaling
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_epsilon,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "position_embedding_type": "rope",
        "rotary_base": int(shape.rope_theta),
        "use_rope_scaling": scaling is not None,
        **({"rope_scaling_factor": scaling.factor} if scaling is not None else {}),
        "untie_embeddings_and_output_weights": not shape.tied_embeddings,
    }


SWITCHES = {
    "group_query_attention": ("--group-query-attention", True),
    "swiglu": ("--swiglu", True),
    "add_bias_linear": ("--disable-bias-linear", False),
    "add_qkv_bias": ("--add-qkv-bias", True),
    "use_rope_scaling": ("--use-rope-scaling", True),
    "untie_embeddings_and_output_weights": ("--untie-embeddings-and-output-weights", True),
}
"""Megatron argument -> (flag without a value, what giving it means)."""


def flag_of(argument: str) -> str:
    """The flag that sets an argument of `megatron_arguments_of`."""
    if argument in SWITCHES:
        return SWITCHES[argument][0]
    return {"layernorm_epsilon": "--norm-epsilon"}.get(argument, f"--{argument.replace('_', '-')}")


def megatron_flags(shape: ModelShape, *, without: Iterable[str] = ()) -> list[str]:
    """The flags that make Megatron build this shape.

    The window is not among them: rotary embedding has no table, and `--max-position-embeddings` must only
    reach the row length.

    Args:
        shape: the model.
        without: flags to leave out, because they are given already.

    Raises:
        ValueError: a shape that megatron-core 0.19.2 cannot express.
    """
    given = set(without)
    words: list[str] = []
    for argument, value in megatron_arguments_of(shape).items():
        flag = flag_of(argument)
        if flag in given:
            continue
        if argument not in SWITCHES:
            words += [flag, str(value)]
        elif value == SWITCHES[argument][1]:
            words.append(flag)
    return words


def check_upstream_can_build(shape: ModelShape) -> None:
    """Refuse what megatron-core 0.19.2 would silently build otherwise.

    Raises:
        ValueError: cause, value and what upstream has instead.
    """
    if shape.rope_theta != int(shape.rope_theta):
        raise ValueError(f"rope_theta is {shape.rope_theta}, but Megatron's --rotary-base is an integer")
    scaling = shape.rope_scaling
    if scaling is None:
        return
    built_in = Llama3Scaling(factor=scaling.factor)
    for field in fields(scaling):
        value, upstream = getattr(scaling, field.name), getattr(built_in, field.name)
        if value != upstream:
            raise ValueError(
                f"rope_scaling.{field.name} is {value}, but Megatron has {upstream} written into its code: "
                "this model would get other rotary frequencies"
            )


FIXED_ARGUMENTS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "apply_query_key_layer_scaling": False,
    "multi_latent_attention": False,
    "num_experts": None,
    "squared_relu": False,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "softmax_type": "vanilla",
    "attention_output_gate": False,
    "no_rope_freq": None,
    "experimental_attention_variant": None,
    "heterogeneous_layers_config_path": None,
    "hybrid_layer_pattern": None,
    "spec": None,
    "use_mup": False,
}
"""Megatron arguments that both families leave at one value."""


def num_query_groups_of(args: Any) -> int:
    """Key/value heads of the model; without grouped-query attention Megatron's own value says nothing.

    Args:
        args: Megatron's validated namespace.
    """
    return int(args.num_query_groups if args.group_query_attention else args.num_attention_heads)


def shape_of_megatron_arguments(args: Any) -> ModelShape:
    """The shape that Megatron will build.

    Args:
        args: Megatron's validated namespace.

    Raises:
        ValueError: a model of another family; names the arguments.
    """
    strange = [
        f"{name} is {getattr(args, name)}, expected {value}"
        for name, value in FIXED_ARGUMENTS.items()
        if getattr(args, name) != value
    ]
    if strange:
        raise ValueError(f"neither a Llama nor a Qwen2 model: {'; '.join(strange)}")
    return ModelShape(
        architecture="qwen2" if args.add_qkv_bias else "llama",
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=num_query_groups_of(args),
        head_dim=args.kv_channels,
        vocab_size=args.vocab_size,
        max_position_embeddings=args.max_position_embeddings,
        norm_epsilon=args.layernorm_epsilon,
        rope_theta=float(args.rotary_base),
        rope_scaling=Llama3Scaling(factor=args.rope_scaling_factor) if args.use_rope_scaling else None,
        tied_embeddings=not args.untie_embeddings_and_output_weights,
        qkv_bias=args.add_qkv_bias,
    )
