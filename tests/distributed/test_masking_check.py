"""tools/check_document_masking.py on the layouts of a job, and faults of a real model that it must find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_exact.data.indexed import IndexedWriter
from tests.distributed import jobs, ranks

REPOSITORY = Path(__file__).parents[2]
TOOL = REPOSITORY / "tools" / "check_document_masking.py"
ALONE = "(b) a document in its row and alone"

LAYOUTS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "tp1 micro-batch 2": (1, ("--micro-batch-size", 2)),
    "tp2 sequence parallel stock head": (
        2,
        ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--loss-head", "stock"),
    ),
    "virtual pipeline": (
        2,
        (*jobs.DEEP, "--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1),
    ),
    "cp2 bf16": (2, ("--context-parallel-size", 2, "--bf16")),
    "dp2": (2, ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")),
}


def check(
    world: int, argv: list[Any], folder: Path, patch: Callable[[], None] | None = None
) -> tuple[ranks.Ended, dict[str, Any]]:
    """Run the check on forked ranks; the report is empty if there is none."""

    def job() -> int:
        from megatron_exact.training.masking_check import run

        if patch is not None:
            patch()
        return run([str(word) for word in argv], num_documents=4, as_json=True)

    ended = ranks.run_ranks(world, job, folder)
    _, brace, text = ended.outputs[0].partition("\n{\n")
    return ended, json.loads("{" + text.rpartition("\n}")[0] + "}") if brace else {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sound_job_passes(
    layout: str, pack: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    world, flags = LAYOUTS[layout]
    is_deep = flags[:2] == jobs.DEEP
    checkpoint: Path = request.getfixturevalue("deep_checkpoint" if is_deep else "checkpoint")
    run = tmp_path / "run"
    argv = jobs.command(pack, "exact", 6, "--pretrained-checkpoint", checkpoint, "--save", run)
    ended, report = check(world, [*argv, "--save-interval", 3, *flags], tmp_path)
    ended.check()
    assert report["passed"]
    assert report["repeated_difference"] == report["leak_share"] == 0
    differences = {one["name"]: one["difference"] for one in report["checks"]}
    assert [value for name, value in differences.items() if name.startswith("(a)")] == [0, 0]
    (bound,) = (one["bound"] for one in report["checks"] if one["name"] == ALONE)
    assert differences[ALONE] <= bound / 10
    assert str(checkpoint) in report["layout"]
    assert not run.exists(), "the check writes nothing"


def attend(*args: Any, lengths: list[int] | None = None) -> Tensor:
    """The honest kernel with other boundaries."""
    from megatron_exact.model import packed_attention

    query, key, value, packing, scale = args
    boundaries = packing.cu_seqlens_q if lengths is None else torch.tensor([0, *lengths]).cumsum(0)
    changed = type(packing)(cu_seqlens_q=boundaries, max_seqlen_q=int(boundaries.diff().max()))
    return packed_attention.attend_by_segment(query, key, value, changed, scale)


def ignore_boundaries() -> None:
    from megatron_exact.model import packed_attention

    packed_attention._attend = lambda *args: attend(*args, lengths=[args[0].shape[0]])


def shift_boundaries() -> None:
    from megatron_exact.model import packed_attention

    def shifted(*args: Any) -> Tensor:
        lengths = args[3].cu_seqlens_q.diff().tolist()
        if len(lengths) > 1:
            lengths[0], lengths[1] = lengths[0] + 1, lengths[1] - 1
        return attend(*args, lengths=[length for length in lengths if length])

    packed_attention._attend = shifted


def see_the_future() -> None:
    stock = torch.nn.functional.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> Tensor:
        return stock(*args, **{**kwargs, "is_causal": False})

    torch.nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]


def run_positions_on() -> None:
    from megatron_exact.data.dataset import PackedDataset

    honest = PackedDataset.__getitem__

    def item(self: PackedDataset, index: int) -> dict[str, Tensor]:
        sample = honest(self, index)
        return {**sample, "position_ids": torch.arange(len(sample["tokens"]))}

    PackedDataset.__getitem__ = item  # type: ignore[method-assign]


LEARNED = ("--position-embedding-type", "learned_absolute")
FAULTS: dict[str, tuple[Callable[[], None], tuple[Any, ...], str, str]] = {
    "boundaries ignored": (
        ignore_boundaries,
        (),
        "(a) one token changed: other documents",
        "does not look",
    ),
    "boundaries shifted": (shift_boundaries, (), "(a) one token changed: other documents", "although"),
    "not causal": (see_the_future, (), "(a) one token changed: earlier tokens", "later tokens"),
    "positions run on": (run_positions_on, LEARNED, ALONE, "position ids that do not restart"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(fault: str, pack: Path, tmp_path: Path) -> None:
    patch, flags, failing, words = FAULTS[fault]
    ended, report = check(1, jobs.command(pack, "none", 1, *flags), tmp_path, patch)
    assert ended.codes == [1]
    assert not report["passed"]
    assert failing in [one["name"] for one in report["checks"] if not one["passed"]]
    assert words in " ".join(report["explanation"])


def test_a_fault_is_found_on_the_far_stage_of_a_pipeline(pack: Path, tmp_path: Path) -> None:
    def on_the_last_stage() -> None:
        if os.environ["RANK"] == "1":
            ignore_boundaries()

    argv = jobs.command(pack, "none", 1, "--pipeline-model-parallel-size", 2)
    ended, report = check(2, argv, tmp_path, on_the_last_stage)
    assert ended.codes == [1, 1]
    assert "(a) one token changed: other documents" in [
        one["name"] for one in report["checks"] if not one["passed"]
    ]


def test_learned_positions_pass_when_they_restart(pack: Path, tmp_path: Path) -> None:
    """The other half of the control above."""
    ended, report = check(1, jobs.command(pack, "none", 1, *LEARNED), tmp_path)
    ended.check()
    assert report["passed"]


def test_bad_arguments_are_one_line(pack: Path, tmp_path: Path) -> None:
    writer = IndexedWriter(f"{tmp_path}/book.bin", f"{tmp_path}/book.idx", jobs.VOCABULARY)
    writer.add(np.ones(10 * jobs.ROW_TOKENS, dtype=np.int64))
    writer.close()
    book = jobs.make_pack(tmp_path / "book", "concat", validation_fraction=0.0)
    refused = {
        "--pack is missing": jobs.command(pack, "none", 1)[2:],
        "--window-size": jobs.command(pack, "none", 1, "--window-size", "4,0"),
        "there are no neighbors to keep apart": jobs.command(book, "none", 1),
    }
    for words, argv in refused.items():
        ended, report = check(1, argv, tmp_path)
        assert ended.codes == [1]
        assert not report
        (error,) = (line for line in ended.outputs[0].splitlines() if line.startswith("error: "))
        assert words in error
        assert "Traceback" not in ended.outputs[0]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
LAUNCHES = {"python": (TOOL,), "torchrun": (*TORCHRUN, TOOL, "--tensor-model-parallel-size", 2)}


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES)
def test_the_command(launch: str, pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    words = [sys.executable, *LAUNCHES[launch]]
    words += jobs.command(pack, "none", 1, "--pretrained-checkpoint", checkpoint)
    ended = subprocess.run(
        [str(word) for word in words], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("FAILED") == 0
    assert ended.stdout.count("  ok") == 6
    assert len(ended.stdout.splitlines()) < 15, "upstream's own lines go to stderr"
