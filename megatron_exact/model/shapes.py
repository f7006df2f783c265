"""What makes a model of the Llama and Qwen2 families, its weights apart.

Nothing heavy is imported: tools read shapes before torch or Megatron is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

Architecture = Literal["qwen2", "llama"]

COUNTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
LARGEST_COUNT = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3's scaling of the rotary frequencies.

    megatron-core 0.19.2 has the last three values written into its code
    (core/models/common/embeddings/rotary_pos_embedding.py, `_apply_scaling`); only the factor is an option.
    """

    factor: float
    """What the lowest frequencies are divided by."""
    low_freq_factor: float = 1.0
    """Wavelengths above original length / this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """Wavelengths below original length / this stay; those between are interpolated."""
    original_max_position_embeddings: int = 8192
    """Window of the model before its own long-context training, tokens."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything about a model but its weights.

    Always so in both families: RMSNorm before attention and before the gated SiLU MLP, no bias in linear
    layers except perhaps q, k and v, rotary embedding over the whole head.

    Raises:
        ValueError: a number that is out of range or does not divide.
    """

    architecture: Architecture
    """Hugging Face `model_type`."""
    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of gate and up each."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key/value heads; each serves `num_attention_heads / num_query_groups` query heads."""
    head_dim: int
    """Width of one head; even."""
    vocab_size: int
    """Rows of the embedding, at least the ids of the tokenizer."""
    max_position_embeddings: int
    """Window that the published config promises, tokens."""
    norm_epsilon: float
    """Added to the mean square in RMSNorm."""
    rope_theta: float
    """Base of the rotary frequencies."""
    rope_scaling: Llama3Scaling | None
    """None: plain rotary embedding."""
    tied_embeddings: bool
    """Whether the output layer is the embedding."""
    qkv_bias: bool
    """Whether q, k and v have a bias."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_COUNT:
                raise ValueError(f"{name} is {value!r}, not an integer of 1 to {LARGEST_COUNT}")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} does not divide by num_query_groups "
                f"{self.num_query_groups}: every key/value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding turns pairs")
        if not 0 < self.norm_epsilon < 1:
            raise ValueError(f"norm_epsilon is {self.norm_epsilon}, not between 0 and 1")
        if not 1 < self.rope_theta <= LARGEST_COUNT:
            raise ValueError(f"rope_theta is {self.rope_theta}, not between 1 and {LARGEST_COUNT}")
        if self.rope_scaling is not None and not 1 <= self.rope_scaling.factor < float("inf"):
            raise ValueError(
                f"rope_scaling.factor is {self.rope_scaling.factor}, not a number of 1 or more"
            )


def compare_shapes(found: ModelShape, expected: ModelShape) -> list[str]:
    """One line for each field that differs, such as `num_layers is 24, expected 28`; empty if equal."""
    theirs = dict(_flat(expected))
    ours = dict(_flat(found))
    names = list(dict.fromkeys((*ours, *theirs)))
    return [
        f"{name} is {ours.get(name)}, expected {theirs.get(name)}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _flat(shape: ModelShape) -> Iterator[tuple[str, Any]]:
    for field in fields(shape):
        value = getattr(shape, field.name)
        if isinstance(value, Llama3Scaling):
            for inner in fields(value):
                yield f"{field.name}.{inner.name}", getattr(value, inner.name)
        else:
            yield field.name, value


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How many logits exist at a time in the tiled loss head (`loss_head_tiles.py`).

    Raises:
        ValueError: a size below 1.
    """

    tokens: int = 2048
    """T, tokens of a tile."""
    columns: int = 2048
    """B, vocabulary columns of a tile."""

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("columns", self.columns)):
            if value < 1:
                raise ValueError(f"a tile of the loss head has {value} {name}: give 1 or more")
