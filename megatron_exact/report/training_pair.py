"""A pair of training runs side by side: their records, curves and buckets, and the report of the pair.

The rows of a pair are the same at every iteration, so the difference of the two training losses is free of
the noise between batches that hides it in the curves themselves. Everything in the report is computed from
result files; the caller adds only facts that no file of a run contains (where the text came from, wall
times, commands).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_exact.files import write_text
from megatron_exact.report.exposure_figure import format_exposure_table
from megatron_exact.report.figures import STYLES, new_figure, save_figure
from megatron_exact.report.page import markdown_table
from megatron_exact.report.results import (
    BucketComparison,
    Record,
    RunResults,
    compare_buckets,
    compare_group,
    format_comparisons,
    plot_comparisons,
    require_paired,
)

ABOVE: dict[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "frameon": False,
    "fontsize": "small",
}
BASELINE = "standard"
TREATMENT = "EXACT"
SMOOTHING_SHARE = 20  # the running mean spans a twentieth of the run


@dataclass(frozen=True, kw_only=True)
class PairedReport:
    """Input of the report of one pair."""

    title: str
    """First heading."""
    introduction: str
    """One paragraph: which text, which stages."""
    base: RunResults
    """The run whose last checkpoint both arms start from."""
    baseline: RunResults
    """Arm with rule `none`."""
    treatment: RunResults
    """Arm with rule `exact`."""
    exposure: dict[str, Any]
    """Output of `tools/inspect_pack.py --json` on the packed rows of both arms."""
    exposure_figure: str
    """File name of its figure, beside the report."""
    facts: Sequence[tuple[str, str]]
    """Facts to add to the list of facts."""
    seconds: Sequence[tuple[str, str]]
    """Step and its wall time, in words."""
    commands: Sequence[str]
    """The commands, in order."""


def write_paired_report(folder: Path, report: PairedReport) -> Path:
    """Write `report.md` and its figures into `folder`.

    Returns:
        Path of the report.

    Raises:
        ValueError: the runs are not one pair.
    """
    check_pair(report)
    evaluations = compare_evaluations(report)
    plot_run(folder / "base_curve.png", report.base, name="base")
    names = {"baseline_name": BASELINE, "treatment_name": TREATMENT}
    plot_pair(folder / "curves.png", report.baseline, report.treatment, **names)
    plot_comparisons(
        folder / "buckets.png",
        evaluations.buckets,
        first_tail_bucket=evaluations.first_tail_bucket,
        **names,
    )
    sections = [
        f"# {report.title}\n\n{report.introduction}\n",
        _exposure_section(report),
        _validation_section(report, evaluations),
        _curves_section(report),
        _limits_section(report, evaluations),
        _facts_section(report),
        "## Wall time\n\n" + markdown_table(["step", "seconds"], report.seconds),
        "## Commands\n\n```\n" + "\n".join(report.commands) + "\n```\n",
    ]
    path = folder / "report.md"
    write_text(path, "\n".join(sections))
    return path


def check_pair(report: PairedReport) -> None:
    """Raise ValueError unless the arms agree in all but their token weighting."""
    one, other = report.baseline.run, report.treatment.run
    for name in ("fingerprint", "start_checkpoint", "seed", "model", "schedule", "layout"):
        if one.get(name) != other.get(name):
            raise ValueError(
                f"the arms differ in {name} ({one.get(name)} against {other.get(name)}): "
                "they are not one pair, train both again"
            )
    if one.get("fingerprint") != report.exposure["fingerprint"]:
        raise ValueError("the exposure table belongs to another pack than the runs: inspect their pack")
    require_paired(report.baseline.evaluations, report.treatment.evaluations, "evaluations")


@dataclass(frozen=True, kw_only=True)
class ComparedEvaluations:
    """Comparisons of the evaluations of both arms."""

    buckets: list[BucketComparison]
    """Comparison of the last evaluation, one for each bucket."""
    groups: list[BucketComparison]
    """Comparison of the last evaluation below the tail, in the tail, and over all targets."""
    first_tail_bucket: int
    """Index into `buckets`."""
    history: list[tuple[int, list[BucketComparison]]]
    """Iteration and groups of every evaluation."""


def compare_evaluations(report: PairedReport) -> ComparedEvaluations:
    """Compare all evaluations of the arms, the last one by bucket."""
    lowers = np.array([bucket["lower"] for bucket in report.exposure["buckets"]])
    in_tail = lowers >= report.exposure["tail"]["tau"]

    def groups(one: Record, other: Record) -> list[BucketComparison]:
        return [
            compare_group("below the tail", one, other, ~in_tail),
            compare_group("tail", one, other, in_tail),
            compare_group("all", one, other, np.ones_like(in_tail)),
        ]

    last = report.baseline.final_evaluation, report.treatment.final_evaluation
    pairs = zip(report.baseline.evaluations, report.treatment.evaluations, strict=True)
    return ComparedEvaluations(
        buckets=compare_buckets(*last, lowers, report.exposure["row_tokens"]),
        groups=groups(*last),
        first_tail_bucket=int(np.argmax(in_tail)),
        history=[(one.iteration, groups(one, other)) for one, other in pairs],
    )


def _exposure_section(report: PairedReport) -> str:
    table, tau = report.exposure["buckets"], report.exposure["tail"]["tau"]
    return (
        "## Exposure: which contexts the training targets have\n\n"
        "Supervised targets of the packed training rows by effective left context (tokens of their own "
        f"document that are visible), before and after weighting.{_about_long_documents(table)}\n\n"
        + format_exposure_table(table, row_tokens=report.exposure["row_tokens"], tau=tau, markdown=True)
        + f"\n![exposure before and after weighting]({report.exposure_figure})\n"
    )


def _about_long_documents(table: Sequence[dict[str, Any]]) -> str:
    targets = [bucket["targets"] for bucket in table]
    if targets[-1] < max(targets):
        return ""
    return (
        " Here most text is in documents longer than a row, so the longest contexts are the most frequent "
        "ones; the corpora that the method is made for have few of them (the paper's figure: 27% of the "
        "targets in the tail)."
    )


def _validation_section(report: PairedReport, compared: ComparedEvaluations) -> str:
    names = {"baseline_name": BASELINE, "treatment_name": TREATMENT}
    last = report.baseline.final_evaluation
    history = [
        [f"{iteration:,}", *(f"{group.difference:+.4f}" for group in groups)]
        for iteration, groups in compared.history
    ]
    return (
        "## Validation loss by effective context\n\n"
        f"Unweighted mean loss in nats a target after {last.iteration:,} iterations, on "
        f"{last.targets:,} targets of documents that no run was trained on. Both arms are scored on the "
        f"same targets; difference = {TREATMENT} - {BASELINE}, negative where {TREATMENT} predicts "
        "better.\n\n"
        + format_comparisons([*compared.buckets, *compared.groups], **names)
        + "\n![validation loss by bucket](buckets.png)\n\n"
        + "The same difference at every evaluation:\n\n"
        + markdown_table(["iteration", "below the tail", "tail", "all"], history, left_columns=0)
    )


def _curves_section(report: PairedReport) -> str:
    return (
        "## Training curves\n\n"
        "Both arms see the same rows in the same order, so the difference at each iteration is free of "
        "the noise between batches.\n\n"
        "![training loss of both arms](curves.png)\n\n"
        f"The run that both start from ({len(report.base.losses):,} iterations from scratch):\n\n"
        "![training loss of the base run](base_curve.png)\n"
    )


def _limits_section(report: PairedReport, compared: ComparedEvaluations) -> str:
    below, tail, _ = compared.groups
    largest = max((abs(row.difference) for row in compared.buckets if row.targets), default=0.0)
    fewest = min((row for row in compared.buckets if row.targets), key=lambda row: row.targets)
    longest, short = compared.buckets[-1], compared.buckets[max(0, compared.first_tail_bucket - 1)]
    trained = sum(record.targets for record in report.baseline.losses)
    alpha = report.treatment.run["weighting"]["parameters"].get("alpha", float("nan"))
    return f"""## What these numbers show, and what they do not

