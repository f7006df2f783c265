"""The small job that the distributed tests run in many layouts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.data.pack import PackOptions, pack_corpora

VOCABULARY = 96
ROW_TOKENS = 64
LAYERS = 2
HIDDEN = 48
HEADS = 4
KV_GROUPS = 2
GLOBAL_BATCH = 4

MODEL = (
    *("--num-layers", LAYERS),
    *("--hidden-size", HIDDEN),
    *("--ffn-hidden-size", 80),
    *("--num-attention-heads", HEADS),
    "--group-query-attention",
    *("--num-query-groups", KV_GROUPS),
    "--swiglu",
    *("--normalization", "RMSNorm"),
    "--disable-bias-linear",
    *("--position-embedding-type", "rope"),
    *("--vocab-size", VOCABULARY),
)
SCHEDULE = (
    *("--global-batch-size", GLOBAL_BATCH),
    *("--lr", "1e-3"),
    *("--lr-decay-style", "constant"),
    *("--log-interval", 1),
    *("--eval-iters", 0),
)
LARGE_LAYERS, LARGE_BATCH = 4, 8
DEEP = ("--num-layers", LARGE_LAYERS)
"""Four parts of a pipeline."""
LARGE = (*DEEP, "--global-batch-size", LARGE_BATCH)
"""Also two micro-batches of each of four replicas, and steps that take longer."""


def command(pack: Path, rule: str, train_iters: int, *extra: Any) -> list[Any]:
    """Command line of a job; later words win."""
    return [
        *("--pack", pack),
        *("--token-weighting", rule),
        *MODEL,
        *SCHEDULE,
        *("--train-iters", train_iters),
        *extra,
    ]


def make_corpus(prefix: Path) -> Path:
    """Write documents of heavy-tailed lengths, random ids, each ending in the last id of the vocabulary."""
    generator = np.random.default_rng(0)
    writer = IndexedWriter(f"{prefix}.bin", f"{prefix}.idx", VOCABULARY)
    for length in np.clip(generator.lognormal(3.0, 1.1, 160), 2, 300).astype(int):
        document = generator.integers(0, VOCABULARY - 1, length)
        document[-1] = VOCABULARY - 1
        writer.add(document)
    writer.close()
    return prefix


def make_pack(corpus: Path, policy: str, name: str | None = None, **options: Any) -> Path:
    """Pack a corpus into rows of ROW_TOKENS beside it."""
    output = corpus.parent / (name or policy)
    settings = {
        "row_tokens": ROW_TOKENS,
        "policy": policy,
        "seed": 3,
        "validation_fraction": 0.2,
        **options,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these corpora have no tokenizer
        pack_corpora([str(corpus)], output, PackOptions(**settings))
    return output


def divisor_near(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - wanted))
