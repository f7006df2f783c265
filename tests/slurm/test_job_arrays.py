"""`evaluate.sbatch` and `tokenize.sbatch` as job arrays on a real Slurm; no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import CHECKOUT
from tests.unit.evaluation_suites.small_evaluation import NEEDLES, write_small_model

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]
MINUTES = 60.0


def submit_array(cluster: Cluster, folder: Path, script: str, *words: object, **variables: str) -> int:
    folder.mkdir(exist_ok=True)
    return cluster.submit(
        CHECKOUT / "examples" / "slurm" / script,
        ("--array=0-1", f"--output={folder}/%A_%a.out"),
        {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables},
        [str(word) for word in words],
        CHECKOUT,
    )


def array_ends(cluster: Cluster, job: int, folder: Path) -> str:
    """Wait for both tasks; returns what they printed."""

    def states() -> list[str]:
        text = cluster.run("scontrol", "-o", "show", "job", str(job))
        return [line.partition("JobState=")[2].split()[0] for line in text.splitlines() if line.strip()]

    waits = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
    cluster.wait_until(lambda: not set(states()) & set(waits), 25 * MINUTES, f"array {job} runs on")
    printed = "\n".join(path.read_text() for path in sorted(folder.glob(f"{job}_*.out")))
    assert set(states()) == {"COMPLETED"}, printed[-5000:]
    return printed


def test_an_evaluation_over_two_nodes_is_that_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model")
    words = [
        *("evaluate", "--model", model, "--suite", "nolima", "--nolima-data", NEEDLES),
        *("--tasks", "needle_set", "--lengths", 512, "--samples", 5, "--device", "cpu"),
        *("--example-cache", tmp_path / "cache"),
    ]
    alone = [sys.executable, "-m", "megatron_exact", *map(str, words), "--output", str(tmp_path / "whole")]
    subprocess.run(alone, cwd=CHECKOUT, env=cluster.environment, check=True, capture_output=True)
    output = ("--output", tmp_path / "shared")
    logs = tmp_path / "logs"
    job = submit_array(cluster, logs, "evaluate.sbatch", *words, *output, GPUS_PER_NODE="2")
    printed = array_ends(cluster, job, logs)
    assert "nolima/needle_set/512: " in printed
    for name in ("results.json", "nolima/needle_set/512.jsonl"):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_corpus_is_tokenized_over_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    inputs = [tmp_path / f"{number}.jsonl" for number in range(3)]
    for number, path in enumerate(inputs):
        lines = [json.dumps({"text": f"book {number} tale {n}"}) for n in range(20 + number)]
        path.write_text("\n".join(lines) + "\n")
    model = write_small_model(tmp_path / "model")
    words = ("--input", *inputs, "--tokenizer", model, "--output", tmp_path / "tokens", "--tasks", 3)
    printed = array_ends(
        cluster,
        submit_array(cluster, tmp_path / "logs", "tokenize.sbatch", *words),
        tmp_path / "logs",
    )
    assert "3 shards, a source for megatron-exact pack; 63 documents" in printed
    assert len(list((tmp_path / "tokens").glob("*.bin"))) == 3
