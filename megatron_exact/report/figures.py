"""Figures: one palette, line plots with intervals, and heat maps.

Figures use neither a display nor the global state of matplotlib, and they can be printed in grey: line
styles, markers and hatching distinguish things, and colour only helps. In `plot_lines` each name has its
own marker, dash pattern and colour, the same in every panel; where lines have intervals, their points at
one place are drawn beside each other, so that intervals do not hide each other. `plot_fields` draws heat
maps with numbers in their cells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_exact.files import atomic_file
from megatron_exact.report.page import one_line

INCHES_WIDE = 7.0
INCHES_HIGH = 4.8
DOTS_PER_INCH = 150
LONGEST_NAME = 60
"""Characters of a name in a figure; longer names are truncated there and complete in tables."""

BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#e69f00",
)
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE)
"""The palette of Okabe and Ito, whose colours differ for any kind of colour vision."""
STYLES: dict[str, dict[str, Any]] = {
    "baseline": {"color": BLUE, "linestyle": "-", "marker": "o", "markersize": 4, "linewidth": 1.4},
    "treatment": {
        "color": VERMILION,
        "linestyle": "--",
        "marker": "s",
        "markersize": 5,
        "linewidth": 1.4,
        "markerfacecolor": "none",
    },
}
"""Lines of the two runs of a pair."""
BARS: tuple[dict[str, Any], dict[str, Any]] = (
    {"color": BLUE, "edgecolor": "black"},
    {"color": "#f0c9a8", "edgecolor": "black", "hatch": "///"},
)
"""Bars before and after something: plain against hatched."""
LOOKS: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "linestyle": "-", "marker": "o"},
    {"color": VERMILION, "linestyle": "--", "marker": "s", "markerfacecolor": "white"},
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
COLOUR_MAP = "PuOr_r"
"""Dark at both ends and white at 0; in grey, the signs of the numbers distinguish the ends."""
DARK = 0.18
"""Relative luminance below which white is easier to read than black."""
LINE_INCHES = 0.42
AXIS_INCHES, LETTER_INCHES = 5.6, 0.085
"""Length of a horizontal axis, and of a letter of the names below it."""
STEPS = 30
"""A figure shows so many digits that its largest number has at least this many steps above 0."""


def digits_for(scale: float) -> int:
    """Return how many digits behind the point numbers up to `scale` get, 0 to 4."""
    return min(max(math.ceil(math.log10(STEPS / scale)), 0), 4) if scale > 0 else 0


def signed_text(value: float, digits: int) -> str:
    """Return a number with its sign; what rounds to 0 has none."""
    rounded = round(value, digits)
    return f"{rounded:+.{digits}f}" if rounded else f"{0:.{digits}f}"


def new_figure(*, rows: int, heights: Sequence[float]) -> tuple[Any, Any]:
    """Make a figure of `rows` panels above each other with a shared horizontal axis.

    Returns:
        The figure and its axes [rows], independent of windows and of matplotlib's global state.
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
    """Make a name from a user's file safe for a figure: short, without control characters and formulas."""
    words = one_line(text)
    if len(words) > LONGEST_NAME:
        words = words[: LONGEST_NAME - 3] + "..."
    return words.replace("$", r"\$")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write the figure atomically as PNG, whatever the suffix of `path`, without dates: equal data, equal
    bytes."""
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a panel; a NaN leaves a gap."""

    name: str
    """Name in the legend; lines with one name look alike in all panels."""
    at: Sequence[float]
    """Places on the horizontal axis, each one of `Axis.places`."""
    values: Sequence[float]
    """Value at each place."""
    low: Sequence[float] | None = None
    """Lower ends of the intervals; None without intervals."""
    high: Sequence[float] | None = None
    """Upper ends of the intervals."""
    is_joined: bool = True
    """Whether its points are joined; False where the steps between places have no meaning."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Lines over one vertical axis."""

    label: str
    """Label of the vertical axis, with its unit; may have line breaks."""
    lines: Sequence[Line]
    """Lines in the order of drawing."""
    has_zero: bool = False
    """Whether to draw a line at 0."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The horizontal axis that all panels share."""

    label: str
    """Label with its unit; may have line breaks."""
    places: Sequence[float]
    """Places, ascending."""
    names: Sequence[str]
    """Names of the places; long ones are rotated."""
    shaded_from: float | None = None
    """Places from this one on are shaded."""
    shaded_name: str = ""
    """What the shade means."""
    is_log: bool = False
    """Whether places are drawn at their logarithm, one step a doubling, instead of with equal steps."""

    def positions(self) -> dict[float, float]:
        """Return where each place is drawn."""
        if self.is_log:
            return {place: math.log2(place) for place in self.places}
        return {place: float(number) for number, place in enumerate(self.places)}


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
        raise ValueError(f"{len(names)} lines in one figure: at most {len(LOOKS)} can be distinguished")
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
    save_figure(figure, path)


