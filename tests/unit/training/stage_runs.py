"""Chains of stages for tests: packs, and what a run leaves."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.data.manifest import TokenizerIdentity
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.files import sha256_file
from megatron_exact.integrity import write_integrity
from megatron_exact.training.checkpoint_start import TRACKER

ARGUMENTS = ["--train-iters", "10", "--global-batch-size", "2"]


def make_pack(folder: Path, row_tokens: int, tokenizer: str | None = None) -> str:
    folder.mkdir()
    writer = IndexedWriter(f"{folder}/docs.bin", f"{folder}/docs.idx", 50)
    for _ in range(20):
        writer.add(np.arange(row_tokens // 2) % 50)
    writer.close()
    options = PackOptions(row_tokens=row_tokens, policy="concat", seed=0, validation_fraction=0.0)
    identity = (
        TokenizerIdentity(path="t", kind="huggingface", vocab_size=50, sha256=tokenizer * 64)
        if tokenizer
        else None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pack_corpora([f"{folder}/docs"], folder / "pack", options, tokenizer=identity)
    return str(folder / "pack")


def save_checkpoint(folder: Path, iteration: int) -> None:
    """What a run leaves, as far as names, sizes and hashes go."""
    path = folder / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    for name in (".metadata", "metadata.json", "__0_0.distcp"):
        (path / name).write_text("{}")
    write_integrity(path, {entry.name: sha256_file(entry) for entry in path.iterdir()})
    (folder / TRACKER).write_text(str(iteration))
