"""Mistral, dense, without a sliding window: the layers of Llama under another name."""

from __future__ import annotations

from megatron_exact.model.family import Family, NotSupported
from megatron_exact.model.shapes import ModelShape

FAMILY = Family(
    model_type="mistral",
    model_class="MistralForCausalLM",
    base_class="MistralModel",
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    written={"sliding_window": None},
    not_supported=(
        NotSupported(
            key="sliding_window",
            harmless=(None,),
            reason="it would hide the context that is weighted: set it to null to train with full "
            "attention, or take a version without one",
        ),
    ),
    presets={
        "mistral-7b-v0.3": ModelShape(
            architecture="mistral",
            num_layers=32,
            hidden_size=4096,
            ffn_hidden_size=14_336,
            num_attention_heads=32,
            num_query_groups=8,
            head_dim=128,
            vocab_size=32_768,
            max_position_embeddings=32_768,
            norm_epsilon=1e-5,
            rope_theta=1_000_000.0,
            rope_scaling=None,
            tied_embeddings=False,
            qkv_bias=False,
        )
    },
)
