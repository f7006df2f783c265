"""Llama 2 and 3 and models of the same classes (SmolLM2): no bias, perhaps Llama 3's rotary scaling."""

from __future__ import annotations

from dataclasses import replace

from megatron_exact.model.family import Family, NotSupported
from megatron_exact.model.shapes import Llama3Scaling, ModelShape

_8B = ModelShape(
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
_SMOLLM2 = replace(
    _8B,
    vocab_size=49_152,
    head_dim=64,
    max_position_embeddings=8192,
    rope_theta=100_000.0,
    rope_scaling=None,
    tied_embeddings=True,
)

FAMILY = Family(
    model_type="llama",
    model_class="LlamaForCausalLM",
    base_class="LlamaModel",
    defaults={"max_position_embeddings": 2048},
    written={"attention_bias": False, "mlp_bias": False},
    not_supported=(
        NotSupported(
            key="attention_bias",
            harmless=(None, False),
            reason="it would put a bias on the output projection as well, which is not supported",
        ),
    ),
    presets={
        "llama-3.2-1b": replace(
            _8B,
            num_layers=16,
            hidden_size=2048,
            ffn_hidden_size=8192,
            head_dim=64,
            rope_scaling=Llama3Scaling(factor=32.0),
            tied_embeddings=True,
        ),
        "llama-3.2-3b": replace(
            _8B,
            num_layers=28,
            hidden_size=3072,
            ffn_hidden_size=8192,
            num_attention_heads=24,
            rope_scaling=Llama3Scaling(factor=32.0),
            tied_embeddings=True,
        ),
        "llama-3.1-8b": _8B,
        "smollm2-135m": replace(
            _SMOLLM2,
            num_layers=30,
            hidden_size=576,
            ffn_hidden_size=1536,
            num_attention_heads=9,
            num_query_groups=3,
        ),
        "smollm2-360m": replace(
            _SMOLLM2,
            hidden_size=960,
            ffn_hidden_size=2560,
            num_attention_heads=15,
            num_query_groups=5,
        ),
        "smollm2-1.7b": replace(
            _SMOLLM2,
            num_layers=24,
            hidden_size=2048,
            ffn_hidden_size=8192,
            num_query_groups=32,
            rope_theta=130_000.0,
        ),
    },
)
