"""The manifest of a packed dataset: what was packed, how, and what came out.

`DIR/manifest.json` beside the arrays of `DIR/train` and `DIR/validation`. Its fingerprint is the sha256
of the canonical JSON (sorted keys, no spaces) of everything in it except where things lay and where they
came from (`prefix`, `raw_files`, `licence`, the tokenizer's `path`) and what the hashes of the corpora
decide (`largest_id`, `document_tokens`): two machines that pack the same tokens with the same options
agree, and an edited number no longer matches.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from megatron_exact.data.fields import build_record
from megatron_exact.data.manifest_entries import (
    FIRST_TARGET,
    FIRST_TARGET_DTYPE,
    DocumentTokens,
    Exposure,
    Manifest,
    Shard,
    Source,
    SourceUse,
    Split,
    Supervision,
    TokenizerIdentity,
    TokenPlace,
)
from megatron_exact.data.manifest_values import check_values
from megatron_exact.files import sha256_file, write_json
from megatron_exact.json_input import as_json, read_json_object

__all__ = [
    "DocumentTokens",
    "Exposure",
    "Manifest",
    "Shard",
    "Source",
    "SourceUse",
    "Split",
    "Supervision",
    "TokenPlace",
    "TokenizerIdentity",
    "fingerprint_of",
    "finish_manifest",
    "read_manifest",
    "verify_arrays",
    "verify_split_arrays",
    "write_manifest",
]

FORMAT_VERSION = 2  # 1: plans in another order, no shards
MANIFEST_NAME = "manifest.json"
POLICIES = ("concat", "best-fit")
WEIGHT_UNITS = ("tokens", "documents")
SPLITS = ("train", "validation")
ARRAY_DTYPES = {
    "row_offsets": "<i8",
    "segment_source": "<u2",
    "segment_document": "<i8",
    "segment_start": "<i8",
    "segment_tokens": "<i4",
}
DESCRIPTIVE_SOURCE_FIELDS = ("prefix", "raw_files", "licence", "largest_id")
BINDINGS = ("bin_blocks_sha256", "bin_sample_sha256")  # follow from what bin_sha256 says already


def fingerprint_of(content: dict[str, Any]) -> str:
    """Fingerprint of the JSON content of a manifest (see the module's head), hex."""
    hashed = without_defaults(content)
    hashed.pop("fingerprint", None)
    hashed.pop("document_tokens", None)
    for source in hashed["sources"]:
        for field in DESCRIPTIVE_SOURCE_FIELDS:
            source.pop(field, None)
        for part in (source, *source["shards"]):
            for field in BINDINGS:
                part.pop(field, None)
    if hashed.get("tokenizer") is not None:
        hashed["tokenizer"].pop("path", None)
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def without_defaults(content: dict[str, Any]) -> dict[str, Any]:
    """A copy of a manifest's JSON without the fields that have their defaults.

    Such fields were added later; packs that do not use them keep their bytes and their fingerprint.
    """
    kept = copy.deepcopy(content)
    shards = [shard for source in kept["sources"] for shard in source["shards"]]
    for cls, entries in ((Manifest, [kept]), (Source, kept["sources"]), (Shard, shards)):
        defaults = {field.name: field.default for field in fields(cls) if field.default is not MISSING}
        for entry in entries:
            for name, default in defaults.items():
                if name in entry and entry[name] == default:
                    del entry[name]
    return kept


def finish_manifest(**entries: Any) -> Manifest:
    """A Manifest from all fields but `format_version` and `fingerprint`, which are added."""
    draft = asdict(Manifest(format_version=FORMAT_VERSION, fingerprint="", **entries))
    # Built as a reader builds it before it is hashed: 0 for a float becomes 0.0.
    built = build_record(Manifest, as_json(draft), MANIFEST_NAME)
    return replace(built, fingerprint=fingerprint_of(asdict(built)))


def write_manifest(manifest: Manifest, pack_dir: str | Path) -> None:
    """Write `manifest.json` into an existing folder."""
    write_json(Path(pack_dir) / MANIFEST_NAME, without_defaults(asdict(manifest)))


def read_manifest(pack_dir: str | Path) -> Manifest:
    """Read and check the manifest of a packed dataset.

    Raises:
        FileNotFoundError: no manifest there.
        ValueError: not JSON, another format, a field missing, of another type or out of range, or a
            fingerprint that does not match (edited by hand).
    """
    path = Path(pack_dir) / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {pack_dir} is no packed dataset, make one with pack_corpus.py"
        )
    content = read_json_object(path, "pack the corpus again")
    if content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version")
        raise ValueError(
            f"{path} has format_version {found!r}, this program reads {FORMAT_VERSION}: pack again"
        )
    manifest = build_record(Manifest, content, str(path))
    if tuple(sorted(manifest.splits)) != tuple(sorted(SPLITS)):
        raise ValueError(f"{path} has splits {sorted(manifest.splits)}, not {sorted(SPLITS)}: pack again")
    check_values(manifest, str(path))
    expected = fingerprint_of(content)
    if manifest.fingerprint != expected:
        raise ValueError(
            f"{path} says fingerprint {manifest.fingerprint[:16]}... but its content gives "
            f"{expected[:16]}...: it was edited or damaged, pack the corpus again"
        )
    return manifest


def array_dtypes(split: Split) -> dict[str, str]:
    """Name to dtype of the arrays of a split."""
    if f"{FIRST_TARGET}.npy" not in split.arrays:
        return ARRAY_DTYPES
    return {**ARRAY_DTYPES, FIRST_TARGET: FIRST_TARGET_DTYPE}


def verify_arrays(pack_dir: str | Path, manifest: Manifest | None = None) -> int:
    """Hash every array of a pack and compare with its manifest; a training job does this once.

    Returns:
        Bytes read.

    Raises:
        ValueError: a missing, unexpected or damaged array.
    """
    manifest = manifest or read_manifest(pack_dir)
    return sum(verify_split_arrays(pack_dir, name, split) for name, split in manifest.splits.items())


def verify_split_arrays(pack_dir: str | Path, name: str, split: Split) -> int:
    """The same for one split."""
    expected = sorted(f"{array}.npy" for array in array_dtypes(split))
    if sorted(split.arrays) != expected:
        raise ValueError(
            f"the manifest of {pack_dir} lists arrays {sorted(split.arrays)}, not {expected}: pack again"
        )
    total = 0
    for file, sha256 in split.arrays.items():
        path = Path(pack_dir) / name / file
        if not path.is_file():
            raise ValueError(f"{path} is missing: copy the pack again or pack again")
        found = sha256_file(path)
        if found != sha256:
            raise ValueError(
                f"{path} has sha256 {found[:16]}... but the manifest says {sha256[:16]}...: "
                "the array is damaged, copy the pack again or pack again"
            )
        total += path.stat().st_size
    return total
