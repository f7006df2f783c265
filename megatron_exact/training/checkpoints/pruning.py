"""`--keep-last N`: older checkpoints go once a newer one is complete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_exact.files import fsync_path
from megatron_exact.integrity import INTEGRITY_FILE
from megatron_exact.training.checkpoints.folders import RELEASE, checkpoints_in, iteration_number

DOOMED = ".pruned-"
"""Prefix under which a checkpoint waits to be deleted; nothing looks for checkpoints there."""


def prune(folder: Path, saved: int, keep: int) -> list[str]:
    """Remove complete checkpoints older than the newest `keep`.

    A checkpoint is renamed before it is deleted, so a kill in between leaves no half of one that could be
    taken for a whole. Left alone: folders without integrity.json (a save in progress, or files of somebody
    who can still seal them), iterations above `saved` (a course that was given up), a release.

    Args:
        folder: that the run saves to.
        saved: iteration whose save has just been completed; it always stays.
        keep: number of complete checkpoints to keep, >= 1.

    Returns:
        Names of the removed checkpoints.
    """
    for left in folder.glob(f"{DOOMED}*"):
        shutil.rmtree(left, ignore_errors=True)
    complete = [
        path
        for path in checkpoints_in(folder)
        if path.name != RELEASE
        and iteration_number(path) <= saved
        and (path / INTEGRITY_FILE).is_file()
        and not path.is_symlink()
    ]
    if not complete or iteration_number(complete[0]) != saved:
        return []
    removed = complete[keep:]
    for path in removed:
        doomed = folder / f"{DOOMED}{path.name}"
        os.rename(path, doomed)
        fsync_path(folder)
        shutil.rmtree(doomed, ignore_errors=True)
    return [path.name for path in removed]
