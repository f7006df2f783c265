"""Loss by effective context: two runs over the same targets, bucket by bucket.

Both runs are scored on identical targets, so a difference of bucket means is a paired difference. Its
noise across seeds is not in these files: a report of one pair must say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from megatron_exact.files import atomic_file
from megatron_exact.report.figures import STYLES, new_figure, save_figure
from megatron_exact.report.results import Record, require_paired
from megatron_exact.report.tables import markdown_table


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
    """Ranges of effective context, such as `0-7`; the top one is closed by the row length."""
    edges = [int(edge) for edge in np.asarray(lower_bounds)]
    uppers = [edge - 1 for edge in edges[1:]] + [row_tokens]
    return [f"{low:,}-{high:,}" for low, high in zip(edges, uppers, strict=True)]


def compare_buckets(
    baseline: Record, treatment: Record, lower_bounds: ArrayLike, row_tokens: int
) -> list[BucketComparison]:
    """One comparison a bucket, shortest context first.

    Args:
        baseline: an evaluation of one run.
        treatment: the same evaluation of the other.
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
    """The comparison over all targets of the chosen buckets together; `chosen`: bool [buckets]."""
    mask = np.asarray(chosen, dtype=bool)
    targets = int(baseline.bucket_targets[mask].sum())

    def mean(record: Record) -> float:
        return float(record.bucket_loss_sums[mask].sum() / targets) if targets else float("nan")

    return BucketComparison(
        label=label, targets=targets, baseline=mean(baseline), treatment=mean(treatment)
    )


def format_comparisons(rows: Sequence[BucketComparison], *, baseline_name: str, treatment_name: str) -> str:
    """A Markdown table of comparisons, losses to four decimals."""
    head = ["effective context", "targets", baseline_name, treatment_name, "difference"]
    body = [
        [
            row.label,
            f"{row.targets:,}",
            _number(row.baseline, ".4f"),
            _number(row.treatment, ".4f"),
            _number(row.difference, "+.4f"),
        ]
        for row in rows
    ]
    return markdown_table(head, body)


def _number(value: float, form: str) -> str:
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
        path: of the PNG.
        rows: one a bucket, from `compare_buckets`.
        first_tail_bucket: buckets from this one on are shaded as the tail.
        baseline_name: for the legend.
        treatment_name: for the legend.
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
    with atomic_file(path) as temporary:
        save_figure(figure, temporary)
