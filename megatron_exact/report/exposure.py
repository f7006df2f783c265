"""The exposure table: targets per bucket of effective context, before and after weighting.

"After weighting" means the share of the training signal: targets times weight over its sum, figure 1 of
EXACT (arXiv 2605.10544).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_exact.exposure import Weighting, build_weighting
from megatron_exact.exposure.weights import EmptyTailError
from megatron_exact.report.buckets import bucket_labels
from megatron_exact.report.figures import new_figure, save_figure
from megatron_exact.report.tables import markdown_table, plain_table

HEAD = ("effective context", "targets", "share", "weight", "share after")
ExposureRow = dict[str, Any]


def exposure_table(lower_bounds: ArrayLike, counts: ArrayLike, weights: ArrayLike) -> list[ExposureRow]:
    """One row a bucket.

    Args:
        lower_bounds: integers [buckets], tokens.
        counts: integers [buckets], supervised targets.
        weights: floats [buckets], weight of a target.

    Returns:
        {`lower`, `targets`, `share`, `weight`, `weighted_share`}; both shares sum to 1 (0 without targets).
    """
    targets = np.asarray(counts, dtype=np.float64)
    mass = targets * np.asarray(weights, dtype=np.float64)
    shares = targets / max(targets.sum(), 1)
    weighted_shares = mass / mass.sum() if mass.sum() > 0 else mass
    columns = (np.asarray(lower_bounds), np.asarray(counts), shares, np.asarray(weights), weighted_shares)
    return [
        {
            "lower": int(lower),
            "targets": int(count),
            "share": float(share),
            "weight": float(weight),
            "weighted_share": float(weighted_share),
        }
        for lower, count, share, weight, weighted_share in zip(*columns, strict=True)
    ]


def weigh_for_display(
    counts: ArrayLike, lower_bounds: ArrayLike, row_tokens: int, *, alpha: float, gamma: float, tau: float
) -> tuple[Weighting, str | None]:
    """EXACT's weights, and what to say where its tail is empty and training would refuse it.

    Args:
        counts: integers [buckets], targets of the train split.
        lower_bounds: integers [buckets], tokens.
        row_tokens: inputs of a row.
        alpha, gamma, tau: see `exposure.exact_weights`.

    Raises:
        ValueError: parameters that no pack permits.
    """
    place = (counts, lower_bounds, row_tokens)
    try:
        return build_weighting("exact", *place, alpha=alpha, gamma=gamma, tau=tau), None
    except EmptyTailError as error:
        parameters = {"alpha": alpha, "gamma": gamma, "tau": float(tau)}
        weighting = replace(build_weighting("none", *place), rule="exact", parameters=parameters)
        return weighting, f"note: every weight is shown as 1, training would refuse EXACT here: {error}"


def tail_summary(table: Sequence[Mapping[str, Any]], tau: float) -> dict[str, Any]:
    """The buckets from `tau` tokens upwards, taken together.

    Returns:
        {`tau`, `lower_bounds`, `targets`, `share`, `weighted_share`, `mean_extra_weight`}; the last is
        the mean of weight - 1 over the tail's targets, alpha under EXACT, 0 without targets.
    """
    tail = [row for row in table if row["lower"] >= tau]
    targets = sum(row["targets"] for row in tail)
    extra = sum(row["targets"] * (row["weight"] - 1) for row in tail)
    return {
        "tau": tau,
        "lower_bounds": [row["lower"] for row in tail],
        "targets": targets,
        "share": sum(row["share"] for row in tail),
        "weighted_share": sum(row["weighted_share"] for row in tail),
        "mean_extra_weight": extra / targets if targets else 0.0,
    }


def format_exposure_table(
    table: Sequence[Mapping[str, Any]], *, row_tokens: int, tau: float, markdown: bool = False
) -> str:
    """The table and a sentence about the tail, aligned for a terminal or as Markdown.

    Args:
        table: from `exposure_table`.
        row_tokens: inputs of a row.
        tau: from how many tokens a bucket belongs to the tail; such rows are marked `*`.
        markdown: a Markdown table instead of plain columns.
    """
    labels = bucket_labels([row["lower"] for row in table], row_tokens)
    body = [
        [
            label + (" *" if row["lower"] >= tau else ""),
            f"{row['targets']:,}",
            f"{row['share']:.2%}",
            f"{row['weight']:.4f}",
            f"{row['weighted_share']:.2%}",
        ]
        for label, row in zip(labels, table, strict=True)
    ]
    tail = tail_summary(table, tau)
    sentence = (
        f"* tail, from tau = {tau:,g} tokens: {tail['share']:.2%} of {sum(r['targets'] for r in table):,} "
        f"targets, {tail['weighted_share']:.2%} of the signal after weighting "
        f"(mean extra weight {tail['mean_extra_weight']:.4f})"
    )
    if markdown:
        return markdown_table(HEAD, body) + "\n" + sentence.replace("*", "\\*", 1) + "\n"
    return "\n".join([*plain_table(HEAD, body), "", sentence]) + "\n"


def plot_exposure(
    path: str | Path, table: Sequence[Mapping[str, Any]], *, row_tokens: int, tau: float, title: str = ""
) -> None:
    """Draw share of targets and of training signal by bucket as a PNG, the tail shaded.

    Args:
        path: file to write.
        table: from `exposure_table`.
        row_tokens: inputs of a row.
        tau: from how many tokens a bucket belongs to the tail.
        title: above the figure.
    """
    figure, axes = new_figure(rows=1, heights=[1])
    axis = axes[0]
    places = np.arange(len(table))
    before = np.array([row["share"] for row in table]) * 100
    after = np.array([row["weighted_share"] for row in table]) * 100
    tail = tail_summary(table, tau)
    first = len(table) - len(tail["lower_bounds"])
    if tail["lower_bounds"]:
        axis.axvspan(first - 0.5, len(table) - 0.5, color="0.92", zorder=0)
        axis.text(
            len(table) - 0.55,
            1.01,
            f"tail, from {tau:,g} tokens: {tail['share']:.1%} of targets, "
            f"{tail['weighted_share']:.1%} after weighting",
            transform=axis.get_xaxis_transform(),
            ha="right",
            va="bottom",
            fontsize="small",
        )
    # Plain against hatched bars: told apart without colour.
    axis.bar(places - 0.2, before, 0.4, color="#0072b2", edgecolor="black", label="targets")
    axis.bar(
        places + 0.2, after, 0.4, color="#f0c9a8", edgecolor="black", hatch="///", label="after weighting"
    )
    axis.set_xticks(
        places, bucket_labels([row["lower"] for row in table], row_tokens), rotation=35, ha="right"
    )
    axis.set_xlim(-0.6, len(table) - 0.4)
    axis.set_xlabel("effective left context of the target (tokens)")
    axis.set_ylabel("share (%)")
    axis.set_title(title, loc="left", pad=18)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)
