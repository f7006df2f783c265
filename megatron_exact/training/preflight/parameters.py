"""How many parameters a GPU holds.

h = hidden size, f = feed-forward width, q = width of all query heads, k = width of all key heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_exact.model.shapes import ModelShape
from megatron_exact.training.layout import Layout


@dataclass(frozen=True, kw_only=True)
class StageParameters:
    """Parameters of one GPU of one pipeline stage."""

    layers: int
    """Its transformer layers."""
    total: int
    """Its parameters."""
    embedding: int
    """Of these, in the input embedding."""
    largest_matrix: int
    """In the largest weight of a layer."""


def layer_parameters(shape: ModelShape, tensor_parallel: int) -> int:
    """Parameters of one layer on one tensor-parallel GPU; norms are whole on each."""
    h, f = shape.hidden_size, shape.ffn_hidden_size
    q, k = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    shared = h * (q + 2 * k) + q * h + 3 * h * f + (q + 2 * k if shape.qkv_bias else 0)
    return shared // tensor_parallel + 2 * h


def stage_parameters(shape: ModelShape, layout: Layout, pipeline_rank: int) -> StageParameters:
    """Parameters of a GPU of this pipeline stage; layers are taken to divide evenly."""
    layers = shape.num_layers // layout.pipeline_parallel
    is_first, is_last = pipeline_rank == 0, pipeline_rank == layout.pipeline_parallel - 1
    table = shape.vocab_size * shape.hidden_size // layout.tensor_parallel
    total = layers * layer_parameters(shape, layout.tensor_parallel)
    total += table if is_first else 0
    if is_last:
        total += shape.hidden_size  # the final norm
        # a tied output layer is the embedding itself where both lie on one GPU, else a copy of it
        total += 0 if shape.tied_embeddings and is_first else table
    return StageParameters(
        layers=layers,
        total=total,
        embedding=table if is_first else 0,
        largest_matrix=2 * shape.ffn_hidden_size * shape.hidden_size // layout.tensor_parallel,
    )


def model_parameters(shape: ModelShape) -> int:
    """Parameters of the whole model."""
    return stage_parameters(shape, Layout(distributed_optimizer=False), 0).total
