"""What happens to a job in each phase: a test for each row of the table in docs/cluster.md.

Each event is sent to a real Slurm, or done to real processes. Asked for are the state of the job, its
number of starts, its last line, and that its output shows no traceback and no error of a shell command.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Submit

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]
ITERATIONS = 40
NEVER = ("--save-interval", 100_000)
ENDLESS = 100_000
MINUTES = 60.0
OF_SLURM = ("slurmstepd", "srun: ")


@pytest.fixture(scope="module")
def whole(cluster: Cluster, submit: Submit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    job = submit.a_rank_a_node(run, ITERATIONS, *NEVER)
    assert cluster.ended(job, 20 * MINUTES) == "COMPLETED", cluster.output(job)[-5000:]
    assert last_line(cluster, job) == f"finished at iteration {ITERATIONS}"
    return run


class Started:
    """A job under test, and what is waited for in it."""

    def __init__(self, cluster: Cluster, job: int, run: Path) -> None:
        self.cluster, self.job, self.run = cluster, job, run

    def until(self, is_so: Callable[[], bool], what: str) -> None:
        self.cluster.wait_for(self.job, is_so, 15 * MINUTES, what)

    def importing(self) -> None:
        """A rank is there; Python has hardly begun."""
        self.until(lambda: bool(ranks_of(self.job)), "no rank")

    def building(self) -> None:
        """The arguments are read, Megatron sets the job up."""
        self.until(lambda: "token weighting" in self.log(0), "rank 0 builds nothing")
        assert self.iterations() == 0

    def training(self, iterations: int = 5) -> None:
        self.until(lambda: self.iterations() >= iterations, f"no {iterations} iterations")

    def log(self, rank: int) -> str:
        """Output of a rank in the latest start."""
        paths = sorted(self.run.glob(f"logs/{self.job}-*/rank-{rank:05d}.log"))
        return paths[-1].read_text() if paths else ""

    def iterations(self) -> int:
        path = self.run / "losses.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def saved(self) -> int:
        path = self.run / "latest_checkpointed_iteration.txt"
        return int(path.read_text()) if path.exists() else 0

    def ends(self, state: str, starts: int, line: str) -> None:
        """The job ends so, after so many starts, and its last line matches."""
        found = self.cluster.ended(self.job, 25 * MINUTES)
        output = self.cluster.output(self.job)
        told = last_line(self.cluster, self.job)
        came = (found, int(self.cluster.field(self.job, "Restarts")) + 1)
        assert came == (state, starts), output[-4000:]
        assert re.fullmatch(line, told), (told, output[-4000:])
        for noise in ("Traceback", "grep:", "tail:", "awk:", "SignalException"):
            assert noise not in own_lines(output), output[-4000:]

        assert not re.search(r": line \d+: ", output), output[-4000:]  # of a shell

    def told(self, line: str) -> None:
        """An earlier start ended with a line that matches."""
        output = self.cluster.output(self.job)
        assert any(re.fullmatch(line, each) for each in output.splitlines()), output[-4000:]

    def is_whole(self, whole: Path) -> None:
        """The records are those of a run that nothing happened to."""
        for name in ("losses.jsonl", "rows.jsonl"):
            assert (self.run / name).read_text() == (whole / name).read_text()


def own_lines(output: str) -> str:
    """Without the lines of Slurm and of Megatron."""
    kept = [line for line in output.splitlines() if "iteration" not in line or ";" in line]
    return "\n".join(line for line in kept if not line.startswith(OF_SLURM))


def last_line(cluster: Cluster, job: int) -> str:
    """The last line of the output that is not Slurm's own."""
    lines = [line for line in cluster.output(job).splitlines() if not line.startswith(OF_SLURM)]
    return lines[-1] if lines else ""


