"""`tools/run_stages.py --sbatch` on a real Slurm: two stages, two arms, each job after its predecessor."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import jobs
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import CHECKOUT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]
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
        *("--nproc-per-node", 1, *jobs.MODEL, *jobs.SCHEDULE, *jobs.LARGE),
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
    """Of the jobs; every line must have one."""
    found = numbers_in(printed)
    assert None not in found, printed
    return [job for job in found if job is not None]


def numbers_in(printed: str) -> list[int | None]:
    """Number of the job of each line, None for a run that is finished."""
    found = [re.search(r" as job (\d+)", line) for line in printed.splitlines()]
    return [None if match is None else int(match[1]) for match in found]


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
        assert cluster.ended(job, 25 * MINUTES) == "COMPLETED", cluster.output(job)[-5000:]
    for arm in ("none", "exact"):
        records = [json.loads((output / arm / stage / "run.json").read_text()) for stage in ("32", "64")]
        assert [record["weighting"]["rule"] for record in records] == [arm, arm]
        assert records[1]["start_checkpoint"]["path"] == str(output / arm / "32" / "iter_0000006")
        assert (output / arm / "64" / "losses.jsonl").read_text().count("\n") == 6
    assert submit_stages(cluster, packs, output).count(": finished\n") == 4


def test_a_failed_stage_ends_the_next_and_the_same_call_resumes(
    cluster: Cluster, packs: list[Path], tmp_path: Path
) -> None:
    """`status` says why the next stage never began; a second call submits both, and they finish."""
    output, words = tmp_path / "runs", ("--arms", "exact")
    first, second = numbers(submit_stages(cluster, packs, output, *words, "--lr-decay-style", "nonsense"))
    assert cluster.ended(first, 15 * MINUTES) == "FAILED"
    assert "--lr-decay-style nonsense is not supported" in cluster.output(first)
    assert cluster.ended(second, 5 * MINUTES) == "CANCELLED"
    assert not (output / "exact" / "64" / "run.json").exists()
    shown = last_lines(cluster, output / "exact" / "64")
    assert f"job {second} waits for {output / 'exact' / '32'}, or ended with it: not restarted" in shown
    printed = submit_stages(cluster, packs, output, *words)
    assert f"(job {first} has ended: not restarted" in printed
    assert f"(job {second} has ended: job {second} waits for" in printed
    again = numbers(printed)
    assert set(again).isdisjoint({first, second})
    for job in again:
        assert cluster.ended(job, 25 * MINUTES) == "COMPLETED", cluster.output(job)[-5000:]
    assert last_lines(cluster, output).count("; finished; iteration 6 of 6") == 2


def test_a_cancelled_stage_ends_the_next(cluster: Cluster, packs: list[Path], tmp_path: Path) -> None:
    output, words = tmp_path / "runs", ("--arms", "exact", "--train-iters", 100_000)
    first, second = numbers(submit_stages(cluster, packs, output, *words))
    losses = output / "exact" / "32" / "losses.jsonl"
    cluster.wait_for(first, losses.exists, 25 * MINUTES, "no iteration")
    assert "32 exact; running" in last_lines(cluster, output / "exact" / "32")
    cluster.run("scancel", str(first))
    assert cluster.ended(first, 5 * MINUTES) == "CANCELLED"
    assert cluster.ended(second, 5 * MINUTES) == "CANCELLED"
    shown = last_lines(cluster, output / "exact" / "64")
    assert "64 exact; not begun" in shown
    assert "ended with it: cancelled: the job does not come back" in shown


def test_a_job_that_is_ending_is_not_taken_for_one_that_runs(
    cluster: Cluster, packs: list[Path], tmp_path: Path
) -> None:
    """Its processes have ended, but Slurm still cleans up its nodes."""
    epilog = tmp_path / "epilog"
    epilog.write_text("#!/bin/sh\nexec sleep 30\n")
    epilog.chmod(0o755)
    output, words = tmp_path / "runs", ("--arms", "exact", "--lr-decay-style", "nonsense")
    with cluster.configured(f"Epilog={epilog}"):
        first, second = numbers(submit_stages(cluster, packs, output, *words))
        cluster.wait_for(
            first, lambda: cluster.field(first, "JobState") == "COMPLETING", 15 * MINUTES, "not ending"
        )
        printed = submit_stages(cluster, packs, output, *words).splitlines()
    assert f"32 exact: job {first} is ending, waiting for it" in printed
    again = numbers("\n".join(line for line in printed if " as job " in line))
    assert len(again) == 2
    assert set(again).isdisjoint({first, second})
    for job in again:
        cluster.run("scancel", str(job))
        cluster.ended(job, 5 * MINUTES)


def last_lines(cluster: Cluster, folder: Path) -> str:
    """What `megatron-exact status` prints."""
    command = [sys.executable, "-m", "megatron_exact", "status", str(folder)]
    return subprocess.run(
        command, cwd=CHECKOUT, env=cluster.environment, capture_output=True, text=True
    ).stdout
