"""A family of no library, in one file: other tensor names and config keys, a norm of queries and keys.

`test_new_family.py` registers it and takes a model of it through import, export and verification.
"""

from __future__ import annotations

from megatron_exact.model.family import Family, HfNames, NotSupported

FAMILY = Family(
    model_type="othernames",
    model_class="OtherNamesForCausalLM",
    base_class="OtherNamesModel",
    defaults={"max_position_embeddings": 512, "parallel_blocks": False},
    written={"parallel_blocks": False},
    keys={
        "num_hidden_layers": "depth",
        "hidden_size": "width",
        "intermediate_size": "mlp_width",
        "num_attention_heads": "query_heads",
        "num_key_value_heads": "key_heads",
        "head_dim": "head_width",
        "max_position_embeddings": "context",
        "rms_norm_eps": "epsilon",
    },
    not_supported=(
        NotSupported(
            key="parallel_blocks",
            harmless=(None, False),
            reason="attention and MLP side by side are not supported",
        ),
    ),
    qk_norm=True,
    names=HfNames(
        embedding="body.tokens",
        attention_norm="body.blocks.{layer}.before_attention",
        query="body.blocks.{layer}.query",
        key="body.blocks.{layer}.key",
        value="body.blocks.{layer}.value",
        query_norm="body.blocks.{layer}.query_norm",
        key_norm="body.blocks.{layer}.key_norm",
        attention_output="body.blocks.{layer}.mix",
        mlp_norm="body.blocks.{layer}.before_mlp",
        gate="body.blocks.{layer}.w1",
        up="body.blocks.{layer}.w3",
        down="body.blocks.{layer}.w2",
        final_norm="body.last_norm",
        head="readout",
        base_prefix="body.",
    ),
)
