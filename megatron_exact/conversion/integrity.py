"""`integrity.json`: the sha256 of every file of a checkpoint, in upstream's format.

`{"algorithm": "sha256", "files": {name: hex}}` (megatron/core/dist_checkpointing/validation.py), so that
Megatron's `--verify-integrity` reads what is written here and the other way round.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_exact.conversion.layout import INTEGRITY_FILE
from megatron_exact.files import sha256_file, write_json
from megatron_exact.model.hf_folder import read_json_object

ALGORITHM = "sha256"


def write_integrity(folder: Path, hashes: Mapping[str, str]) -> None:
    """Write the list of hashes of a folder."""
    write_json(folder / INTEGRITY_FILE, {"algorithm": ALGORITHM, "files": dict(sorted(hashes.items()))})


def check_integrity(
    folder: Path, on_bytes: Callable[[int], object] | None = None
) -> list[tuple[str, str | None]] | None:
    """Hash every file of a checkpoint again.

    Args:
        folder: folder of one iteration.
        on_bytes: called with the number of bytes after each block.

    Returns:
        (file name, what is wrong or None) for each file listed or there; None without an integrity.json.

    Raises:
        ValueError: an integrity.json that cannot be read.
    """
    path = folder / INTEGRITY_FILE
    if not path.is_file():
        return None
    manifest = read_json_object(path)
    files = manifest.get("files")
    if manifest.get("algorithm", ALGORITHM) != ALGORITHM or not isinstance(files, dict):
        raise ValueError(f"{path} is no list of sha256 hashes: copy the checkpoint again")
    results: list[tuple[str, str | None]] = []
    for name, expected in sorted(files.items()):
        file = folder / name
        if name != os.path.basename(name) or not file.is_file():
            results.append((name, "missing"))
        elif sha256_file(file, on_bytes) != expected:
            results.append((name, "sha256 differs"))
        else:
            results.append((name, None))
    there = {entry.name for entry in folder.iterdir() if entry.is_file()} - {INTEGRITY_FILE}
    return results + [(name, "not listed") for name in sorted(there - set(files))]
