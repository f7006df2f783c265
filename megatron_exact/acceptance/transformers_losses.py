"""The tiny model of an acceptance, and what transformers computes on the documents of packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
"""Sizes that 2 and 4 ranks divide; weights so large that attention matters before training."""


def make_tiny_model(folder: Path) -> None:
    """Write a random Llama model in Hugging Face's format, float32."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    config = transformers.LlamaConfig(**TINY)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).float()
    model.save_pretrained(folder)


def document_losses(
    hf: Path, batch: dict[str, Any], spans: Sequence[tuple[int, int]], device: str
) -> NDArray[np.float64]:
    """Return the cross-entropy at every position, each span computed alone, in float32.

    Args:
        hf: a Hugging Face folder.
        batch: `tokens` and `labels`, each [b, S].
        spans: (start, end) in the flattened micro-batch.
        device: of the model.
    """
    from megatron_exact.scoring import Piece, Scorer

    tokens, labels = (batch[name].reshape(-1).numpy() for name in ("tokens", "labels"))
    longest = max(end - start for start, end in spans)
    scorer = Scorer(hf, longest, device=device, dtype="float32")
    pieces = [Piece(tokens=tokens[start:end], labels=labels[start:end]) for start, end in spans]
    losses = np.full(tokens.size, np.nan)
    for (start, end), found in zip(spans, scorer.losses(pieces, 4 * longest), strict=True):
        losses[start:end] = found
    return losses
