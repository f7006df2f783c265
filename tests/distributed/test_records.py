"""What a run records: exact counts over an epoch, the stock loss to the bit, and evaluations."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_exact.data.manifest import read_manifest
from tests.distributed import jobs, ranks


@pytest.mark.parametrize(
    ("policy", "options", "world", "flags"),
    [
        ("concat", {}, 1, ()),
        ("concat", {}, 2, ("--pipeline-model-parallel-size", 2)),
        ("best-fit", {}, 2, ("--pipeline-model-parallel-size", 2)),
        ("best-fit", {"mask_cross_document_targets": True}, 2, ("--tensor-model-parallel-size", 2)),
        ("concat", {"mask_cross_document_targets": True}, 2, ("--context-parallel-size", 2)),
    ],
    ids=["concat-tp1", "concat-pp2", "best-fit-pp2", "best-fit-masked-tp2", "concat-masked-cp2"],
)
def test_one_epoch_of_recorded_targets_is_the_manifest(
    policy: str, options: dict[str, Any], world: int, flags: tuple[Any, ...], corpus: Path, tmp_path: Path
) -> None:
    pack = jobs.make_pack(corpus, policy, f"epoch-{policy}-{world}-{len(options)}", **options)
    split = read_manifest(pack).splits["train"]
    batch = jobs.divisor_near(split.rows, 8)
    argv = jobs.command(
        pack, "exact", split.rows // batch, "--global-batch-size", batch, "--run-dir", tmp_path / "run",
        "--log-row-ids", *flags,
    )  # fmt: skip
    ranks.train(world, argv, tmp_path).check()
    lines = ranks.read_jsonl(tmp_path / "run" / "losses.jsonl")
    recorded = [sum(bucket) for bucket in zip(*(line["bucket_targets"] for line in lines), strict=True)]
    assert recorded == list(split.exposure.counts)
    assert sum(line["targets"] for line in lines) == split.supervised_targets
    seen = ranks.read_jsonl(tmp_path / "run" / "rows.jsonl")
    assert sorted(row for line in seen for row in line["rows"]) == list(range(split.rows))
    assert {line["epoch"] for line in seen} == {0}


def use_stock_loss() -> None:
    """Replace our loss by the stock formula, keeping the records."""
    from megatron_exact.training import run as run_module

    def stock_loss(token_losses: Any, targets: Any, statistics: Any, *, divides_by_mass: bool) -> Any:
        losses, mask = token_losses.view(-1).float(), targets.loss_mask.view(-1).float()
        loss = torch.sum(losses * mask)
        count = mask.sum().clone().detach().to(torch.int)
        statistics.add(losses.detach(), targets)
        return loss, count, {"lm loss": torch.cat([loss.detach().view(1), count.view(1)])}

    run_module.weighted_token_loss = stock_loss


@pytest.mark.parametrize(
    ("world", "flags"),
    [(1, ("--micro-batch-size", 2)), (2, ("--tensor-model-parallel-size", 2))],
    ids=["tp1", "tp2"],
)
def test_rule_none_is_the_stock_loss_to_the_bit(
    world: int, flags: tuple[Any, ...], pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    def records(name: str, rule: str, patch: Callable[[], None] | None = None) -> list[dict[str, Any]]:
        argv = jobs.command(
            pack, rule, 4, "--pretrained-checkpoint", checkpoint, "--run-dir", tmp_path / name, *flags
        )
        ranks.train(world, argv, tmp_path / f"{name}-output", patch).check()
        return ranks.read_jsonl(tmp_path / name / "losses.jsonl")

    ours = records("ours", "none")
    assert ours == records("stock", "none", use_stock_loss)
    assert ours != records("weighted", "exact")  # negative control


def test_evaluations_are_unweighted_and_always_over_the_same_rows(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    split = read_manifest(pack).splits["validation"]
    batch = 2
    iterations = min(3, split.rows // batch)
    flags = (
        *("--global-batch-size", batch),
        *("--eval-interval", 2),
        *("--eval-iters", iterations),
        *("--pipeline-model-parallel-size", 2),
        *("--lr", 0, "--min-lr", 0),  # nothing is learnt: the same rows give the same loss
    )
    argv = jobs.command(
        pack, "exact", 4, "--pretrained-checkpoint", checkpoint, "--run-dir", tmp_path / "run", *flags
    )
    ranks.train(2, argv, tmp_path).check()
    lines = ranks.read_jsonl(tmp_path / "run" / "evaluations.jsonl")
    assert [line["iteration"] for line in lines] == [2, 4]
    first, second = ({k: v for k, v in line.items() if k != "iteration"} for line in lines)
    assert first == second
    assert first["loss"] == first["weighted_loss"]
    assert first["targets"] == iterations * batch * jobs.ROW_TOKENS
    assert set(first) | {"iteration"} == set(ranks.read_jsonl(tmp_path / "run" / "losses.jsonl")[0])


def test_tensorboard_has_the_same_curves(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    argv = jobs.command(pack, "exact", 3, "--pretrained-checkpoint", checkpoint, "--run-dir", run)
    ranks.train(1, argv, tmp_path).check()
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    lines = ranks.read_jsonl(run / "losses.jsonl")
    for tag, key in (("training/loss", "loss"), ("training/weighted loss", "weighted_loss")):
        drawn = [event.value for event in events.Scalars(tag)]
        assert drawn == pytest.approx([line[key] for line in lines], rel=1e-6)
    bucket = [event.value for event in events.Scalars("training loss by context/000008")]
    sums = [line["bucket_loss_sums"][1] / line["bucket_targets"][1] for line in lines]
    assert bucket == pytest.approx(sums, rel=1e-6)


def test_console_lines_show_the_values_of_losses_jsonl(pack: Path, tmp_path: Path) -> None:
    """Upstream prints means: over two iterations after a start, later over the interval."""
    run = tmp_path / "run"
    argv = jobs.command(pack, "exact", 7, "--save", run, "--load", run, "--save-interval", 3)
    shown: list[tuple[int, float, float]] = []
    for number, extra in enumerate((("--exit-interval", 3), ("--log-interval", 3))):
        ended = ranks.train(2, [*argv, *extra], tmp_path / f"output{number}").check()
        found = re.findall(r"iteration +(\d+)/.*lm loss: (\S+) .*weighted loss: (\S+) ", ended.outputs[-1])
        shown += [(int(iteration), float(plain), float(weighted)) for iteration, plain, weighted in found]
    assert [iteration for iteration, *_ in shown] == [1, 2, 3, 4, 6]
    recorded = {line["iteration"]: line for line in ranks.read_jsonl(run / "losses.jsonl")}
    for iteration, plain, weighted in shown:
        line = recorded[iteration]
        assert plain == float(f"{line['loss']:.6E}"), iteration
        assert weighted == float(f"{line['weighted_loss']:.6E}"), iteration
    assert abs(recorded[1]["loss"] / recorded[2]["loss"] - 1) > 1e-5  # a mean of two would be seen


def test_a_run_on_the_cpu_says_every_iteration_and_what_evaluations_cost(
    pack: Path, tmp_path: Path
) -> None:
    argv = jobs.command(pack, "none", 3, "--run-dir", tmp_path / "run")
    for flag in ("--log-interval", "--eval-iters"):
        position = argv.index(flag)
        argv = [*argv[:position], *argv[position + 2 :]]
    ended = ranks.train(1, argv, tmp_path).check()
    assert re.findall(r"iteration +(\d+)/", ended.outputs[0]) == ["1", "2", "3"]
    (line,) = (
        line
        for line in ended.outputs[0].splitlines()
        if f"evaluation: 1 x {jobs.GLOBAL_BATCH} validation rows" in line
    )
    assert "about 11.1% of the time of training" in line
    evaluations = ranks.read_jsonl(tmp_path / "run" / "evaluations.jsonl")
    assert [one["iteration"] for one in evaluations] == [3]
