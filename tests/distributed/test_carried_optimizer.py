"""`--carry-optimizer`: a stage begins with the optimizer's states of the stage before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from megatron_exact.training.checkpoint_start import Start
from tests.distributed import jobs, ranks

BETA = 0.9  # Megatron's default


@pytest.fixture(scope="module")
def before(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage before: four iterations, so moments are there."""
    folder = tmp_path_factory.mktemp("before")
    argv = jobs.command(pack, "none", 4, "--save", folder / "run", "--save-interval", 4)
    ranks.train(1, argv, folder).check()
    return folder / "run"


def start(pack: Path, before: Path, run: Path, iterations: int, *extra: Any) -> ranks.Ended:
    words = ("--pretrained-checkpoint", before, "--load", run, "--save", run, *extra)
    return ranks.train(1, jobs.command(pack, "exact", iterations, *words), run.parent / "output").check()


def moments(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Adam's first moments, read by torch alone."""
    reader = FileSystemReader(run / f"iter_{iteration:07d}")
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size)
        for name, entry in stored.items()
        if "optimizer.state.exp_avg." in name
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def test_moments_go_on_and_everything_else_begins_anew(pack: Path, before: Path, tmp_path: Path) -> None:
    fresh, carried = tmp_path / "fresh" / "run", tmp_path / "carried" / "run"
    start(pack, before, fresh, 1, "--save-interval", 1)
    ended = start(pack, before, carried, 1, "--save-interval", 1, "--carry-optimizer")
    assert "with the states of its optimizer" in ended.outputs[0]
    # Both starts see the same gradient in the first iteration, before any step
    gradients, there, old = moments(fresh, 1), moments(carried, 1), moments(before, 4)
    assert len(there) == 8  # layers are stacked
    for name, value in there.items():
        expected = BETA * old[name] + gradients[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-9)
        assert not torch.allclose(value, gradients[name], rtol=1e-2)  # negative control: nothing carried
    assert json.loads((carried / "run.json").read_text())["schedule"]["carry_optimizer"] is True


def test_rows_and_learning_rate_begin_anew_and_the_run_resumes(
    pack: Path, before: Path, tmp_path: Path
) -> None:
    warmup = ("--lr", 1e-3, "--lr-warmup-iters", 3, "--save-interval", 2, "--log-row-ids")
    fresh, carried = tmp_path / "fresh" / "run", tmp_path / "carried" / "run"
    start(pack, before, fresh, 4, *warmup)
    start(pack, before, carried, 4, *warmup, "--carry-optimizer", "--exit-interval", 2)
    start(pack, before, carried, 4, *warmup, "--carry-optimizer")  # the same words resume
    assert (carried / "rows.jsonl").read_text() == (fresh / "rows.jsonl").read_text()
    lines = [ranks.read_jsonl(run / "losses.jsonl") for run in (fresh, carried)]
    for key in ("iteration", "learning_rate"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]]
    assert lines[0][0]["loss"] == lines[1][0]["loss"]
    assert lines[0][2]["loss"] != lines[1][2]["loss"]


def test_another_learning_rate_is_refused_and_an_import_says_that_it_has_no_optimizer(
    pack: Path, before: Path, tmp_path: Path
) -> None:
    argv = jobs.command(
        pack, "none", 1, "--pretrained-checkpoint", before, "--carry-optimizer", "--lr", "1e-4"
    )
    ended = ranks.train(1, argv, tmp_path)
    assert ended.codes == [1]
    assert (
        "--carry-optimizer needs the --lr 0.001 of the stage before, this job has 0.0001"
        in ended.outputs[0]
    )
    assert (
        Start(
            load=before,
            checkpoint=before,
            iteration=None,
            is_resume=False,
            weights_only=True,
            message="starting",
        )
        .carrying_optimizer()
        .message.startswith("starting; it contains no optimizer")
    )
