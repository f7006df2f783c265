"""A run that stops and goes on is the run that did not stop."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.distributed import jobs, ranks

FLAGS = ("--train-iters", 6, "--save-interval", 3, "--log-row-ids")


def resumable(pack: Path, rule: str, run: Path, checkpoint: Path, *extra: Any) -> list[Any]:
    """The same command starts and resumes."""
    start = ("--load", run, "--save", run, "--pretrained-checkpoint", checkpoint)
    return jobs.command(pack, rule, 6, *start, *FLAGS, *extra)


TP2, PP2 = ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        pytest.param(1, (), id="tp1"),
        pytest.param(2, PP2, id="pp2"),
        pytest.param(2, ("--bf16",), id="dp2-bf16"),
        pytest.param(2, TP2, id="tp2", marks=pytest.mark.slow),
        pytest.param(2, (), id="dp2", marks=pytest.mark.slow),
        pytest.param(2, ("--balance-rows",), id="dp2-balanced", marks=pytest.mark.slow),
        pytest.param(4, (*TP2, *PP2), id="tp2-pp2", marks=pytest.mark.slow),
        pytest.param(4, (*TP2, *PP2, "--bf16"), id="tp2-pp2-bf16", marks=pytest.mark.slow),
    ],
)
def test_three_and_three_is_six_to_the_bit(
    world: int, flags: tuple[Any, ...], pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ranks.train(world, resumable(pack, "exact", whole, checkpoint, *flags), tmp_path / "o1").check()
    first = resumable(pack, "exact", parts, checkpoint, *flags, "--exit-interval", 3)
    ranks.train(world, first, tmp_path / "o2").check()
    assert len(ranks.read_jsonl(parts / "losses.jsonl")) == 3
    # what a job wrote after its last save is told again by the resumed one, never twice
    with open(parts / "losses.jsonl", "a") as stream:
        stream.write('{"iteration": 4, "loss": 1.0}\n{"iterat')
    ended = ranks.train(world, resumable(pack, "exact", parts, checkpoint, *flags), tmp_path / "o3").check()
    assert "resuming from iter_0000003" in ended.outputs[0]
    assert (parts / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()
    assert (parts / "rows.jsonl").read_text() == (whole / "rows.jsonl").read_text()
    record = json.loads((parts / "run.json").read_text())
    assert [resume["iteration"] for resume in record["resumes"]] == [3]
    assert (
        record["start_checkpoint"]["sha256"]
        == json.loads((whole / "run.json").read_text())["start_checkpoint"]["sha256"]
    )


def test_resume_goes_on_with_the_same_rows_on_another_layout(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ranks.train(1, resumable(pack, "exact", whole, checkpoint), tmp_path / "o1").check()
    first = resumable(pack, "exact", parts, checkpoint, "--exit-interval", 3)
    ranks.train(1, first, tmp_path / "o2").check()
    ranks.train(2, resumable(pack, "exact", parts, checkpoint), tmp_path / "o3").check()  # DP2
    assert (parts / "rows.jsonl").read_text() == (whole / "rows.jsonl").read_text()
    for ours, theirs in zip(
        *(ranks.read_jsonl(run / "losses.jsonl") for run in (parts, whole)), strict=True
    ):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks.train(1, resumable(pack, "none", run, checkpoint), tmp_path / "o1").check()
    text = (run / "losses.jsonl").read_text()
    (run / "iter_0000006" / ".metadata").unlink()
    ended = ranks.train(1, resumable(pack, "none", run, checkpoint), tmp_path / "o2").check()
    assert "iter_0000003" in ended.outputs[0]
    assert "not taken: iter_0000006 lacks .metadata" in ended.outputs[0]
    assert (run / "losses.jsonl").read_text() == text
    for iteration in ("iter_0000003", "iter_0000006"):
        shutil.rmtree(run / iteration)
        (run / iteration).mkdir()
    ended = ranks.train(1, resumable(pack, "none", run, checkpoint), tmp_path / "o3")
    assert ended.codes == [1]
    assert (
        "no intact checkpoint: iter_0000006 lacks .metadata; iter_0000003 lacks .metadata"
        in ended.outputs[0]
    )


def test_a_folder_of_another_run_is_refused(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks.train(1, resumable(pack, "none", run, checkpoint, "--exit-interval", 3), tmp_path / "o1").check()
    ended = ranks.train(1, resumable(pack, "exact", run, checkpoint), tmp_path / "o2")
    assert ended.codes == [1]
    assert "belongs to another run: its weighting is" in ended.outputs[0]
    assert len(ranks.read_jsonl(run / "losses.jsonl")) == 3


def test_a_run_keeps_its_schedule_and_is_not_begun_again(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks.train(1, resumable(pack, "none", run, checkpoint, "--exit-interval", 3), tmp_path / "o1").check()
    before = (run / "losses.jsonl").read_bytes()
    refusals = {
        "--clip-grad 1.0, the default (now 0.1): a run keeps its configuration": resumable(
            pack, "none", run, checkpoint, "--clip-grad", 0.1
        ),
        "--finetune with --load equal to --save": resumable(pack, "none", run, checkpoint, "--finetune"),
        "already contains a run": jobs.command(
            pack, "none", 6, "--load", checkpoint, "--finetune", "--save", run, *FLAGS
        ),
    }
    for words, argv in refusals.items():
        ended = ranks.train(1, argv, tmp_path / "o2")
        assert ended.codes == [1]
        assert words in ended.outputs[0]
        assert (run / "losses.jsonl").read_bytes() == before


def test_a_finished_run_says_so(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = resumable(pack, "none", run, checkpoint)
    ranks.train(1, argv, tmp_path / "o1").check()
    before = {path: path.read_bytes() for path in run.glob("*.json*")}
    ended = ranks.train(1, argv, tmp_path / "o2").check()
    assert "the run is finished: iteration 6 of 6" in ended.outputs[0]
    assert {path: path.read_bytes() for path in run.glob("*.json*")} == before


def test_a_rank_that_fails_alone_is_named(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The last rank cannot read the checkpoint, on another node perhaps; the others wait for it."""

    def break_last_rank() -> None:
        import os

        from megatron_exact.training import run_record

        stock = run_record.describe_run

        def fail(*args: Any, **kwargs: Any) -> Any:
            if os.environ["RANK"] == "1":
                raise OSError("input/output error")
            return stock(*args, **kwargs)

        run_record.describe_run = fail

    argv = jobs.command(pack, "none", 1, "--pretrained-checkpoint", checkpoint)
    ended = ranks.train(2, argv, tmp_path, break_last_rank)
    assert all(ended.codes)
    assert "error: rank 1: input/output error" in ended.outputs[1]


