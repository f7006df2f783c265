"""Phi-3 and Phi-4: one tensor for query, key and value, one for gate and up, perhaps heads turned in part.

The long-context versions and Phi-4-mini have LongRoPE, which Megatron's RotaryEmbedding lacks.
"""

from __future__ import annotations

from megatron_exact.model.family import Family, HfNames, NotSupported
from megatron_exact.model.shapes import ModelShape

FAMILY = Family(
    model_type="phi3",
    model_class="Phi3ForCausalLM",
    base_class="Phi3Model",
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    written={
        "sliding_window": None,
        # else those of the published model, which a smaller vocabulary does not have
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    },
    not_supported=(
        NotSupported(
            key="sliding_window",
            harmless=(None,),
            reason="it would hide the context that is weighted: set it to null to train with full "
            "attention, or take a version without one",
        ),
    ),
    may_rotate_part=True,
    may_scale_rope=False,
    names=HfNames(
        query_key_value="model.layers.{layer}.self_attn.qkv_proj",
        gate_up="model.layers.{layer}.mlp.gate_up_proj",
    ),
    presets={
        "phi-4": ModelShape(
            architecture="phi3",
            num_layers=40,
            hidden_size=5120,
            ffn_hidden_size=17_920,
            num_attention_heads=40,
            num_query_groups=10,
            head_dim=128,
            vocab_size=100_352,
            max_position_embeddings=16_384,
            norm_epsilon=1e-5,
            rope_theta=250_000.0,
            rope_scaling=None,
            tied_embeddings=False,
            qkv_bias=False,
        )
    },
)
