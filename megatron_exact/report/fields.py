"""Heat maps with numbers in their cells: evidence by distance and context, lift by model and length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from megatron_exact.files import atomic_file
from megatron_exact.report.figures import INCHES_WIDE, figure_text, save_figure

COLOUR_MAP = "PuOr_r"
"""Dark at both ends and white at 0: in grey the numbers and their signs tell the ends apart."""
DARK = 0.18
"""Relative luminance below which white is easier to read than black."""
LINE_INCHES = 0.42


@dataclass(frozen=True, kw_only=True)
class Field:
    """One heat map."""

    title: str
    """Above it."""
    row_names: Sequence[str]
    """From top to bottom."""
    values: ArrayLike
    """Floats [rows, columns]; NaN is drawn hatched, as what was not run."""
    texts: Sequence[Sequence[str]]
    """[rows, columns], what stands in the cells."""
    scale: float
    """Value of the darkest colour, above 0; the other end is its negative."""
    steps: Sequence[int | None] = ()
    """A row each: before which column a thick line stands; none without such lines."""


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
        colour_label: what the numbers are, with their unit; behind the title of each map.
    """
    from matplotlib.figure import Figure

    heights = [max(1, len(field.row_names)) for field in fields]
    figure = Figure(
        figsize=(INCHES_WIDE, 1.4 + LINE_INCHES * sum(heights) + 0.45 * len(fields)), layout="constrained"
    )
    axes = figure.subplots(len(fields), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for field, axis in zip(fields, axes, strict=True):
        mesh = _draw_field(axis, field)
        axis.set_title(f"{figure_text(field.title)}: {colour_label}", loc="left", fontsize="medium")
        if len({field.scale for field in fields}) > 1:
            figure.colorbar(mesh, ax=axis, fraction=0.04)
    if len({field.scale for field in fields}) == 1:
        figure.colorbar(mesh, ax=list(axes), fraction=0.04, aspect=30)
    if row_label:
        figure.supylabel(row_label, fontsize="medium")
    is_long = sum(map(len, column_names)) > 60
    axes[-1].set_xticks(
        range(len(column_names)),
        column_names,
        rotation=35 if is_long else 0,
        ha="right" if is_long else "center",
    )
    axes[-1].set_xlabel(column_label)
    with atomic_file(path) as temporary:
        save_figure(figure, temporary)


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
    for row, column in np.argwhere(np.isfinite(values)):
        axis.text(
            column,
            row,
            field.texts[row][column],
            ha="center",
            va="center",
            fontsize=size,
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
    """Relative luminance of an sRGB colour, 0..1 (WCAG 2)."""
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]
    )
    return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)
