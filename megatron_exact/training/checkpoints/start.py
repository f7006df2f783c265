"""Where a job starts from: the beginning, a checkpoint of another run, or its own last one.

`--load` equal to `--save` is the resume idiom: with nothing there the job starts from the beginning, or
from `--pretrained-checkpoint`, and says so. Any other `--load` must hold an intact checkpoint. Checkpoints
newer than the tracker names belong to a save that was cut off or to a course that was given up, and are not
taken. Upstream would start from scratch, or stop, with exit code 0 in these cases
(megatron/training/checkpointing.py, `_load_base_checkpoint`).

Here the choice is made by names and sizes, before Megatron is imported; hashes are compared once the ranks
have met (`verification.py`), and may move the choice to an older iteration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_exact.integrity import INTEGRITY_FILE
from megatron_exact.training.checkpoints.folders import (
    TRACKER,
    checkpoints_in,
    is_cut_off_first_save,
    iteration_number,
    structural_fault,
    tracked_iteration,
)


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
    carries_optimizer: bool = False
    """Whether the states of the optimizer come along all the same (`--carry-optimizer`)."""
    older: tuple[Path, ...] = ()
    """Checkpoints to fall back on, newest first, not yet looked at."""
    not_taken: tuple[str, ...] = ()
    """Checkpoints that were passed over, each with its fault."""

    def arguments(self) -> list[str]:
        """The Megatron flags that carry the decision out."""
        if self.load is None:
            return []
        flags = ["--load", str(self.load)]
        if self.iteration is not None:
            flags += ["--ckpt-step", str(self.iteration)]
        if self.carries_optimizer:
            flags += ["--no-load-rng"]  # the rest is set back after loading (`hooks.py`)
        elif self.weights_only:
            flags += ["--finetune"]
        return flags

    def carrying_optimizer(self) -> Start:
        """The same start with the optimizer's states, where there are any."""
        if not self.weights_only:
            return self
        if self.iteration is None:
            note = "; it holds no optimizer: --carry-optimizer begins with fresh states"
            return dataclasses.replace(self, message=self.message + note)
        message = f"{self.message}, with the states of its optimizer"
        return dataclasses.replace(self, carries_optimizer=True, message=message)

    def fall_back(self, fault: str) -> Start:
        """The decision for the next older checkpoint.

        Args:
            fault: of the chosen one, to follow its name.

        Raises:
            ValueError: there is no older one.
        """
        assert self.load is not None
        assert self.checkpoint is not None
        return _take(
            dataclasses.replace(self, not_taken=(*self.not_taken, f"{self.checkpoint.name} {fault}")),
            self.older,
            needs_integrity=True,
        )


def is_own_folder(load: str | None, save: str | None) -> bool:
    """Whether `--load` equals `--save`, the resume idiom."""
    return load is not None and save is not None and Path(load).resolve() == Path(save).resolve()


def choose_start(
    load: str | None,
    save: str | None,
    pretrained: str | None = None,
    step: int | None = None,
    *,
    needs_integrity: bool = True,
) -> Start:
    """Decide what `--load`, `--pretrained-checkpoint` and `--ckpt-step` mean.

    Args:
        load: folder of checkpoints; equal to `save` it means resume, or start if there is none yet.
        save: folder this job saves to.
        pretrained: where the weights come from when `load` holds no checkpoint.
        step: the iteration asked for, else the newest intact one.
        needs_integrity: whether a checkpoint without integrity.json is passed over.

    Raises:
        ValueError: no intact checkpoint where there has to be one.
    """
    is_own = is_own_folder(load, save)
    is_begun = load is not None and is_own and is_cut_off_first_save(Path(load))
    if load is not None and checkpoints_in(Path(load)) and not is_begun:
        # In a command that is started again and again, the step belongs to where it first came from
        own_step = None if is_own and pretrained is not None else step
        return _newest(Path(load), own_step, needs_integrity, is_resume=is_own, weights_only=False)
    if pretrained is not None:
        if not checkpoints_in(Path(pretrained)):
            raise ValueError(f"--pretrained-checkpoint {pretrained} holds no checkpoint: check the path")
        return _newest(Path(pretrained), step, needs_integrity, is_resume=False, weights_only=True)
    if load is None:
        message = "no --load: starting fresh"
    elif is_own:
        there = "a first save that was cut off" if is_begun else "no checkpoint"
        message = f"--load equals --save and {load} holds {there}: starting fresh"
    else:
        raise ValueError(
            f"--load {load} holds no checkpoint: check the path, or drop --load to start fresh"
        )
    return Start(
        load=None, checkpoint=None, iteration=None, is_resume=False, weights_only=False, message=message
    )


