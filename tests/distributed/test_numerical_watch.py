"""NaN and Inf are found before the step is taken and traced to rank, row and segment."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.training.runtime import NOT_FINITE
from tests.distributed import jobs, ranks
from tests.distributed.test_gradients import (
    BOUND,
    SEED,
    dump_first_gradients,
    reference_gradients,
    whole_parameters,
)

ITERATION = 3
PLACE = 21  # in the rank's own order of the micro-batch
PP2 = ("--pipeline-model-parallel-size", 2, "--clip-grad", 0)
SHARDED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--bf16")


def damage_losses(rank: int, value: float, per_step: int, micro_batch: int = 1) -> Callable[[], None]:
    """Give one loss of ITERATION another value, on one rank, as a kernel that fails would."""

    def patch() -> None:
        import os

        from megatron_exact.training import run as run_module

        stock, calls = run_module.weighted_token_loss, [0]

        def damaged(token_losses: Any, *args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            is_here = calls[0] == (ITERATION - 1) * per_step + micro_batch + 1
            if is_here and int(os.environ["RANK"]) == rank:
                places = torch.arange(token_losses.numel()).view_as(token_losses)
                token_losses = token_losses.masked_fill(places == PLACE, value)
            return stock(token_losses, *args, **kwargs)

        run_module.weighted_token_loss = damaged  # type: ignore[assignment]

    return patch


def damage_gradient(rank: int, per_step: int) -> Callable[[], None]:
    """Leave the losses as they are and damage what backward makes of them."""

    def patch() -> None:
        import os

        from megatron_exact.training import run as run_module

        stock, calls = run_module.TrainingRun.forward_step, [0]

        def forward_step(self: Any, iterator: Any, model: Any) -> Any:
            output, loss = stock(self, iterator, model)
            calls[0] += 1
            if calls[0] == (ITERATION - 1) * per_step + 1 and int(os.environ["RANK"]) == rank:
                output.register_hook(lambda gradient: gradient * math.inf)
            return output, loss

        run_module.TrainingRun.forward_step = forward_step  # type: ignore[method-assign]

    return patch


def sample_row(pack: Path, sample: int) -> tuple[PackedDataset, int]:
    dataset = PackedDataset(pack, "train", num_samples=6 * jobs.GLOBAL_BATCH, seed=SEED)
    return dataset, dataset.row_of(sample)


@pytest.mark.parametrize(
    ("world", "flags", "rank", "value", "first_of_micro_batch"),
    [
        pytest.param(1, ("--micro-batch-size", 2), 0, math.nan, 2, id="micro-batches"),
        pytest.param(2, PP2, 1, math.inf, 1, id="pp2-inf-unclipped"),
        # data parallel: the other rank has every second row
        pytest.param(2, (), 1, math.nan, 3, id="dp2", marks=pytest.mark.slow),
        pytest.param(2, SHARDED, 0, math.nan, 2, id="distributed-optimizer-bf16"),
        pytest.param(2, ("--context-parallel-size", 2), 1, math.nan, 1, id="cp2", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_loss_stops_the_job_and_is_traced(
    world: int,
    flags: tuple[Any, ...],
    rank: int,
    value: float,
    first_of_micro_batch: int,
    pack: Path,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    save = ("--save", run, "--save-interval", 2)
    start = ("--pretrained-checkpoint", checkpoint, *save)
    is_shared = "--micro-batch-size" in flags or flags in ((), SHARDED)  # by micro-batches or ranks of two
    per_step = jobs.GLOBAL_BATCH // (2 if is_shared else 1)
    # the second context-parallel rank holds the second and third quarter of a row
    position = PLACE if "--context-parallel-size" not in flags else PLACE + jobs.ROW_TOKENS // 4
    argv = jobs.command(pack, "exact", 5, *start, "--load", run, *flags)
    ended = ranks.train(world, argv, tmp_path, damage_losses(rank, value, per_step))
    assert ended.codes == [NOT_FINITE] * world
    errors = [line for text in ended.outputs for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    dataset, row = sample_row(pack, (ITERATION - 1) * jobs.GLOBAL_BATCH + first_of_micro_batch)
    kind = "nan" if math.isnan(value) else "inf"
    assert f"not finite in iteration {ITERATION}: loss {kind} on rank {rank} (" in errors[0]
    assert f"micro-batch 1, row {row}, position {position}, segment" in errors[0]
    report = json.loads((run / f"nonfinite_{ITERATION:07d}.json").read_text())
    (found,) = report["found"]
    boundaries = dataset.reader.read(row).cu_seqlens.tolist()
    number = found["segment"]["number"]
    assert boundaries[number] <= position < boundaries[number + 1]
    assert report["checkpoint"] == {"folder": str(run), "iteration": 2}
    assert report["command"] == [str(word) for word in argv]
    rows = [row for part in report["batch"] for row in part["rows"]]
    first = (ITERATION - 1) * jobs.GLOBAL_BATCH
    assert sorted(rows) == sorted(
        dataset.row_of(index) for index in range(first, first + jobs.GLOBAL_BATCH)
    )
    own = [part for part in report["batch"] if part["data_parallel_rank"] == found["data_parallel_rank"]]
    assert row in own[1]["rows"]
    # nothing of the step is kept: the line says so, and the same command goes on from the step before
    lines = ranks.read_jsonl(run / "losses.jsonl")
    assert lines[-1]["skipped"] is True
    assert lines[-1]["loss"] is None
    ranks.train(world, argv, tmp_path / "again").check()
    whole = jobs.command(
        pack, "exact", 5, "--pretrained-checkpoint", checkpoint, "--run-dir", tmp_path / "whole", *flags
    )
    ranks.train(world, whole, tmp_path / "output").check()
    assert (run / "losses.jsonl").read_text() == (tmp_path / "whole" / "losses.jsonl").read_text()


def test_a_damaged_gradient_is_traced_to_the_rank_that_made_it(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """All losses are finite, and once ranks are summed the gradient is damaged on both."""
    argv = jobs.command(
        pack, "exact", 5, "--pretrained-checkpoint", checkpoint, "--run-dir", tmp_path / "run"
    )
    ended = ranks.train(2, argv, tmp_path, damage_gradient(1, jobs.GLOBAL_BATCH // 2))
    assert ended.codes == [NOT_FINITE] * 2
    report = json.loads((tmp_path / "run" / f"nonfinite_{ITERATION:07d}.json").read_text())
    (found,) = report["found"]
    assert (found["kind"], found["rank"], found["data_parallel_rank"]) == ("gradient", 1, 1)
    first = (ITERATION - 1) * jobs.GLOBAL_BATCH
    assert found["rows"] == [sample_row(pack, first + index)[1] for index in range(1, jobs.GLOBAL_BATCH, 2)]
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in found["parameters"]
    (error,) = (line for line in ended.outputs[0].splitlines() if line.startswith("error: "))
    assert "gradient on rank 1 (" in error

    # negative control: upstream alone, told not to look, trains on with weights that are NaN
    def unguarded() -> None:
        from megatron_exact.training.numerical_watch import NumericalWatch

        damage_gradient(1, jobs.GLOBAL_BATCH // 2)()
        NumericalWatch.guard = lambda *_: None  # type: ignore[method-assign, assignment]

    argv = jobs.command(
        pack, "exact", 5, "--pretrained-checkpoint", checkpoint, "--run-dir", tmp_path / "bad"
    )
    ranks.train(2, argv, tmp_path, unguarded).check()
    assert [line["loss"] is None for line in ranks.read_jsonl(tmp_path / "bad" / "losses.jsonl")] == [
        False, False, False, True, True,
    ]  # fmt: skip


def test_a_skipped_step_is_as_if_it_had_not_been(pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Equal to upstream's own `--iterations-to-skip`, and to the bit over a resume."""

    def argv(name: str, *extra: Any) -> list[Any]:
        start = (
            "--pretrained-checkpoint",
            checkpoint,
            "--save",
            tmp_path / name,
            "--load",
            tmp_path / name,
        )
        flags = ("--save-interval", 3, "--log-row-ids", "--lr-decay-style", "linear", *extra)
        return jobs.command(pack, "exact", 6, *start, *flags)

    patch = damage_losses(1, math.nan, jobs.GLOBAL_BATCH // 2)
    skip = ("--on-nonfinite", "skip")
    ended = ranks.train(2, argv("whole", *skip), tmp_path / "o1", patch).check()
    assert f"not finite in iteration {ITERATION}: loss nan on rank 1" in ended.outputs[0]
    assert "the step is skipped" in ended.outputs[0]
    whole = ranks.read_jsonl(tmp_path / "whole" / "losses.jsonl")
    assert [line.get("skipped", False) for line in whole] == [n == ITERATION for n in range(1, 7)]
    ranks.train(2, argv("parts", *skip, "--exit-interval", 3), tmp_path / "o2", patch).check()
    ranks.train(2, argv("parts", *skip), tmp_path / "o3").check()
    for name in ("losses.jsonl", "rows.jsonl"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    ranks.train(2, argv("upstream", "--iterations-to-skip", ITERATION), tmp_path / "o4").check()
    upstream = ranks.read_jsonl(tmp_path / "upstream" / "losses.jsonl")
    assert [line["iteration"] for line in upstream if line.get("skipped")] == [ITERATION]
    assert [line for line in upstream if "skipped" not in line] == [
        line for line in whole if "skipped" not in line
    ]


def test_a_spike_is_told_with_its_rows_and_stops_nothing(
    pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    flags = ("--pretrained-checkpoint", checkpoint, "--log-row-ids", "--spike-window", 4)
    argv = jobs.command(pack, "none", 6, *flags, "--run-dir", tmp_path / "run")
    patch = damage_losses(0, 1e4, jobs.GLOBAL_BATCH)
    ended = ranks.train(1, argv, tmp_path, patch).check()
    (spike,) = ranks.read_jsonl(tmp_path / "run" / "spikes.jsonl")
    assert spike["iteration"] == ITERATION
    rows = ranks.read_jsonl(tmp_path / "run" / "rows.jsonl")[ITERATION - 1]["rows"]
    assert spike["rows"] == rows
    assert spike["loss"] == ranks.read_jsonl(tmp_path / "run" / "losses.jsonl")[ITERATION - 1]["loss"]
    assert f"loss spike in iteration {ITERATION}" in ended.outputs[0]


LENGTH_ONE, WHOLE_ROW = 10 * jobs.ROW_TOKENS, 10


@pytest.fixture(scope="module")
def sparse_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one document, and rows of documents of one token, in which nothing is supervised.

    The order is such that the second of two data-parallel ranks has no target in the first step.
    """
    prefix = tmp_path_factory.mktemp("sparse") / "docs"
    generator = np.random.default_rng(0)
    writer = IndexedWriter(f"{prefix}.bin", f"{prefix}.idx", jobs.VOCABULARY)
    for length in [1] * LENGTH_ONE + [jobs.ROW_TOKENS] * WHOLE_ROW:
        writer.add(generator.integers(0, jobs.VOCABULARY, length))
    writer.close()
    for seed in range(500):
        options = {"mask_cross_document_targets": True, "validation_fraction": 0.0, "seed": seed}
        pack = jobs.make_pack(prefix, "best-fit", f"sparse-{seed}", **options)
        targets = targets_of_samples(pack, jobs.GLOBAL_BATCH)
        if not any(targets[1::2]) and any(targets[::2]):
            return pack
    raise AssertionError("no seed of 500 gives such an order")


def targets_of_samples(pack: Path, samples: int) -> list[int]:
    dataset = PackedDataset(pack, "train", num_samples=samples, seed=SEED)
    return [int(dataset[index]["loss_mask"].sum()) for index in range(samples)]


@pytest.mark.parametrize("rule", ["none", "exact-normalized"])
@pytest.mark.parametrize(
    ("world", "flags"),
    [(2, ()), pytest.param(2, ("--pipeline-model-parallel-size", 2), marks=pytest.mark.slow)],
    ids=["dp2", "pp2"],
)
def test_a_rank_and_micro_batches_without_targets_do_no_harm(
    world: int, flags: tuple[Any, ...], rule: str, sparse_pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """One micro-batch a row: the gradient is the reference's, and nothing is NaN."""
    argv = jobs.command(sparse_pack, rule, 1, "--pretrained-checkpoint", checkpoint, *flags)
    ended = ranks.train(world, argv, tmp_path, dump_first_gradients(tmp_path)).check()
    assert "nan" not in ended.outputs[-1].lower().replace("nan iterations", "")
    found = whole_parameters(tmp_path, world)
    found.pop("output_layer.weight", None)  # the last stage's copy of the tied embedding
    expected = reference_gradients(sparse_pack, rule, {name: value for name, (value, _) in found.items()})
    for name, (_, gradient) in found.items():
        difference = float((gradient.double() - expected[name]).norm() / expected[name].norm())
        assert difference <= BOUND, f"{name}: relative difference {difference:.1e}"


@pytest.mark.parametrize("rule", ["none", "exact-normalized"])
def test_a_whole_batch_without_targets_does_no_harm(
    rule: str, sparse_pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    iterations = 8
    targets = targets_of_samples(sparse_pack, 2 * iterations)
    expected = [targets[2 * step] + targets[2 * step + 1] for step in range(iterations)]
    assert 0 in expected[1:-1]  # weights are used after it
    start = ("--pretrained-checkpoint", checkpoint, "--global-batch-size", 2, "--log-interval", iterations)
    argv = jobs.command(sparse_pack, rule, iterations, *start, "--run-dir", tmp_path / "run")
    ended = ranks.train(2, argv, tmp_path).check()
    lines = ranks.read_jsonl(tmp_path / "run" / "losses.jsonl")
    assert [line["targets"] for line in lines] == expected
    for line in lines:
        assert (line["loss"] is None) == (line["targets"] == 0)
        assert (line["grad_norm"] == 0) == (line["targets"] == 0)
        assert "skipped" not in line
    means = [float(mean) for mean in re.findall(r"lm loss: (\S+)", ended.outputs[-1])]
    assert all(map(math.isfinite, means))  # the mean over the interval leaves such steps out
    assert means
