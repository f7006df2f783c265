"""table1.csv from comparisons: the paper's columns, and what was not run."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.experiments.definition import read_experiment_file
from megatron_exact.experiments.experiment_plan import Planner
from megatron_exact.experiments.table_one import COLUMNS, write_table
from megatron_exact.report.paper_numbers import FOLDER
from tests.unit.experiments.test_definition import GOOD, written
from tests.unit.report.small_comparisons import comparison, write_comparison

ARMS = ("standard", "position")
PROBE = '[probe]\nrange = ["4K", "64K"]\n'


def rows_of(planner: Planner) -> list[dict[str, str]]:
    with write_table(planner).open() as stream:
        return list(csv.DictReader(stream))


def of_runs(
    content: dict[str, Any], kind: str, seeds: tuple[int, ...] = (1, 2), arms: tuple[str, str] = ARMS
) -> dict[str, Any]:
    """Return a comparison as one of these seeds and arms."""
    run = content["runs"][0]
    return {
        **content,
        "runs": [
            {
                **run,
                **{
                    side: {**run[side], "results": f"out/{kind}/seed-{seed}/{arm}"}
                    for side, arm in zip(("baseline", "treatment"), arms, strict=True)
                },
            }
            for seed in seeds
        ],
    }


@pytest.mark.parametrize(
    ("seeds", "arms", "state"),
    [
        ((1, 2), ARMS, "run"),
        ((1,), ARMS, "not run"),
        ((2, 1), ARMS, "not run"),
        ((1, 2), ARMS[::-1], "not run"),
        ((1, 2), ("standard", "other"), "not run"),
    ],
)
def test_a_comparison_of_other_runs_gives_no_numbers(
    tmp_path: Path, seeds: tuple[int, ...], arms: tuple[str, str], state: str
) -> None:
    planner = Planner(read_experiment_file(written(tmp_path, GOOD)), tmp_path / "out")
    content = of_runs(comparison("packed-position"), "results", seeds, arms)
    write_comparison(planner.output / "comparisons" / "position", content)
    (row,) = (row for row in rows_of(planner) if (row["benchmark"], row["regime"]) == ("ruler", "trained"))
    assert row["state"] == state
    assert bool(row["delta"]) == (state == "run")


def test_the_first_columns_are_those_of_the_paper() -> None:
    with (FOLDER / "table1_main_results.csv").open() as stream:
        head = next(csv.reader(stream))
    assert list(COLUMNS[: len(head)]) == head


def test_numbers_are_those_of_the_comparisons(tmp_path: Path) -> None:
    planner = Planner(read_experiment_file(written(tmp_path, GOOD + PROBE)), tmp_path / "out")
    content = comparison("packed-position", has_probe=True)
    entry = next(
        one for one in content["aggregates"] if (one["suite"], one["regime"]) == ("ruler", "trained")
    )
    missing = next(
        one for one in content["aggregates"] if (one["suite"], one["regime"]) == ("ruler", "extrapolated")
    )
    missing |= {"ci95": None, "ci95_reason": "only 2 pairs of runs"}
    content["aggregates"] = [
        entry,
        missing,
        *(one for one in content["aggregates"] if one["suite"] == "qa"),
    ]
    write_comparison(planner.output / "comparisons" / "position", of_runs(content, "results"))
    write_comparison(planner.output / "comparisons" / "position-probe", of_runs(content, "probes"))
    rows = {(row["benchmark"], row["regime"]): row for row in rows_of(planner)}
    ruler = rows["ruler", "trained"]
    assert ruler["evaluation_windows"] == "2K,4K"
    assert float(ruler["delta"]) == pytest.approx(entry["delta"], abs=1e-3)
    assert [float(ruler["ci95_low"]), float(ruler["ci95_high"])] == pytest.approx(entry["ci95"], abs=1e-3)
    assert (ruler["arm"], ruler["rule"], ruler["pairs"], ruler["state"]) == (
        *("position", "packed-position", "2", "run"),
    )
    beyond = rows["ruler", "extrapolated"]
    assert beyond["state"] == "run, no interval: only 2 pairs of runs"
    assert (beyond["ci95_low"], beyond["ci95_high"]) == ("", "")
    assert float(rows["qa", "all"]["delta"]) == pytest.approx(0.25)
    assert rows["nolima", "trained"]["state"] == "not run"
    assert rows["nolima", "trained"]["delta"] == ""
    kinds = [row for (name, _), row in rows.items() if name.startswith("probe ")]
    assert kinds
    assert all(row["state"] == "run" and row["delta"] for row in kinds)


def test_a_damaged_comparison_is_named(tmp_path: Path) -> None:
    planner = Planner(read_experiment_file(written(tmp_path, GOOD)), tmp_path / "out")
    write_comparison(planner.output / "comparisons" / "position", {"format_version": 1})
    with pytest.raises(ValueError, match=r"comparison\.json is not a comparison"):
        write_table(planner)
