"""Lines with intervals over a few points: by distance, by length, by bucket, by dose.

Each name has a marker, a dash pattern and a colour of its own, the same in every panel, so that lines are
told apart without colour. Where lines have intervals, their points at one place stand beside each other, so
that intervals do not hide each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.files import atomic_file
from megatron_exact.report.figures import INCHES_WIDE, figure_text, new_figure, save_figure

LOOKS: tuple[dict[str, Any], ...] = (
    {"color": "#0072b2", "linestyle": "-", "marker": "o"},
    {"color": "#d55e00", "linestyle": "--", "marker": "s", "markerfacecolor": "white"},
    {"color": "#007a5a", "linestyle": "-.", "marker": "^"},
    {"color": "#a3327b", "linestyle": ":", "marker": "D", "markerfacecolor": "white"},
    {"color": "#3a3a3a", "linestyle": (0, (6, 2)), "marker": "v"},
    {"color": "#8a5a00", "linestyle": (0, (3, 1, 1, 1)), "marker": "P"},
    {"color": "#4b5bb5", "linestyle": (0, (1, 1)), "marker": "X", "markerfacecolor": "white"},
    {"color": "#6b6b6b", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "*"},
)
SPREAD = 0.09
"""Between the points of one place, in steps between places; less where there are many lines."""
INCHES_A_PANEL = 2.5


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a panel; a NaN leaves a gap."""

    name: str
    """For the legend; lines of one name look alike in all panels."""
    at: Sequence[float]
    """Places on the horizontal axis, each one of `Axis.places`."""
    values: Sequence[float]
    """As many."""
    low: Sequence[float] | None = None
    """Lower ends of the intervals; None without intervals."""
    high: Sequence[float] | None = None
    """Upper ends."""
    is_joined: bool = True
    """Whether its points are joined; not where the steps between places stand for nothing."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines over one vertical axis."""

    label: str
    """Of the vertical axis, with its unit; may have line breaks."""
    lines: Sequence[Line]
    """Drawn in this order."""
    has_zero: bool = False
    """Whether a line at 0 belongs to it."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The horizontal axis that all panels share: places with equal steps, whatever they stand for."""

    label: str
    """With its unit; may have line breaks."""
    places: Sequence[float]
    """Ascending."""
    names: Sequence[str]
    """Of the places; long ones are turned."""
    shaded_from: float | None = None
    """Places from this one on are shaded."""
    shaded_name: str = ""
    """What the shade means."""


def plot_lines(path: str | Path, panels: Sequence[Panel], axis: Axis, *, title: str = "") -> None:
    """Write a PNG of panels above each other.

    Args:
        path: of the PNG.
        panels: from top to bottom.
        axis: shared.
        title: above the first panel.
    """
    figure, axes = new_figure(rows=len(panels), heights=[1] * len(panels))
    figure.set_size_inches(INCHES_WIDE, 1.5 + INCHES_A_PANEL * len(panels))
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    if len(names) > len(LOOKS):
        raise ValueError(f"{len(names)} lines in one figure: at most {len(LOOKS)} can be told apart")
    for panel, plot in zip(panels, axes, strict=True):
        _draw_panel(plot, panel, axis, names)
    _mark_places(axes[-1], axis)
    if axis.shaded_name and axis.shaded_from is not None:
        axes[0].text(
            1,
            1.01,
            axis.shaded_name,
            transform=axes[0].transAxes,
            ha="right",
            va="bottom",
            fontsize="small",
        )
    axes[0].set_title(figure_text(title), loc="left", pad=18 if axis.shaded_name else 8, wrap=True)
    _add_legend(figure, axes, names)
    with atomic_file(path) as temporary:
        save_figure(figure, temporary)


def _add_legend(figure: Any, axes: Sequence[Any], names: Sequence[str]) -> None:
    """A legend below the panels, in as many columns, up to three, as the figure is wide enough for.

    Names of the greatest length in the widest letters get a smaller font.
    """
    handles = {
        name: handle
        for plot in axes
        for handle, name in zip(*plot.get_legend_handles_labels(), strict=True)
    }
    layouts = ((3, "medium"), (2, "medium"), (1, "medium"), (1, "small"))
    for columns, font_size in layouts:
        legend = figure.legend(
            [handles[name] for name in names],
            list(map(figure_text, names)),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            handlelength=3.5,
            fontsize=font_size,
        )
        if (columns, font_size) == layouts[-1] or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _draw_panel(plot: Any, panel: Panel, axis: Axis, names: Sequence[str]) -> None:
    index = {place: number for number, place in enumerate(axis.places)}
    if axis.shaded_from is not None and axis.shaded_from in index:
        plot.axvspan(index[axis.shaded_from] - 0.5, len(index) - 0.5, color="0.92", zorder=0)
    if panel.has_zero:
        plot.axhline(0, color="0.3", linewidth=0.8)
    has_intervals = any(line.low is not None for line in panel.lines)
    step = min(SPREAD, 0.6 / max(1, len(panel.lines))) if has_intervals else 0.0
    for order, line in enumerate(panel.lines):
        number = names.index(line.name)
        shift = step * (order - (len(panel.lines) - 1) / 2)
        at = np.array([index[place] for place in line.at]) + shift
        plot.errorbar(
            at,
            np.asarray(line.values, dtype=float),
            yerr=_error_lengths(line),
            label=line.name,
            linewidth=1.4,
            markersize=5.5,
            capsize=3,
            elinewidth=1,
            **LOOKS[number] | ({} if line.is_joined else {"linestyle": "none"}),
        )
    plot.set_ylabel(panel.label)


def _error_lengths(line: Line) -> NDArray[np.float64] | None:
    if line.low is None or line.high is None:
        return None
    values = np.asarray(line.values, dtype=float)
    low, high = np.asarray(line.low, dtype=float), np.asarray(line.high, dtype=float)
    lengths: NDArray[np.float64] = np.maximum(np.nan_to_num(np.stack([values - low, high - values])), 0)
    return lengths


def _mark_places(plot: Any, axis: Axis) -> None:
    is_long = sum(map(len, axis.names)) > 60
    plot.set_xticks(
        range(len(axis.places)),
        axis.names,
        rotation=35 if is_long else 0,
        ha="right" if is_long else "center",
    )
    plot.set_xlim(-0.5, len(axis.places) - 0.5)
    plot.set_xlabel(axis.label)