def ranks_of(job: int) -> dict[int, int]:
    """Process id of each rank of a job, by its number."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"megatron_exact.training.pretrain" not in (path / "cmdline").read_bytes().split(b"\0"):
                continue
            pairs = (entry.partition(b"=") for entry in (path / "environ").read_bytes().split(b"\0"))
            variables = {name: value for name, _, value in pairs}
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            is_rank = b"commands.node" in Path(f"/proc/{parent}/cmdline").read_bytes()
            if is_rank and variables.get(b"SLURM_JOB_ID") == str(job).encode():
                found[int(variables[b"RANK"])] = int(path.name)
    return found


def node_of(pid: int) -> str:
    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if entry.startswith(b"SLURMD_NODENAME="):
            return entry.partition(b"=")[2].decode()
    raise AssertionError(f"process {pid} belongs to no node")


@pytest.fixture
def start(cluster: Cluster, submit: Submit, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Submits the job of a test, which is over when the test is."""
    jobs: list[int] = []

    def begin(iterations: int, *words: object, options: tuple[str, ...] = ()) -> Started:
        run = tmp_path / f"run{len(jobs)}"
        job = submit.a_rank_a_node(run, iterations, *words, options=options)
        jobs.append(job)
        return Started(cluster, job, run)

    yield begin
    for job in jobs:
        cluster.run("scancel", "--signal=KILL", "--full", str(job), check=False)
        cluster.run("scancel", str(job), check=False)
        cluster.ended(job, 3 * MINUTES)


def warn(cluster: Cluster, job: Started) -> None:
    """What Slurm sends before the time limit; test_training_jobs has the real one."""
    cluster.run("scancel", "--batch", "--signal=USR1", str(job.job))


def preempt(cluster: Cluster, tmp_path: Path) -> None:
    """Submit a job that takes all nodes, and wait until it has run."""
    script = tmp_path / "urgent.sbatch"
    script.write_text("#!/bin/sh\nsleep 2\n")
    options = ("--partition=high", "--exclusive", "--nodes=3", f"--output={tmp_path}/urgent.out")
    job = cluster.submit(script, options, {}, [])
    assert cluster.ended(job, 10 * MINUTES) == "COMPLETED"


FINISHED = f"finished at iteration {ITERATIONS}"
ASKED = r"asked to stop by (USR1|TERM): saved iteration \d+; requeued: the job resumes from iteration \d+"
CANCELLED = r"cancelled: the job does not come back; submit it again to resume \(saved: iteration \d+\)"


# -- the time limit is near --------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["importing", "building", "training"])
def test_warned_of_the_time_limit(
    phase: str, cluster: Cluster, start: Callable[..., Started], whole: Path
) -> None:
    job = start(ITERATIONS, *NEVER)
    getattr(job, phase)()
    warn(cluster, job)
    job.ends("COMPLETED", 2, FINISHED)
    job.told(ASKED)
    job.is_whole(whole)


def test_warned_before_any_rank_is_there(
    cluster: Cluster, start: Callable[..., Started], tmp_path: Path
) -> None:
    """The launchers see that nothing has to be saved; nothing is lost, so the job starts again."""
    prolog = tmp_path / "prolog"
    prolog.write_text("#!/bin/sh\nexec sleep 15\n")  # what srun runs on a node before the launcher
    prolog.chmod(0o755)
    job = start(3, *NEVER, options=(f"--export=ALL,SLURM_TASK_PROLOG={prolog}",))
    logs = job.run / "logs" / f"{job.job}-0"
    job.until(logs.is_dir, "the script has not begun")  # Slurm loses a signal that comes before
    warn(cluster, job)
    job.ends("COMPLETED", 2, "finished at iteration 3")
    job.told("asked to stop by USR1 while the ranks started; requeued: the job resumes from its beginning")


# -- preemption --------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["building", "training"])
@pytest.mark.parametrize("partition", ["grace", "cancel"])
def test_preempted_with_grace(
    partition: str,
    phase: str,
    cluster: Cluster,
    start: Callable[..., Started],
    whole: Path,
    tmp_path: Path,
) -> None:
    """In a partition that cancels, too: the job asks for its next start before the grace time is over."""
    job = start(ITERATIONS, *NEVER, options=(f"--partition={partition}",))
    getattr(job, phase)()
    preempt(cluster, tmp_path)
    job.ends("COMPLETED", 2, FINISHED)
    job.told(ASKED)
    job.is_whole(whole)


