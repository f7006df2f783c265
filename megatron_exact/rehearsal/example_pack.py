"""A pack for a rehearsal that names none: random tokens in documents as long as those of the web."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.data.pack import PackOptions, pack_corpora

MEDIAN_DOCUMENT_TOKENS = 600
"""Documents are lognormal about this median, with a deviation of 1.1: a mean of about 1,100 tokens."""


def make_example_pack(folder: Path, *, row_tokens: int, vocabulary: int, rows: int, seed: int = 0) -> Path:
    """Write a corpus and a pack of it.

    Args:
        folder: receives both; made if it is missing.
        row_tokens: inputs of a row.
        vocabulary: ids are below it.
        rows: at least so many for training.
        seed: of lengths and tokens.

    Returns:
        The folder of the pack.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    prefix = folder / "documents"
    writer = IndexedWriter(f"{prefix}.bin", f"{prefix}.idx", vocabulary)
    wanted = (rows + 1) * row_tokens + 1
    while writer.num_tokens < wanted:
        length = int(np.clip(generator.lognormal(np.log(MEDIAN_DOCUMENT_TOKENS), 1.1), 2, 4 * row_tokens))
        writer.add(generator.integers(0, vocabulary, length))
    writer.close()
    options = PackOptions(row_tokens=row_tokens, policy="concat", seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this corpus has no tokenizer
        pack_corpora([str(prefix)], folder / "pack", options)
    return folder / "pack"
