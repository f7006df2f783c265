"""Where a job starts from: the beginning, a checkpoint of another run, or its own last one.

    FOLDER/latest_checkpointed_iteration.txt    the tracker: a number, or `release`
    FOLDER/iter_0000100/ or FOLDER/release/     .metadata, metadata.json, *.distcp, integrity.json

`--load` equal to `--save` is the resume idiom: with nothing there the job starts from the beginning, or
from `--pretrained-checkpoint`, and logs that. Any other `--load` must contain an intact checkpoint.
Checkpoints newer than the tracker's belong to a save that was cut off or to a course that was given up, and
are skipped. Megatron would start from scratch, or stop, with exit code 0 in these cases
(megatron/training/checkpointing.py, `_load_base_checkpoint`).

A checkpoint of another run, or one that was renamed, is not damage: the job stops, since resuming from an
older one would hide a mistake. Where a newer checkpoint is damaged, the job takes the older one that it
continued, and no other that lies beside it.

The choice is made by names and sizes, before Megatron is imported. Hashes are compared once the ranks have
met (`checkpoint_integrity.py`), and may move the choice to an older iteration.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_exact.conversion.checkpoint_layout import MOST_DIGITS, is_iteration_name
from megatron_exact.files import kind_of_file, read_regular_file
from megatron_exact.integrity import (
    INTEGRITY_FILE,
    OwnRun,
    Previous,
    Seal,
    read_seal,
    special_file,
    unlisted_files,
)
from megatron_exact.training.run_record import read_run_record

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
NEEDED_FILES = (".metadata", "metadata.json")


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first, or the release alone if the tracker names it.

    Folders with other names than Megatron's are ignored.
    """
    if not folder.is_dir():
        return []
    release = folder / RELEASE
    if release.is_dir() and _tracker_text(folder) == RELEASE:
        return [release]
    iterations = [path for path in folder.glob("iter_*") if is_iteration_name(path.name) and path.is_dir()]
    return sorted(iterations, key=iteration_number, reverse=True)


def is_cut_off_first_save(folder: Path) -> bool:
    """Return whether a folder contains only the beginning of a save: no seal, and no tracker yet.

    integrity.json is written before the tracker, so a run that was killed later than this has one.
    """
    there = checkpoints_in(folder)
    is_sealed = any((checkpoint / INTEGRITY_FILE).exists() for checkpoint in there)
    return bool(there) and not is_sealed and not (folder / TRACKER).exists()


def iteration_number(checkpoint: Path) -> int:
    """Return the number of a checkpoint folder, 0 for a release."""
    return 0 if checkpoint.name == RELEASE else int(checkpoint.name.removeprefix("iter_"))


