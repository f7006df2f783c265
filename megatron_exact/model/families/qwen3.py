"""Qwen3, dense: an RMSNorm of every query and key head, heads of 128 whatever the width, no bias."""

from __future__ import annotations

from dataclasses import replace

from megatron_exact.model.family import Family, NotSupported
from megatron_exact.model.shapes import ModelShape

_8B = ModelShape(
    architecture="qwen3",
    num_layers=36,
    hidden_size=4096,
    ffn_hidden_size=12_288,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=151_936,
    max_position_embeddings=32_768,  # the chat models have 40,960
    norm_epsilon=1e-6,
    rope_theta=1_000_000.0,
    rope_scaling=None,
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=True,
)
_SMALL = replace(_8B, num_layers=28, num_attention_heads=16, tied_embeddings=True)

FAMILY = Family(
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    base_class="Qwen3Model",
    defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768},
    written={"attention_bias": False, "use_sliding_window": False},
    not_supported=(
        NotSupported(
            key="attention_bias",
            harmless=(None, False),
            reason="it would put a bias on the output projection as well, which is not supported",
        ),
    ),
    qk_norm=True,
    presets={
        "qwen3-0.6b": replace(_SMALL, hidden_size=1024, ffn_hidden_size=3072),
        "qwen3-1.7b": replace(_SMALL, hidden_size=2048, ffn_hidden_size=6144),
        "qwen3-4b": replace(_8B, hidden_size=2560, ffn_hidden_size=9728, tied_embeddings=True),
        "qwen3-8b": _8B,
        "qwen3-14b": replace(
            _8B, num_layers=40, hidden_size=5120, ffn_hidden_size=17_408, num_attention_heads=40
        ),
    },
)
