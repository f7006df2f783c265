"""`--qk-timing`: which parameters it holds back, by how much, when, and that a resume goes on with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from tests.distributed import jobs, ranks

ITERATIONS = 6
FACTOR, HOLD, RETURN = 0.25, 1 / 3, 1 / 2
TIMING = ("--qk-timing", "--qk-timing-fraction", HOLD, "--qk-timing-return", RETURN)
MULTIPLIERS = [FACTOR, FACTOR, FACTOR, 0.5, 0.75, 1.0]
"""Of the six iterations: held for two, then three of the way back, of which the first is its beginning."""
TP2, PP2 = ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)
VPP = (*jobs.DEEP, *PP2, "--num-layers-per-virtual-pipeline-stage", 1)
SHARDED = ("--use-distributed-optimizer",)
WARMUP = ("--lr-warmup-iters", 2, "--lr-decay-style", "cosine", "--min-lr", 1e-5)
QKV, MLP = "decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.mlp.linear_fc1.weight"
BIAS = "decoder.layers.self_attention.linear_qkv.bias"
HEAD_DIM = jobs.HIDDEN // jobs.HEADS
BETAS, EPSILON, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.01  # Megatron's defaults


def stored(run: Path, iteration: int) -> dict[str, Tensor]:
    """Tensors of a checkpoint by key, float64, read by torch alone."""
    reader = FileSystemReader(run / f"iter_{iteration:07d}")
    state = {
        name: torch.empty(entry.size)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.endswith((QKV, MLP, BIAS))
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {name: value.double() for name, value in state.items()}


def parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """linear_qkv [layers, rows, ...] in two: queries and keys of the upper half, and all the rest."""
    heads_of_group = jobs.HEADS // jobs.KV_GROUPS + 2
    grid = tensor.unflatten(1, (jobs.KV_GROUPS, heads_of_group, HEAD_DIM))
    is_timed = torch.zeros(grid.shape[:3], dtype=torch.bool)
    is_timed[jobs.LAYERS // 2 :, :, :-1] = True  # the last head of a group is its value
    return grid[is_timed], grid[~is_timed]


def follow(
    states: list[dict[str, Tensor]], rates: list[float], timed_rates: list[float]
) -> list[dict[str, float]]:
    """Largest distance, by part, between the weights of each iteration and plain AdamW's with two groups.

    The gradients are those that the moments of the run tell: g = (m - beta1 m_before) / (1 - beta1).
    """
    before = states[0]
    names = {"timed": QKV, "rest": QKV, "mlp": MLP, "timed bias": BIAS, "rest bias": BIAS}

    def part_of(state: dict[str, Tensor], name: str, prefix: str = "") -> Tensor:
        tensor = state[prefix + names[name]]
        return tensor if name == "mlp" else parts(tensor)[0 if name.startswith("timed") else 1]

    parameters = {name: torch.nn.Parameter(part_of(before, name).clone()) for name in names}
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [parameter],
                "weight_decay": 0.0 if name.endswith("bias") else WEIGHT_DECAY,
                "is_timed": name.startswith("timed"),
            }
            for name, parameter in parameters.items()
        ],
        betas=BETAS,
        eps=EPSILON,
    )
    for name, parameter in parameters.items():
        moments = [part_of(before, name, f"optimizer.state.{key}.") for key in ("exp_avg", "exp_avg_sq")]
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": moments[0].clone(),
            "exp_avg_sq": moments[1].clone(),
        }
    distances = []
    for iteration in range(2, ITERATIONS + 1):
        now = states[iteration - 1]
        for group in optimizer.param_groups:
            group["lr"] = (timed_rates if group["is_timed"] else rates)[iteration - 1]
        for name, parameter in parameters.items():
            first, then = (part_of(state, name, "optimizer.state.exp_avg.") for state in (before, now))
            parameter.grad = (then - BETAS[0] * first) / (1 - BETAS[0])
        optimizer.step()
        distances.append(
            {
                name: float((parameter.detach() - part_of(now, name)).abs().max())
                for name, parameter in parameters.items()
            }
        )
        before = now
    return distances


def test_the_updates_are_those_of_adamw_with_two_groups(pack: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = jobs.command(
        *(pack, "exact", ITERATIONS, "--save", run, "--save-interval", 1, "--add-qkv-bias"),
        *("--clip-grad", 0, *TIMING),
    )
    ended = ranks.train(1, argv, tmp_path).check()
    rates = [1e-3] * ITERATIONS
    timed = [1e-3 * multiplier for multiplier in MULTIPLIERS]
    states = [stored(run, iteration) for iteration in range(1, ITERATIONS + 1)]
    for distance in follow(states, rates, timed):
        assert max(distance.values()) < 1e-7, distance
    # negative controls: without the timing, and with it on the others
    for wrong in (follow(states, rates, rates), follow(states, timed, timed)):
        assert max(max(distance.values()) for distance in wrong) > 1e-4

    lines = ranks.read_jsonl(run / "losses.jsonl")
    assert [line["learning_rate"] for line in lines] == rates  # that of the others
    # of the step that was taken: upstream reads the next one's
    assert [line["upper_qk_learning_rate"] for line in lines] == pytest.approx(timed)
    assert "learning rate of upper q and k 2.500000E-04, 0.25 of the others'" in ended.outputs[0]
    schedule = json.loads((run / "run.json").read_text())["schedule"]
    assert schedule["qk_timing"] == {"factor": FACTOR, "fraction": HOLD, "return_fraction": RETURN}


def command(pack: Path, run: Path, checkpoint: Path, *flags: Any) -> list[Any]:
    start = ("--load", run, "--save", run, "--pretrained-checkpoint", checkpoint)
    return jobs.command(pack, "exact", ITERATIONS, *start, "--save-interval", 3, *WARMUP, *TIMING, *flags)


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        pytest.param(2, PP2, id="pp2"),  # the first pipeline stage has no timed parameter
        pytest.param(2, SHARDED, id="dp2-distributed-optimizer"),
        pytest.param(1, (), id="one", marks=pytest.mark.slow),
        pytest.param(2, TP2, id="tp2", marks=pytest.mark.slow),
        pytest.param(2, VPP, id="vpp", marks=pytest.mark.slow),  # of a rank's two chunks, one has them
        pytest.param(2, (*PP2, "--bf16"), id="pp2-bf16", marks=pytest.mark.slow),
        pytest.param(2, (*PP2, *SHARDED), id="pp2-distributed-optimizer", marks=pytest.mark.slow),
        pytest.param(2, ("--bf16",), id="dp2-bf16", marks=pytest.mark.slow),
        pytest.param(
            *(4, (*TP2, *PP2, "--sequence-parallel", "--bf16")), id="tp2-pp2-bf16", marks=pytest.mark.slow
        ),
        pytest.param(
            *(4, (*TP2, *SHARDED, "--overlap-grad-reduce", "--overlap-param-gather")),
            id="tp2-dp2-distributed-optimizer",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_resume_on_the_way_back_is_the_run_to_the_bit(
    world: int, flags: tuple[Any, ...], pack: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint: Path = request.getfixturevalue("deep_checkpoint" if flags == VPP else "checkpoint")
    whole, again = tmp_path / "whole", tmp_path / "again"
    ranks.train(world, command(pack, whole, checkpoint, *flags), tmp_path / "o1").check()
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns("iter_0000006"))
    (again / "latest_checkpointed_iteration.txt").write_text("3")
    ended = ranks.train(world, command(pack, again, checkpoint, *flags), tmp_path / "o2").check()
    assert "resuming from iter_0000003" in ended.outputs[0]
    text = (again / "losses.jsonl").read_text()
    assert text == (whole / "losses.jsonl").read_text()
    lines = ranks.read_jsonl(again / "losses.jsonl")
    assert lines[0]["learning_rate"] == 0  # of the warm-up's first step
    found = [line["upper_qk_learning_rate"] / line["learning_rate"] for line in lines[1:]]
    assert found == pytest.approx(MULTIPLIERS[1:])


@pytest.mark.slow
def test_it_changes_what_is_trained_and_a_factor_of_one_does_not(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Without clipping: the norm of gradients is summed by group, so its last bit depends on them."""
    losses = {}
    for name, flags in {
        "plain": ("--separate-qkv",),
        "factor 1": (*TIMING, "--qk-timing-factor", 1),
        "no window": ("--qk-timing", "--qk-timing-fraction", 0, "--qk-timing-return", 0),
        "timed": TIMING,
    }.items():
        start = ("--pretrained-checkpoint", checkpoint, "--run-dir", tmp_path / name, "--clip-grad", 0)
        argv = jobs.command(pack, "exact", ITERATIONS, *start, *flags)
        ranks.train(1, argv, tmp_path / f"output {name}").check()
        losses[name] = [line["loss"] for line in ranks.read_jsonl(tmp_path / name / "losses.jsonl")]
    assert losses["factor 1"] == losses["plain"]
    assert losses["no window"] == losses["plain"]
    assert losses["timed"][0] == losses["plain"][0]
    assert all(a != b for a, b in zip(losses["timed"][1:], losses["plain"][1:], strict=True))


