"""`make evaluate-demo` in small: SFT, export, suites, probe, comparison, report, and a second call."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from megatron_exact.data.manifest import read_manifest
from megatron_exact.evaluation.evaluate import window_label
from tests.end_to_end.demo_calls import output_of

LIMIT_SECONDS = 3000
SUITES = {"ruler": 11, "nolima": 6, "qa": 6}


def run_demo(output: Path) -> str:
    command = [sys.executable, "tools/run_evaluate_demo.py", "--quick", "--output", str(output)]
    return output_of(command, LIMIT_SECONDS)


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_SECONDS)
def test_the_whole_experiment_in_small(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    printed = run_demo(output)
    work = output / "work"
    for arm in ("standard", "exact"):
        results = work / f"results_{arm}" / "results"
        info = json.loads((results / "results.json").read_text())
        assert info["suites"]["ruler"]["template"]["kind"] == "model"
        template = read_manifest(work / "records" / "rows").supervision
        assert template is not None
        assert info["suites"]["ruler"]["template"]["sha256"] == template.template_sha256
        for suite, tasks in SUITES.items():
            assert len(list((results / suite).iterdir())) == tasks
        run = info["provenance"]["run"]
        assert run["weighting"]["rule"] == "none"
        assert run["start_checkpoint"]["run"]["weighting"]["rule"] == {"standard": "none"}.get(arm, "exact")
        window = window_label(run["start_checkpoint"]["run"]["row_tokens"])  # not the rows of fine-tuning
        with open(results / "summary.csv", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        assert {row["cpt_window"] for row in rows} == {window}
        assert {"trained", "extrapolated"} <= {row["regime"] for row in rows}
        assert [corpus["licence"] for corpus in run["corpora"]] == ["CC0-1.0"]
    comparison = json.loads((output / "comparison" / "comparison.json").read_text())
    found = {(entry["suite"], entry["regime"]) for entry in comparison["aggregates"]}
    for suite in ("ruler", "nolima"):
        assert {(suite, regime) for regime in ("trained", "extrapolated", "all")} <= found
    assert ("qa", "all") in found
    assert comparison["probe"]
    assert "not verifiably" not in comparison["pairing"]["statement"]
    assert (output / "report.md").read_text().startswith("#")
    assert "<html" in (output / "report.html").read_text()
    assert list(output.glob("*.png"))
    assert "scores mean nothing" in (output / "README.md").read_text()

    again = run_demo(output)
    assert again.count("nothing changed, using what was made before") == printed.count("\n== ")
