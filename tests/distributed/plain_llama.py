"""An independent Llama in plain float64 PyTorch: one document at a time, no packing, no Megatron.

Parameters carry Megatron's names and layouts at tensor-parallel size 1, because those are what is compared;
everything else is written from the architecture's definition.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from tests.distributed import jobs

HEAD_DIM = jobs.HIDDEN // jobs.HEADS
NORM_EPS = 1e-5
ROPE_BASE = 10_000.0


def rms_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden / torch.sqrt((hidden * hidden).mean(-1, keepdim=True) + NORM_EPS) * weight


def rotate(heads: Tensor) -> Tensor:
    """RoPE on [tokens, heads, HEAD_DIM], positions from 0."""
    tokens, half = heads.shape[0], HEAD_DIM // 2
    frequencies = ROPE_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies[None, :]
    cos, sin = torch.cos(angles)[:, None, :], torch.sin(angles)[:, None, :]
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(hidden: Tensor, parameters: dict[str, Tensor], prefix: str) -> Tensor:
    """Causal grouped-query attention over one document, [tokens, HIDDEN] -> the same."""
    tokens = hidden.shape[0]
    per_group = jobs.HEADS // jobs.KV_GROUPS
    qkv = hidden @ parameters[f"{prefix}.linear_qkv.weight"].T
    qkv = qkv.view(tokens, jobs.KV_GROUPS, per_group + 2, HEAD_DIM)
    outputs = []
    for group in range(jobs.KV_GROUPS):
        key = rotate(qkv[:, group, per_group : per_group + 1])[:, 0]
        value = qkv[:, group, per_group + 1]
        queries = rotate(qkv[:, group, :per_group])
        for head in range(per_group):
            scores = queries[:, head] @ key.T / math.sqrt(HEAD_DIM)
            future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
            outputs.append(torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1) @ value)
    return torch.cat(outputs, dim=-1) @ parameters[f"{prefix}.linear_proj.weight"].T


def document_logits(tokens: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Logits [tokens, vocabulary] of one document; embeddings tied."""
    embedding = parameters["embedding.word_embeddings.weight"]
    hidden = embedding[tokens]
    for layer in range(jobs.LAYERS):
        prefix = f"decoder.layers.{layer}"
        normed = rms_norm(hidden, parameters[f"{prefix}.input_layernorm.weight"])
        hidden = hidden + attention(normed, parameters, f"{prefix}.self_attention")
        normed = rms_norm(hidden, parameters[f"{prefix}.pre_mlp_layernorm.weight"])
        gate, up = (normed @ parameters[f"{prefix}.mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
        activated = gate * torch.sigmoid(gate) * up
        hidden = hidden + activated @ parameters[f"{prefix}.mlp.linear_fc2.weight"].T
    return rms_norm(hidden, parameters["decoder.final_layernorm.weight"]) @ embedding.T


def row_losses(
    tokens: Tensor, labels: Tensor, boundaries: list[int], parameters: dict[str, Tensor]
) -> Tensor:
    """Cross-entropy of every input of a row, float64 [row_tokens], each segment run alone."""
    losses = []
    for start, end in itertools.pairwise(boundaries):
        logits = document_logits(tokens[start:end], parameters)
        log_probabilities = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
        losses.append(-log_probabilities[torch.arange(end - start), labels[start:end]])
    return torch.cat(losses)
