"""The result files of a training run, read and checked.

A run writes `run.json`, `losses.jsonl` (one object an iteration) and `evaluations.jsonl` (one object an
evaluation, the same keys). Losses are in nats a target; sums are over supervised targets and unweighted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.json_input import read_json_lines, read_json_object


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of `losses.jsonl` or `evaluations.jsonl`."""

    iteration: int
    """Optimizer steps done."""
    loss: float
    """Unweighted mean over the supervised targets, nats a target; NaN where it was not finite."""
    weighted_loss: float
    """The objective of the run."""
    targets: int
    """Supervised targets of the global batch, or of the evaluation rows."""
    bucket_loss_sums: NDArray[np.float64]
    """[buckets], unweighted sums of loss."""
    bucket_targets: NDArray[np.int64]
    """[buckets], supervised targets."""


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """What one training run left behind."""

    run: dict[str, Any]
    """`run.json`."""
    losses: tuple[Record, ...]
    """By iteration, without gaps or repeats."""
    evaluations: tuple[Record, ...]
    """By iteration; empty where none was asked for."""

    @property
    def final_evaluation(self) -> Record:
        """The last evaluation.

        Raises:
            ValueError: the run has none.
        """
        if not self.evaluations:
            raise ValueError("the run has no evaluation: train it with --eval-iters above 0")
        return self.evaluations[-1]


def read_run(folder: str | Path) -> RunResults:
    """Read the results of the run in `folder`.

    Raises:
        ValueError: a file that is damaged, or iterations that have gaps or repeats.
        FileNotFoundError: `run.json` or `losses.jsonl` is missing.
    """
    folder = Path(folder)
    run = read_json_object(folder / "run.json", "run the training again")
    losses = read_records(folder / "losses.jsonl")
    iterations = [record.iteration for record in losses]
    if iterations != list(range(1, len(losses) + 1)):
        raise ValueError(
            f"{folder / 'losses.jsonl'} does not count its iterations from 1 without gaps or repeats: "
            "it mixes two runs, train again into an empty folder"
        )
    path = folder / "evaluations.jsonl"
    evaluations = read_records(path) if path.exists() else ()
    return RunResults(run=run, losses=losses, evaluations=evaluations)


def read_records(path: str | Path) -> tuple[Record, ...]:
    """Read a file of records, one JSON object a line.

    Raises:
        ValueError: a line that is not such an object, with its number.
    """
    records: list[Record] = []
    for place, value in read_json_lines(path, "the file is damaged, run the training again"):
        try:
            records.append(parse_record(value))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(
                f"{place} is not a record of a run "
                f"({type(error).__name__}: {error}): the file is damaged, run the training again"
            ) from error
    return tuple(records)


def parse_record(value: dict[str, Any]) -> Record:
    """A record from its JSON object; KeyError, TypeError, ValueError or OverflowError for another value."""
    sums = np.array([_number(item) for item in value["bucket_loss_sums"]], dtype=np.float64)
    targets = np.asarray(value["bucket_targets"], dtype=np.int64)
    if sums.ndim != 1 or sums.shape != targets.shape:
        raise ValueError(f"{sums.shape} loss sums for {targets.shape} counts of targets")
    return Record(
        iteration=int(value["iteration"]),
        loss=_number(value["loss"]),
        weighted_loss=_number(value["weighted_loss"]),
        targets=int(value["targets"]),
        bucket_loss_sums=sums,
        bucket_targets=targets,
    )


def _number(value: float | None) -> float:
    """JSON has no NaN: null stands for what was not finite."""
    return float("nan") if value is None else float(value)


def require_paired(baseline: Sequence[Record], treatment: Sequence[Record], what: str) -> None:
    """Raise ValueError unless two runs saw the same numbers of targets at the same iterations."""
    if len(baseline) != len(treatment):
        raise ValueError(
            f"the runs have {len(baseline)} and {len(treatment)} {what}: they are not one pair, "
            "train both with the same schedule"
        )
    for one, other in zip(baseline, treatment, strict=True):
        same = one.iteration == other.iteration and np.array_equal(one.bucket_targets, other.bucket_targets)
        if not same:
            raise ValueError(
                f"the {what} of the runs differ in their targets at iteration {one.iteration}: "
                "they did not see the same rows and cannot be compared"
            )