def tracked_iteration(folder: Path) -> int | None:
    """Return the iteration that the tracker names; None without one, for a release, or an empty file.

    Megatron writes the tracker in place, so a full disk or a kill leaves it empty.

    Raises:
        ValueError: a tracker with other content.
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
    """Return why the tracker is not read: it is a link, a FIFO, a device or a folder; else None."""
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
    """Return why a torch_dist checkpoint cannot be whole, or None.

    Args:
        checkpoint: folder of one iteration.
        needs_integrity: whether it must have an integrity.json, every file that is listed there in its
            size, and no other file.
    """
    special = special_file(checkpoint)
    if special is not None:
        return f"contains {special}: only files are read"
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
        return f"contains {unlisted[0]}, which its {INTEGRITY_FILE} does not list: remove it"
    return None


MOST_POINTS = 1000


def resume_schedule(
    stock_load: Callable[[Any, dict[str, Any]], None], scheduler: Any, state: dict[str, Any]
) -> None:
    """Set a scheduler to a checkpoint's position, on the curve that this job's flags describe.

    Megatron compares the settings of the schedule one by one and stops with a traceback, even where they
    mean the same: a constant rate has no length. Here the two curves are compared over what was already
    trained. Where they agree, the flags decide how the rate continues. A curve that would have been
    different from the start is an error without `--override-opt-param-scheduler`.

    Args:
        stock_load: Megatron's `load_state_dict`.
        scheduler: Megatron's OptimizerParamScheduler, made from this job's flags.
        state: scheduler state of the run's checkpoint.

    Raises:
        ValueError: the flags describe another curve than the one the run has followed so far.
    """
    if not (scheduler.override_opt_param_scheduler or scheduler.use_checkpoint_opt_param_scheduler):
        _require_same_past(scheduler, state)
    scheduler.override_opt_param_scheduler = not scheduler.use_checkpoint_opt_param_scheduler
    stock_load(scheduler, state)


def _require_same_past(scheduler: Any, state: dict[str, Any]) -> None:
    past = copy.copy(scheduler)
    for name in set(state) & set(vars(scheduler)) - {"num_steps"}:
        setattr(past, name, state[name])
    trained = state["num_steps"]
    for step in range(0, trained + 1, max(1, trained // MOST_POINTS)):
        before, now = (_values_at(curve, step) for curve in (past, scheduler))
        if before.timed != now.timed and before.rate == now.rate:
            raise ValueError(
                "the run has followed another --qk-timing window over the samples trained so far "
                f"({past.qk_window}, now {scheduler.qk_window}), as the window is a part of the length of "
                "the training: give the length of the beginning, or --override-opt-param-scheduler to "
                "continue with this job's window from here"
            )
        if before != now:
            raise ValueError(
                f"the run has followed a {state['lr_decay_style']} learning rate over "
                f"{state['lr_decay_steps']:,} samples; this job's flags make it "
                f"{scheduler.lr_decay_steps:,} and another curve from the start (at sample {step:,}: "
                f"{before.rate:.6g}, now {now.rate:.6g}): give the --lr-decay-iters of the beginning, or "
                "--override-opt-param-scheduler to change over at this point"
            )


class _Values(NamedTuple):
    """The values that a scheduler sets at one position."""

    rate: float
    """Learning rate."""
    timed: float
    """Learning rate of the groups that `--qk-timing` slows down; without it the same as `rate`."""
    weight_decay: float
    """Weight decay before the multiplier of a group."""


def _values_at(scheduler: Any, step: int) -> _Values:
    """Return the values at a position, counted in samples."""
    curve = copy.copy(scheduler)
    curve.num_steps = step
    return _Values(curve.get_lr({}), curve.get_lr({"lr_mult": 0.0}), curve.get_wd())


UNKNOWN_RUN = OwnRun()


@dataclass(frozen=True, kw_only=True)
class Start:
    """The decision about `--load`."""

    load: Path | None
    """Folder from which Megatron loads, or None to start from the beginning."""
    checkpoint: Path | None
    """Folder of the chosen iteration inside it."""
    iteration: int | None
    """Number of the iteration; None for a release checkpoint or no checkpoint."""
    is_resume: bool
    """Whether it is the run's own checkpoint."""
    weights_only: bool
    """Whether iteration, optimizer and random state start fresh (`--pretrained-checkpoint`)."""
    message: str
    """One line for the log."""
    carries_optimizer: bool = False
    """Whether the states of the optimizer are loaded nevertheless (`--carry-optimizer`)."""
    older: tuple[Path, ...] = ()
    """Checkpoints to fall back on, newest first, not yet checked."""
    not_taken: tuple[str, ...] = ()
    """Checkpoints that were passed over, each with its fault."""
    run: OwnRun = UNKNOWN_RUN
    """The run that the checkpoints belong to."""
    previous: Previous | None = None
    """The checkpoint that the chosen one continued, if it names one."""

    def arguments(self) -> list[str]:
        """Return the Megatron flags of the decision."""
        if self.load is None:
            return []
        flags = ["--load", str(self.load)]
        if self.iteration is not None:
            flags += ["--ckpt-step", str(self.iteration)]
        if self.carries_optimizer:
            flags += ["--no-load-rng"]  # the rest is set back after loading (`substitutions.py`)
        elif self.weights_only:
            flags += ["--finetune"]
        return flags

    def carrying_optimizer(self) -> Start:
        """Return the same start with the optimizer's states, where there are any."""
        if not self.weights_only:
            return self
        if self.iteration is None:
            note = "; it contains no optimizer: --carry-optimizer begins with fresh states"
            return dataclasses.replace(self, message=self.message + note)
        message = f"{self.message}, with the states of its optimizer"
        return dataclasses.replace(self, carries_optimizer=True, message=message)

    def fall_back(self, fault: str) -> Start:
        """Return the decision for the next older checkpoint.

        Args:
            fault: fault of the chosen one, as words that follow its name.

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
    """Return whether `--load` equals `--save`, the resume idiom."""
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
        pretrained: where the weights come from when `load` contains no checkpoint.
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
            raise ValueError(f"--pretrained-checkpoint {pretrained} contains no checkpoint: check the path")
        run = OwnRun.of(read_run_record(Path(pretrained)))
        return _newest(Path(pretrained), step, needs_integrity, run, is_resume=False, weights_only=True)
    if load is None:
        message = "no --load: starting fresh"
    elif is_own:
        there = "a first save that was cut off" if is_begun else "no checkpoint"
        message = f"--load equals --save and {load} contains {there}: starting fresh"
    else:
        raise ValueError(
            f"--load {load} contains no checkpoint: check the path, or drop --load to start fresh"
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
    """Return the decision for the newest checkpoint that can be whole, with the older ones behind it."""
    candidates = checkpoints_in(folder)
    if step is not None:
        candidates = [path for path in candidates if path.name == f"iter_{step:07d}"]
        if not candidates:
            raise ValueError(f"--ckpt-step {step}: {folder} contains no iter_{step:07d}")
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
    """Return the decision for the first of these checkpoints that can be whole."""
    assert start.load is not None
    not_taken = list(start.not_taken)
    newer, expected = start.checkpoint, start.previous
    for position, checkpoint in enumerate(candidates):
        seal = _seal_of(checkpoint)
        fault = structural_fault(checkpoint, needs_integrity=needs_integrity)
        refusal = start.run.refusal(iteration_number(checkpoint), seal, is_checked=needs_integrity)
        if fault is None and refusal is not None and newer is None:
            raise ValueError(
                f"{checkpoint} {refusal}; put the right {checkpoint.name} back, or remove this one to "
                "resume from an older one"
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
    """Return why an older checkpoint is not the one that a newer one continued, or None."""
    if newer is None or expected is None:
        return None
    number = iteration_number(checkpoint)
    if number > expected.iteration:
        return (
            f"is not in the course that led to {newer.name}, which continued iteration {expected.iteration}"
        )
    if number < expected.iteration or seal is None or seal.sha256 == expected.sha256:
        return None
    if seal.belonging is not None and seal.belonging.origin == "sealed":
        return None  # its first integrity.json was lost
    return f"is not the checkpoint that {newer.name} continued: its {INTEGRITY_FILE} is another"


def _doubt(seal: Seal | None) -> str:
    """Return what is not known about a checkpoint that is taken."""
    if seal is None:
        return ""
    if seal.belonging is None:
        return f"; its {INTEGRITY_FILE} names no run: Megatron or an older version wrote it"
    if seal.belonging.origin == "sealed":
        return "; it was sealed after it was saved: nothing shows which run it belongs to"
    return ""


def _no_intact_checkpoint(folder: Path, not_taken: Sequence[str]) -> str:
    """Return the error for a folder whose checkpoints all have a fault."""
    remedy = "copy an intact one there, or choose another --save to start again"
    if any(fault.endswith(f" lacks {INTEGRITY_FILE}") for fault in not_taken):
        remedy = (
            f"megatron-exact seal-checkpoint {folder} gives an older, whole checkpoint its "
            f"{INTEGRITY_FILE} (--skip-integrity-check loads without); else " + remedy
        )
    return f"{folder} contains no intact checkpoint: {'; '.join(not_taken)}; {remedy}"


def require_free_run(save: str | None, run_dir: str | Path | None, start: Start, *, is_own: bool) -> None:
    """Raise where a new run would begin in the folder of another one, whose records would be lost.

    Args:
        save: folder this job saves to.
        run_dir: folder of the records.
        start: the decision.
        is_own: whether `--load` equals `--save`: then a run that was stopped before its first save
            begins again, if `run.json` agrees (`write_run_record`).

    Raises:
        ValueError: the folder contains another run.
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
            f"{run_dir or save} already contains a run ({', '.join(there[:3])}): resume it by --load "
            "equal to --save, or choose another --save"
        )
