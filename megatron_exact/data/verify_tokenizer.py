"""The tokenizer that a pack names: the one its corpora were made with, and the one that lies there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_exact.data.manifest import Manifest
from megatron_exact.data.shards import Corpus
from megatron_exact.data.sources import read_parts
from megatron_exact.data.tokenizers import identify_tokenizer

FIELDS = ("kind", "vocab_size", "sha256")


def look_at_tokenizer(pack_dir: Path, manifest: Manifest, corpora: Sequence[Corpus]) -> str:
    """Compare the manifest's tokenizer with the corpus records and with the tokenizer itself.

    Args:
        pack_dir: a packed dataset.
        manifest: its manifest.
        corpora: those of its sources that could be opened.

    Returns:
        What was found. A tokenizer that is not there is said, not refused: packs travel without it.

    Raises:
        ValueError: a field that differs, or no tokenizer named although a record names one.
    """
    parts = [part for corpus in corpora for part in read_parts(corpus)]
    records = [(part.tokens.prefix, part.record) for part in parts]
    named = [(prefix, record.tokenizer) for prefix, record in records if record is not None]
    if manifest.tokenizer is None:
        if named:
            raise ValueError(
                f"the manifest names none but the record of {named[0][0]} says {named[0][1]['path']} "
                f"(sha256 {named[0][1]['sha256'][:16]}...): pack the corpus again"
            )
        return "not checked: neither the manifest nor a corpus record names one"
    for prefix, identity in named:
        _compare(manifest, identity, f"the record of {prefix}")
    proved = f"as in {len(named)} of {len(records)} corpus records"
    path = manifest.tokenizer_path(pack_dir)
    assert path is not None  # for mypy: the manifest names one
    if not os.path.exists(path):
        return f"{path} not checked: tokenizer file is not there; {proved}"
    _compare(manifest, identify_tokenizer(path), str(path))
    return f"{path}: kind, vocabulary and sha256 as packed; {proved}"


def _compare(manifest: Manifest, found: dict[str, object], where: str) -> None:
    for field in FIELDS:
        packed = getattr(manifest.tokenizer, field)
        if found[field] != packed:
            raise ValueError(f"{field} is {found[field]} in {where} but {packed} in the manifest")
