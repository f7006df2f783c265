"""What lies in a folder of checkpoints, judged by names and sizes alone.

    FOLDER/latest_checkpointed_iteration.txt    the tracker: a number, or `release`
    FOLDER/iter_0000100/ or FOLDER/release/     .metadata, metadata.json, *.distcp, integrity.json

Contents are hashed later, by all ranks together (`verification.py`).
"""

from __future__ import annotations

import re
import stat
from pathlib import Path

from megatron_exact.conversion.layout import MOST_DIGITS, is_iteration_name
from megatron_exact.files import kind_of_file, read_regular_file
from megatron_exact.integrity import INTEGRITY_FILE, read_seal, special_file, unlisted_files

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
NEEDED_FILES = (".metadata", "metadata.json")


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoint folders, the one to try first in front: release if the tracker says so, newest first.

    What is named otherwise than Megatron names an iteration is none.
    """
    if not folder.is_dir():
        return []
    release = folder / RELEASE
    if release.is_dir() and _tracker_text(folder) == RELEASE:
        return [release]
    iterations = [path for path in folder.glob("iter_*") if is_iteration_name(path.name) and path.is_dir()]
    return sorted(iterations, key=iteration_number, reverse=True)


def is_cut_off_first_save(folder: Path) -> bool:
    """Whether all that lies there is the beginning of a save: nothing sealed, and no tracker yet.

    Integrity.json is written before the tracker, so a run that was killed later than this has one.
    """
    there = checkpoints_in(folder)
    is_sealed = any((checkpoint / INTEGRITY_FILE).exists() for checkpoint in there)
    return bool(there) and not is_sealed and not (folder / TRACKER).exists()


def iteration_number(checkpoint: Path) -> int:
    """Number of a checkpoint folder, 0 for a release."""
    return 0 if checkpoint.name == RELEASE else int(checkpoint.name.removeprefix("iter_"))


def tracked_iteration(folder: Path) -> int | None:
    """The iteration that the tracker names; None without a tracker, for a release, or for an empty one.

    Upstream writes the tracker in place, so a full disk or a kill leaves it empty.

    Raises:
        ValueError: a tracker that says something else.
    """
    text = _tracker_text(folder)
    if text in (None, "", RELEASE):
        return None
    if re.fullmatch(rf"[0-9]{{1,{MOST_DIGITS}}}", text) is None:
        raise ValueError(
            f"{folder / TRACKER} says {text[:40]!r}, neither an iteration nor 'release': "
            "write the number of the checkpoint to load into it"
        )
    return int(text)


def tracker_fault(folder: Path) -> str | None:
    """Why the tracker is not read: a link, a FIFO, a device or a folder lies in its place."""
    try:
        mode = (folder / TRACKER).lstat().st_mode
    except FileNotFoundError:
        return None
    return None if stat.S_ISREG(mode) else f"{TRACKER} is {kind_of_file(mode)} and is not read"


def _tracker_text(folder: Path) -> str | None:
    if not (folder / TRACKER).is_file() or tracker_fault(folder) is not None:
        return None
    return read_regular_file(folder / TRACKER).decode(errors="replace").strip()


def structural_fault(checkpoint: Path, *, needs_integrity: bool = True) -> str | None:
    """Why a torch_dist checkpoint cannot be whole, or None.

    Args:
        checkpoint: folder of one iteration.
        needs_integrity: whether it has to hold an integrity.json, every file that is listed there in its
            size, and no other.
    """
    special = special_file(checkpoint)
    if special is not None:
        return f"holds {special}: only files are read"
    for name in NEEDED_FILES:
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size == 0:
            return f"lacks {name}"
    shards = list(checkpoint.glob("*.distcp"))
    if not shards:
        return "lacks .distcp files"
    empty = [path.name for path in shards if path.stat().st_size == 0]
    if empty:
        return f"has an empty {empty[0]}"
    if not needs_integrity:
        return None
    try:
        seal = read_seal(checkpoint)
    except ValueError:
        return f"has a damaged {INTEGRITY_FILE}"
    if seal is None:
        return f"lacks {INTEGRITY_FILE}"
    missing = [name for name in seal.files if not (checkpoint / name).is_file()]
    if missing:
        return f"lacks {missing[0]}"
    for name, size in seal.sizes.items():
        found = (checkpoint / name).stat().st_size
        if found != size:
            return f"is damaged: {name} has {found:,} bytes instead of {size:,}"
    unlisted = unlisted_files(checkpoint, seal.files)
    if unlisted:
        return f"holds {unlisted[0]}, which its {INTEGRITY_FILE} does not list: remove it"
    return None
