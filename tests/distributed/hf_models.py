"""Tiny random Hugging Face models of several families, and what transformers computes on packed rows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_exact.data.dataset import PackedDataset

VOCABULARY = 100  # not a multiple of 128: padding would show; divides by 4
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16_384,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2 tied, 2 groups": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen2 untied, 1 group": {
        "model_type": "qwen2",
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "llama tied, factor 32, 2 groups": {
        "model_type": "llama",
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**LLAMA3, "factor": 32.0},
    },
    "llama untied, factor 8, all groups, wide heads": {
        "model_type": "llama",
        "num_key_value_heads": 4,
        "head_dim": 24,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {**LLAMA3, "factor": 8.0},
    },
    "qwen3 tied, 2 groups, wide heads": {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 24,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "mistral untied, 2 groups": {
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "head_dim": 24,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "phi3 untied, 2 groups, three quarters of a head turn": {
        "model_type": "phi3",
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 250000.0,
            "partial_rotary_factor": 0.75,
        },
        "pad_token_id": None,
    },
    "olmo2 untied, 2 groups": {
        "model_type": "olmo2",
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "pad_token_id": None,
        "eos_token_id": None,
    },
    "smollm3 tied, 2 groups, two of four layers without RoPE": {
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "no_rope_layers": [1, 0, 0, 1],  # another order on each of two pipeline stages
        "pad_token_id": None,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0},
    },
}


def make_model(name: str, *, seed: int = 11, **changes: Any) -> Any:
    """The transformers model of a configuration, float32; biases and norms are random as well.

    Args:
        name: key of CONFIGS.
        seed: of the weights.
        changes: fields of the config.
    """
    import transformers

    config = transformers.AutoConfig.for_model(**{**SIZES, **CONFIGS[name], **changes})
    model = (
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in parameter_name else 0.2 * noise)
    return model


def save_model(name: str, folder: Path) -> Path:
    """A Hugging Face folder of `make_model(name)`, with no tokenizer."""
    make_model(name).save_pretrained(folder)
    return folder


def document_logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] of one document alone."""
    return model(tokens[None], use_cache=False).logits[0]  # type: ignore[no-any-return]


def row_loss_sum(model: Any, sample: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Sum of the cross-entropies of a packed row, segment by segment, and its number of targets."""
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    boundaries = sample["cu_seqlens"].unique_consecutive().tolist()
    for start, end in itertools.pairwise(boundaries):
        logits = document_logits(model, sample["tokens"][start:end])
        losses = F.cross_entropy(logits, sample["labels"][start:end], reduction="none")
        total = total + (losses * sample["loss_mask"][start:end]).sum()
    return total, int(sample["loss_mask"].sum())


def mean_loss(model: Any, pack: Path, split: str, rows: list[int]) -> Tensor:
    """Mean cross-entropy over the supervised targets of some rows, nats."""
    dataset = PackedDataset(pack, split, shuffle=False)
    parts = [row_loss_sum(model, dataset[row]) for row in rows]
    return torch.stack([loss for loss, _ in parts]).sum() / sum(count for _, count in parts)