OTHER_MODELS = {
    "--add-qkv-bias": "linear_qkv.bias",
    "--untie-embeddings-and-output-weights": "output_layer",
}


@pytest.mark.parametrize("flag", OTHER_MODELS)
def test_a_model_of_other_flags_does_not_load(
    flag: str, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Upstream's default would load it and drop or invent parameters in silence."""
    bare = tmp_path / "bare"  # a checkpoint that does not say what model it holds
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("hf"))
    argv = jobs.command(pack, "none", 1, "--pretrained-checkpoint", bare, flag)
    ended = ranks.train(1, argv, tmp_path / "output")
    assert ended.codes == [1]
    assert "the flags differ" in ended.outputs[0]
    assert OTHER_MODELS[flag] in ended.outputs[0]


def test_flags_that_contradict_the_checkpoint_are_named(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    flags = ("--add-qkv-bias", "--norm-epsilon", "1e-6", "--rotary-base", 500000)
    argv = jobs.command(pack, "none", 1, "--pretrained-checkpoint", checkpoint, *flags)
    ended = ranks.train(1, argv, tmp_path)
    assert ended.codes == [1]
    (error,) = (line for line in ended.outputs[0].splitlines() if line.startswith("error: "))
    assert "--add-qkv-bias is given but the model has add_qkv_bias False" in error
    assert "--norm-epsilon 1e-6 is given but the model has 1e-05" in error
    assert "--rotary-base 500000 is given but the model has 10000" in error


def test_what_no_shape_flag_names_is_refused(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    argv = jobs.command(pack, "none", 1, "--pretrained-checkpoint", checkpoint, "--rotary-percent", 0.5)
    ended = ranks.train(1, argv, tmp_path)
    assert ended.codes == [1]
    assert "--rotary-percent 0.5 is given but the model has 1.0" in ended.outputs[0]


def test_a_run_says_what_model_it_holds(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    """`hf/` of a run that was started from flags; the next run needs no flags, and carries it on."""
    from megatron_exact.model.hf_folder import read_hf_folder

    shape = read_hf_folder(checkpoint / "hf").shape
    assert (shape.architecture, shape.num_layers, shape.vocab_size) == (
        "llama",
        jobs.LAYERS,
        jobs.VOCABULARY,
    )
    run = tmp_path / "run"
    argv = [
        *("--pack", pack, "--pretrained-checkpoint", checkpoint, "--save", run, "--save-interval", 1),
        *jobs.SCHEDULE,
        *("--train-iters", 1),
    ]
    ranks.train(1, argv, tmp_path / "output").check()
    assert read_hf_folder(run / "hf").shape == shape
    assert (run / "hf" / "config.json").read_bytes() == (checkpoint / "hf" / "config.json").read_bytes()


def test_a_line_has_the_rate_of_its_step_also_across_a_resume_and_a_skip(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """losses.jsonl, the console and TensorBoard; upstream reads the rate of the next step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    decay = ("--lr-decay-style", "linear", "--lr-warmup-iters", 2, "--lr", 3e-3, "--min-lr", 0)
    skip = ("--iterations-to-skip", 2, "--log-interval", 1)
    argv = resumable(pack, "exact", run, checkpoint, *decay, *skip)
    first = ranks.train(1, [*argv, "--exit-interval", 3], tmp_path / "o1").check()
    second = ranks.train(1, argv, tmp_path / "o2").check()
    lines = ranks.read_jsonl(run / "losses.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    left_out = lines.pop(1)
    assert left_out["skipped"] is True
    assert left_out["loss"] is left_out["learning_rate"] is None
    assert left_out["targets"] == 0
    # 2 steps from 0 to the peak, then linearly to 0 in 4; the schedule stands still in the step left out
    rates = [0.0, 1.5e-3, 3e-3, 2.25e-3, 1.5e-3]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    printed = re.findall(r"learning rate: (\S+)", first.outputs[0] + second.outputs[0])
    assert [float(rate) for rate in printed] == pytest.approx(rates, rel=1e-5)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    points = [(point.step, point.value) for point in events.Scalars("learning-rate")]
    assert [step for step, _ in points] == [1, 3, 4, 5, 6]
    assert [value for _, value in points] == pytest.approx(rates, rel=1e-6)
    # the schedule is Megatron's: a warm-up from 0 takes its first step without moving the weights
    assert lines[0]["loss"] > 0


def replace_wandb(told: Path) -> None:
    """A module that notes into a file what a job tells W&B."""

    def say(*words: Any) -> None:
        with open(told, "a") as stream:
            print(*words, file=stream)

    def init(**options: Any) -> None:
        wandb.run.id = os.environ.get("WANDB_RUN_ID", f"begun-by-{os.getpid()}")
        say("init", wandb.run.id, os.environ.get("WANDB_RESUME"))

    def log(values: dict[str, Any], step: int | None = None) -> None:
        if "learning-rate" in values:
            say("log", wandb.run.id, step)

    wandb = mock.MagicMock(init=init, log=log)
    sys.modules["wandb"] = wandb


def test_tensorboard_and_wandb_have_each_iteration_once_after_a_kill(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Killed in iteration 5 and resumed from 3."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, told = tmp_path / "run", tmp_path / "wandb.txt"

    def kill_in_iteration_5() -> None:
        from megatron.training.global_vars import get_tensorboard_writer

        from megatron_exact.training.run import TrainingRun

        replace_wandb(told)
        stock = TrainingRun.record_iteration

        def record(self: Any, iteration: int, **options: Any) -> Any:
            result = stock(self, iteration, **options)
            if iteration == 5:
                writer = get_tensorboard_writer()
                if writer is not None:
                    writer.flush()  # points beyond the checkpoint are on disk
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        TrainingRun.record_iteration = record  # type: ignore[method-assign]

    argv = resumable(pack, "exact", run, checkpoint, "--wandb-project", "p", "--wandb-exp-name", "n")
    ended = ranks.train(1, argv, tmp_path / "o1", kill_in_iteration_5)
    assert ended.codes == [-signal.SIGKILL], ended.outputs[0][-2000:]
    ranks.train(1, argv, tmp_path / "o2", lambda: replace_wandb(told)).check()
    assert [line["iteration"] for line in ranks.read_jsonl(run / "losses.jsonl")] == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for name in ("training/loss", "learning-rate", "training loss by context/000000"):
        assert [point.step for point in events.Scalars(name)] == [1, 2, 3, 4, 5, 6], name
    lines = [line.split() for line in told.read_text().splitlines()]
    identifier = json.loads((run / "run.json").read_text())["wandb_run"]
    assert {line[1] for line in lines} == {identifier}
    assert [line[2] for line in lines if line[0] == "init"] == ["None", "allow"]


@pytest.mark.parametrize(
    "flags", [(), ("--bf16",), ("--sgd-momentum", 0)], ids=["momentum", "bf16", "plain"]
)
def test_sgd_resumes_bit_identically(flags: tuple[Any, ...], pack: Path, tmp_path: Path) -> None:
    """Upstream gives SGD no empty states to load its momenta into."""
    losses = []
    for name, stops in (("whole", False), ("resumed", True)):
        run = tmp_path / name
        folders = ("--save", run, "--load", run, "--save-interval", 2, "--optimizer", "sgd", "--lr", 0.1)
        argv = jobs.command(pack, "exact", 4, *folders, *flags)
        if stops:
            ranks.train(1, [*argv, "--exit-interval", 2], tmp_path / f"{name}-1").check()
        ranks.train(1, argv, tmp_path / name / "output").check()
        losses.append((run / "losses.jsonl").read_text())
    assert losses[0] == losses[1]
    assert len(losses[0].splitlines()) == 4
