"""OLMo 2: norms after attention and MLP instead of before them, and over all queries and all keys."""

from __future__ import annotations

from dataclasses import replace

from megatron_exact.model.family import Family, HfNames, NotSupported
from megatron_exact.model.shapes import ModelShape

_7B = ModelShape(
    architecture="olmo2",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11_008,
    num_attention_heads=32,
    num_query_groups=32,
    head_dim=128,
    vocab_size=100_352,
    max_position_embeddings=4096,
    norm_epsilon=1e-6,
    rope_theta=500_000.0,
    rope_scaling=None,
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=True,
    post_norm=True,
)

FAMILY = Family(
    model_type="olmo2",
    model_class="Olmo2ForCausalLM",
    base_class="Olmo2Model",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    written={
        "attention_bias": False,
        # else those of the published model, which a smaller vocabulary does not have
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    },
    not_supported=(
        NotSupported(
            key="attention_bias",
            harmless=(None, False),
            reason="it would put a bias on the output projection as well, which is not supported",
        ),
    ),
    qk_norm=True,
    post_norm=True,
    names=HfNames(
        attention_norm="model.layers.{layer}.post_attention_layernorm",
        mlp_norm="model.layers.{layer}.post_feedforward_layernorm",
    ),
    presets={
        "olmo2-1b": replace(
            _7B,
            num_layers=16,
            hidden_size=2048,
            ffn_hidden_size=8192,
            num_attention_heads=16,
            num_query_groups=16,
        ),
        "olmo2-7b": _7B,
        "olmo2-13b": replace(
            _7B,
            num_layers=40,
            hidden_size=5120,
            ffn_hidden_size=13_824,
            num_attention_heads=40,
            num_query_groups=40,
        ),
    },
)