@pytest.mark.parametrize("phase", ["building", "training"])
def test_preempted_with_the_user_signal(
    phase: str, cluster: Cluster, start: Callable[..., Started], whole: Path, tmp_path: Path
) -> None:
    """`preempt_send_user_signal`: the script gets its `--signal`, and the ranks get no TERM."""
    with cluster.configured("SlurmctldParameters=preempt_send_user_signal"):
        job = start(ITERATIONS, *NEVER, options=("--partition=grace",))
        getattr(job, phase)()
        preempt(cluster, tmp_path)
        job.ends("COMPLETED", 2, FINISHED)
    job.told(r"asked to stop by USR1: saved iteration \d+; requeued: .*")
    job.is_whole(whole)


def test_preempted_without_grace(
    cluster: Cluster, start: Callable[..., Started], whole: Path, tmp_path: Path
) -> None:
    """Slurm requeues the job; the ranks save if KillWait leaves them the time."""
    job = start(ITERATIONS, *NEVER)
    job.training()
    preempt(cluster, tmp_path)
    job.ends("COMPLETED", 2, FINISHED)
    job.told(r"preempted, or a node was lost: Slurm starts the job again \(saved: iteration \d+\)")
    job.is_whole(whole)


# -- scancel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [2, 100_000], ids=["after a save", "before a save"])
def test_cancelled_in_training(interval: int, cluster: Cluster, start: Callable[..., Started]) -> None:
    job = start(ENDLESS, "--save-interval", interval)
    job.training()
    cluster.run("scancel", str(job.job))
    job.ends("CANCELLED", 1, CANCELLED)
    assert job.saved() == job.iterations() > 0
    time.sleep(10)  # it would be pending by now
    assert cluster.field(job.job, "JobState") == "CANCELLED"


@pytest.mark.parametrize("phase", ["importing", "building"])
def test_cancelled_in_start_up(phase: str, cluster: Cluster, start: Callable[..., Started]) -> None:
    job = start(ENDLESS, *NEVER)
    getattr(job, phase)()
    cluster.run("scancel", str(job.job))
    job.ends(
        "CANCELLED", 1, ".*"
    )  # Slurm kills the script when KillWait is over, maybe before the ranks end
    job.told(r"TERM received.*; cancelled: .*")


# -- faults ------------------------------------------------------------------------------------------


def test_rank_lost_after_a_save(cluster: Cluster, start: Callable[..., Started], whole: Path) -> None:
    job = start(ITERATIONS, "--save-interval", 4)
    job.training(9)
    lost = ranks_of(job.job)[1]
    node = node_of(lost)
    os.kill(lost, signal.SIGKILL)
    job.ends("COMPLETED", 2, FINISHED)
    job.told(rf"rank 1 was ended by SIGKILL on {node}; requeued: the job resumes from iteration \d+")
    job.is_whole(whole)
    (row,) = json.loads((job.run / "run.json").read_text())["restarts"]
    assert row["why"] == f"rank 1 was ended by SIGKILL on {node}"
    assert (row["node"], row["iteration"] % 4) == (node, 0)
    assert 0 <= row["lost_iterations"] < 4 + 4  # a save may have been under way
    assert 0 < row["minutes"] < 25
    job.told(r"megatron_exact: started again 1 times so far: \d+ iterations repeated, .*")


def test_rank_lost_twice_before_a_save(cluster: Cluster, start: Callable[..., Started]) -> None:
    """Two starts in a row without progress end the job."""
    job = start(ENDLESS, *NEVER)
    job.training(2)
    os.kill(ranks_of(job.job)[0], signal.SIGKILL)
    job.until(lambda: cluster.field(job.job, "Restarts") == "1", "not requeued")
    job.until(lambda: len(ranks_of(job.job)) == 2, "not started again")
    os.kill(ranks_of(job.job)[0], signal.SIGKILL)
    job.ends(
        "FAILED", 2, r"not restarted: 2 starts in a row ended before a save \(MAX_RESTARTS\): rank 0 .* n\d"
    )
    job.told(r"rank 0 was ended by SIGKILL on n\d; requeued: the job resumes from its beginning")


