"""YaRN: rotary frequencies for windows beyond those of pretraining (Peng et al. 2023, arXiv 2309.00071).

Megatron-core 0.19.2 has a YarnRotaryEmbedding, which this package does not use: on a CPU it asks for a CUDA
device, and context-parallel attention, which rotates its own tokens, would need one of its own. Here the
plain RotaryEmbedding gets YaRN's frequencies where it would scale them as Llama 3, and its factor of the
sines and cosines, which queries and keys both have, becomes its square in the scale of the softmax. That is
the same function where all of a head rotates in every layer, the only case that is supported.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_exact.model.shapes import YarnScaling

SMALLEST_RAMP = 0.001
"""Pairs between the two ends of the ramp where both are the same pair, as in transformers."""


def yarn_frequencies(frequencies: Tensor, scaling: YarnScaling, base: float) -> Tensor:
    """Return the frequencies of YaRN ("NTK-by-parts", section 3.2), float32 [R / 2].

    Pairs that turn `beta_fast` times or more over the original window keep their frequency, those that turn
    `beta_slow` times or less are divided by the factor, and those between are interpolated.

    Args:
        frequencies: radians a token of each pair without scaling, [R / 2].
        scaling: factor, original window and the two bounds.
        base: base of the frequencies.
    """
    pairs = frequencies.numel()

    def pair_that_turns(times: float) -> float:
        wavelength = scaling.original_max_position_embeddings / times
        return pairs * math.log(wavelength / (2 * math.pi)) / math.log(base)

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), 2 * pairs - 1)
    width = last - first or SMALLEST_RAMP
    numbers = torch.arange(pairs, dtype=torch.float32, device=frequencies.device)
    divided = ((numbers - first) / width).clamp(0, 1)
    return frequencies * (1 - divided) + frequencies / scaling.factor * divided


def softmax_scale(scaling: YarnScaling, head_dim: int) -> float:
    """Return the scale of the softmax that has the square of YaRN's factor of sines and cosines."""
    return scaling.attention_factor**2 / math.sqrt(head_dim)


def use_yarn(config: Any, scaling: YarnScaling | None, base: float) -> None:
    """Make every RotaryEmbedding that this process builds next YaRN's, and set the scale of the softmax.

    Args:
        config: a GPTModelConfig, changed in place.
        scaling: of the model; None for a model without YaRN, which then gets Megatron's own again.
        base: base of the frequencies.
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    stock = RotaryEmbedding._apply_scaling
    stock = getattr(stock, "stock", stock)
    if scaling is None:
        RotaryEmbedding._apply_scaling = stock
        return

    def apply_scaling(self: Any, freqs: Tensor, factor: float) -> Tensor:
        return yarn_frequencies(freqs, scaling, base)

    apply_scaling.stock = stock  # type: ignore[attr-defined]
    RotaryEmbedding._apply_scaling = apply_scaling
    config.rope_scaling, config.rope_scaling_factor = True, scaling.factor
    config.transformer.softmax_scale = softmax_scale(scaling, config.transformer.kv_channels)
