"""Result files are read whole or refused with file and line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_exact.report.results import read_records, read_run, require_paired
from tests.unit.report.small_runs import TARGETS, record, write_run


def test_a_run_is_read_back(tmp_path: Path) -> None:
    results = read_run(write_run(tmp_path / "run", iterations=6))
    assert [line.iteration for line in results.losses] == [1, 2, 3, 4, 5, 6]
    assert [line.iteration for line in results.evaluations] == [3, 6]
    assert results.final_evaluation.iteration == 6
    assert results.run["seed"] == 3
    first = results.losses[0]
    assert first.targets == sum(TARGETS)
    assert first.loss == pytest.approx(first.bucket_loss_sums.sum() / first.bucket_targets.sum())
    assert first.weighted_loss == pytest.approx(1.1 * first.loss)


def test_a_run_without_evaluations_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "evaluations.jsonl").unlink()
    results = read_run(folder)
    assert results.evaluations == ()
    with pytest.raises(ValueError, match="--eval-iters"):
        _ = results.final_evaluation


def test_what_was_not_finite_reads_as_nan(tmp_path: Path) -> None:
    line = record(1, [1, 2, 3, 4])
    line["loss"] = None
    line["bucket_loss_sums"][2] = None
    (tmp_path / "losses.jsonl").write_text(json.dumps(line) + "\n")
    (read,) = read_records(tmp_path / "losses.jsonl")
    assert np.isnan(read.loss)
    assert np.isnan(read.bucket_loss_sums).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    "damage",
    [
        '{"iteration": 2',
        "[]",
        '{"iteration": 2}',
        json.dumps({**record(2, [1] * 4), "bucket_targets": [1]}),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "losses.jsonl"
    path.write_text(json.dumps(record(1, [1, 1, 1, 1])) + "\n" + damage + "\n")
    with pytest.raises(ValueError, match=r"losses\.jsonl, line 2 .*run the training again"):
        read_records(path)


@pytest.mark.parametrize("iterations", [[1, 3], [1, 2, 2], [2, 3]])
def test_gaps_and_repeats_are_refused(tmp_path: Path, iterations: list[int]) -> None:
    folder = write_run(tmp_path / "run")
    lines = [json.dumps(record(i, [1, 1, 1, 1])) for i in iterations]
    (folder / "losses.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="mixes two runs"):
        read_run(folder)


def test_damaged_and_missing_run_records(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is not JSON"):
        read_run(folder)
    (folder / "run.json").unlink()
    with pytest.raises(FileNotFoundError):
        read_run(folder)


def test_pairs_must_have_seen_the_same_targets(tmp_path: Path) -> None:
    one = read_run(write_run(tmp_path / "one")).losses
    other = read_run(write_run(tmp_path / "other", shift=0.3)).losses
    require_paired(one, other, "iterations")
    with pytest.raises(ValueError, match="4 and 3 iterations"):
        require_paired(one, other[:-1], "iterations")
    moved = replace(other[2], bucket_targets=np.array([20, 10, 30, 40]))
    with pytest.raises(ValueError, match="at iteration 3"):
        require_paired(one, (*other[:2], moved, other[3]), "iterations")
