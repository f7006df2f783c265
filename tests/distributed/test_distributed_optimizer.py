"""The distributed optimizer with torch's Adam: what it saves loads, to the bit, on any number of ranks."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_exact.conversion.export_hf import export_hf
from tests.distributed import jobs, ranks

SHARDED = ("--use-distributed-optimizer",)
OVERLAPPED = (*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", 20_000)
"""Several buckets: the model has about 90,000 parameters."""
PRECISIONS = {"fp32": SHARDED, "bf16": (*OVERLAPPED, "--bf16")}


def command(pack: Path, run: Path, checkpoint: Path, *flags: Any) -> list[Any]:
    start = ("--load", run, "--save", run, "--pretrained-checkpoint", checkpoint)
    return jobs.command(pack, "exact", 6, *start, "--save-interval", 3, "--log-row-ids", *flags)


@pytest.fixture(scope="module")
def whole(pack: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of six iterations on two data-parallel ranks, by precision."""

    @functools.cache
    def run(precision: str) -> Path:
        folder = tmp_path_factory.mktemp(precision)
        argv = command(pack, folder / "run", checkpoint, *PRECISIONS[precision])
        ranks.train(2, argv, folder).check()
        return folder / "run"

    return run


def stopped_after_three(whole: Path, folder: Path) -> Path:
    """The run as it was after its first save."""
    run = folder / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("iter_0000006"))
    (run / "latest_checkpointed_iteration.txt").write_text("3")
    for records in ("losses.jsonl", "rows.jsonl"):
        lines = (run / records).read_text().splitlines(keepends=True)
        (run / records).write_text("".join(lines[:3]))
    return run


