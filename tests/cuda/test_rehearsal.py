"""Rehearsals: the memory formula against torch's allocator, and tools/rehearse.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.rehearsal.rehearse import make_example_pack
from tests.cuda.conftest import REPOSITORY, Device

BOUND = 0.03
ROW_TOKENS, VOCABULARY = 2048, 32_768
MODEL = (
    *("--num-layers", 4, "--hidden-size", 1024, "--ffn-hidden-size", 2816, "--num-attention-heads", 8),
    *("--group-query-attention", "--num-query-groups", 4, "--swiglu", "--disable-bias-linear"),
    *("--normalization", "RMSNorm", "--position-embedding-type", "rope", "--bf16"),
    *("--vocab-size", VOCABULARY, "--token-weighting", "exact"),
)
SHORT = (
    *("--train-iters", 2, "--lr", "1e-4", "--lr-decay-style", "constant", "--eval-iters", 0),
    *("--rank-timeout-seconds", 0),
)
SHARDED = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
TP2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", 2)
# name -> (flags, rows of a step, world size, rank)
JOBS: dict[str, tuple[tuple[Any, ...], int, int, int]] = {
    "one GPU": ((), 2, 1, 0),
    "two rows": (("--micro-batch-size", 2), 4, 1, 0),
    "untied": (("--untie-embeddings-and-output-weights",), 2, 1, 0),
    "norms of query and key heads": (("--qk-layernorm",), 2, 1, 0),
    "half of the layers without RoPE": (("--no-rope-freq", 2, "--num-query-groups", 8), 2, 1, 0),
    "stock loss head": (("--loss-head", "stock"), 2, 1, 0),
    "full recomputation": (
        ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1),
        *(2, 1, 0),
    ),
    "TP2 SP DP4": ((*TP2, *SHARDED), 8, 8, 5),
    "TP2 SP PP2 DP2, first stage": ((*TP2, *PP2, *SHARDED), 4, 8, 0),
    "TP2 SP PP2 DP2, last stage": ((*TP2, *PP2, *SHARDED), 4, 8, 5),
}


@pytest.fixture(scope="module")
def example_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    return make_example_pack(folder, row_tokens=ROW_TOKENS, vocabulary=VOCABULARY, rows=32)


@pytest.mark.parametrize("name", JOBS)
def test_the_formula_is_within_3_percent_of_the_allocator(
    name: str, device: Device, example_pack: Path, tmp_path: Path
) -> None:
    flags, rows, world_size, rank = JOBS[name]
    saves = ("--save", tmp_path / "run", "--save-interval", 9)  # once, at the end
    argv = (*MODEL, *SHORT, *saves, "--pack", example_pack, "--global-batch-size", rows, *flags)
    seen = device.see(tmp_path, "rehearse", argv=argv, rank=rank, world_size=world_size)
    print({key: seen[key] for key in ("peak_allocated_gib", "forecast_gib", "forecast_parts_gib")})
    assert seen["forecast_gib"] == pytest.approx(seen["peak_allocated_gib"], rel=BOUND)
    assert seen["mixed_devices"] == seen["not_computed"] == {}
    # a save takes weights, gradient buffer and states, and copies none of them on the card
    peaks, kept = seen["phase_peaks_gib"], ("weights", "gradients", "optimizer")
    assert peaks["save"] == pytest.approx(
        sum(seen["forecast_parts_gib"][part] for part in kept), rel=0.1, abs=0.1
    )
    assert peaks["save"] <= seen["peak_allocated_gib"]
    # a formula without activations, or without the working memory, would be seen
    parts = seen["forecast_parts_gib"]
    for part in ("activations", "working"):
        if parts[part] > 2 * BOUND * seen["forecast_gib"]:
            assert seen["forecast_gib"] - parts[part] < (1 - BOUND) * seen["peak_allocated_gib"]


def run_tool(*words: Any, tool: str = "rehearse") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"tools/{tool}.py", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )


def test_the_tool_rehearses_every_stage_without_a_pack(device: Device, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    job = (*MODEL, *TP2, *PP2, *SHARDED, "--seq-length", ROW_TOKENS, "--lr", "1e-4", "--train-iters", 500)
    ended = run_tool("--world-size", 8, "--stages", "--json", found, "--logs", tmp_path, *job)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "the job runs and fits" in ended.stdout
    assert "layers: " in ended.stdout
    assert "warning" not in ended.stderr
    result = json.loads(found.read_text())
    assert (result["recipe"], result["world_size"]) == (None, 8)
    assert [(rank["rank"], rank["pipeline_stage"]) for rank in result["ranks"]] == [(0, 0), (4, 1)]
    for rank in result["ranks"]:
        assert 0 < rank["peak_allocated_gib"] <= rank["peak_reserved_gib"] <= 79.1
        assert rank["kernel_launches"] > 100
        assert rank["host_synchronisations"] == sum(rank["synchronisation_places"].values())
        # a rank of a pipeline of two sends or receives one tensor a micro-batch and direction
        sends = rank["collectives"]["send (pipeline_model_parallel, 2 ranks)"]
        receives = rank["collectives"]["recv (pipeline_model_parallel, 2 ranks)"]
        assert sends == receives
        assert sends == [rank["micro_batches"], rank["micro_batches"] * ROW_TOKENS // 2 * 1024 * 2]
    assert result["preflight_gib"] == pytest.approx(
        max(rank["peak_allocated_gib"] for rank in result["ranks"]), rel=BOUND
    )


@pytest.mark.slow
def test_a_job_that_cannot_run_is_told_with_its_own_error(device: Device, tmp_path: Path) -> None:
    ended = run_tool(
        *("--world-size", 1, "--logs", tmp_path, "--gpu-memory-gib", 2, *MODEL),
        *("--seq-length", ROW_TOKENS, "--lr", "1e-4", "--train-iters", 5, "--num-query-groups", 3),
    )
    assert ended.returncode == 1
    assert "FAILED  rank 0: " in ended.stdout
    assert "the whole log: " in ended.stdout
    assert "the rehearsal failed" in ended.stdout


@pytest.mark.slow
def test_preflight_rehearses_each_stage_of_a_job_that_passes(
    device: Device, example_pack: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = (*MODEL, *SHORT, *PP2, "--pack", example_pack, "--global-batch-size", 8)
    ended = run_tool(
        *("--rehearse", "--world-size", 2, *job, "--save", run, "--save-interval", 2), tool="preflight"
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    table = ended.stdout.splitlines()
    assert table.index("the run can start and fits") < table.index("the job runs and fits")
    stages = [line.split()[:2] for line in table[table.index("the run can start and fits") :]]
    assert [words for words in stages if words in (["0", "0"], ["1", "1"])] == [["0", "0"], ["1", "1"]]
    assert not run.exists()  # neither of them writes where the job would


@pytest.mark.slow
def test_a_job_that_runs_and_does_not_fit_fails(device: Device, tmp_path: Path) -> None:
    ended = run_tool(
        *("--world-size", 1, "--gpu-memory-gib", 3, "--reserve-gib", 2, "--logs", tmp_path, *MODEL),
        *("--seq-length", ROW_TOKENS, "--lr", "1e-4", "--train-iters", 5),
    )
    assert ended.returncode == 1
    assert "GiB do not fit into 1.0 GiB" in ended.stdout
    assert "rank 0: " not in ended.stdout
    assert "the rehearsal failed" in ended.stdout


@pytest.mark.parametrize(("given", "has"), [(141, "141.0"), (40, "79.1")])
def test_the_device_has_the_memory_of_the_card_or_more(device: Device, given: int, has: str) -> None:
    ended = run_tool("--recipe", "qwen2.5_0.5b_4k", "--rank", 8, "--gpu-memory-gib", given)
    assert ended.returncode != 0
    assert f"8 cards of {has} GiB" in ended.stderr
    assert "--rank 8 is not a rank of --world-size 8: choose 0 to 7" in ended.stderr
