"""Records of a run: JSON lines of each iteration, and curves for TensorBoard and W&B.

`losses.jsonl`, `evaluations.jsonl`, `rows.jsonl`, `spikes.jsonl` and `throughput.jsonl` have one JSON
object a line, with floats printed so that they read back bit-identical. Each line is appended and flushed
at once. A resume first removes the lines beyond the loaded iteration, and a line torn by a kill, so that a
file never describes two histories.

A killed job has also drawn points beyond that iteration. TensorBoard leaves out what lies behind a purge
step; W&B keeps one point of each step if the jobs name the same run. Points are written with a delay, so
they are flushed before each save: a resume then misses none.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

from megatron_exact.exposure import Weighting
from megatron_exact.files import open_regular_file, write_text
from megatron_exact.json_input import parse_json_object
from megatron_exact.training.loss import StepTotals
from megatron_exact.training.numerical_watch import Spike
from megatron_exact.training.run_record import EVALUATIONS, LOSSES, ROWS, SPIKES, THROUGHPUT


def draw_totals(name: str, iteration: int, totals: StepTotals, weighting: Weighting) -> None:
    """Add one point to each TensorBoard curve; a loss that is not finite is left out.

    Args:
        name: `training` or `validation`, which is never weighted.
        iteration: the iteration of the point.
        totals: totals over all ranks.
        weighting: the weighting of the run.
    """
    writer = get_tensorboard_writer()
    if writer is None or not math.isfinite(totals.loss):
        return
    divides_by_mass = weighting.divides_by_mass and name == "training"
    writer.add_scalar(f"{name}/loss", totals.loss, iteration)
    writer.add_scalar(f"{name}/weighted loss", totals.objective(divides_by_mass=divides_by_mass), iteration)
    buckets = zip(weighting.lower_bounds, totals.bucket_loss_sums, totals.bucket_targets, strict=True)
    for lower, loss_sum, targets in buckets:
        if targets:
            writer.add_scalar(f"{name} loss by context/{lower:06d}", loss_sum / targets, iteration)


def drop_points_after(iteration: int) -> None:
    """Make TensorBoard leave out the points that an earlier job of this run drew after an iteration."""
    writer = get_tensorboard_writer()
    if writer is None:
        return
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    # As torch's SummaryWriter does for `purge_step`, which it would need before the checkpoint is chosen
    first = iteration + 1
    events = writer._get_file_writer()
    events.add_event(Event(step=first, file_version="brain.Event:2"))
    events.add_event(Event(step=first, session_log=SessionLog(status=SessionLog.START)))


def flush_points() -> None:
    """Write the points drawn so far to disk."""
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.flush()


def join_wandb_run(args: Any, first: Mapping[str, Any] | None) -> None:
    """Let a resumed job log into the W&B run that its first job opened; called before Megatron opens one.

    Args:
        args: Megatron's validated namespace.
        first: run.json of the run, None at its beginning.
    """
    if args.wandb_project and first is not None and "wandb_run" in first:
        os.environ.setdefault("WANDB_RUN_ID", str(first["wandb_run"]))
        os.environ.setdefault("WANDB_RESUME", "allow")


def wandb_run_id() -> str | None:
    """Return the id of the W&B run into which this rank logs, or None."""
    wandb = get_wandb_writer()
    return None if wandb is None else str(wandb.run.id)


class RunRecords:
    """Append-only records of one run; used on one rank.

    Args:
        run_dir: the run's folder, created if missing.
        iteration: the iteration from which the job resumes; later lines are removed.
    """

    def __init__(self, run_dir: Path, iteration: int) -> None:
        self.run_dir = run_dir
        self.extra: dict[str, float] = {}  # of the coming iteration, beside what every run records
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (LOSSES, EVALUATIONS, ROWS, SPIKES, THROUGHPUT):
            drop_lines_after(run_dir / name, iteration)
        self._evaluated = {line["iteration"] for line in read_lines(run_dir / EVALUATIONS)}

    def iteration(
        self,
        iteration: int,
        totals: StepTotals,
        *,
        divides_by_mass: bool,
        grad_norm: float | None,
        learning_rate: float | None,
        skipped: bool = False,
    ) -> None:
        """Record one training iteration, with `"skipped": true` where its step was not taken."""
        objective = totals.objective(divides_by_mass=divides_by_mass)
        line = {**_line(iteration, totals, objective, grad_norm, learning_rate), **self.extra}
        self._append(LOSSES, {**line, "skipped": True} if skipped else line)

    def evaluation(self, iteration: int, totals: StepTotals) -> None:
        """Record one evaluation, unweighted; one that a resumed job repeats is not recorded twice."""
        if iteration not in self._evaluated:
            self._evaluated.add(iteration)
            self._append(EVALUATIONS, _line(iteration, totals, totals.loss, None, None))

    def rows(self, iteration: int, epoch: int, rows: Iterable[int]) -> None:
        """Record which rows of the pack an iteration saw."""
        self._append(ROWS, {"iteration": iteration, "epoch": epoch, "rows": list(rows)})

    def spike(self, iteration: int, spike: Spike, epoch: int, rows: Iterable[int]) -> None:
        """Record an iteration whose loss stands out, with the rows that it saw."""
        line = {"iteration": iteration, **asdict(spike), "epoch": epoch, "rows": list(rows)}
        self._append(SPIKES, line)

    def losses(self) -> list[float | None]:
        """Return the losses of the iterations recorded so far."""
        return [line["loss"] for line in read_lines(self.run_dir / LOSSES)]

    def throughput(self, line: dict[str, Any]) -> None:
        """Record a log interval; `line` has `iteration`, the last of the interval."""
        self._append(THROUGHPUT, line)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with open(self.run_dir / name, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")


def _line(
    iteration: int,
    totals: StepTotals,
    objective: float,
    grad_norm: float | None,
    learning_rate: float | None,
) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "loss": _finite(totals.loss),
        "weighted_loss": _finite(objective),
        "targets": totals.targets,
        "grad_norm": _finite(grad_norm),
        "learning_rate": _finite(learning_rate),
        "bucket_loss_sums": [_finite(value) for value in totals.bucket_loss_sums],
        "bucket_targets": totals.bucket_targets,
    }


def _finite(value: float | None) -> float | None:
    """Return None for a value that is not finite, since JSON has no NaN."""
    return float(value) if value is not None and math.isfinite(value) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the intact lines of a records file, without damaged ones or a last line torn by a kill.

    Raises:
        ValueError: the file has lines, but none is the record of an iteration.
    """
    return _split(path)[0] if path.exists() else []


