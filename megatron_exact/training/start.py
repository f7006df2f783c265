"""Where a job starts from: the beginning, a checkpoint of another run, or its own last one.

`--load` equal to `--save` is the resume idiom: with nothing there the job starts from the beginning, or
from `--pretrained-checkpoint`, and says so. Any other `--load` must hold an intact checkpoint. Checkpoints
newer than the tracker names belong to a save that was cut off or to a course that was given up, and are not
taken. Upstream would start from scratch, or stop, with exit code 0 in these cases
(megatron/training/checkpointing.py, `_load_base_checkpoint`).
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.files import sha256_file

TRACKER = "latest_checkpointed_iteration.txt"
NEEDED_FILES = (".metadata", "metadata.json")


@dataclass(frozen=True, kw_only=True)
class Start:
    """Decision about `--load`."""

    load: Path | None
    """Folder that upstream is to load from, or None to start from the beginning."""
    checkpoint: Path | None
    """Folder of the chosen iteration inside it."""
    iteration: int | None
    """Its number; None for a release checkpoint or no checkpoint."""
    is_resume: bool
    """Whether it is the run's own checkpoint."""
    weights_only: bool
    """Whether iteration, optimizer and random state start afresh (`--pretrained-checkpoint`)."""
    message: str
    """One line for the log."""

    def arguments(self) -> list[str]:
        """The Megatron flags that carry the decision out."""
        if self.load is None:
            return []
        flags = ["--load", str(self.load)]
        if self.iteration is not None:
            flags += ["--ckpt-step", str(self.iteration)]
        if self.weights_only:
            flags += ["--finetune"]
        return flags


def is_own_folder(load: str | None, save: str | None) -> bool:
    """Whether `--load` equals `--save`, the resume idiom."""
    return load is not None and save is not None and Path(load).resolve() == Path(save).resolve()


def choose_start(
    load: str | None, save: str | None, pretrained: str | None = None, step: int | None = None
) -> Start:
    """Decide what `--load`, `--pretrained-checkpoint` and `--ckpt-step` mean.

    Args:
        load: folder of checkpoints; equal to `save` it means resume, or start if there is none yet.
        save: folder this job saves to.
        pretrained: where the weights come from when `load` holds no checkpoint.
        step: the iteration asked for, else the newest intact one.

    Raises:
        ValueError: no intact checkpoint where there has to be one.
    """
    is_own = is_own_folder(load, save)
    if load is not None and _checkpoints(Path(load)):
        # In a command that is started again and again, the step belongs to where it first came from
        own_step = None if is_own and pretrained is not None else step
        return _newest_intact(Path(load), is_resume=is_own, weights_only=False, step=own_step)
    if pretrained is not None:
        if not _checkpoints(Path(pretrained)):
            raise ValueError(f"--pretrained-checkpoint {pretrained} holds no checkpoint: check the path")
        return _newest_intact(Path(pretrained), is_resume=False, weights_only=True, step=step)
    if load is None:
        message = "no --load: starting fresh"
    elif is_own:
        message = f"--load equals --save and {load} holds no checkpoint: starting fresh"
    else:
        raise ValueError(
            f"--load {load} holds no checkpoint: check the path, or drop --load to start fresh"
        )
    return Start(
        load=None, checkpoint=None, iteration=None, is_resume=False, weights_only=False, message=message
    )


