"""Which tensors of a Hugging Face model make up which tensor of a Megatron checkpoint.

`TABLE` is the whole mapping for Llama and Qwen2. Megatron stacks the layers of a model on a leading axis,
so its tensors of `decoder.layers` have shape [layers, rows, ...]; `{layer}` stands for the layer's number
in the names of Hugging Face. Keys and shapes are those that a GPTModel of megatron-core 0.19.2 asks for,
with the local layer spec as with Transformer Engine's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_exact.model.shapes import ModelShape

Fusion = Literal["stacked", "by_group"]
Condition = Literal["always", "qkv_bias", "untied"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One Hugging Face tensor (one a layer)."""

    name: str
    """Its name, with `{layer}` in tensors of a layer."""
    axes: tuple[str, ...]
    """Its shape, as keys of `sizes_of`; the first axis counts the rows."""


@dataclass(frozen=True, kw_only=True)
class TensorName:
    """One line of the table."""

    megatron: str
    """Key in a torch_dist checkpoint."""
    parts: tuple[Part, ...]
    """What it is made of, in this order."""
    fusion: Fusion = "stacked"
    """`stacked`: one part after the other. `by_group`: for each key/value group the query rows of its
    heads, then its key rows, then its value rows."""
    condition: Condition = "always"
    """Models that have it."""

    @property
    def per_layer(self) -> bool:
        """Whether the Megatron tensor has a leading axis of layers."""
        return self.megatron.startswith(LAYERS)


LAYERS = "decoder.layers."
_HF = "model.layers.{layer}."
_ATTENTION = _HF + "self_attn."


def _qkv(kind: str, *tail: str) -> tuple[Part, ...]:
    rows = (("q", "query_rows"), ("k", "group_rows"), ("v", "group_rows"))
    return tuple(Part(name=f"{_ATTENTION}{x}_proj.{kind}", axes=(axis, *tail)) for x, axis in rows)