def _split(path: Path) -> tuple[list[dict[str, Any]], list[tuple[int, bytes]], list[tuple[int, bytes]]]:
    """Return the records of a file, its damaged lines by number, and a last line torn by a kill."""
    with open_regular_file(path) as stream:
        *ended, last = stream.read().split(b"\n")
    records, damaged = [], []
    for number, text in enumerate([*ended, last] if last else ended, start=1):
        try:
            record = parse_json_object(text, f"{path}, line {number}", "restore it")
            if type(record.get("iteration")) is not int:
                raise ValueError("no iteration")
            records.append(record)
        except ValueError:
            damaged.append((number, text))
    torn = [line for line in damaged if line[0] > len(ended)]
    damaged = damaged[: len(damaged) - len(torn)]
    if damaged and not records:
        raise ValueError(f"{path} has no record of an iteration: restore it, or move it away")
    return records, damaged, torn


def drop_lines_after(path: Path, iteration: int) -> None:
    """Keep the lines up to and including `iteration`; rewrite the file only if there are others.

    Damaged lines are moved to a file beside it, which is logged in one line.
    """
    if not path.exists():
        return
    records, damaged, torn = _split(path)
    if all(line["iteration"] < iteration for line in records):
        damaged += torn  # otherwise it belongs to a later iteration, which this job repeats
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        with open(aside, "ab") as stream:
            stream.writelines(text + b"\n" for _, text in damaged)
        numbers = ", ".join(str(number) for number, _ in damaged[:10])
        print(f"megatron_exact: {path}: damaged lines ({numbers}) were moved to {aside.name}", flush=True)
    kept = [line for line in records if line["iteration"] <= iteration]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in kept)
    if text.encode() != path.read_bytes():
        write_text(path, text)
