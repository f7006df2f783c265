"""The shapes of the seven models of the paper, typed here and nowhere else.

A shape may as well come from a Hugging Face config (`hf_config.py`): a preset is a name for a shape, not a
condition.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_exact.model.megatron_flags import megatron_flags
from megatron_exact.model.shapes import Llama3Scaling, ModelShape, compare_shapes

__all__ = [
    "PRESETS",
    "Llama3Scaling",
    "ModelShape",
    "compare_shapes",
    "matching_preset",
    "megatron_flags",
    "nearest_preset",
    "preset",
    "require_preset",
]

_QWEN = ModelShape(
    architecture="qwen2",
    num_layers=24,
    hidden_size=896,
    ffn_hidden_size=4864,
    num_attention_heads=14,
    num_query_groups=2,
    head_dim=64,
    vocab_size=151_936,
    max_position_embeddings=32_768,
    norm_epsilon=1e-6,
    rope_theta=1_000_000.0,
    rope_scaling=None,
    tied_embeddings=True,
    qkv_bias=True,
)
_LLAMA = ModelShape(
    architecture="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14_336,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=128_256,
    max_position_embeddings=131_072,
    norm_epsilon=1e-5,
    rope_theta=500_000.0,
    rope_scaling=Llama3Scaling(factor=8.0),
    tied_embeddings=False,
    qkv_bias=False,
)

PRESETS: dict[str, ModelShape] = {
    "qwen2.5-0.5b": _QWEN,
    "qwen2.5-1.5b": replace(
        _QWEN,
        num_layers=28,
        hidden_size=1536,
        ffn_hidden_size=8960,
        num_attention_heads=12,
        head_dim=128,
        max_position_embeddings=131_072,
    ),
    "qwen2.5-3b": replace(
        _QWEN,
        num_layers=36,
        hidden_size=2048,
        ffn_hidden_size=11_008,
        num_attention_heads=16,
        head_dim=128,
    ),
    "qwen2.5-7b": replace(
        _QWEN,
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18_944,
        num_attention_heads=28,
        num_query_groups=4,
        head_dim=128,
        vocab_size=152_064,
        max_position_embeddings=131_072,
        tied_embeddings=False,
    ),
    "llama-3.2-1b": replace(
        _LLAMA,
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=8192,
        head_dim=64,
        rope_scaling=Llama3Scaling(factor=32.0),
        tied_embeddings=True,
    ),
    "llama-3.2-3b": replace(
        _LLAMA,
        num_layers=28,
        hidden_size=3072,
        ffn_hidden_size=8192,
        num_attention_heads=24,
        rope_scaling=Llama3Scaling(factor=32.0),
        tied_embeddings=True,
    ),
    "llama-3.1-8b": _LLAMA,
}
"""The base models as published; an instruct model may promise another window and then has no preset."""


def preset(name: str) -> ModelShape:
    """The shape of a preset.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def matching_preset(shape: ModelShape) -> str | None:
    """Name of the preset with exactly this shape, or None."""
    return next((name for name, known in PRESETS.items() if known == shape), None)


def require_preset(shape: ModelShape, name: str, *, of: str) -> None:
    """Refuse a model that is not the named preset.

    Args:
        shape: what was found.
        name: of the preset.
        of: where it was found.

    Raises:
        ValueError: an unknown name, or every field that differs.
    """
    differences = compare_shapes(shape, preset(name))
    if differences:
        raise ValueError(
            f"{of} is not {name}: {'; '.join(differences)}. Name another folder or preset, or leave "
            "--preset out to import it as it is"
        )


def nearest_preset(shape: ModelShape, *, at_most: int = 2) -> tuple[str, list[str]] | None:
    """The preset that differs in a few fields only, with the lines of `compare_shapes`; None if none does.

    For a message: a config that is almost a known model was perhaps edited by mistake.
    """
    differences = {name: compare_shapes(shape, known) for name, known in PRESETS.items()}
    name = min(differences, key=lambda name: len(differences[name]))
    return (name, differences[name]) if 0 < len(differences[name]) <= at_most else None
