"""Time, checkpoints' size and room on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from megatron_exact.model.shapes import ModelShape
from megatron_exact.training.preflight.parameters import layer_parameters, model_parameters


def mean_square_segment(pack: str | Path) -> float:
    """Mean over the train split's tokens of the length of their segment, tokens.

    Attention over a segment of s tokens costs s^2 / 2 products, so a token costs half of this on average.
    """
    lengths = np.load(Path(pack) / "train" / "segment_tokens.npy", mmap_mode="r").astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


def flops_per_token(shape: ModelShape, segment_tokens: float) -> float:
    """Floating-point operations a trained token needs, forward and backward, nothing computed twice.

    Two for each parameter of a matrix and again twice that for its two gradients; the input embedding is no
    matrix product, the output layer is one. Attention as it is masked: causal, within its document.

    Args:
        shape: the model.
        segment_tokens: from `mean_square_segment`.
    """
    matrices = shape.num_layers * (layer_parameters(shape, 1) - 2 * shape.hidden_size)
    matrices += shape.vocab_size * shape.hidden_size
    width = shape.num_attention_heads * shape.head_dim
    attention = shape.num_layers * 2 * 2 * width * segment_tokens / 2
    return 3 * (2 * matrices + attention)


def checkpoint_bytes(shape: ModelShape, *, weight_bytes: int, optimizer_bytes: int) -> int:
    """Size of one checkpoint: every parameter once, whatever the layout.

    Args:
        shape: the model.
        weight_bytes: of a parameter.
        optimizer_bytes: of its optimizer states, 0 where they are not saved.
    """
    return model_parameters(shape) * (weight_bytes + optimizer_bytes)


def free_bytes(folder: str | Path) -> int:
    """Free room where a folder is or will be."""
    path = Path(folder).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
