"""`tools/run_stages.py --sbatch` on a real Slurm: two stages, two arms, each job after its predecessor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import jobs
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import CHECKOUT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
MINUTES = 60.0


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    corpus = jobs.make_corpus(tmp_path_factory.mktemp("stages") / "docs")
    return [
        jobs.make_pack(corpus, "concat", str(row_tokens), row_tokens=row_tokens) for row_tokens in (32, 64)
    ]


def submit_stages(cluster: Cluster, packs: list[Path], output: Path, *words: object) -> str:
    command = [
        *(sys.executable, "tools/run_stages.py", "--sbatch", "--pack", *packs, "--output", output),
        *("--nproc-per-node", 1, *jobs.MODEL, *jobs.SCHEDULE),
        *("--train-iters", 6, "--save-interval", 3, "--cpu", *words),
    ]
    done = subprocess.run(
        [str(word) for word in command],
        env={**cluster.environment, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(printed: str) -> list[int]:
    return [int(line.rpartition(" ")[2]) for line in printed.splitlines()]


def test_a_chain_of_stages_runs_in_both_arms(cluster: Cluster, packs: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "runs"
    printed = submit_stages(cluster, packs, output)
    assert [line.split(":")[0] for line in printed.splitlines()] == [
        "32 none",
        "32 exact",
        "64 none",
        "64 exact",
    ]
    submitted = numbers(printed)
    assert "is in the queue as job" in submit_stages(cluster, packs, output)  # a second call adds no job
    for job in submitted:
        assert cluster.ended(job, 10 * MINUTES) == "COMPLETED", cluster.output(job)[-5000:]
    for arm in ("none", "exact"):
        records = [json.loads((output / arm / stage / "run.json").read_text()) for stage in ("32", "64")]
        assert [record["weighting"]["rule"] for record in records] == [arm, arm]
        assert records[1]["start_checkpoint"]["path"] == str(output / arm / "32" / "iter_0000006")
        assert (output / arm / "64" / "losses.jsonl").read_text().count("\n") == 6
    assert submit_stages(cluster, packs, output).count(": finished\n") == 4


def test_a_failed_stage_takes_the_next_one_out_of_the_queue(
    cluster: Cluster, packs: list[Path], tmp_path: Path
) -> None:
    words = ("--arms", "exact", "--lr-decay-style", "nonsense")
    first, second = numbers(submit_stages(cluster, packs, tmp_path / "runs", *words))
    assert cluster.ended(first, 5 * MINUTES) == "FAILED"
    assert "invalid choice: 'nonsense'" in cluster.output(first)
    assert cluster.ended(second, 2 * MINUTES) == "CANCELLED"
    assert not (tmp_path / "runs" / "exact" / "64" / "run.json").exists()
