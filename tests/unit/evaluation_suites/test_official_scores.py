"""Our scores against those of the authors' own scorers, on the files that `export_predictions` writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.evaluation.evidence import export_predictions, verify_results
from megatron_exact.evaluation.result_folders import Cell, read_scores
from megatron_exact.evaluation.suites.nolima import score_answer
from tests.recorded.made_up_results import METRICS, NOLIMA_LENGTHS, write_made_up_results
from tests.recorded.record_official_scores import OUTPUT, exported

RECORDED: dict[str, Any] = json.loads(OUTPUT.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_made_up_results(tmp_path_factory.mktemp("official") / "results")


@pytest.fixture(scope="module")
def export(results: Path) -> Path:
    export_predictions(results, results.parent / "exported")
    return results.parent / "exported"


def test_the_files_are_those_that_were_scored(export: Path) -> None:
    assert exported(export) == RECORDED["files"]


def test_ruler_scores_are_those_of_nvidias_script(results: Path) -> None:
    scores = set()
    for place, theirs in RECORDED["ruler"].items():
        task, length = place.split("/")
        ours = read_scores(results, Cell(suite="ruler", task=task, length=int(length)))
        assert round(100 * math.fsum(ours) / len(ours), 2) == theirs["score"], place
        scores.add(theirs["score"])
    assert len(RECORDED["ruler"]) == 22
    assert len(scores) > 12  # tasks and answers differ


def test_nolima_scores_are_those_of_the_authors_code(results: Path, export: Path) -> None:
    metrics = set()
    for name, theirs in RECORDED["nolima"].items():
        content = json.loads((export / name).read_text())
        ours = [result["metric"] for result in content["results"]]
        assert ours == theirs["metrics"], name
        assert round(sum(ours) / len(ours), 4) == theirs["result"], name
        metrics.add(content["metric"])
    assert metrics == set(METRICS.values())
    assert len(RECORDED["nolima"]) == 32
    for length in NOLIMA_LENGTHS:  # a cell is the mean over its files
        for task in METRICS:
            ours = read_scores(results, Cell(suite="nolima", task=task, length=length))
            files = [
                theirs["result"]
                for name, theirs in RECORDED["nolima"].items()
                if name.startswith(f"nolima/{task}/{length}/")
            ]
            assert math.fsum(ours) / len(ours) == pytest.approx(sum(files) / len(files), abs=1e-4)


def test_another_metric_gives_other_scores(results: Path) -> None:
    """The answers tell the four metrics apart, so that equality above means something."""
    rows = [
        json.loads(line)
        for line in (results / "nolima" / "needle_set" / "250.jsonl").read_text().splitlines()
    ]
    found = {
        tuple(score_answer(metric, row["prediction"], row["references"]) for row in rows)
        for metric in METRICS.values()
    }
    assert len(found) == 4


def test_verify_results_computes_the_same_scores_again(results: Path) -> None:
    found = list(verify_results(results))
    assert len(found) == 30
    assert all(not cell.fault and "scores" in cell.checks for cell in found)
