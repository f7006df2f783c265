"""Qwen3, dense: an RMSNorm of every query and key head, heads of 128 whatever the width, no bias."""

from __future__ import annotations

from megatron_exact.model.family import Family, NotSupported

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
)
