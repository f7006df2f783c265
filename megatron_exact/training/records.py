"""What a run leaves behind: `losses.jsonl`, `evaluations.jsonl`, `rows.jsonl`, `spikes.jsonl`,
`throughput.jsonl`.

One JSON object a line and iteration, floats printed so that they read back to the same bits, appended and
flushed at once. On resume, lines beyond the loaded iteration (and a line torn by a kill) are removed
before anything is added, so that a file never tells two stories.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_exact.files import open_regular_file, write_text
from megatron_exact.json_input import parse_json_object
from megatron_exact.training.loss import StepTotals
from megatron_exact.training.watch.spikes import Spike

LOSSES = "losses.jsonl"
EVALUATIONS = "evaluations.jsonl"
ROWS = "rows.jsonl"
SPIKES = "spikes.jsonl"
THROUGHPUT = "throughput.jsonl"


class RunRecords:
    """Append-only records of one run; used on one rank.

    Args:
        run_dir: the run's folder, created if missing.
        iteration: the iteration from which the job goes on; later lines are removed.
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
        """Record one training iteration; one whose step was not taken says `"skipped": true`."""
        objective = totals.objective(divides_by_mass=divides_by_mass)
        line = {**_line(iteration, totals, objective, grad_norm, learning_rate), **self.extra}
        self._append(LOSSES, {**line, "skipped": True} if skipped else line)

    def evaluation(self, iteration: int, totals: StepTotals) -> None:
        """Record one evaluation, unweighted; a resumed job may repeat one that is there already."""
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
        """Losses of the iterations recorded so far."""
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
    """JSON knows no NaN: what is not finite is null."""
    return float(value) if value is not None and math.isfinite(value) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All sound lines of a records file; a last line torn by a kill is left out.

    Raises:
        ValueError: there are lines, and none is the record of an iteration.
    """
    return _split(path)[0] if path.exists() else []


def _split(path: Path) -> tuple[list[dict[str, Any]], list[tuple[int, bytes]], list[tuple[int, bytes]]]:
    """Records of a file, its damaged lines with their numbers, and a last line that a kill tore."""
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

    Damaged lines are moved to a file beside it, and one line says so.
    """
    if not path.exists():
        return
    records, damaged, torn = _split(path)
    if all(line["iteration"] < iteration for line in records):
        damaged += torn  # else it is of a later iteration, which this job repeats
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
