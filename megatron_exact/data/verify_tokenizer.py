"""The tokenizer that a pack names: the one its corpora were made with, and the one that lies there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_exact.data.manifest import Manifest
from megatron_exact.data.shards import Corpus
from megatron_exact.data.sources import read_parts
from megatron_exact.data.tokenizer_identity import files_sha256, same_tokenizer
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
    path = manifest.tokenizer_path(pack_dir)
    assert path is not None  # for mypy: the manifest names one
    packed = {**asdict(manifest.tokenizer), "path": str(path)}
    for prefix, identity in named:
        is_same = same_tokenizer(identity, packed)
        if identity["sha256"] == packed["sha256"]:
            is_same = all(identity[field] == packed[field] for field in FIELDS)
        if not is_same:
            raise ValueError(_difference(packed, identity, f"the record of {prefix}"))
    proved = f"as in {len(named)} of {len(records)} corpus records"
    if not os.path.exists(path):
        return f"{path} not checked: tokenizer file is not there; {proved}"
    if manifest.tokenizer.sha256 != files_sha256(path):  # the kind of hash before: nothing else to compare
        found = identify_tokenizer(path)
        if any(found[field] != packed[field] for field in FIELDS):
            raise ValueError(_difference(packed, found, str(path)))
    return f"{path}: kind, vocabulary and sha256 as packed; {proved}"


def _difference(packed: Mapping[str, object], found: Mapping[str, object], where: str) -> str:
    field = next(field for field in FIELDS if found[field] != packed[field])
    return f"{field} is {found[field]} in {where} but {packed[field]} in the manifest"