TABLE: tuple[TensorName, ...] = (
    TensorName(
        megatron="embedding.word_embeddings.weight",
        parts=(Part(name="model.embed_tokens.weight", axes=("vocabulary", "hidden")),),
    ),
    TensorName(
        megatron=LAYERS + "self_attention.linear_qkv.layer_norm_weight",
        parts=(Part(name=_HF + "input_layernorm.weight", axes=("hidden",)),),
    ),
    TensorName(
        megatron=LAYERS + "self_attention.linear_qkv.weight",
        parts=_qkv("weight", "hidden"),
        fusion="by_group",
    ),
    TensorName(
        megatron=LAYERS + "self_attention.linear_qkv.bias",
        parts=_qkv("bias"),
        fusion="by_group",
        condition="qkv_bias",
    ),
    TensorName(
        megatron=LAYERS + "self_attention.linear_proj.weight",
        parts=(Part(name=_ATTENTION + "o_proj.weight", axes=("hidden", "query_rows")),),
    ),
    TensorName(
        megatron=LAYERS + "mlp.linear_fc1.layer_norm_weight",
        parts=(Part(name=_HF + "post_attention_layernorm.weight", axes=("hidden",)),),
    ),
    TensorName(
        megatron=LAYERS + "mlp.linear_fc1.weight",
        parts=(
            Part(name=_HF + "mlp.gate_proj.weight", axes=("ffn", "hidden")),
            Part(name=_HF + "mlp.up_proj.weight", axes=("ffn", "hidden")),
        ),
    ),
    TensorName(
        megatron=LAYERS + "mlp.linear_fc2.weight",
        parts=(Part(name=_HF + "mlp.down_proj.weight", axes=("hidden", "ffn")),),
    ),
    TensorName(
        megatron="decoder.final_layernorm.weight",
        parts=(Part(name="model.norm.weight", axes=("hidden",)),),
    ),
    TensorName(
        megatron="output_layer.weight",
        parts=(Part(name="lm_head.weight", axes=("vocabulary", "hidden")),),
        condition="untied",
    ),
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
"""A tied model may hold either or both; both must then be equal."""
BASE_PREFIX = "model."
"""What the names of a model with an output layer have before those of the model without one."""

BUFFERS = re.compile(
    r"(?:^|\.)(?:rotary_emb\.(?:inv_freq|original_inv_freq|cos_cached|sin_cached)"
    r"|(?:self_)?attn\.(?:masked_)?bias|attention\.(?:masked_)?bias|causal_mask|position_ids)$"
)
"""Tensors that a model computes when it is built: rotary tables, causal masks, position numbers.

Older versions of transformers saved them, and its loader ignores them (5.23: rotary tables and
`position_ids` in `_adjust_missing_and_unexpected_keys`, masks in `_keys_to_ignore_on_load_unexpected`).
No parameter of Llama and Qwen2 has such a name.
"""
ROTARY_FREQUENCIES = "rotary_emb.inv_freq"

EXTRA_STATE_MODULES = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer for which upstream's loader wants an object `_extra_state`, empty without fp8."""
FINAL_NORM_EXTRA_STATE = "decoder.final_layernorm._extra_state/shard_0_1"
"""Wanted by Transformer Engine's norm (2.20.2), and by ours so that both read the same files."""
COMMON_STATE = "common_state/shard_0_1"
"""Object with the iteration and the version of the layout."""

OTHER_OBJECTS = ("common_state/", "rng_state/", "rerun_state_machine_state/")
OPTIMIZER_KEYS = ("optimizer.", "optimizer/", "chained_", "opt_param_scheduler")
"""Prefixes of what training saves beside the model; never read by an export."""


def sizes_of(shape: ModelShape) -> dict[str, int]:
    """Length of every axis that the table names."""
    return {
        "vocabulary": shape.vocab_size,
        "hidden": shape.hidden_size,
        "ffn": shape.ffn_hidden_size,
        "query_rows": shape.num_attention_heads * shape.head_dim,
        "group_rows": shape.num_query_groups * shape.head_dim,
    }


def names_of(shape: ModelShape) -> tuple[TensorName, ...]:
    """The lines of the table that a model of this shape has."""
    has = {"always": True, "qkv_bias": shape.qkv_bias, "untied": not shape.tied_embeddings}
    return tuple(name for name in TABLE if has[name.condition])


def part_shape(part: Part, shape: ModelShape) -> tuple[int, ...]:
    """Shape of one Hugging Face tensor."""
    sizes = sizes_of(shape)
    return tuple(sizes[axis] for axis in part.axes)


def fused_shape(name: TensorName, shape: ModelShape) -> tuple[int, ...]:
    """Shape of one layer of a Megatron tensor: the rows of all parts, then their other axes."""
    shapes = [part_shape(part, shape) for part in name.parts]
    return (sum(rows for rows, *_ in shapes), *shapes[0][1:])


def megatron_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Key -> global shape of every tensor of the model in a torch_dist checkpoint."""
    return {
        name.megatron: (*((shape.num_layers,) if name.per_layer else ()), *fused_shape(name, shape))
        for name in names_of(shape)
    }


def layers_of(name: TensorName, shape: ModelShape) -> tuple[int | None, ...]:
    """Layer numbers for which a line of the table holds; (None,) for one outside the layers."""
    return tuple(range(shape.num_layers)) if name.per_layer else (None,)


def hf_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every Hugging Face tensor, layer by layer."""
    return {
        part.name.format(layer=layer): part_shape(part, shape)
        for name, layer in in_model_order(shape)
        for part in name.parts
    }


def in_model_order(shape: ModelShape) -> Iterator[tuple[TensorName, int | None]]:
    """(line, layer) in the order in which the model applies them: embedding, layers, norm, head."""
    names = names_of(shape)
    first = next(i for i, name in enumerate(names) if name.per_layer)
    last = max(i for i, name in enumerate(names) if name.per_layer) + 1
    yield from ((name, None) for name in names[:first])
    yield from ((name, layer) for layer in range(shape.num_layers) for name in names[first:last])
    yield from ((name, None) for name in names[last:])


def is_buffer(name: str) -> bool:
    """Whether a Hugging Face tensor is computed by the model instead of learned."""
    return BUFFERS.search(name) is not None


def extra_state_keys(num_layers: int) -> list[str]:
    """Keys of the empty objects that a checkpoint must hold for upstream's loader."""
    layers = [
        f"{LAYERS}{module}._extra_state/shard_{layer}_{num_layers}"
        for layer in range(num_layers)
        for module in EXTRA_STATE_MODULES
    ]
    return [*layers, FINAL_NORM_EXTRA_STATE]


def is_training_state(key: str) -> bool:
    """Whether a key of a checkpoint belongs to the optimizer, the schedule or the random state."""
    return key.startswith((*OPTIMIZER_KEYS, *OTHER_OBJECTS))


def is_extra_state(key: str) -> bool:
    """Whether a key is an `_extra_state` object of a module: it holds no weights."""
    return "._extra_state/shard_" in key
