"""`--keep-last N`: older checkpoints go once a newer one is complete and the step after it was good."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_exact.files import fsync_path
from megatron_exact.integrity import INTEGRITY_FILE, read_seal
from megatron_exact.training.checkpoints.folders import RELEASE, checkpoints_in, iteration_number

DOOMED = ".pruned-"
"""Prefix under which a checkpoint waits to be deleted; nothing looks for checkpoints there."""


def prune(folder: Path, saved: int, keep: int, run_id: str | None = None) -> list[str]:
    """Remove complete checkpoints older than the newest `keep`.

    A checkpoint is renamed before it is deleted, so a kill in between leaves no half of one that could be
    taken for a whole. Left alone: folders without integrity.json (a save in progress, or files of somebody
    who can still seal them), iterations above `saved` (a course that was given up), a release, checkpoints
    of another run.

    Args:
        folder: that the run saves to.
        saved: iteration whose save was completed last; it always stays.
        keep: number of complete checkpoints to keep, >= 1.
        run_id: of the run.

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
        and _may_be_of(path, run_id)
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


def _may_be_of(checkpoint: Path, run_id: str | None) -> bool:
    try:
        seal = read_seal(checkpoint)
    except ValueError:  # damaged, but ours as far as anybody knows
        return True
    about = None if seal is None else seal.belonging
    return about is None or None in (about.run_id, run_id) or about.run_id == run_id
