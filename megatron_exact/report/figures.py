"""What all figures share: a canvas without display, and styles that survive printing in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_exact.report.page import one_line

INCHES_WIDE = 7.0
INCHES_HIGH = 4.8
DOTS_PER_INCH = 150
LONGEST_NAME = 60
"""Characters; a name that is longer is cut in figures, tables have it whole."""

# Line style and marker tell the runs apart, colour only helps.
STYLES: dict[str, dict[str, Any]] = {
    "baseline": {"color": "#0072b2", "linestyle": "-", "marker": "o", "markersize": 4, "linewidth": 1.4},
    "treatment": {
        "color": "#d55e00",
        "linestyle": "--",
        "marker": "s",
        "markersize": 5,
        "linewidth": 1.4,
        "markerfacecolor": "none",
    },
}


def new_figure(*, rows: int, heights: Sequence[float]) -> tuple[Any, Any]:
    """A figure of `rows` panels above each other with a shared horizontal axis.

    Returns:
        The figure and its axes [rows]. It belongs to no window and no global state of matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES_WIDE, INCHES_HIGH), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, height_ratios=list(heights), squeeze=False)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def figure_text(text: str) -> str:
    """A name from a user's file as a figure may show it: short, no control characters, no mathematics."""
    words = one_line(text)
    if len(words) > LONGEST_NAME:
        words = words[: LONGEST_NAME - 3] + "..."
    return words.replace("$", r"\$")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write the figure as PNG, whatever the suffix of `path`, without dates: equal data, equal bytes."""
    figure.savefig(path, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
