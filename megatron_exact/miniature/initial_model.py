"""A Llama model before its first step, as a Hugging Face folder.

What decides whether a model of two layers learns to recall at all within minutes is how it begins. With
one standard deviation for all weights (0.02, or 0.09) it stays for long on the plateau where it knows which
words are values but not which value; with the scales here it leaves the plateau within a few dozen steps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_exact.files import write_json
from megatron_exact.miniature.language import VOCABULARY, write_tokenizer
from megatron_exact.model.hf_config import hf_config_of_shape
from megatron_exact.model.shapes import ModelShape

WINDOW_TOKENS = 512
SHAPE = ModelShape(
    architecture="llama",
    num_layers=2,
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=4,
    num_query_groups=4,
    head_dim=32,
    vocab_size=len(VOCABULARY),
    max_position_embeddings=WINDOW_TOKENS,
    norm_epsilon=1e-6,
    rope_theta=500.0,  # with 1e4 recall reaches four times the trained length by itself
    rope_scaling=None,
    qkv_bias=False,
    tied_embeddings=False,
)
EMBEDDING_STD = 1.0
RESIDUAL_SCALE = 0.5
"""Of what a layer adds to the residual stream, against 1 / sqrt(inputs) for every other matrix."""
OUTPUT_SCALE = 0.3
"""Of the output layer, against 1 / sqrt(inputs)."""


def initial_weights(shape: ModelShape, seed: int) -> dict[str, NDArray[np.float32]]:
    """Weights by Hugging Face name, float32, matrices as [outputs, inputs]."""
    generator = np.random.default_rng(seed)
    hidden, inner = shape.hidden_size, shape.ffn_hidden_size
    query = shape.num_attention_heads * shape.head_dim
    group = shape.num_query_groups * shape.head_dim

    def normal(size: tuple[int, int], std: float) -> NDArray[np.float32]:
        return np.asarray(generator.standard_normal(size) * std, dtype=np.float32)

    def matrix(outputs: int, inputs: int, scale: float = 1.0) -> NDArray[np.float32]:
        return normal((outputs, inputs), scale / float(np.sqrt(inputs)))

    ones = np.ones(hidden, np.float32)
    vocabulary = (shape.vocab_size, hidden)
    weights = {
        "model.embed_tokens.weight": normal(vocabulary, EMBEDDING_STD),
        "model.norm.weight": ones,
        "lm_head.weight": matrix(*vocabulary, OUTPUT_SCALE),
    }
    for layer in range(shape.num_layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for name, rows in (("q", query), ("k", group), ("v", group)):
            weights[f"{attention}.{name}_proj.weight"] = matrix(rows, hidden)
        weights |= {
            f"{attention}.o_proj.weight": matrix(hidden, query, RESIDUAL_SCALE),
            f"{mlp}.gate_proj.weight": matrix(inner, hidden),
            f"{mlp}.up_proj.weight": matrix(inner, hidden),
            f"{mlp}.down_proj.weight": matrix(hidden, inner, RESIDUAL_SCALE),
            f"model.layers.{layer}.input_layernorm.weight": ones.copy(),
            f"model.layers.{layer}.post_attention_layernorm.weight": ones.copy(),
        }
    return weights


def write_initial_model(folder: Path, *, seed: int) -> None:
    """Write config, tokenizer and random weights of `SHAPE` into an existing folder."""
    from safetensors.numpy import save_file

    write_json(folder / "config.json", hf_config_of_shape(SHAPE, dtype="float32"))
    write_tokenizer(folder, window_tokens=WINDOW_TOKENS)
    save_file(initial_weights(SHAPE, seed), folder / "model.safetensors", metadata={"format": "pt"})
