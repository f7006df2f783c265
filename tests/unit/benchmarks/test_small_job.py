"""What the benchmarks of training compare: the rows, the FLOPs of bare products, the masks, whole runs."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import attention
import pytest
import small_job
import torch
from training_throughput import VOCABULARY, products

REPOSITORY = Path(__file__).resolve().parents[3]


def test_rows_cut_one_stream_of_documents() -> None:
    rows = small_job.rows_of_segments(512, 40, seed=2)
    assert [sum(row) for row in rows] == [512] * 40
    assert all(length > 0 for row in rows for length in row)
    ends = set(torch.tensor([length for row in rows for length in row]).cumsum(0).tolist())
    documents = small_job.document_lengths(100, 2).cumsum()
    assert set(documents[documents < 512 * 40].tolist()) <= ends


def test_dense_mask_forbids_other_documents_and_the_future() -> None:
    mask = attention.dense_mask([2, 3])[0, 0]
    visible = [[0], [0, 1], [2], [2, 3], [2, 3, 4]]
    assert [(~row).nonzero().flatten().tolist() for row in mask] == visible


def test_bare_products_have_the_flops_of_the_model() -> None:
    options = argparse.Namespace(hidden=384, layers=3, row_tokens=1024)
    segments = [300, 724]
    done = sum(2.0 * n * left.numel() * right.shape[-1] for left, right, n in products(options, segments))
    weights = 3 * (4 * 384**2 + 3 * 384 * 1024) + 384 * VOCABULARY
    causal = 3 * 3 * 2 * sum(length**2 for length in segments) * 384
    assert done == pytest.approx(6 * 1024 * weights + causal, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("attention.py", "--row-tokens", "512", "--rows", "1", "--rounds", "1"),
        ("step_cost.py", "--pairs", "2", "--layers", "1", "--hidden", "64", "--row-tokens", "256"),
        ("confidence_cost.py", "--pairs", "2", "--layers", "1", "--hidden", "64", "--row-tokens", "256"),
        (
            "training_throughput.py",
            "--steps",
            "2",
            "--layers",
            "1",
            "--hidden",
            "64",
            "--row-tokens",
            "256",
        ),
    ],
    ids=lambda command: command[0],
)
def test_benchmark_runs_and_publishes(command: tuple[str, ...], tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    words = [sys.executable, f"benchmarks/{command[0]}", *command[1:], "--json", str(results)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(results.read_text())
    assert result["benchmark"] == command[0].removesuffix(".py")
    assert result["rows"]
    assert result["command"] == shlex.join(["python", f"benchmarks/{command[0]}", *command[1:]])
    if command[0] == "attention.py":
        assert result["rows"][0]["largest difference"] < 1e-5
    if command[0] == "training_throughput.py":
        assert float(result["notes"][0].rsplit(": ", 1)[1].rstrip(".")) < 1e-5  # of the losses
