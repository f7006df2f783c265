"""SmolLM3: a Llama in which every fourth layer is without rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_exact.model.family import Family, NotSupported, short
from megatron_exact.model.shapes import ModelShape

INTERVAL = 4
"""Every fourth layer is without rotary embedding where the config names no layers."""


def _read_layers(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Read `no_rope_layers`, one number a layer, in which 1 means that the layer rotates.

    Raises:
        ValueError: not one 0 or 1 for each layer, or an interval below 1.
    """
    layers = range(config["num_hidden_layers"])
    rotates, interval = config.get("no_rope_layers"), config.get("no_rope_layer_interval", INTERVAL)
    if rotates is None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(
                f"{where}: no_rope_layer_interval is {short(interval)}, not an integer of 1 or more"
            )
        rotates = [int((layer + 1) % interval != 0) for layer in layers]
    if (
        not isinstance(rotates, list)
        or len(rotates) < len(layers)
        or any(value not in (0, 1) for value in rotates)
    ):
        raise ValueError(
            f"{where}: no_rope_layers {short(rotates)} is not a list of a 0 (no rotary embedding) or 1 for "
            f"each of the {len(layers)} layers: copy config.json of the model again"
        )
    return {"layers_without_rope": tuple(layer for layer in layers if not rotates[layer])}


def _write_layers(shape: ModelShape) -> Mapping[str, Any]:
    skipped = shape.layers_without_rope
    return {"no_rope_layers": [int(layer not in skipped) for layer in range(shape.num_layers)]}


FAMILY = Family(
    model_type="smollm3",
    model_class="SmolLM3ForCausalLM",
    base_class="SmolLM3Model",
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
    },
    written={
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        # else those of the published model, which a smaller vocabulary does not have
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    },
    read_fields=_read_layers,
    write_keys=_write_layers,
    not_supported=(
        NotSupported(
            key="attention_bias",
            harmless=(None, False),
            reason="it would put a bias on the output projection as well, which is not supported",
        ),
    ),
    may_skip_rope=True,
    presets={
        "smollm3-3b": ModelShape(
            architecture="smollm3",
            num_layers=36,
            hidden_size=2048,
            ffn_hidden_size=11_008,
            num_attention_heads=16,
            num_query_groups=4,
            head_dim=128,
            vocab_size=128_256,
            max_position_embeddings=65_536,
            norm_epsilon=1e-6,
            rope_theta=5_000_000.0,
            rope_scaling=None,
            tied_embeddings=True,
            qkv_bias=False,
            layers_without_rope=tuple(range(3, 36, 4)),
        )
    },
)
