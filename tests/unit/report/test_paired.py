"""The report of a pair: every number traceable, and refusals where the runs are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.report.exposure_figure import exposure_table, tail_summary
from megatron_exact.report.results import read_run
from megatron_exact.report.training_pair import PairedReport, compare_evaluations, write_paired_report
from tests.unit.report.small_runs import LOWER_BOUNDS, ROW_TOKENS, TARGETS, write_run

SHIFT = -0.0125


@pytest.fixture
def report(tmp_path: Path) -> PairedReport:
    table = exposure_table(LOWER_BOUNDS, TARGETS, [1, 1, 1.2, 1.1])
    exposure = {
        "row_tokens": ROW_TOKENS,
        "fingerprint": "f" * 64,
        "buckets": table,
        "tail": tail_summary(table, 16),
    }
    return PairedReport(
        title="A pair",
        introduction="Made up.",
        base=read_run(write_run(tmp_path / "base")),
        baseline=read_run(write_run(tmp_path / "none")),
        treatment=read_run(write_run(tmp_path / "exact", rule="exact", shift=SHIFT)),
        exposure=json.loads(json.dumps(exposure)),
        exposure_figure="exposure.png",
        facts=[("text", "made up")],
        seconds=[("base", "1.0")],
        commands=["python tools/pack_corpus.py"],
    )


def test_every_evaluation_is_compared(report: PairedReport) -> None:
    compared = compare_evaluations(report)
    assert compared.first_tail_bucket == 2
    assert [iteration for iteration, _ in compared.history] == [2, 4]
    assert [group.label for group in compared.groups] == ["below the tail", "tail", "all"]
    assert [group.targets for group in compared.groups] == [30, 70, 100]
    for row in [*compared.buckets, *compared.groups]:
        assert row.difference == pytest.approx(SHIFT)


def test_the_report_and_its_figures(tmp_path: Path, report: PairedReport) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    path = write_paired_report(folder, report)
    text = path.read_text(encoding="utf-8")
    names = {line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert names == {"exposure.png", "buckets.png", "curves.png", "base_curve.png"}
    written = {found.name for found in folder.iterdir()}
    assert written == {"report.md", "buckets.png", "curves.png", "base_curve.png"}
    assert text.count("-0.0125") >= 4 + 3 + 2 * 3  # each bucket, each group, each evaluation
    for part in (
        "do not show that EXACT is better",
        "One seed",
        "No standard error",
        "f" * 64,
        "alpha 0.15",
    ):
        assert part in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: {**run, "seed": 4}, "differ in seed"),
        (lambda run: {**run, "fingerprint": "e" * 64}, "differ in fingerprint"),
        (lambda run: {**run, "start_checkpoint": None}, "differ in start_checkpoint"),
        (lambda run: {**run, "layout": {"world_size": 4}}, "differ in layout"),
    ],
)
def test_arms_that_are_no_pair_are_refused(
    tmp_path: Path,
    report: PairedReport,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    message: str,
) -> None:
    arm = replace(report.treatment, run=change(report.treatment.run))
    with pytest.raises(ValueError, match=message):
        write_paired_report(tmp_path, replace(report, treatment=arm))
    assert not (tmp_path / "report.md").exists()


def test_an_exposure_table_of_another_pack_is_refused(tmp_path: Path, report: PairedReport) -> None:
    with pytest.raises(ValueError, match="another pack"):
        write_paired_report(
            tmp_path, replace(report, exposure={**report.exposure, "fingerprint": "0" * 64})
        )


def test_what_restarts_have_cost_is_a_fact_of_the_runs(tmp_path: Path, report: PairedReport) -> None:
    rows = [{"lost_iterations": 3, "minutes": 2.5}, {"lost_iterations": 4, "minutes": None}]
    report.treatment.run["restarts"] = rows
    (tmp_path / "out").mkdir()
    text = write_paired_report(tmp_path / "out", report).read_text(encoding="utf-8")
    cost = "2 times, 7 iterations repeated, 2.5 minutes until training resumed"
    assert f"* **started again**: never; {cost}\n" in text
