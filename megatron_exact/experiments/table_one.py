"""`table1.csv` of an experiment: the columns of the paper's table 1, from the comparisons that there are.

What was not run is a row with `not run`; no number is filled in. A row is one arm against the first one, on
one suite and regime. The columns after those of the paper say which arm, over how many pairs of runs, and
why a number is missing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_exact.evaluation.suites.suite import registered
from megatron_exact.experiments.definition import EXTRAPOLATED, TRAINED, ArmPart, suite_lengths
from megatron_exact.experiments.experiment_plan import Planner
from megatron_exact.files import write_text
from megatron_exact.report.comparison_page import read_comparison
from megatron_exact.report.paper_numbers import LONG_SUITES
from megatron_exact.training.run_status import row_length_name

COLUMNS = (
    *("model", "cpt_window", "benchmark", "regime", "evaluation_windows"),
    *("standard_cpt", "exact", "delta", "ci95_low", "ci95_high"),
    *("arm", "rule", "pairs", "state"),
)
"""Those of the paper's table, and ours after them; `exact` is the score of the row's arm."""
NOT_RUN = "not run"
RUN = "run"
PROBE_MEASURE = "effect"
"""Measure of the probe that the table has: nats of margin that the evidence moves."""
WHOLE = "all"
"""Regime of a suite without lengths, and of the probe."""
Row = dict[str, Any]


def write_table(planner: Planner) -> Path:
    """Write `table1.csv` into the folder of the experiment; return its path.

    Raises:
        ValueError: a comparison is damaged.
    """
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(table_rows(planner))
    path = planner.output / "table1.csv"
    write_text(path, stream.getvalue())
    return path


def table_rows(planner: Planner) -> list[Row]:
    """Return the rows of all arms but the first, in the order of the file."""
    return [row for arm in planner.others for row in _rows_of_arm(planner, arm)]


def _rows_of_arm(planner: Planner, arm: ArmPart) -> Iterator[Row]:
    experiment = planner.experiment
    about = {
        "model": experiment.title,
        "cpt_window": row_length_name(max(planner.rows)).upper(),
        "arm": arm.name,
        "rule": arm.rule,
        "pairs": len(experiment.seeds),
    }
    content = _content(planner, arm, "results")
    planned = {suite.name: suite for suite in experiment.suites}
    names = [*LONG_SUITES, *(name for name in planned if name not in LONG_SUITES)]
    if "qa" not in names:
        names.append("qa")
    for name in names:
        suite = planned.get(name)
        has_lengths = registered()[name].has_lengths
        windows = suite_lengths(suite, max(planner.rows)) if suite is not None and has_lengths else {}
        for regime in (TRAINED, EXTRAPOLATED) if has_lengths else (WHOLE,):
            row = {
                **about,
                "benchmark": name,
                "regime": regime,
                "evaluation_windows": ",".join(windows.get(regime, ())),
            }
            found = None if content is None else _find(content["aggregates"], suite=name, regime=regime)
            yield {**row, **_numbers(found)}
    if experiment.probe is not None:
        probe = (_content(planner, arm, "probes") or {}).get("probe")
        kinds = [] if probe is None else probe["kinds"]
        for kind in kinds:
            low, high = kind["distances"]
            yield {
                **about,
                "benchmark": f"probe {kind['kind']}, {PROBE_MEASURE} in nats",
                "regime": WHOLE,
                "evaluation_windows": f"{low}-{high}",
                **_numbers(kind["measures"][PROBE_MEASURE]),
            }
        if probe is None:
            yield {**about, "benchmark": "probe", "regime": WHOLE, **_numbers(None)}


def _content(planner: Planner, arm: ArmPart, kind: str) -> dict[str, Any] | None:
    """Return the comparison of an arm's results or probes; None where it is not of all planned seeds."""
    name = arm.name if kind == "results" else f"{arm.name}-probe"
    path = planner.output / "comparisons" / name / "comparison.json"
    if not path.is_file():
        return None
    content = read_comparison(path)
    compared = [
        tuple(Path(run[side]["results"]).parts[-3:] for side in ("baseline", "treatment"))
        for run in content["runs"]
    ]
    planned = [
        tuple((kind, f"seed-{seed}", one.name) for one in (planner.base, arm))
        for seed in planner.experiment.seeds
    ]
    return content if compared == planned else None


def _find(aggregates: list[dict[str, Any]], **wanted: str) -> dict[str, Any] | None:
    return next(
        (one for one in aggregates if all(one[name] == value for name, value in wanted.items())), None
    )


def _numbers(found: dict[str, Any] | None) -> Row:
    """Return the numbers of an aggregate of a comparison, rounded as the paper does with one digit more."""
    if found is None:
        return {"state": NOT_RUN}
    ends = found["ci95"]
    numbers = {"standard_cpt": found["baseline"], "exact": found["treatment"], "delta": found["delta"]}
    if ends is not None:
        numbers |= {"ci95_low": ends[0], "ci95_high": ends[1]}
    state = RUN if ends is not None else f"{RUN}, no interval: {found.get('ci95_reason', 'unknown')}"
    return {**{name: f"{value:.3f}" for name, value in numbers.items()}, "state": state}
