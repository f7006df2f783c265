"""Mistral, dense, without a sliding window: the layers of Llama under another name."""

from __future__ import annotations

from megatron_exact.model.family import Family, NotSupported

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
)
