"""`integrity.json`: the sha256 of every file of a checkpoint, in upstream's format.

`{"algorithm": "sha256", "files": {name: hex}}` (megatron/core/dist_checkpointing/validation.py), so that
Megatron's `--verify-integrity` reads what is written here and the other way round. The file is written
last: a folder that holds it holds a whole checkpoint, or what damaged it came later.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_exact.files import sha256_file, write_json
from megatron_exact.json_input import read_json_object

INTEGRITY_FILE = "integrity.json"
ALGORITHM = "sha256"


def write_integrity(folder: Path, hashes: Mapping[str, str]) -> None:
    """Write the list of hashes of a folder, atomically."""
    write_json(folder / INTEGRITY_FILE, {"algorithm": ALGORITHM, "files": dict(sorted(hashes.items()))})


def read_integrity(folder: Path) -> dict[str, str] | None:
    """File name -> sha256 of a checkpoint; None without an integrity.json.

    Raises:
        ValueError: an integrity.json that cannot be read, or that names files outside the folder.
    """
    path = folder / INTEGRITY_FILE
    if not path.is_file():
        return None
    content = read_json_object(path, "copy the checkpoint again")
    try:
        files = content["files"]
        is_sound = content.get("algorithm", ALGORITHM) == ALGORITHM and all(
            isinstance(digest, str) and is_name(name) for name, digest in files.items()
        )
    except (TypeError, KeyError, AttributeError):
        is_sound = False
    if not is_sound:
        raise ValueError(f"{path} is no list of sha256 hashes: copy the checkpoint again")
    return dict(sorted(files.items()))


def is_name(name: str) -> bool:
    """Whether this names a file inside a folder, not the folder, a parent or a path."""
    return name not in ("", ".", "..") and name == os.path.basename(name) and "\0" not in name


def file_fault(path: Path, expected: str, on_bytes: Callable[[int], object] | None = None) -> str | None:
    """What is wrong with a file that should have this sha256, or None."""
    if not path.is_file():
        return "missing"
    return None if sha256_file(path, on_bytes) == expected else "sha256 differs"


def unlisted_files(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Names of the files of a folder that its integrity.json does not list."""
    there = {entry.name for entry in folder.iterdir() if entry.is_file()}
    return sorted(there - set(files) - {INTEGRITY_FILE})


def check_integrity(
    folder: Path, on_bytes: Callable[[int], object] | None = None
) -> list[tuple[str, str | None]] | None:
    """Hash every file of a checkpoint again, in this process alone.

    Args:
        folder: folder of one iteration.
        on_bytes: called with the number of bytes after each block.

    Returns:
        (file name, what is wrong or None) for each file listed or there; None without an integrity.json.

    Raises:
        ValueError: an integrity.json that cannot be read.
    """
    files = read_integrity(folder)
    if files is None:
        return None
    results = [(name, file_fault(folder / name, digest, on_bytes)) for name, digest in files.items()]
    return results + [(name, "not listed") for name in unlisted_files(folder, files)]


def content_digest(files: Mapping[str, str]) -> str:
    """One sha256 for a whole checkpoint, from the hashes of its files."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
