"""A training job on its CUDA branch, with real numbers, against the same job on the CPU runtime."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.conftest import SMALL, Device
from tests.distributed import jobs, ranks

IN_BFLOAT16 = 2e-3
"""Relative: attention, norms and products round in other places. A wrong rotation costs 0.1."""


def command(pack: Path, checkpoint: Path, rule: str, iterations: int, *extra: Any) -> list[Any]:
    return jobs.command(pack, rule, iterations, *SMALL, "--pretrained-checkpoint", checkpoint, *extra)


def losses(run: Path) -> list[dict[str, Any]]:
    return ranks.read_jsonl(run / "losses.jsonl")


@pytest.fixture(scope="module")
def one_rank(
    device: Device, pack: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run of one rank, which those of two are compared with."""
    folder = tmp_path_factory.mktemp("one")
    argv = command(pack, checkpoint, "exact", 2, "--run-dir", folder / "run")
    device.see(folder / "o", "train", argv=argv)
    return folder / "run"


def test_three_iterations_have_the_losses_of_the_cpu(
    device: Device, on_cpu: Callable[..., Any], pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / "cpu", tmp_path / "cuda"
    on_cpu(command(pack, checkpoint, "exact", 3, "--run-dir", here), tmp_path / "o1")
    seen = device.see(
        tmp_path / "o2", "train", argv=command(pack, checkpoint, "exact", 3, "--run-dir", there)
    )
    assert seen["mixed_devices"] == seen["refused"] == seen["not_computed"] == {}
    for ours, theirs in zip(losses(there), losses(here), strict=True):
        for name in ("loss", "weighted_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=IN_BFLOAT16), name
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)
        assert ours["targets"] == theirs["targets"]
        assert ours["bucket_targets"] == theirs["bucket_targets"]


def test_attention_has_the_frequencies_and_the_scale_of_yarn(
    device: Device, on_cpu: Callable[..., Any], pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    yarn = ("--change-rope-yarn", "64,16")
    for name, flags in (("plain", ()), ("yarn", yarn)):
        argv = command(pack, checkpoint, "exact", 1, "--run-dir", tmp_path / name, *flags)
        on_cpu(argv, tmp_path / f"o {name}")
    argv = command(pack, checkpoint, "exact", 1, "--run-dir", tmp_path / "cuda", *yarn)
    seen = device.see(tmp_path / "o cuda", "train", argv=argv)
    assert seen["mixed_devices"] == seen["refused"] == seen["not_computed"] == {}
    plain, right, found = (losses(tmp_path / name)[0]["loss"] for name in ("plain", "yarn", "cuda"))
    assert found == pytest.approx(right, rel=IN_BFLOAT16)
    assert plain != pytest.approx(right, rel=2 * IN_BFLOAT16)


def test_another_rotation_would_be_seen(
    device: Device, on_cpu: Callable[..., Any], pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / "cpu", tmp_path / "cuda"
    on_cpu(command(pack, checkpoint, "exact", 1, "--run-dir", here), tmp_path / "o1")
    argv = command(pack, checkpoint, "exact", 1, "--run-dir", there)
    device.see(tmp_path / "o2", "train", argv=argv, rotates_twice=True)
    assert losses(there)[0]["loss"] != pytest.approx(losses(here)[0]["loss"], rel=IN_BFLOAT16)


def test_three_and_three_is_six_to_the_bit(
    device: Device, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    def resumable(run: Path, *extra: Any) -> list[Any]:
        same = ("--load", run, "--save", run, "--save-interval", 3, "--log-row-ids")
        return command(pack, checkpoint, "exact", 6, *same, *extra)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    device.see(tmp_path / "o1", "train", argv=resumable(whole))
    device.see(tmp_path / "o2", "train", argv=resumable(parts, "--exit-interval", 3))
    assert len(losses(parts)) == 3
    device.see(tmp_path / "o3", "train", argv=resumable(parts))
    assert (parts / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()
    assert (parts / "rows.jsonl").read_text() == (whole / "rows.jsonl").read_text()


def waits(
    device: Device, pack: Path, checkpoint: Path, folder: Path, rows: int, *extra: Any, on: int = 1
) -> dict[str, int]:
    """How often the host waits in the second iteration of a job, by place."""
    argv = command(pack, checkpoint, "exact", 2, "--global-batch-size", rows, *extra)
    step = device.see(folder, "train", on=on, argv=argv)["steps"][-1]
    assert step["micro_batches"] == rows
    return dict(step["synchronisations"])


BOUNDARIES = {
    # boundaries of packed rows are cut to their true number, which the device knows
    "cudaStreamSynchronize at megatron/core/utils.py": 2,
    "aten::nonzero at megatron/core/utils.py": 1,
}
FOREIGN_TOKENS = {
    # tokens of other ranks' part of the vocabulary are masked
    "aten::index_put_ at megatron/core/tensor_parallel/layers.py": 2,
    "aten::index_put at backward of IndexPutBackward0": 1,
}


@pytest.mark.parametrize(
    ("layout", "ranks", "expected"),
    [
        pytest.param((), 1, BOUNDARIES, id="one rank"),
        pytest.param(
            ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
            *(2, BOUNDARIES | FOREIGN_TOKENS),
            id="tp2-sp",
        ),
        pytest.param(
            ("--context-parallel-size", 2),
            *(2, BOUNDARIES | {"cudaStreamSynchronize at megatron/core/utils.py": 3}),
            id="cp2",
        ),
    ],
)
def test_a_micro_batch_waits_only_where_megatron_itself_does(
    layout: tuple[Any, ...],
    ranks: int,
    expected: dict[str, int],
    device: Device,
    pack: Path,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    two = waits(device, pack, checkpoint, tmp_path / "two", 2, *layout, on=ranks)
    four = waits(device, pack, checkpoint, tmp_path / "four", 4, *layout, on=ranks)
    by_function: Counter[str] = Counter()
    for place, times in four.items():
        by_function[re.sub(r":\d+$", "", place)] += times - two.get(place, 0)
    assert {place: times / 2 for place, times in by_function.items() if times} == expected


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("--tensor-model-parallel-size", 2, "--sequence-parallel"), id="tp2-sp"),
        pytest.param(("--use-distributed-optimizer", "--overlap-grad-reduce"), id="dp2"),
        pytest.param(("--pipeline-model-parallel-size", 2), id="pp2"),
        pytest.param(("--context-parallel-size", 2), id="cp2"),
    ],
)
def test_two_ranks_have_the_losses_of_one(
    layout: tuple[Any, ...], device: Device, one_rank: Path, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = command(pack, checkpoint, "exact", 2, "--run-dir", run, *layout)
    seen = device.see(tmp_path / "o", "train", on=2, argv=argv)
    assert seen["mixed_devices"] == seen["not_computed"] == {}
    for ours, theirs in zip(losses(run), losses(one_rank), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=IN_BFLOAT16)
        assert ours["bucket_targets"] == theirs["bucket_targets"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)


def test_the_masking_check_passes(device: Device, pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    argv = command(pack, checkpoint, "none", 1)
    assert device.see(tmp_path, "check_masking", argv=argv)["refused"] == {}


def test_a_step_with_an_infinite_loss_is_refused_and_its_row_named(
    device: Device, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = command(pack, checkpoint, "exact", 3, "--run-dir", run)
    ended = device.run(tmp_path / "o", "train", argv=argv, damaged_pass=6)  # the second of the second step
    assert ended.codes != [0]
    report = json.loads((run / "nonfinite_0000002.json").read_text())
    assert report["iteration"] == 2
    assert [line["iteration"] for line in losses(run)] == [1, 2]


def test_an_asynchronous_save_hands_over_main_memory(device: Device, tmp_path: Path) -> None:
    seen = device.see(tmp_path, "host_copies")
    assert seen["devices"] == ["cpu"] * 3
    assert seen["shared"] == seen["equal"] == seen["same"] == [True] * 3
    assert seen["others"] == [0, "queue"]
