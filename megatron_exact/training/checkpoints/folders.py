"""What lies in a folder of checkpoints, judged by names and sizes alone.

    FOLDER/latest_checkpointed_iteration.txt    the tracker: a number, or `release`
    FOLDER/iter_0000100/ or FOLDER/release/     .metadata, metadata.json, *.distcp, integrity.json

Contents are hashed later, by all ranks together (`verification.py`).
"""

from __future__ import annotations

from pathlib import Path

from megatron_exact.integrity import INTEGRITY_FILE, read_integrity

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
NEEDED_FILES = (".metadata", "metadata.json")


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoint folders, the one to try first in front: release if the tracker says so, newest first."""
    if not folder.is_dir():
        return []
    release = folder / RELEASE
    tracker = folder / TRACKER
    if release.is_dir() and tracker.is_file() and tracker.read_text(errors="replace").strip() == RELEASE:
        return [release]
    iterations = [path for path in folder.glob("iter_*") if path.is_dir() and path.name[5:].isdigit()]
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
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(errors="replace").strip()
    if text in ("", RELEASE):
        return None
    if not (text.isascii() and text.isdigit()):
        raise ValueError(
            f"{tracker} says {text[:40]!r}, neither an iteration nor 'release': "
            "write the number of the checkpoint to load into it"
        )
    return int(text)


def structural_fault(checkpoint: Path, *, needs_integrity: bool = True) -> str | None:
    """Why a torch_dist checkpoint cannot be whole, or None.

    Args:
        checkpoint: folder of one iteration.
        needs_integrity: whether it has to hold an integrity.json, and every file that is listed there.
    """
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
        files = read_integrity(checkpoint)
    except ValueError:
        return f"has a damaged {INTEGRITY_FILE}"
    if files is None:
        return f"lacks {INTEGRITY_FILE}"
    missing = [name for name in files if not (checkpoint / name).is_file()]
    if missing:
        return f"lacks {missing[0]}"
    return None