def _add_legend(figure: Any, axes: Sequence[Any], names: Sequence[str]) -> None:
    """Add a legend below the panels, in up to three columns as far as they fit.

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
    index = axis.positions()
    if axis.shaded_from is not None and axis.shaded_from in index:
        plot.axvspan(index[axis.shaded_from] - 0.5, max(index.values()) + 0.5, color="0.92", zorder=0)
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
    # NaN draws no bar, and a point without an interval must not look certain
    lengths: NDArray[np.float64] = np.maximum(np.stack([values - low, high - values]), 0)
    return lengths


def name_ticks(plot: Any, at: Sequence[float], names: Sequence[str]) -> None:
    """Name the ticks of a horizontal axis; names that would touch each other are rotated."""
    widest = max((len(line) for name in names for line in name.split("\n")), default=0)
    steps = np.diff(np.asarray(at, dtype=float))
    inches = AXIS_INCHES * float(steps.min() / (at[-1] - at[0] + 1)) if steps.size else AXIS_INCHES
    is_long = widest * LETTER_INCHES > inches
    plot.set_xticks(list(at), names, rotation=35 if is_long else 0, ha="right" if is_long else "center")


def _mark_places(plot: Any, axis: Axis) -> None:
    at = [axis.positions()[place] for place in axis.places]
    name_ticks(plot, at, axis.names)
    plot.set_xlim(at[0] - 0.5, at[-1] + 0.5)
    plot.set_xlabel(axis.label)


@dataclass(frozen=True, kw_only=True)
class Field:
    """One heat map."""

    title: str
    """Title above the map."""
    row_names: Sequence[str]
    """Names of the rows, from top to bottom."""
    values: ArrayLike
    """Floats [rows, columns]; NaN is drawn hatched, as what was not run."""
    texts: Sequence[Sequence[str]]
    """[rows, columns], texts in the cells; bold where a value lies beyond the scale."""
    scale: float
    """Value of the darkest colour, above 0; the other end is its negative."""
    steps: Sequence[int | None] = ()
    """Column before which each row has a thick line; empty without such lines."""


def plot_fields(
    path: str | Path,
    fields: Sequence[Field],
    *,
    column_names: Sequence[str],
    column_label: str,
    row_label: str,
    colour_label: str,
) -> None:
    """Write a PNG of heat maps above each other with the same columns.

    Args:
        path: of the PNG.
        fields: from top to bottom.
        column_names: from left to right.
        column_label: below the lowest map.
        row_label: left of the maps; may be empty.
        colour_label: what the numbers are, with their unit; beside each colour bar. Maps of one scale that
            follow each other share one, with arrows at its ends where a value lies beyond it.
    """
    from matplotlib.figure import Figure

    heights = [max(1, len(field.row_names)) for field in fields]
    figure = Figure(
        figsize=(INCHES_WIDE, 1.4 + LINE_INCHES * sum(heights) + 0.45 * len(fields)), layout="constrained"
    )
    axes = figure.subplots(len(fields), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    meshes = []
    for field, axis in zip(fields, axes, strict=True):
        meshes.append(_draw_field(axis, field))
        axis.set_title(figure_text(field.title), loc="left", fontsize="medium")
    first = 0
    for scale, together in itertools.groupby(field.scale for field in fields):
        last = first + len(list(together))
        is_clipped = any(is_beyond(field.values, scale).any() for field in fields[first:last])
        figure.colorbar(
            meshes[first],
            ax=list(axes[first:last]),
            fraction=0.04,
            aspect=30 if last - first > 1 else 20,
            extend="both" if is_clipped else "neither",
            label=f"{colour_label}\nscale: ±{scale:.3g}",
        )
        first = last
    if row_label:
        figure.supylabel(row_label, fontsize="medium")
    name_ticks(axes[-1], range(len(column_names)), column_names)
    axes[-1].set_xlabel(column_label)
    save_figure(figure, path)


def is_beyond(values: ArrayLike, scale: float) -> NDArray[np.bool_]:
    """Return which values have a number and lie beyond the ends of a colour scale."""
    found = np.asarray(values, dtype=float)
    beyond: NDArray[np.bool_] = np.isfinite(found) & (np.abs(found) > scale * (1 + 1e-9))
    return beyond


def _draw_field(axis: Any, field: Field) -> Any:
    values = np.asarray(field.values, dtype=float)
    rows, columns = values.shape
    size = "medium" if columns <= 8 else "small" if columns <= 11 else "x-small"
    axis.set_facecolor("white")
    axis.patch.set_hatch("////")
    axis.patch.set_edgecolor("0.7")
    mesh = axis.pcolormesh(
        np.arange(columns + 1) - 0.5,
        np.arange(rows + 1) - 0.5,
        np.ma.masked_invalid(values),
        cmap=COLOUR_MAP,
        vmin=-field.scale,
        vmax=field.scale,
        edgecolors="white",
        linewidth=1.5,
    )
    beyond = is_beyond(values, field.scale)
    for row, column in np.argwhere(np.isfinite(values)):
        axis.text(
            column,
            row,
            field.texts[row][column],
            ha="center",
            va="center",
            fontsize=size,
            fontweight="bold" if beyond[row, column] else "normal",
            color="white" if _luminance(mesh.to_rgba(values[row, column])) < DARK else "black",
        )
    for row, step in enumerate(field.steps):
        if step is not None:
            axis.plot([step - 0.5, step - 0.5], [row - 0.5, row + 0.5], color="black", linewidth=2.5)
    axis.set_yticks(range(rows), [figure_text(name) for name in field.row_names])
    axis.set_ylim(rows - 0.5, -0.5)
    axis.set_xlim(-0.5, columns - 0.5)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return mesh


def _luminance(colour: Sequence[float]) -> float:
    """Return the relative luminance of an sRGB colour, 0..1 (WCAG 2)."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]
    )
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)
