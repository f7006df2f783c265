"""The demo's training command, its progress line and its errors."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.demo.settings import FULL, QUICK, DemoSettings, StageSettings
from megatron_exact.demo.training import (
    TrainingProgress,
    first_error,
    remove_half_saved_run,
    train,
    training_command,
)


def command(stage: StageSettings = FULL.long, **changes: Any) -> list[str]:
    options: dict[str, Any] = {
        "pack": Path("pack"),
        "validation_rows": 1000,
        "rule": "exact",
        "save": Path("runs/exact"),
        "base": Path("runs/base"),
        **changes,
    }
    return training_command(FULL, stage, **options)


def value(words: list[str], flag: str) -> str:
    assert words.count(flag) == 1, flag
    return words[words.index(flag) + 1]


def test_an_arm_starts_from_the_base_and_resumes_by_the_same_command() -> None:
    words = command()
    assert value(words, "--pretrained-checkpoint") == "runs/base"
    assert value(words, "--load") == value(words, "--save") == "runs/exact"
    assert value(words, "--token-weighting") == "exact"
    assert value(words, "--tensor-model-parallel-size") == value(words, "--nproc-per-node") == "2"


def test_arms_differ_in_rule_and_folder_only() -> None:
    one, other = command(), command(rule="none", save=Path("runs/none"))
    differing = {one[i - 1] for i in range(len(one)) if one[i] != other[i]}
    assert differing == {"--token-weighting", "--save", "--load"}


def test_the_base_starts_from_scratch() -> None:
    words = command(base=None)
    assert value(words, "--load") == value(words, "--save") == "runs/exact"
    assert "--pretrained-checkpoint" not in words


def test_evaluations_fit_the_validation_split() -> None:
    rows = FULL.long.rows_per_iteration
    assert value(command(), "--eval-iters") == str(FULL.long.evaluation_batches)
    assert value(command(validation_rows=3 * rows + 1), "--eval-iters") == "3"


@pytest.mark.parametrize("settings", [FULL, QUICK])
def test_settings_fit_together(settings: DemoSettings) -> None:
    assert settings.vocabulary % 2 == 0
    assert settings.query_groups % 2 == 0
    assert settings.hidden % settings.heads == 0
    for stage in (settings.short, settings.long):
        assert stage.rows_per_iteration % stage.rows_per_micro_batch == 0
        assert stage.warmup_iterations < stage.iterations
        assert stage.iterations % stage.evaluations == 0


def write_records(path: Path, iterations: range) -> None:
    with open(path, "a", encoding="utf-8") as stream:
        for iteration in iterations:
            stream.write(json.dumps({"iteration": iteration, "loss": 5 - 0.1 * iteration}) + "\n")


def test_progress_follows_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "losses.jsonl"
    write_records(path, range(1, 4))  # of an earlier attempt: not shown before it changes
    progress = TrainingProgress("base", path, 10)
    progress.poll()
    time.sleep(0.02)
    write_records(path, range(4, 8))
    progress.poll()
    with open(path, "a", encoding="utf-8") as stream:
        stream.write('{"iteration": 8, "lo')  # a line that is being written
    time.sleep(0.02)
    progress.finish()
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("base: starting 2 processes")
    assert shown[-1].startswith("base: iteration 7/10  loss 4.300")


@pytest.mark.parametrize(
    ("code", "cause", "tail"),
    [
        ("raise SystemExit('error: tau 9 is too large')", "error: tau 9 is too large", False),
        ("print('fine'); raise RuntimeError('gone')", "RuntimeError: gone", True),
    ],
)
def test_a_failed_run_names_its_first_error_and_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str, cause: str, tail: bool
) -> None:
    (tmp_path / "log.txt").write_text("error: of an earlier attempt\n")
    with pytest.raises(
        ValueError, match=rf"arm stopped with exit code 1 \({cause}\); its log is .*log\.txt"
    ):
        train([sys.executable, "-c", code], name="arm", run_dir=tmp_path, iterations=3)
    assert ("  | fine" in capsys.readouterr().out) == tail


def test_first_error() -> None:
    lines = [
        "UserWarning: not this",
        "[rank1]: Traceback (most recent call last):",
        "[rank1]: torch.distributed.DistError: gone",
    ]
    assert first_error(lines) == "torch.distributed.DistError: gone"
    assert first_error([*lines, "[rank0] error: the cause"]) == "error: the cause"
    assert first_error(["error: --eval-iters 9 is too many"]) == "error: --eval-iters 9 is too many"
    assert first_error(["all is well"]) == "its log names no error"


def test_only_a_run_without_a_whole_checkpoint_is_removed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert not remove_half_saved_run(run_dir)
    (run_dir / "iter_0000002").mkdir(parents=True)  # torn while it was being saved
    assert remove_half_saved_run(run_dir)
    assert not run_dir.exists()
    (run_dir / "iter_0000002").mkdir(parents=True)
    (run_dir / "latest_checkpointed_iteration.txt").write_text("2")
    (run_dir / "iter_0000004").mkdir()  # the training itself passes over the torn one
    assert not remove_half_saved_run(run_dir)
    assert (run_dir / "iter_0000004").exists()
