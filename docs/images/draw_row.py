#!/usr/bin/env python3
"""Draw `row.svg`: one packed row, the effective context of its targets, and what EXACT does to them.

The row is made up; the weights are EXACT's, with the paper's parameters, for the targets by bucket of the
pack of docs/tutorial.md, as `tools/inspect_pack.py packs/long` prints them.

  python docs/images/draw_row.py docs/images/row.svg
"""

from __future__ import annotations

import sys

import matplotlib as mpl
import numpy as np

from megatron_exact.exposure import (
    DEFAULT_ALPHA,
    bucket_index,
    bucket_lower_bounds,
    default_tau,
    effective_context,
    exact_weights,
)

ROW_TOKENS = 512
DOCUMENTS = {"A": 70, "B": 304, "C": 48, "D": 90}
COUNTS = (37_795, 38_107, 67_257, 103_647, 126_600, 116_118, 72_315)
"""Targets of `packs/long` by bucket."""
TAIL, SHORT = "#d55e00", "#0072b2"  # told apart by colour-blind readers
FILLS = ("#cfe3f1", "#9fc8e3")


def row_weights() -> tuple[np.ndarray, np.ndarray]:
    """Effective context and weight of every target of the row, [ROW_TOKENS] each."""
    boundaries = np.cumsum([0, *DOCUMENTS.values()])
    context = effective_context(boundaries, last_continues=False)
    lower = bucket_lower_bounds(ROW_TOKENS)
    weights = exact_weights(COUNTS, lower, tau=default_tau(ROW_TOKENS))
    return context, weights[bucket_index(context, ROW_TOKENS)]


def corners(values: np.ndarray) -> np.ndarray:
    """Positions at which a series that is linear in pieces bends, both ends included."""
    bends = np.flatnonzero(np.diff(values, 2)) + 1
    return np.unique([0, *bends, len(values) - 1])


def draw(path: str) -> None:
    """Write the figure."""
    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "row",
        "font.family": "sans-serif",
        "font.size": 12,
    }
    context, weight = row_weights()
    tau = default_tau(ROW_TOKENS)
    figure, (row, ages, weights) = plt.subplots(
        3, 1, figsize=(8.6, 4.7), sharex=True, height_ratios=(0.5, 1.5, 1.1), layout="constrained"
    )
    start = 0
    for number, (name, tokens) in enumerate(DOCUMENTS.items()):
        row.barh(0, tokens, left=start, height=1, color=FILLS[number % 2], edgecolor="black", linewidth=0.8)
        label = f"document {name}: {tokens} tokens" if tokens > 100 else f"{name}: {tokens}"
        row.text(start + tokens / 2, 0, label, ha="center", va="center")
        start += tokens
    row.set_ylim(-0.5, 0.5)
    row.set_axis_off()
    row.set_title(f"one row of {ROW_TOKENS} tokens", loc="left", fontsize=12)

    places = corners(context)
    context = context[places]
    ages.axhspan(tau, 340, color="#fbe6d9", zorder=0)
    ages.fill_between(places, context, color=SHORT, alpha=0.25, linewidth=0)
    ages.plot(places, context, color=SHORT, linewidth=1.4)
    ages.axhline(tau, color=TAIL, linestyle="--", linewidth=1.2)
    ages.text(8, tau + 12, f"the tail: {tau} tokens or more", color=TAIL, va="bottom")
    ages.set_ylim(0, 340)
    ages.set_yticks([0, tau, 256])
    ages.set_ylabel("effective\ncontext")

    places = corners(weight)
    weights.plot(places, weight[places], color=TAIL, linewidth=1.8)
    weights.fill_between(places, 1, weight[places], color=TAIL, alpha=0.25, linewidth=0)
    levels = sorted({float(value) for value in weight})
    for level in levels[1:]:
        first = int(np.argmax(weight == level))
        weights.text(first + 3, level + 0.008, f"{level:.3f}", color=TAIL, va="bottom")
    weights.set_ylim(0.97, max(levels) + 0.07)
    weights.set_yticks([1.0, 1.1, 1.2])
    weights.set_ylabel("weight in\nthe loss")
    weights.set_xlabel(f"position in the row (EXACT, alpha {DEFAULT_ALPHA:g})")
    weights.set_xlim(0, ROW_TOKENS)
    for axis in (ages, weights):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    draw(sys.argv[1])
