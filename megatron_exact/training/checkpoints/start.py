"""Where a job starts from: the beginning, a checkpoint of another run, or its own last one.

`--load` equal to `--save` is the resume idiom: with nothing there the job starts from the beginning, or
from `--pretrained-checkpoint`, and says so. Any other `--load` must hold an intact checkpoint. Checkpoints
newer than the tracker names belong to a save that was cut off or to a course that was given up, and are not
taken. Upstream would start from scratch, or stop, with exit code 0 in these cases
(megatron/training/checkpointing.py, `_load_base_checkpoint`).

A checkpoint of another run, or one that was renamed, is not damage: the job stops, since to go on from an
older one would hide a mistake. Where a newer checkpoint is damaged, the older one that it went on from is
taken, and no other that lies beside it.

Here the choice is made by names and sizes, before Megatron is imported; hashes are compared once the ranks
have met (`verification.py`), and may move the choice to an older iteration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_exact.integrity import INTEGRITY_FILE, OwnRun, Previous, Seal, read_seal
from megatron_exact.training.checkpoints.folders import (
    TRACKER,
    checkpoints_in,
    is_cut_off_first_save,
    iteration_number,
    structural_fault,
    tracked_iteration,
    tracker_fault,
)
from megatron_exact.training.run_record import read_run_record

UNKNOWN_RUN = OwnRun()


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
    run: OwnRun = UNKNOWN_RUN
    """The run that the checkpoints belong to."""
    previous: Previous | None = None
    """What the chosen checkpoint went on from, as far as it says so."""

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
    run_dir: str | Path | None = None,
) -> Start:
    """Decide what `--load`, `--pretrained-checkpoint` and `--ckpt-step` mean.

    Args:
        load: folder of checkpoints; equal to `save` it means resume, or start if there is none yet.
        save: folder this job saves to.
        pretrained: where the weights come from when `load` holds no checkpoint.
        step: the iteration asked for, else the newest intact one.
        needs_integrity: whether a checkpoint without integrity.json is passed over.
        run_dir: folder of the job's run.json where that is not `save`.

    Raises:
        ValueError: no intact checkpoint where there has to be one, or one of another run.
    """
    is_own = is_own_folder(load, save)
    is_begun = load is not None and is_own and is_cut_off_first_save(Path(load))
    if load is not None and checkpoints_in(Path(load)) and not is_begun:
        # In a command that is started again and again, the step belongs to where it first came from
        own_step = None if is_own and pretrained is not None else step
        run = OwnRun.of(read_run_record(Path(run_dir or load) if is_own else Path(load)))
        return _newest(Path(load), own_step, needs_integrity, run, is_resume=is_own, weights_only=False)
    if pretrained is not None:
        if not checkpoints_in(Path(pretrained)):
            raise ValueError(f"--pretrained-checkpoint {pretrained} holds no checkpoint: check the path")
        run = OwnRun.of(read_run_record(Path(pretrained)))
        return _newest(Path(pretrained), step, needs_integrity, run, is_resume=False, weights_only=True)
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
    folder: Path,
    step: int | None,
    needs_integrity: bool,
    run: OwnRun,
    *,
    is_resume: bool,
    weights_only: bool,
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
    not_read = tracker_fault(folder)
    start = Start(
        load=folder,
        checkpoint=None,
        iteration=None,
        is_resume=is_resume,
        weights_only=weights_only,
        message="",
        not_taken=(
            *([not_read] if not_read is not None else []),
            *(f"{path.name} is newer than {TRACKER} says" for path in candidates[:num_given_up]),
        ),
        run=run,
    )
    return _take(start, candidates[num_given_up:], needs_integrity=needs_integrity)


def _take(start: Start, candidates: Sequence[Path], *, needs_integrity: bool) -> Start:
    """The decision for the first of these checkpoints that can be whole."""
    assert start.load is not None
    not_taken = list(start.not_taken)
    newer, expected = start.checkpoint, start.previous
    for position, checkpoint in enumerate(candidates):
        seal = _seal_of(checkpoint)
        fault = structural_fault(checkpoint, needs_integrity=needs_integrity)
        refusal = start.run.refusal(iteration_number(checkpoint), seal, is_checked=needs_integrity)
        if fault is None and refusal is not None and newer is None:
            raise ValueError(
                f"{checkpoint} {refusal}; put the right {checkpoint.name} back, or remove this one to go "
                "on from an older one"
            )
        off_course = refusal or _chain_fault(checkpoint, seal, newer, expected)
        fault = fault or off_course
        if expected is not None and iteration_number(checkpoint) <= expected.iteration:
            expected = None
        if off_course is None:
            newer = checkpoint
            if seal is not None and seal.belonging is not None:
                expected = seal.belonging.previous or expected
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
            previous=expected,
            message=f"{verb} from {checkpoint.name} of {start.load}{skipped}{_doubt(seal)}",
        )
    raise ValueError(_no_intact_checkpoint(start.load, not_taken))


def _seal_of(checkpoint: Path) -> Seal | None:
    try:
        return read_seal(checkpoint)
    except (ValueError, OSError):
        return None


def _chain_fault(
    checkpoint: Path, seal: Seal | None, newer: Path | None, expected: Previous | None
) -> str | None:
    """Why an older checkpoint is not the one that a newer one went on from."""
    if newer is None or expected is None:
        return None
    number = iteration_number(checkpoint)
    if number > expected.iteration:
        return f"is not in the course that led to {newer.name}, which went on from {expected.iteration}"
    if number < expected.iteration or seal is None or seal.sha256 == expected.sha256:
        return None
    if seal.belonging is not None and seal.belonging.origin == "sealed":
        return None  # its first integrity.json was lost
    return f"is not the checkpoint that {newer.name} went on from: its {INTEGRITY_FILE} is another"


def _doubt(seal: Seal | None) -> str:
    """What is not known of a checkpoint that is taken."""
    if seal is None:
        return ""
    if seal.belonging is None:
        return f"; its {INTEGRITY_FILE} names no run: Megatron or an older version wrote it"
    if seal.belonging.origin == "sealed":
        return "; it was sealed after it was saved: nothing shows which run it belongs to"
    return ""


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
