"""Writes that either happen whole or leave no trace, and hashes of files.

A file is written beside its target, flushed to disk and renamed; a folder is built under a hidden
name beside its target and renamed once every file in it is on disk. A process that is killed leaves
at most a `.NAME.partial-PID` beside the target, which nothing opens and the next writer removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HASH_BLOCK_BYTES = 4 << 20


def partial_path(path: Path) -> Path:
    """The hidden name under which this process builds `path`."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def fsync_path(path: Path) -> None:
    """Flush one file, or the entries of one folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; on success flush it and rename it to `path`, on failure remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_partials(path)
    temporary = partial_path(path)
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically. Non-finite floats raise ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a hidden folder; on success flush everything in it and rename it to `path`.

    Raises:
        ValueError: `path` exists already and is not an empty folder.
    """
    path = Path(path)
    require_free_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_partials(path)
    temporary = partial_path(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                fsync_path(Path(folder) / name)
            fsync_path(Path(folder))
        try:
            os.rename(temporary, path)  # replaces an empty folder, refuses any other
        except OSError as error:
            raise ValueError(
                f"{path} was created by someone else meanwhile ({error.strerror}); "
                "nothing was written: choose another output"
            ) from error
        fsync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_free_folder(path: Path) -> None:
    """Raise ValueError unless `path` is missing or an empty folder."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise ValueError(f"{path} exists already: remove it or choose another output")


def remove_stale_partials(path: Path) -> None:
    """Remove what killed writers of `path` left behind; what a living process builds stays."""
    for left in path.parent.glob(f".{path.name}.partial-*"):
        owner = left.name.rpartition("-")[2]
        if not owner.isdigit() or Path(f"/proc/{owner}").exists():
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def sha256_file(path: str | Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """Hex sha256 of a file, read in blocks; `on_bytes(n)` is called after each block of n bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()
