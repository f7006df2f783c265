"""How runs are doing, from the files in their folders alone: it works while jobs run, on any machine.

    RUN/run.json, losses.jsonl, throughput.jsonl     what the run is, its last iteration, its speed
    RUN/.lease                                       renewed every few seconds while a job holds the folder
    RUN/logs/submitted.json                          written by `stages --sbatch` when it submits a job
    RUN/logs/JOB-N/last_line, rank-*.log             written by examples/slurm/rank.sh and ending.sh

A job that Slurm cancelled before it began, because the stage before it failed, leaves nothing of its own:
`submitted.json` says which stage that was, and its folder says why.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_exact.command_line import duration, printable
from megatron_exact.files import write_json
from megatron_exact.folder_lock import LEASE, is_held
from megatron_exact.json_input import parse_json_object, read_json_object
from megatron_exact.training.checkpoint_start import tracked_iteration
from megatron_exact.training.run_record import (
    LOSSES,
    RUN_RECORD,
    THROUGHPUT,
    read_run_record,
    restarts_of,
)

SUBMITTED = Path("logs") / "submitted.json"
LAST_LINE = "last_line"
LOGS = re.compile(r"(\d+)-(\d+)")
"""Folder of the logs of one start: JOB-N."""
DEEPEST = 4
"""Levels below a folder in which runs are looked for: OUTPUT/seed/arm/stage."""
TAIL_BYTES = 1 << 16
LONGEST_LINE = 300
FINISHED, RUNNING, NOT_RUNNING = "finished", "running", "not running"
NOT_BEGUN, UNREADABLE = "not begun", "unreadable"


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One run; None where its files do not say."""

    folder: str
    """Its folder."""
    stage: str | None
    """Row length, such as `16k`."""
    arm: str | None
    """Token weighting rule."""
    state: str
    """`finished`, `running`, `not running`, `not begun` or `unreadable`."""
    iteration: int
    """The last one that is recorded."""
    iterations: int | None
    """At its end."""
    saved: int | None
    """Iteration of the last checkpoint."""
    tokens_per_second: float | None
    """Of the last log interval."""
    seconds_left: float | None
    """At that speed, without evaluations and saves; None unless it runs."""
    restarts: int
    """Starts after a fault or a preemption."""
    last_line: str | None
    """What ended its last start, or the last line of the log while it runs."""

    def describe(self) -> list[str]:
        """Return lines for a terminal."""
        total = "?" if self.iterations is None else f"{self.iterations:,}"
        parts = [
            " ".join(filter(None, (self.stage, self.arm))),
            self.state,
            f"iteration {self.iteration:,} of {total}",
            "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f} tokens/s",
            "" if self.seconds_left is None else f"{duration(self.seconds_left)} left",
            f"{self.restarts} restart{'s' * (self.restarts != 1)}" if self.restarts else "",
        ]
        lines = [f"{self.folder}: {'; '.join(part for part in parts if part)}"]
        return lines + ([f"    {self.last_line}"] if self.last_line else [])


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of runs at or below a folder, in order.

    Raises:
        ValueError: there is none.
    """
    found = _runs_below(folder, DEEPEST)
    if not found:
        raise ValueError(
            f"{folder} has no {RUN_RECORD} and no run below it: name the folder of a run (--save), or one "
            "that contains runs"
        )
    return found


def _runs_below(folder: Path, levels: int) -> list[Path]:
    if (folder / RUN_RECORD).exists() or (folder / SUBMITTED).exists() or _starts(folder):
        return [folder]
    if not levels or not folder.is_dir():
        return []
    below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [run for path in below for run in _runs_below(path, levels - 1)]


def record_submission(folder: Path, job: str, previous: Path | None, about: Mapping[str, Any]) -> None:
    """Leave in the folder of a run which job was submitted for it.

    Args:
        folder: of the run.
        job: its number.
        previous: folder of the run that it waits for; None if it waits for none.
        about: `stage`, `arm` and `iterations`.
    """
    waits_for = None if previous is None else os.path.relpath(previous, folder)
    write_json(folder / SUBMITTED, {"job": job, "waits_for": waits_for, **about})


def read_submission(folder: Path) -> dict[str, Any] | None:
    """Return what `record_submission` left, or None.

    Raises:
        ValueError: a damaged file.
    """
    path = folder / SUBMITTED
    return read_json_object(path, "remove it") if path.is_file() else None


def read_status(folder: Path) -> RunStatus:
    """Return how a run is doing; damaged files make it `unreadable`."""
    return _read_or_say_why(folder, explains=True)


def _read_or_say_why(folder: Path, *, explains: bool) -> RunStatus:
    try:
        return _read(folder, explains=explains)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        is_plain = isinstance(error, ValueError | OSError | AttributeError)
        line = str(error) if is_plain else f"{type(error).__name__}: {error}"
        return RunStatus(
            folder=str(folder),
            stage=None,
            arm=None,
            state=UNREADABLE,
            iteration=0,
            iterations=None,
            saved=None,
            tokens_per_second=None,
            seconds_left=None,
            restarts=0,
            last_line=line,
        )


def _read(folder: Path, *, explains: bool) -> RunStatus:
    """Read the files of a run.

    Args:
        folder: of its records.
        explains: whether to read, for a run that has not begun, the one that it waits for.
    """
    record, submitted = read_run_record(folder), read_submission(folder) or {}
    stage, arm, iterations = (submitted.get(name) for name in ("stage", "arm", "iterations"))
    if record is not None:
        stage, arm = row_length_name(int(record["row_tokens"])), str(record["weighting"]["rule"])
        iterations = record["schedule"].get("train_iters")
    losses, speed = last_record(folder / LOSSES), last_record(folder / THROUGHPUT)
    iteration, save = (losses or {}).get("iteration", 0), _save_folder(folder, record)
    saved = None if save is None else tracked_iteration(save)
    done = iteration if save is None else saved or 0
    is_running = is_held(folder / LEASE)
    if not is_running and iterations is not None and done >= iterations:
        state = FINISHED
    elif is_running:
        state = RUNNING
    else:
        state = NOT_BEGUN if record is None and not _starts(folder) else NOT_RUNNING
    left = None
    if state == RUNNING and speed is not None and iterations is not None:
        left = max(0, iterations - iteration) * speed["seconds"] / speed["iterations"]
    line = _last_line(folder, is_running)
    if state == NOT_BEGUN and line is None and explains:
        line = _why_not_begun(folder, submitted)
    return RunStatus(
        folder=str(folder),
        stage=stage,
        arm=arm,
        state=state,
        iteration=iteration,
        iterations=iterations,
        saved=saved,
        tokens_per_second=None if speed is None else float(speed["tokens_per_second"]),
        seconds_left=left,
        restarts=len(restarts_of(record or {})),
        last_line=line,
    )


def _save_folder(folder: Path, record: Mapping[str, Any] | None) -> Path | None:
    """Return where a run saves, from its record; None if it saves nothing."""
    places = {} if record is None else record.get("places", {})
    save, run_dir = places.get("save"), places.get("run_dir")
    if run_dir is None:  # the records are where the run saves
        return folder
    if save is None:
        return None
    # both may be relative to the folder in which the job was started, or have been moved together
    return Path(os.path.normpath(folder / os.path.relpath(save, run_dir)))


def row_length_name(row_tokens: int) -> str:
    """Return the name of a stage: `16k` for rows of 16,384 tokens, `96` for rows of 96."""
    rows, rest = divmod(row_tokens, 1024)
    return str(row_tokens) if rest else f"{rows}k"


def _why_not_begun(folder: Path, submitted: Mapping[str, Any]) -> str | None:
    """Return what a job waits or waited for, from the run that it starts from."""
    job, waits_for = submitted.get("job"), submitted.get("waits_for")
    if waits_for is None:
        return None if job is None else f"submitted as job {job}"
    previous = Path(os.path.normpath(folder / str(waits_for)))
    before = _read_or_say_why(previous, explains=False)  # runs may wait for each other in a circle
    if before.state == FINISHED:
        return f"submitted as job {job}, after {before.folder}, which is finished"
    if before.state == NOT_RUNNING and before.last_line:
        return f"job {job} waits for {before.folder}, or ended with it: {before.last_line}"
    return f"job {job} waits for {before.folder}, which is {before.state}"


def _last_line(folder: Path, is_running: bool) -> str | None:
    """Return the last line of the newest start: of its log while it runs, else what ended it."""
    starts = _starts(folder)
    if not starts:
        return None
    logs = starts[-1]
    told = tail(logs / LAST_LINE)
    if told and not is_running:
        return told[-1]
    ranks = sorted(logs.glob("rank-*.log"))
    lines = tail(ranks[-1]) if ranks else []
    return lines[-1] if lines else None


def _starts(folder: Path) -> list[Path]:
    """Return the folders with the logs of each start of a job, oldest first."""
    found = [
        (int(match[1]), int(match[2]), path)
        for path in (folder / "logs").glob("*-*")
        if (match := LOGS.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, _, path in sorted(found)]


def _last_bytes(path: Path) -> bytes:
    """Return the end of a file; nothing of a missing one."""
    try:
        with open(path, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - TAIL_BYTES))
            return stream.read()
    except FileNotFoundError:
        return b""


def tail(path: Path) -> list[str]:
    """Return the last lines of a file without empty ones, fit for a terminal; none of a missing file."""
    text = _last_bytes(path).decode("utf-8", errors="replace")
    return [printable(line.strip())[:LONGEST_LINE] for line in text.split("\n") if line.strip()]


def last_record(path: Path) -> dict[str, Any] | None:
    """Return the last intact line of a records file; a job may be writing another one."""
    for line in reversed(_last_bytes(path).split(b"\n")):
        try:
            record = parse_json_object(line, str(path), "see the run")
        except ValueError:
            continue
        if type(record.get("iteration")) is int:
            return record
    return None


def as_json(found: Sequence[RunStatus]) -> str:
    """Return the runs as JSON text: `{"runs": [...]}`."""
    return json.dumps({"runs": [asdict(status) for status in found]}, indent=1)