@pytest.mark.slow
def test_another_setting_does_not_resume_and_states_of_the_fused_layout_do_not_load(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = command(pack, run, checkpoint)
    ranks.train(1, [*argv, "--exit-interval", 3], tmp_path / "o1").check()
    for flags, words in {
        ("--qk-timing-factor", 0.5): "25, the default (now 0.5): a run keeps its configuration",
        ("--qk-timing-fraction", 0.1): "a run keeps its configuration",
        ("--train-iters", 12, "--lr-decay-iters", 6): "followed another --qk-timing window",
    }.items():
        check_refused(ranks.train(1, [*argv, *flags], tmp_path / "o2"), words)
    fused = jobs.command(pack, "exact", 1, "--pretrained-checkpoint", run, "--lr-warmup-iters", 0)
    ranks.train(1, fused, tmp_path / "o3").check()  # the weights do
    with_states = [*fused, *WARMUP, "--train-iters", 6, "--carry-optimizer"]
    check_refused(ranks.train(1, with_states, tmp_path / "o4"), "were saved with --separate-qkv True")
    stage = [*with_states, *TIMING, "--run-dir", tmp_path / "stage"]
    ranks.train(1, stage, tmp_path / "o6").check()  # same groups: the states do, and the window begins anew
    lines = ranks.read_jsonl(tmp_path / "stage" / "losses.jsonl")
    assert lines[0]["learning_rate"] == 0  # of the warm-up's first step
    found = [line["upper_qk_learning_rate"] / line["learning_rate"] for line in lines[1:]]
    assert found == pytest.approx(MULTIPLIERS[1:])
    other_factor = [*with_states, *TIMING, "--qk-timing-factor", 0.5]
    check_refused(
        ranks.train(1, other_factor, tmp_path / "o5"), "--qk-timing-factor 0.25, this job has 0.5"
    )


def check_refused(ended: ranks.Ended, words: str) -> None:
    assert ended.codes == [1]
    assert words in ended.outputs[0]
    assert "Traceback" not in ended.outputs[0]
