"""Qwen2 and Qwen2.5: a bias of q, k and v; the smaller models tie their output layer to the embedding."""

from __future__ import annotations

from dataclasses import replace

from megatron_exact.model.family import Family
from megatron_exact.model.shapes import ModelShape

_SMALLEST = ModelShape(
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

FAMILY = Family(
    model_type="qwen2",
    model_class="Qwen2ForCausalLM",
    base_class="Qwen2Model",
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32_768},
    written={"use_sliding_window": False},
    qkv_bias=True,
    presets={
        "qwen2.5-0.5b": _SMALLEST,
        "qwen2.5-1.5b": replace(
            _SMALLEST,
            num_layers=28,
            hidden_size=1536,
            ffn_hidden_size=8960,
            num_attention_heads=12,
            head_dim=128,
            max_position_embeddings=131_072,
        ),
        "qwen2.5-3b": replace(
            _SMALLEST,
            num_layers=36,
            hidden_size=2048,
            ffn_hidden_size=11_008,
            num_attention_heads=16,
            head_dim=128,
        ),
        "qwen2.5-7b": replace(
            _SMALLEST,
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
    },
)
