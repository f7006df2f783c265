"""What a job says of its speed, against a count by hand from the rows that it trained on."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_exact.data.rows import RowReader
from megatron_exact.training.throughput import peak_tflops
from tests.distributed import jobs, ranks

ITERATIONS = 4
LOG_INTERVAL = 2
PEAK_TFLOPS = 0.5
VIRTUAL = (*jobs.DEEP, "--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2)


def squares_of_rows(pack: Path, rows: list[int]) -> list[int]:
    reader = RowReader(pack, "train")
    lengths = [reader.read(row).cu_seqlens for row in rows]
    return [int(((ends[1:] - ends[:-1]) ** 2).sum()) for ends in lengths]


def operations(tokens: int, squares: int, layers: int) -> float:
    """Forward and backward of the model of jobs.py: each weight 6 a token, attention the causal half."""
    head = jobs.HIDDEN // jobs.HEADS
    attention = jobs.HIDDEN * (2 * jobs.HIDDEN + 2 * jobs.KV_GROUPS * head)
    weights = layers * (attention + 3 * jobs.HIDDEN * 80) + jobs.HIDDEN * jobs.VOCABULARY
    scores_and_values = 2 * (2 * squares / 2) * jobs.HIDDEN
    return 6 * tokens * weights + 3 * layers * scores_and_values


@pytest.mark.parametrize(("layout", "data_ranks"), [((), 2), (VIRTUAL, 1)], ids=["DP2", "virtual PP2"])
def test_operations_and_imbalance(
    pack: Path, tmp_path: Path, layout: tuple[str | int, ...], data_ranks: int
) -> None:
    save = tmp_path / "run"
    options = ("--save", save, "--save-interval", 3, "--log-row-ids", "--log-throughput")
    intervals = ("--log-interval", LOG_INTERVAL, "--eval-interval", 3, "--eval-iters", 1)
    argv = jobs.command(
        pack, "none", ITERATIONS, *options, *intervals, "--peak-tflops", PEAK_TFLOPS, *layout
    )
    ended = ranks.train(2, argv, tmp_path).check()

    layers = jobs.LARGE_LAYERS if layout else jobs.LAYERS
    lines = ranks.read_jsonl(save / "throughput.jsonl")
    rows = [line["rows"] for line in ranks.read_jsonl(save / "rows.jsonl")]
    assert [line["iteration"] for line in lines] == [2, 4]
    for line, steps in zip(lines, (rows[:2], rows[2:]), strict=True):
        squares = [squares_of_rows(pack, step) for step in steps]
        tokens = LOG_INTERVAL * jobs.GLOBAL_BATCH * jobs.ROW_TOKENS
        assert line["tokens_per_second"] * line["seconds"] == pytest.approx(tokens)
        done = line["model_tflops"] * 1e12 * 2 * line["seconds"]
        assert done == pytest.approx(operations(tokens, sum(map(sum, squares)), layers))
        # negative control: dense attention is what upstream assumes without boundaries
        assert done < 0.99 * operations(tokens, tokens * jobs.ROW_TOKENS, layers)
        assert line["mfu"] == pytest.approx(line["model_tflops"] / PEAK_TFLOPS)
        work = [[sum(step[rank::data_ranks]) for rank in range(data_ranks)] for step in squares]
        ratios = [max(step) * data_ranks / sum(step) for step in work]
        assert line["attention_imbalance"] == pytest.approx(sum(ratios) / len(ratios))
        assert 0 < line["data_wait_seconds"] < line["seconds"]
    if data_ranks > 1:
        assert lines[0]["attention_imbalance"] > 1
    assert [line["save_seconds"] > 0 for line in lines] == [False, True]
    assert [line["evaluation_seconds"] > 0 for line in lines] == [False, True]

    report = "".join(ended.outputs)
    assert "throughput in iteration 2: " in report
    assert re.search(r"MFU \d+\.\d% of 0\.5", report)
    assert "throughput per GPU" in report
    losses = ranks.read_jsonl(save / "losses.jsonl")
    assert len(losses) == ITERATIONS
    assert not {"seconds", "tokens_per_second"} & set(losses[0])  # equal runs keep equal files


def test_the_peak_is_that_of_the_device_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(name: str, *, bf16: bool = True, given: float | None = None) -> float | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        return peak_tflops(types.SimpleNamespace(peak_tflops=given, bf16=bf16, fp16=False))

    assert peak("NVIDIA H100 80GB HBM3") == 989.4
    assert peak("NVIDIA H100 PCIe") == 756.0
    assert peak("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak("cpu") is None
    assert peak("NVIDIA H100 80GB HBM3", bf16=False) is None  # its peak is another one
    assert peak("cpu", bf16=False, given=0.1) == 0.1


def test_balanced_rows_train_the_same_steps_with_more_even_work(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Losses, gradients and rows of every step are those of the drawn order, to the rounding of sums."""

    def train(name: str, *flags: Any) -> tuple[list[Any], list[list[int]], float]:
        run = tmp_path / name
        shared = ("--pretrained-checkpoint", checkpoint, "--run-dir", run, "--log-row-ids")
        batch = ("--global-batch-size", 12, "--log-interval", 3)
        ranks.train(
            2, jobs.command(pack, "exact", 3, *shared, *batch, *flags), tmp_path / f"{name}-o"
        ).check()
        (interval,) = ranks.read_jsonl(run / "throughput.jsonl")
        rows = [line["rows"] for line in ranks.read_jsonl(run / "rows.jsonl")]
        return ranks.read_jsonl(run / "losses.jsonl"), rows, interval["attention_imbalance"]

    drawn, drawn_rows, drawn_imbalance = train("drawn")
    balanced, balanced_rows, imbalance = train("balanced", "--balance-rows")
    other, other_rows, _ = train("other", "--balance-rows", "--seed", 77)
    assert list(map(sorted, drawn_rows)) == list(map(sorted, balanced_rows))
    assert drawn_rows != balanced_rows
    assert sorted(other_rows[0]) != sorted(balanced_rows[0])
    for key, bound in (("loss", 2e-6), ("weighted_loss", 2e-6), ("grad_norm", 1e-5)):
        found = [line[key] for line in balanced]
        assert found == pytest.approx([line[key] for line in drawn], rel=bound), key
        assert found != pytest.approx([line[key] for line in other], rel=10 * bound), key  # other rows
    assert [line["targets"] for line in balanced] == [line["targets"] for line in drawn]
    assert imbalance - 1 < 0.3 * (drawn_imbalance - 1)
    # what the job measured is what its rows say, rank by rank
    squares = [squares_of_rows(pack, step) for step in balanced_rows]
    work = [[sum(step[rank::2]) for rank in range(2)] for step in squares]
    ratios = [max(step) * 2 / sum(step) for step in work]
    assert imbalance == pytest.approx(sum(ratios) / len(ratios))
