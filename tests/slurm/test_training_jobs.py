"""`examples/slurm/train.sbatch` on a real Slurm: TP2 x PP2 over gloo on two of three nodes."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]
ITERATIONS = 24
MINUTES = 60.0


@pytest.fixture(scope="module")
def whole(cluster: Cluster, submit: Submit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    job = submit(run, ITERATIONS, "--save-interval", 8)
    state = cluster.ended(job, 25 * MINUTES)
    assert state == "COMPLETED", cluster.output(job)[-5000:]
    assert cluster.field(job, "NumNodes") == "2"
    return run


def lines(run: Path, name: str = "losses.jsonl") -> int:
    path = run / name
    return path.read_text().count("\n") if path.exists() else 0


def resumes(run: Path) -> list[int]:
    return [resume["iteration"] for resume in json.loads((run / "run.json").read_text())["resumes"]]


def assert_same(run: Path, whole: Path) -> None:
    for name in ("losses.jsonl", "rows.jsonl"):
        assert (run / name).read_text() == (whole / name).read_text()


def test_every_rank_has_a_log_and_the_job_shows_the_iterations(
    cluster: Cluster, whole: Path, submit: Submit
) -> None:
    assert lines(whole) == ITERATIONS
    (logs,) = (whole / "logs").iterdir()
    names = sorted(path.name for path in logs.glob("rank-*"))
    assert names == [f"rank-{rank:05d}.log" for rank in range(4)]
    assert "token weighting exact" in (logs / "rank-00000.log").read_text()
    (output,) = whole.parent.glob("megatron_exact-*.out")
    assert f"iteration       {ITERATIONS}/      {ITERATIONS}" in output.read_text()
    layout = json.loads((whole / "run.json").read_text())["layout"]
    assert (layout["world_size"], layout["tensor_model_parallel_size"]) == (4, 2)


def test_a_signal_saves_requeues_and_goes_on_to_the_bit(
    cluster: Cluster, whole: Path, submit: Submit, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    job = submit(run, ITERATIONS, "--save-interval", 1000)
    cluster.wait_for(job, lambda: lines(run) >= 3, 15 * MINUTES, "no three iterations")
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    assert cluster.ended(job, 25 * MINUTES) == "COMPLETED", cluster.output(job)[-5000:]
    assert cluster.field(job, "Restarts") == "1"
    assert "requeue" in cluster.output(job)
    assert len(resumes(run)) == 1
    assert_same(run, whole)


def test_the_time_limit_is_announced_early_enough(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    """Slurm's own signal; it may come up to a minute early, and at least 120 s are left for the save."""
    run = tmp_path / "run"
    job = submit(run, 1_000_000, "--save-interval", 1_000_000, options=("--time=5", "--signal=B:USR1@120"))
    cluster.wait_for(job, lambda: cluster.field(job, "Restarts") == "1", 7 * MINUTES, "not requeued")
    saved = int((run / "latest_checkpointed_iteration.txt").read_text())
    cluster.wait_for(job, lambda: resumes(run) == [saved], 20 * MINUTES, "not resumed")
    assert lines(run) >= saved > 0
    cluster.run("scancel", str(job))
    cluster.ended(job, 3 * MINUTES)


def test_a_preempted_job_comes_back(cluster: Cluster, whole: Path, submit: Submit, tmp_path: Path) -> None:
    """Requeued by Slurm without a warning: it goes on from its last regular save."""
    run = tmp_path / "run"
    job = submit(run, ITERATIONS, "--save-interval", 2)
    cluster.wait_for(job, lambda: lines(run) >= 5, 15 * MINUTES, "no five iterations")
    urgent = tmp_path / "urgent.sbatch"
    urgent.write_text("#!/bin/sh\nsleep 2\n")
    options = ("--partition=high", "--exclusive", "--nodes=2", f"--output={tmp_path}/urgent.out")
    other = cluster.submit(urgent, options, {}, [])
    assert cluster.ended(other, 3 * MINUTES) == "COMPLETED"
    assert cluster.ended(job, 25 * MINUTES) == "COMPLETED", cluster.output(job)[-5000:]
    assert cluster.field(job, "Restarts") == "1"
    assert resumes(run)[0] >= 2
    assert_same(run, whole)


def test_two_jobs_run_side_by_side_on_one_node(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    """Each on a port of its own; that of the first is taken by another program."""
    options = ("--nodes=1", "--nodelist=n1", "--oversubscribe", "--hold")
    jobs = [
        submit.a_rank_a_node(tmp_path / name / "run", 6, "--save-interval", 6, options=options)
        for name in ("a", "b")
    ]
    with socket.create_server(("127.0.0.1", 20_000 + jobs[0] % 10_000)):
        for job in jobs:
            cluster.run("scontrol", "release", str(job))
        both = [tmp_path / name / "run" for name in ("a", "b")]
        cluster.wait_for(
            jobs[0],
            lambda: all(cluster.field(job, "JobState") == "RUNNING" for job in jobs),
            5 * MINUTES,
            "the jobs are not running at the same time",
        )
        for job in jobs:
            assert cluster.ended(job, 25 * MINUTES) == "COMPLETED", cluster.output(job)[-5000:]
    assert [lines(run) for run in both] == [6, 6]
    assert {cluster.field(job, "NodeList") for job in jobs} == {"n1"}
    assert (both[0] / "losses.jsonl").read_text() == (both[1] / "losses.jsonl").read_text()


def test_a_failing_job_fails_loudly(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    job = submit(tmp_path / "run", 4, "--seq-length", 128)
    assert cluster.ended(job, 15 * MINUTES) == "FAILED"
    assert cluster.field(job, "ExitCode") != "0:0"
    assert "--seq-length 128 differs from the pack" in cluster.output(job).splitlines()[-1]
    assert cluster.field(job, "Restarts") == "0"