def _newest(
    folder: Path, step: int | None, needs_integrity: bool, *, is_resume: bool, weights_only: bool
) -> Start:
    """The newest checkpoint that can be whole, and the older ones behind it."""
    candidates = checkpoints_in(folder)
    if step is not None:
        candidates = [path for path in candidates if path.name == f"iter_{step:07d}"]
        if not candidates:
            raise ValueError(f"--ckpt-step {step}: {folder} holds no iter_{step:07d}")
    newest = tracked_iteration(folder)
    is_given_up = [bool(step is None and newest and iteration_number(path) > newest) for path in candidates]
    num_given_up = sum(is_given_up)  # newest first
    start = Start(
        load=folder,
        checkpoint=None,
        iteration=None,
        is_resume=is_resume,
        weights_only=weights_only,
        message="",
        not_taken=tuple(f"{path.name} is newer than {TRACKER} says" for path in candidates[:num_given_up]),
    )
    return _take(start, candidates[num_given_up:], needs_integrity=needs_integrity)


def _take(start: Start, candidates: Sequence[Path], *, needs_integrity: bool) -> Start:
    """The decision for the first of these checkpoints that can be whole."""
    assert start.load is not None
    not_taken = list(start.not_taken)
    for position, checkpoint in enumerate(candidates):
        fault = structural_fault(checkpoint, needs_integrity=needs_integrity)
        if fault is not None:
            not_taken.append(f"{checkpoint.name} {fault}")
            continue
        skipped = f" (not taken: {'; '.join(not_taken)})" if not_taken else ""
        verb = "resuming" if start.is_resume else "starting"
        return dataclasses.replace(
            start,
            checkpoint=checkpoint,
            iteration=iteration_number(checkpoint) or None,
            older=tuple(candidates[position + 1 :]),
            not_taken=tuple(not_taken),
            message=f"{verb} from {checkpoint.name} of {start.load}{skipped}",
        )
    raise ValueError(_no_intact_checkpoint(start.load, not_taken))


def _no_intact_checkpoint(folder: Path, not_taken: Sequence[str]) -> str:
    """The error for a folder of which every checkpoint has a fault."""
    remedy = "copy an intact one there, or choose another --save to start again"
    if any(fault.endswith(f" lacks {INTEGRITY_FILE}") for fault in not_taken):
        remedy = (
            f"tools/seal_checkpoint.py {folder} gives an older, whole checkpoint its {INTEGRITY_FILE} "
            "(--skip-integrity-check loads without); else " + remedy
        )
    return f"{folder} holds no intact checkpoint: {'; '.join(not_taken)}; {remedy}"


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
    there = [path.name for path in checkpoints_in(Path(save))] if save is not None else []
    if save is not None and is_own and is_cut_off_first_save(Path(save)):
        there = []
    if run_dir is not None and not is_own:
        there += [name for name in ("run.json", "losses.jsonl") if (Path(run_dir) / name).exists()]
    if there:
        raise ValueError(
            f"{run_dir or save} holds a run already ({', '.join(there[:3])}): go on with it by --load "
            "equal to --save, or choose another --save"
        )
