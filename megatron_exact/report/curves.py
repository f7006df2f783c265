"""Loss over iterations: one run alone, or a pair with its difference at every step.

The rows of a pair are the same at every iteration, so the difference of the two training losses is free
of the noise between batches that hides it in the curves themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_exact.files import atomic_file
from megatron_exact.report.figures import STYLES, new_figure, save_figure
from megatron_exact.report.results import Record, RunResults, require_paired

ABOVE: dict[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "frameon": False,
    "fontsize": "small",
}
SMOOTHING_SHARE = 20  # the running mean spans a twentieth of the run


def running_mean(values: ArrayLike, span: int) -> NDArray[np.float64]:
    """Mean over the last `span` values, fewer at the beginning.

    Args:
        values: floats [n].
        span: at least 1.

    Returns:
        float64 [n].
    """
    values = np.asarray(values, dtype=np.float64)
    totals = np.concatenate(([0.0], np.cumsum(values)))
    ends = np.arange(1, values.size + 1)
    starts = np.maximum(0, ends - span)
    return np.asarray((totals[ends] - totals[starts]) / (ends - starts))


def plot_run(path: str | Path, results: RunResults, *, name: str) -> None:
    """Write a PNG: training loss of one run by iteration, with its evaluations."""
    figure, (axis,) = new_figure(rows=1, heights=(1,))
    _draw_run(axis, results, style="baseline", name=name)
    axis.set_ylabel("loss (nats a target)")
    axis.set_xlabel("iteration")
    axis.legend(frameon=False)
    with atomic_file(path) as temporary:
        save_figure(figure, temporary)


def plot_pair(
    path: str | Path,
    baseline: RunResults,
    treatment: RunResults,
    *,
    baseline_name: str,
    treatment_name: str,
) -> None:
    """Write a PNG: unweighted training loss of two paired runs, and their difference below.

    Raises:
        ValueError: the runs did not see the same targets at the same iterations.
    """
    require_paired(baseline.losses, treatment.losses, "iterations")
    figure, (upper, lower) = new_figure(rows=2, heights=(3, 2))
    _draw_run(upper, baseline, style="baseline", name=baseline_name)
    _draw_run(upper, treatment, style="treatment", name=treatment_name)
    upper.set_ylabel("unweighted loss\n(nats a target)")
    upper.legend(**ABOVE, ncols=2)
    difference = _losses(treatment.losses) - _losses(baseline.losses)
    iterations = [record.iteration for record in baseline.losses]
    span = max(1, difference.size // SMOOTHING_SHARE)
    lower.axhline(0, color="0.3", linewidth=0.8)
    lower.plot(iterations, difference, color="0.7", linewidth=0.8, label="each iteration")
    lower.plot(
        iterations,
        running_mean(difference, span),
        color="black",
        linewidth=1.4,
        label=f"mean of the last {span}",
    )
    lower.set_ylabel(f"{treatment_name}\nminus {baseline_name}\n(nats a target)")
    lower.set_xlabel("iteration")
    lower.legend(**ABOVE, ncols=2)
    with atomic_file(path) as temporary:
        save_figure(figure, temporary)


def _draw_run(axis: Any, results: RunResults, *, style: str, name: str) -> None:
    look = STYLES[style]
    line = {key: look[key] for key in ("color", "linestyle")}
    points = {key: value for key, value in look.items() if key not in ("linestyle", "linewidth")}
    iterations = [record.iteration for record in results.losses]
    axis.plot(iterations, _losses(results.losses), label=f"{name}, training", linewidth=1.0, **line)
    if results.evaluations:
        axis.plot(
            [record.iteration for record in results.evaluations],
            _losses(results.evaluations),
            label=f"{name}, validation",
            linestyle="none",
            **points,
        )


def _losses(records: Sequence[Record]) -> NDArray[np.float64]:
    return np.array([record.loss for record in records])
