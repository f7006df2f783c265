"""The result files of a training run, read and checked, and the loss of two runs by effective context.

A run writes `run.json`, `losses.jsonl` (one object an iteration) and `evaluations.jsonl` (one object an
evaluation, the same keys). Losses are in nats a target; sums are over supervised targets and unweighted.

Both runs of a pair are scored on identical targets, so a difference of bucket means is a paired difference.
These files do not contain its variance across seeds, so a report of one pair must say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_exact.json_input import read_json_lines, read_json_object
from megatron_exact.report.figures import STYLES, new_figure, save_figure
from megatron_exact.report.page import markdown_table


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
    """The result files of one training run."""

    run: dict[str, Any]
    """`run.json`."""
    losses: tuple[Record, ...]
    """Training losses by iteration, without gaps or repeats."""
    evaluations: tuple[Record, ...]
    """Evaluations by iteration; empty for a run without evaluations."""

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
    """Make a record from its JSON object.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: the object is not a record.
    """
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
    """Read a number; null stands for one that was not finite, since JSON has no NaN."""
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


@dataclass(frozen=True, kw_only=True)
class BucketComparison:
    """Loss of two runs on the same targets of one bucket, or of several together."""

    label: str
    """Range of effective context in tokens, such as `8-15`, or the name of a group."""
    targets: int
    """Supervised targets, the same in both runs."""
    baseline: float
    """Mean loss, nats a target; NaN without targets."""
    treatment: float
    """Mean loss, nats a target; NaN without targets."""

    @property
    def difference(self) -> float:
        """Treatment minus baseline: negative means that the treatment predicts better."""
        return self.treatment - self.baseline


def bucket_labels(lower_bounds: ArrayLike, row_tokens: int) -> list[str]:
    """Return ranges of effective context such as `0-7`; the top one ends with the row length."""
    edges = [int(edge) for edge in np.asarray(lower_bounds)]
    uppers = [edge - 1 for edge in edges[1:]] + [row_tokens]
    return [f"{low:,}-{high:,}" for low, high in zip(edges, uppers, strict=True)]


def compare_buckets(
    baseline: Record, treatment: Record, lower_bounds: ArrayLike, row_tokens: int
) -> list[BucketComparison]:
    """Compare bucket by bucket, shortest context first.

    Args:
        baseline: an evaluation of one run.
        treatment: the same evaluation of the other run.
        lower_bounds: integers [buckets], tokens.
        row_tokens: inputs of a packed row.

    Raises:
        ValueError: the two do not count the same targets, or not these buckets.
    """
    require_paired([baseline], [treatment], "evaluations")
    labels = bucket_labels(lower_bounds, row_tokens)
    if len(labels) != len(baseline.bucket_targets):
        raise ValueError(
            f"the evaluation has {len(baseline.bucket_targets)} buckets, the pack has {len(labels)}: "
            "they belong to different packs"
        )
    return [
        compare_group(label, baseline, treatment, np.arange(len(labels)) == bucket)
        for bucket, label in enumerate(labels)
    ]


def compare_group(label: str, baseline: Record, treatment: Record, chosen: ArrayLike) -> BucketComparison:
    """Compare over all targets of the chosen buckets together; `chosen`: bool [buckets]."""
    mask = np.asarray(chosen, dtype=bool)
    targets = int(baseline.bucket_targets[mask].sum())

    def mean(record: Record) -> float:
        return float(record.bucket_loss_sums[mask].sum() / targets) if targets else float("nan")

    return BucketComparison(
        label=label, targets=targets, baseline=mean(baseline), treatment=mean(treatment)
    )


def format_comparisons(rows: Sequence[BucketComparison], *, baseline_name: str, treatment_name: str) -> str:
    """Return a Markdown table of comparisons, losses with four decimals."""
    head = ["effective context", "targets", baseline_name, treatment_name, "difference"]
    body = [
        [
            row.label,
            f"{row.targets:,}",
            _nats(row.baseline, ".4f"),
            _nats(row.treatment, ".4f"),
            _nats(row.difference, "+.4f"),
        ]
        for row in rows
    ]
    return markdown_table(head, body)


def _nats(value: float, form: str) -> str:
    return "-" if np.isnan(value) else format(value, form)


def plot_comparisons(
    path: str | Path,
    rows: Sequence[BucketComparison],
    *,
    first_tail_bucket: int,
    baseline_name: str,
    treatment_name: str,
) -> None:
    """Write a PNG: mean loss of both runs by bucket, and their difference below.

    Args:
        path: path of the PNG.
        rows: one for each bucket, from `compare_buckets`.
        first_tail_bucket: buckets from this one on are shaded as the tail.
        baseline_name: name in the legend.
        treatment_name: name in the legend.
    """
    figure, (upper, lower) = new_figure(rows=2, heights=(3, 2))
    at = np.arange(len(rows))
    for axis in (upper, lower):
        axis.axvspan(first_tail_bucket - 0.5, len(rows) - 0.5, color="0.92", zorder=0)
    upper.plot(at, [row.baseline for row in rows], label=baseline_name, **STYLES["baseline"])
    upper.plot(at, [row.treatment for row in rows], label=treatment_name, **STYLES["treatment"])
    upper.set_ylabel("validation loss\n(nats a target)")
    upper.legend(frameon=False, title="tail buckets shaded")
    lower.axhline(0, color="0.3", linewidth=0.8)
    lower.bar(at, [row.difference for row in rows], color="0.55", edgecolor="black", hatch="//", width=0.6)
    lower.set_ylabel(f"{treatment_name}\nminus {baseline_name}\n(nats a target)")
    lower.set_xlabel("effective left context of the target (tokens)")
    lower.set_xticks(at, [row.label for row in rows], rotation=30, ha="right")
    save_figure(figure, path)