@pytest.mark.parametrize("precision", PRECISIONS)
def test_three_and_three_is_six_to_the_bit(
    precision: str, pack: Path, checkpoint: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run = stopped_after_three(whole(precision), tmp_path)
    ended = ranks.train(2, command(pack, run, checkpoint, *PRECISIONS[precision]), tmp_path).check()
    assert "resuming from iter_0000003" in ended.outputs[0]
    for records in ("losses.jsonl", "rows.jsonl"):
        assert (run / records).read_text() == (whole(precision) / records).read_text()


@pytest.mark.parametrize("world", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_it_resumes_on_another_number_of_ranks(
    world: int, pack: Path, checkpoint: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run = stopped_after_three(whole("fp32"), tmp_path)
    ranks.train(world, command(pack, run, checkpoint, *SHARDED), tmp_path).check()
    check_agreement(run, whole("fp32"))


def test_overlap_and_sharding_change_nothing(
    pack: Path, checkpoint: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    """Against the plain optimizer on the same two ranks, which has no state to shard."""
    plain, overlapped = tmp_path / "plain", tmp_path / "overlapped"
    ranks.train(2, command(pack, plain, checkpoint), tmp_path / "o1").check()
    ranks.train(2, command(pack, overlapped, checkpoint, *OVERLAPPED), tmp_path / "o2").check()
    check_agreement(whole("fp32"), plain)
    check_agreement(overlapped, plain)


def check_agreement(run: Path, reference: Path) -> None:
    """Same rows, and the bounds of the layout matrix."""
    assert (run / "rows.jsonl").read_text() == (reference / "rows.jsonl").read_text()
    ours, theirs = (ranks.read_jsonl(path / "losses.jsonl") for path in (run, reference))
    for line, other in zip(ours, theirs, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-6)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def without(method: str) -> Callable[[], None]:
    """A patch that gives upstream its own method back."""

    def patch() -> None:
        from megatron_exact.training.distributed_optimizer import TorchAdamDistributedOptimizer

        delattr(TorchAdamDistributedOptimizer, method)

    return patch


@pytest.mark.parametrize("method", ["state_dict", "_set_main_param_and_optimizer_states"])
def test_without_either_repair_a_load_fails(
    method: str, pack: Path, checkpoint: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run = stopped_after_three(whole("fp32"), tmp_path)
    ended = ranks.train(2, command(pack, run, checkpoint, *SHARDED), tmp_path, without(method))
    assert all(ended.codes)
    assert f"in {method}" in ended.outputs[0]


def test_without_its_own_step_count_a_state_runs_away(
    pack: Path, checkpoint: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nothing fails: the fourth iteration's gradient is still right, its update is not."""
    run = stopped_after_three(whole("fp32"), tmp_path)
    argv = command(pack, run, checkpoint, *SHARDED)
    ranks.train(2, argv, tmp_path, without("load_state_dict")).check()
    ours, theirs = (ranks.read_jsonl(path / "losses.jsonl") for path in (run, whole("fp32")))
    assert ours[:4] == theirs[:4]
    assert abs(ours[4]["loss"] / theirs[4]["loss"] - 1) > 1e-5


TP2 = ("--tensor-model-parallel-size", 2)
OTHER_FORMS: dict[str, tuple[int, tuple[Any, ...], str]] = {
    "plain": (
        1,
        (),
        "saved with --use-distributed-optimizer, whose states have another form: add the flag",
    ),
    "tp2": (2, (*SHARDED, *TP2), "saved with --tensor-model-parallel-size 1, this job has 2"),
    "buckets": (1, (*SHARDED, "--overlap-grad-reduce"), "buckets of all parameters, this job's in buckets"),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_states_of_another_form_are_refused_in_one_line(
    form: str, pack: Path, checkpoint: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    world, flags, words = OTHER_FORMS[form]
    run = stopped_after_three(whole("fp32"), tmp_path)
    check_refused(ranks.train(world, command(pack, run, checkpoint, *flags), tmp_path), words)


def test_states_of_the_plain_optimizer_are_left_out_when_asked(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    argv = jobs.command(pack, "none", 2, "--load", checkpoint, *SHARDED)
    check_refused(ranks.train(1, argv, tmp_path), "saved without --use-distributed-optimizer")
    ranks.train(1, [*argv, "--no-load-optim", "--finetune"], tmp_path).check()


def check_refused(ended: ranks.Ended, words: str) -> None:
    assert all(ended.codes)
    (error,) = (line for line in ended.outputs[0].splitlines() if line.startswith("error: "))
    assert words in error
    assert "--no-load-optim" in error
    assert "Traceback" not in ended.outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "is_damaged"), [(SHARDED, False), (OVERLAPPED, True)])
def test_fully_reshardable_states_of_several_buckets_are_damaged(
    flags: tuple[Any, ...], is_damaged: bool, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Why the flag is refused: without the guard 0.19.2 saves zeros for the end of the parameters."""

    def lift_the_guard() -> None:
        from megatron_exact.training import flag_classes

        flag_classes.HARMLESS = {**flag_classes.HARMLESS, "--dist-ckpt-optim-fully-reshardable": ()}

    argv = command(pack, tmp_path / "whole", checkpoint, *flags, "--dist-ckpt-optim-fully-reshardable")
    assert all(ranks.train(2, argv, tmp_path / "o1").codes), "the guard is not there"
    ranks.train(2, argv, tmp_path / "o2", lift_the_guard).check()
    run = stopped_after_three(tmp_path / "whole", tmp_path)
    argv = command(pack, run, checkpoint, *flags, "--dist-ckpt-optim-fully-reshardable")
    ranks.train(2, argv, tmp_path / "o3", lift_the_guard).check()
    losses = [(path / "losses.jsonl").read_text() for path in (run, tmp_path / "whole")]
    assert (losses[0] != losses[1]) == is_damaged


@pytest.mark.slow
def test_an_export_does_not_know_which_optimizer_it_was(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Tensor and pipeline parallel; without clipping, as norms of other shards differ in the last bit."""
    layout = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--clip-grad", 0)
    weights = []
    for name, flags in (("plain", ()), ("sharded", SHARDED)):
        argv = command(pack, tmp_path / name, checkpoint, *layout, *flags)
        ranks.train(4, argv, tmp_path / f"output-{name}").check()
        export_hf(tmp_path / name, tmp_path / f"hf-{name}")
        weights.append(load_file(tmp_path / f"hf-{name}" / "model.safetensors"))
    plain, sharded = weights
    assert plain.keys() == sharded.keys()
    assert all(torch.equal(plain[name], sharded[name]) for name in plain)
