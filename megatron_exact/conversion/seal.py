"""Sealing: an integrity.json for a checkpoint that was saved without one.

First the structure is checked: the index can be read, every chunk of every tensor and every object that it
names lies inside a file that is there, and each record is a whole zip file whose CRC-32 sums agree. Then
the files are hashed. A seal shows that nothing changes from now on. It cannot verify that the records
contain what the run computed, nor that the files belong together: damage that the CRC-32 does not show, or
a file of another run with the same shapes, is sealed with the rest.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.command_line import progress_bar
from megatron_exact.conversion.checkpoint_layout import (
    BACKEND_FILE,
    INDEX_FILE,
    RELEASE,
    is_iteration_name,
    iteration_of,
)
from megatron_exact.conversion.torch_dist_reader import (
    FileSlice,
    TorchDistCheckpoint,
    load_metadata,
    short_reason,
    stored_iteration,
)
from megatron_exact.files import sha256_file
from megatron_exact.integrity import (
    INTEGRITY_FILE,
    Belonging,
    read_integrity,
    special_file,
    unlisted_files,
    write_integrity,
)

BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Sealing:
    """The result for one checkpoint."""

    name: str
    """Name of its folder."""
    is_sealed: bool
    """Whether it has an integrity.json now."""
    detail: str
    """What was done, or the fault."""


def seal_checkpoints(folder: str | Path) -> Iterator[Sealing]:
    """Seal every checkpoint of a run, or one.

    Args:
        folder: folder of a run or an import, or of one iteration.

    Raises:
        ValueError: a folder without checkpoints.
    """
    folder = Path(folder)
    if (folder / INDEX_FILE).is_file() or (folder / BACKEND_FILE).is_file():
        yield _seal(folder)
        return
    found = sorted(path for path in folder.glob("iter_*") if path.is_dir() and is_iteration_name(path.name))
    if (folder / RELEASE).is_dir():
        found.append(folder / RELEASE)
    if not found:
        raise ValueError(f"{folder} contains no checkpoint: give the folder of a run, or of one iteration")
    for checkpoint in found:
        yield _seal(checkpoint)


def _seal(checkpoint: Path) -> Sealing:
    try:
        if read_integrity(checkpoint) is not None:
            detail = f"has an {INTEGRITY_FILE}; megatron-exact verify-checkpoint compares the files with it"
            return Sealing(name=checkpoint.name, is_sealed=True, detail=detail)
        special = special_file(checkpoint)
        if special is not None:
            raise ValueError(f"contains {special}: put the file itself there, or remove it")
        num_records, iteration = _check_structure(checkpoint)
        files = [checkpoint / name for name in unlisted_files(checkpoint, {})]
        with progress_bar("hash", sum(path.stat().st_size for path in files), "B") as bar:
            hashes = {path.name: sha256_file(path, bar.update) for path in files}
        write_integrity(checkpoint, hashes, Belonging(origin="sealed", iteration=iteration))
    except (ValueError, OSError) as error:
        return Sealing(name=checkpoint.name, is_sealed=False, detail=short_reason(error))
    detail = f"sealed: {len(files)} files, {num_records} records whole"
    return Sealing(name=checkpoint.name, is_sealed=True, detail=detail)


def _check_structure(checkpoint: Path) -> tuple[int, int]:
    """Read every record of a checkpoint.

    Returns:
        Number of records, and number of the iteration.

    Raises:
        ValueError: the first fault.
    """
    TorchDistCheckpoint(checkpoint, lambda _: True).close()  # chunks tile their tensors, inside the files
    metadata = load_metadata(checkpoint / INDEX_FILE)
    stored = stored_iteration(checkpoint, metadata)
    iteration = stored or 0
    if checkpoint.name == RELEASE or is_iteration_name(checkpoint.name):
        iteration = iteration_of(checkpoint) or 0
    if iteration and stored is not None and stored != iteration:
        raise ValueError(f"was renamed: its state says iteration {stored}; give the folder its name back")
    records = sorted({_place(info) for info in metadata.storage_data.values()})
    with progress_bar("read", sum(length for _, _, length in records), "B") as bar:
        for name, start, length in records:
            try:
                with open(checkpoint / name, "rb") as stream:
                    part = io.BufferedReader(FileSlice(stream.fileno(), start, length), BLOCK_BYTES)
                    damaged = zipfile.ZipFile(part).testzip()
                if damaged is not None:
                    raise ValueError(f"CRC-32 of {damaged} differs")
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise ValueError(
                    f"{name}: the record at byte {start:,} is damaged ({short_reason(error)}): take "
                    "another checkpoint, or copy this one again"
                ) from error
            bar.update(length)
    return len(records), iteration


def _place(info: Any) -> tuple[str, int, int]:
    name, start, length = info.relative_path, info.offset, info.length
    if not (isinstance(name, str) and Path(name).name == name and _is_count(start) and _is_count(length)):
        raise ValueError(f"{INDEX_FILE} names a record at {str(name)[:80]!r}, outside the folder")
    return name, start, length


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