def test_a_node_where_two_starts_failed_is_excluded(
    cluster: Cluster, start: Callable[..., Started], whole: Path
) -> None:
    job = start(ITERATIONS, "--save-interval", 4)
    job.training(9)
    lost = ranks_of(job.job)[1]
    node = node_of(lost)
    os.kill(lost, signal.SIGKILL)
    job.until(lambda: cluster.field(job.job, "Restarts") == "1", "not requeued")
    job.until(lambda: job.saved() > 8 and len(ranks_of(job.job)) == 2, "no progress")
    again = {node_of(pid): pid for pid in ranks_of(job.job).values()}
    os.kill(again[node], signal.SIGKILL)
    job.ends("COMPLETED", 3, FINISHED)
    job.told(f"node {node} is excluded: 2 starts failed on it")
    assert cluster.field(job.job, "ExcNodeList") == node
    job.is_whole(whole)


def test_node_lost(cluster: Cluster, start: Callable[..., Started], whole: Path) -> None:
    """Slurm itself requeues the job, which resumes on the spare node."""
    job = start(ITERATIONS, "--save-interval", 4)
    job.training(9)
    lost = node_of(ranks_of(job.job)[1])
    cluster.lose(lost)
    try:
        job.ends("COMPLETED", 2, FINISHED)
        job.told(r"preempted, or a node was lost: Slurm starts the job again \(saved: iteration \d+\)")
        assert lost not in cluster.run("scontrol", "show", "hostnames", cluster.field(job.job, "NodeList"))
        job.is_whole(whole)
    finally:
        cluster.bring_back(lost)


def test_rank_hangs(cluster: Cluster, start: Callable[..., Started], whole: Path) -> None:
    job = start(ITERATIONS, "--save-interval", 4, "--rank-timeout-seconds", 10)
    job.training(9)
    os.kill(ranks_of(job.job)[1], signal.SIGSTOP)
    job.ends("COMPLETED", 2, FINISHED)
    job.told(r".*rank 1 \(.*requeued: the job resumes from iteration \d+")
    job.is_whole(whole)


def test_numbers_that_are_not_finite(start: Callable[..., Started]) -> None:
    """An absurd learning rate; the same data and weights would end the same way."""
    job = start(
        ENDLESS, "--save-interval", 1, "--lr", "1000", "--clip-grad", 0, "--init-method-std", "1e19"
    )
    job.ends("FAILED", 1, r"not restarted: rank \d ended with exit code 65: .*")
    assert job.cluster.field(job.job, "ExitCode") == "65:0"


def test_refused(start: Callable[..., Started]) -> None:
    job = start(4, "--seq-length", 128)
    job.ends(
        "FAILED", 1, r"not restarted, it would end the same way: .*--seq-length 128 differs from the pack.*"
    )


def test_no_interpreter(start: Callable[..., Started]) -> None:
    job = start(4, *NEVER, options=("--export=ALL,PYTHON=/nowhere/python",))
    job.ends("FAILED", 1, "PYTHON is /nowhere/python, which is not there on .*: run make setup .*")


def test_disk_full(cluster: Cluster, start: Callable[..., Started], tmp_path: Path) -> None:
    """The run lies in a file system that takes one checkpoint and no second."""
    run = tmp_path / "run0"
    run.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", run], check=True)
    try:
        job = start(ENDLESS, "--save-interval", 3)
        job.ends("FAILED", 1, r"not restarted, it would end the same way: .*")
        assert "make room" in last_line(cluster, job.job)
    finally:
        subprocess.run(["umount", "--lazy", run], check=True)


def test_finished_again(cluster: Cluster, start: Callable[..., Started], submit: Submit) -> None:
    """A job whose run is finished says so, and trains nothing."""
    job = start(3, *NEVER)
    job.ends("COMPLETED", 1, "finished at iteration 3")
    again = Started(cluster, submit.a_rank_a_node(job.run, 3, *NEVER), job.run)
    again.ends("COMPLETED", 1, "finished at iteration 3")
    assert job.iterations() == 3


def test_the_same_folder_twice(cluster: Cluster, start: Callable[..., Started], submit: Submit) -> None:
    job = start(ENDLESS, "--save-interval", 2, options=("--nodes=1",))
    job.training()
    options = ("--nodes=1", f"--output={job.run.parent}/second-%j.out")
    second = Started(cluster, submit.a_rank_a_node(job.run, ENDLESS, *NEVER, options=options), job.run)
    second.ends("FAILED", 1, r"not restarted, it would end the same way: .* is in use by .*")
    assert cluster.field(job.job, "JobState") == "RUNNING"