def _newest_intact(folder: Path, *, is_resume: bool, weights_only: bool, step: int | None) -> Start:
    candidates = _checkpoints(folder)
    if step is not None:
        candidates = [path for path in candidates if path.name == f"iter_{step:07d}"]
        if not candidates:
            raise ValueError(f"--ckpt-step {step}: {folder} holds no iter_{step:07d}")
    newest = _tracked_iteration(folder)
    abandoned = [path for path in candidates if step is None and newest and _iteration(path) > newest]
    damaged = [f"{path.name} is newer than {TRACKER} says" for path in abandoned]
    for checkpoint in candidates[len(abandoned) :]:
        fault = _fault(checkpoint)
        if fault is not None:
            damaged.append(f"{checkpoint.name} {fault}")
            continue
        skipped = f" (not taken: {'; '.join(damaged)})" if damaged else ""
        verb = "resuming" if is_resume else "starting"
        return Start(
            load=folder,
            checkpoint=checkpoint,
            iteration=_iteration(checkpoint) or None,
            is_resume=is_resume,
            weights_only=weights_only,
            message=f"{verb} from {checkpoint.name} of {folder}{skipped}",
        )
    raise ValueError(
        f"{folder} holds no intact checkpoint: {'; '.join(damaged)}; "
        "copy an intact one there, or choose another --save to start again"
    )


def _iteration(checkpoint: Path) -> int:
    """Number of a checkpoint folder, 0 for a release."""
    return 0 if checkpoint.name == "release" else int(checkpoint.name.removeprefix("iter_"))


def _tracked_iteration(folder: Path) -> int | None:
    """The iteration that the tracker names, None without a tracker or for a release.

    Raises:
        ValueError: a tracker that says neither.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(errors="replace").strip()
    if text == "release":
        return None
    if not text.isdigit():
        raise ValueError(
            f"{tracker} says {text[:40]!r}, neither an iteration nor 'release': "
            "write the number of the checkpoint to load into it"
        )
    return int(text)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the one to try first in front: release if the tracker says so, newest first."""
    if not folder.is_dir():
        return []
    release = folder / "release"
    tracker = folder / TRACKER
    if release.is_dir() and tracker.is_file() and tracker.read_text().strip() == "release":
        return [release]
    iterations = [path for path in folder.glob("iter_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(iterations, key=_iteration, reverse=True)


def _fault(checkpoint: Path) -> str | None:
    """Why a torch_dist checkpoint cannot be whole, or None."""
    for name in NEEDED_FILES:
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size == 0:
            return f"lacks {name}"
    shards = list(checkpoint.glob("*.distcp"))
    if not shards:
        return "lacks .distcp files"
    empty = [path.name for path in shards if path.stat().st_size == 0]
    return f"has an empty {empty[0]}" if empty else None


def require_free_run(save: str | None, run_dir: str | Path | None, start: Start, *, is_own: bool) -> None:
    """Refuse to begin a run in a folder that holds another one; its records would be lost.

    Args:
        save: folder this job saves to.
        run_dir: folder of the records.
        start: the decision.
        is_own: whether `--load` equals `--save`: then a run that was stopped before its first save
            begins again, if `run.json` agrees (`write_run_record`).

    Raises:
        ValueError: names what lies there.
    """
    if start.is_resume:
        return
    there = [path.name for path in _checkpoints(Path(save))] if save is not None else []
    if run_dir is not None and not is_own:
        there += [name for name in ("run.json", "losses.jsonl") if (Path(run_dir) / name).exists()]
    if there:
        raise ValueError(
            f"{run_dir or save} holds a run already ({', '.join(there[:3])}): go on with it by --load "
            "equal to --save, or choose another --save"
        )


def checkpoint_identity(start: Start) -> dict[str, Any] | None:
    """What tells two starting points apart: iteration and a hash over all of its files.

    Returns:
        {"path", "iteration", "sha256"}, or None for a fresh start. The path is for humans.
    """
    if start.checkpoint is None:
        return None
    files = sorted(path for path in start.checkpoint.rglob("*") if path.is_file())
    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing releases the GIL
        digests = list(pool.map(sha256_file, files))
    whole = hashlib.sha256()
    for path, digest in zip(files, digests, strict=True):
        whole.update(f"{path.relative_to(start.checkpoint)} {digest}\n".encode())
    return {
        "path": str(start.checkpoint),
        "iteration": start.iteration,
        "sha256": whole.hexdigest(),
    }