They show that the chain works: text became rows with a known exposure, one checkpoint was continued in
two arms that agree in pack, seed, schedule and layout, and both were scored bucket by bucket on the same
held-out targets. They show how far this one pair moved apart: tail {tail.difference:+.4f}, below
the tail {below.difference:+.4f}, largest difference of a bucket {largest:.4f} nats a target.

They do not show that EXACT is better or worse.

* One seed. Another seed gives other differences; how large that scatter is cannot be read from one pair.
  Tail targets weigh {alpha:.0%} more on average, so an effect near that scatter is expected.
* No standard error: the evaluations store sums by bucket, not by row, so none can be computed from them.
* A very small model and {trained:,} training targets an arm. The table shows how far it uses long
  contexts at all: the {BASELINE} arm's loss is {longest.baseline:.4f} in the longest bucket and
  {short.baseline:.4f} in the last one below the tail.
* Few held-out documents: the bucket {fewest.label} has {fewest.targets:,} validation targets, and
  targets of one document are not independent of each other.
* Loss is not task accuracy. The paper's claims rest on long-context tasks, which are not measured here.
"""


def _facts_section(report: PairedReport) -> str:
    run = report.treatment.run
    start = run.get("start_checkpoint") or {}
    schedule, layout = run["schedule"], run["layout"]
    facts = [
        *report.facts,
        ("pack fingerprint", run["fingerprint"]),
        ("start checkpoint", f"iteration {start.get('iteration')}, sha256 {start.get('sha256')}"),
        ("git commit", str(run.get("git_commit"))),
        ("seed", str(run["seed"])),
        (
            "weighting",
            ", ".join(f"{key} {value:g}" for key, value in run["weighting"]["parameters"].items()),
        ),
        ("model", _pairs(run["model"])),
        ("schedule", _pairs(schedule)),
        ("layout", _pairs(layout)),
        ("versions", _pairs(run["versions"])),
        ("resumed", f"{len(report.baseline.run['resumes'])} and {len(run['resumes'])} times"),
        ("started again", f"{_restarts(report.baseline.run)}; {_restarts(run)}"),
    ]
    return "## Facts of the runs\n\n" + "".join(f"* **{name}**: {value}\n" for name, value in facts)


def _restarts(run: dict[str, Any]) -> str:
    """Describe what restarts after faults and preemptions have cost a run."""
    rows = run.get("restarts", [])
    if not rows:
        return "never"
    lost = sum(row["lost_iterations"] for row in rows)
    minutes = sum(row["minutes"] or 0 for row in rows)
    return f"{len(rows)} times, {lost} iterations repeated, {minutes:.1f} minutes until training resumed"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def running_mean(values: ArrayLike, span: int) -> NDArray[np.float64]:
    """Return the mean over the last `span` values, fewer at the beginning.

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
    save_figure(figure, path)


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
    save_figure(figure, path)


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
