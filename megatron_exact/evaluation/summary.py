"""`summary.csv`: one model's part of Table 1, in the layout of that table.

`model,cpt_window,benchmark,regime,evaluation_windows,score,cells,examples`: the score is the macro average
over the cells (task x window) in points, windows up to the training window are `trained`, longer ones
`extrapolated`. Without a training window there is one row a benchmark, regime `all`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from megatron_exact.evaluation.examples import read_scores
from megatron_exact.evaluation.result_folders import Cell
from megatron_exact.files import write_text

COLUMNS = ("model", "cpt_window", "benchmark", "regime", "evaluation_windows", "score", "cells", "examples")
REGIMES = ("trained", "extrapolated", "all")


def window_label(tokens: int) -> str:
    """`1.5K` for 1,536: K is 1,024; lengths that are no multiple of 256 are written out."""
    return f"{tokens / 1024:g}K" if tokens >= 256 and tokens % 256 == 0 else str(tokens)


def regime_of(length: int, cpt_window: int | None) -> str:
    """Where a window belongs."""
    if cpt_window is None or length == 0:
        return "all"
    return "trained" if length <= cpt_window else "extrapolated"


def summary_rows(
    model: str, cpt_window: int | None, cells: Mapping[Cell, list[float]]
) -> list[dict[str, str]]:
    """One row a benchmark and regime, in the order of the table."""
    groups: dict[tuple[str, int, str], list[Cell]] = {}
    for cell in sorted(cells):
        regime = regime_of(cell.length, cpt_window)
        groups.setdefault((cell.suite, REGIMES.index(regime), regime), []).append(cell)
    rows = []
    for (suite, _, regime), members in sorted(groups.items()):
        means = [sum(cells[cell]) / len(cells[cell]) for cell in members]
        windows = [window_label(length) for length in sorted({cell.length for cell in members}) if length]
        rows.append(
            {
                "model": model,
                "cpt_window": "" if cpt_window is None else window_label(cpt_window),
                "benchmark": suite,
                "regime": regime,
                "evaluation_windows": ",".join(windows),
                "score": f"{100 * sum(means) / len(means):.2f}",
                "cells": str(len(members)),
                "examples": str(sum(len(cells[cell]) for cell in members)),
            }
        )
    return rows


def write_summary(results: Path, model: str, cpt_window: int | None, cells: list[Cell]) -> Path:
    """Write `summary.csv` from finished cells."""
    scores = {cell: read_scores(results, cell) for cell in cells}
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(summary_rows(model, cpt_window, scores))
    path = results / "summary.csv"
    write_text(path, stream.getvalue())
    return path
