"""Every save ends with integrity.json, hashed by all ranks, written last.

Upstream's own `--verify-integrity` hashes the whole folder on rank 0, in one thread, while all ranks wait,
and writes without fsync or rename. Here each rank hashes the files that it wrote, while they are still in
the memory of its node; with `--async-save` the process that wrote them does, in the background. Rank 0
then writes the list, atomically; upstream's tracker names the iteration afterwards.

The order on disk: *.distcp (fsync), .metadata, metadata.json, integrity.json, tracker. Whatever is cut off
before integrity.json is there is not taken for a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_exact.command_line import describe
from megatron_exact.files import fsync_path, kind_of_file, sha256_file, write_json
from megatron_exact.integrity import INTEGRITY_FILE, Belonging, Previous, previous_of, write_integrity
from megatron_exact.json_input import read_json_object
from megatron_exact.training.checkpoints.folders import TRACKER
from megatron_exact.training.checkpoints.hashing import (
    UNREADABLE,
    from_rank_0,
    gather,
    hash_together,
    size_of,
)
from megatron_exact.training.checkpoints.verification import AgreedError

Bucket = tuple[str, str, tuple[list[Any], list[Any]]]
"""Upstream's work for one file: its path, its key, and (objects, tensors) to write."""


def clear_the_way(folder: Path, iteration: int) -> list[str]:
    """Set aside what would keep a save from writing an iteration or the tracker (rank 0).

    A link, a FIFO, a device or a file in the place of the iteration's folder, and anything but a file in
    the place of the tracker, is renamed: it may be somebody's, and a write through it would go elsewhere
    or wait for ever.

    Args:
        folder: that the run saves to.
        iteration: about to be written.

    Returns:
        What was set aside, in words.
    """
    done = []
    for path, is_right in (
        (folder / f"iter_{iteration:07d}", stat.S_ISDIR),
        (folder / TRACKER, stat.S_ISREG),
    ):
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            continue
        if not is_right(mode):
            aside = path.with_name(f".{path.name}.set-aside-{secrets.token_hex(4)}")
            os.rename(path, aside)
            done.append(f"{path.name} was {kind_of_file(mode)} and is now {aside.name}")
    return done


def empty_folder(checkpoint: Path) -> None:
    """Remove what an older save left in a folder about to be written, integrity.json first (rank 0)."""
    with contextlib.suppress(FileNotFoundError, IsADirectoryError):
        os.unlink(checkpoint / INTEGRITY_FILE)
        fsync_path(checkpoint)
    for left in list(checkpoint.iterdir()):
        if stat.S_ISDIR(left.lstat().st_mode):
            shutil.rmtree(left)
        else:
            left.unlink()


def seal_together(checkpoint: Path, belonging: Belonging | None = None) -> Previous | None:
    """Write integrity.json; called by every rank once all other files are written.

    Args:
        checkpoint: folder of one iteration.
        belonging: what it belongs to; rank 0's counts.

    Returns:
        On rank 0, what the next checkpoint names as the one before it.

    Raises:
        AgreedError: a file that cannot be read back, or a list that cannot be written.
    """
    rank = torch.distributed.get_rank()
    hashed = _take_note(checkpoint, rank)
    own = _own_files(checkpoint, rank)
    hashes = hash_together([path for path in own if path.name not in hashed], f"hash {checkpoint.name}")
    sizes: dict[str, int] = {}
    for noted, lengths in gather((hashed, {path.name: size_of(path) for path in own})):
        hashes.update(noted)
        sizes.update(lengths)
    fault = None
    if rank == 0:
        unreadable = [f"{name}: {text}" for name, text in hashes.items() if text.startswith(UNREADABLE)]
        try:
            if unreadable:
                raise OSError(unreadable[0])
            write_integrity(checkpoint, hashes, belonging, sizes)
        except OSError as error:
            fault = describe(error)
    fault = from_rank_0(fault)
    if fault is not None:
        raise AgreedError(f"{checkpoint} could not be completed: {fault}; {GO_ON}")
    return previous_of(checkpoint) if rank == 0 else None


GO_ON = "the last complete checkpoint is untouched: make room, then start the same command again"


def _own_files(checkpoint: Path, rank: int) -> list[Path]:
    """What this rank wrote; rank 0 wrote what is of no rank."""
    files = [path for path in checkpoint.iterdir() if path.is_file() and path.name != INTEGRITY_FILE]
    own = [path for path in files if path.name.startswith(f"__{rank}_")]
    if rank == 0:
        own += [path for path in files if not path.name.startswith("__") and not _is_note(path)]
    return sorted(own)


def explain_write_error(error: BaseException, checkpoint: Path) -> AgreedError:
    """One line for torch's CheckpointException, which knows the ranks but rarely the reason."""
    ranks = ", ".join(map(str, sorted(getattr(error, "failures", {})))) or "another rank"
    free = shutil.disk_usage(checkpoint).free
    return AgreedError(
        f"{checkpoint} could not be written (rank {ranks}; {free / 1e6:,.1f} MB are free there, the lines "
        f"above say more); {GO_ON}"
    )


@dataclass(frozen=True)
class WriteThenHash:
    """What the background process does for an asynchronous save; travels there by pickle."""

    write: Callable[..., None]
    """Upstream's writer."""
    checkpoint: Path
    """Folder of the iteration."""

    def __call__(self, rank: int, buckets: list[Bucket], results: Any) -> None:
        """Write the files of a rank, then leave their hashes in a note for `seal_together`."""
        self.write(rank, buckets, results)
        with contextlib.suppress(OSError):  # told by the writer itself, or hashed again when sealing
            hashes = {Path(bucket[0]).name: sha256_file(bucket[0]) for bucket in buckets}
            write_json(_note(self.checkpoint, rank), hashes)


def detached(buckets: list[Bucket]) -> list[Bucket]:
    """The same work on copies of tensors in main memory.

    Upstream hands such tensors to the background process as they are ("For persistent worker, this work
    should be changed", filesystem_async.py), while the optimizer goes on changing them.
    """
    return [
        (path, key, (objects, [(item, _copy(tensor)) for item, tensor in tensors]))
        for path, key, (objects, tensors) in buckets
    ]


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone() if tensor.device.type == "cpu" else tensor


def _note(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f".hashes-of-rank-{rank}.json"


def _is_note(path: Path) -> bool:
    return path.name.startswith(".hashes-of-rank-") or ".partial-" in path.name


def _take_note(checkpoint: Path, rank: int) -> dict[str, str]:
    """Hashes that the background process of this rank left, and no note any more."""
    note = _note(checkpoint, rank)
    if not note.is_file():
        return {}
    hashes: dict[str, str] = read_json_object(note, "remove it")
    note.unlink()
    return hashes
