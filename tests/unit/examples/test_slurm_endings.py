"""`examples/slurm/ending.sh`: what comes after each way to end, with a stand-in for `scontrol`.

tests/slurm does the same to real jobs; here every branch is taken, in a second.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "slurm" / "ending.sh"
SCONTROL = """#!/bin/bash
echo "$*" >>"$SCRATCH/calls"
case "$1" in
    -o) echo "JobId=7 JobState=$STATE Restarts=$RESTARTS EndTime=$END PreemptTime=$PREEMPTED" \
        "ExcNodeList=(null) Name=x" ;;
    requeue) exit "${REFUSES:-0}" ;;
esac
"""
NODES = {
    "killed": "137\tsignal\tn2\trank 1 was ended by SIGKILL",
    "lost": "75\tlost\tn1\trank 0 ended with exit code 75: rank 1 (n2) ended first: x",
    "refused": "1\tuser\tn1\trank 0 ended with exit code 1: --lr 0",
    "nan": "65\tnan\tn2\trank 1 ended with exit code 65: NaN",
    "fault": "1\tfault\tn2\trank 1 ended with exit code 1: CUDA error",
}


class Job:
    """A start of a job, its files and what Slurm says of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "bin" / "scontrol").write_text(SCONTROL)
        (folder / "bin" / "scontrol").chmod(0o755)
        (folder / "run").mkdir()

    def save(self, iteration: int) -> None:
        (self.folder / "run" / "latest_checkpointed_iteration.txt").write_text(str(iteration))

    def ends(
        self,
        *nodes: str,
        start: int = 0,
        saves: int | None = None,
        ending: str = "",
        code: int = 1,
        asked: str = "",
        **slurm: str,
    ) -> tuple[int, list[str], list[str]]:
        """Exit code, lines of the output, and what `scontrol` was told."""
        notes = "".join(
            f'printf "%s\\n" "{NODES[name]}" >"$LOG_DIR/node-{number:05d}.ending"\n'
            for number, name in enumerate(nodes)
        )
        saved = "" if saves is None else f'echo {saves} >"$TRACKER"\n'
        noted = f'echo "{ending}" >"$LOG_DIR/ending"\n' if ending else ""
        text = f'asked="{asked}"\nsource {SCRIPT}\nbegin_start\n{notes}{saved}{noted}end_start {code}\n'
        variables: Mapping[str, str] = {
            **{
                "STATE": "RUNNING",
                "RESTARTS": str(start),
                "PREEMPTED": "None",
                "END": "2099-01-01T00:00:00",
            },
            **slurm,
        }
        (self.folder / "calls").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            env={
                **os.environ,
                "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
                "SCRATCH": str(self.folder),
                "RUN_DIR": str(self.folder / "run"),
                "SLURM_JOB_ID": "7",
                "SLURM_RESTART_COUNT": str(start),
                **variables,
            },
            capture_output=True,
            text=True,
        )
        assert done.stderr == ""
        calls = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return (
            done.returncode,
            done.stdout.splitlines(),
            [call for call in calls if not call.startswith("-o")],
        )


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


REQUEUE = ["requeue 7"]


def test_a_rank_that_is_lost(job: Job) -> None:
    """With a save since the start, and once without; the cause is told, not what the others saw of it."""
    code, lines, calls = job.ends("lost", "killed", saves=8)
    assert (code, calls) == (0, REQUEUE)
    assert lines == ["rank 1 was ended by SIGKILL on n2; requeued: the job resumes from iteration 8"]


def test_fruitless_starts_end_the_job(job: Job) -> None:
    code, lines, calls = job.ends("killed")
    assert (code, calls) == (0, REQUEUE)
    assert lines[-1].endswith("the job resumes from its beginning")
    code, lines, calls = job.ends("killed", start=1)
    assert (code, calls) == (137, [])
    assert lines == [
        "not restarted: 2 starts in a row ended before a save (MAX_RESTARTS): "
        "rank 1 was ended by SIGKILL on n2"
    ]


def test_a_save_in_between_begins_the_count_again(job: Job) -> None:
    assert job.ends("killed")[2] == REQUEUE
    assert job.ends("killed", start=1, saves=4)[2][:1] == REQUEUE
    assert job.ends("killed", start=2)[2][:1] == REQUEUE
    code, lines, calls = job.ends("killed", start=3)
    assert (code, calls) == (137, [])
    assert "2 starts in a row" in lines[-1]


def test_a_node_that_failed_twice_is_excluded(job: Job) -> None:
    job.ends("killed", saves=4)
    _, lines, calls = job.ends("killed", start=1, saves=8)
    assert calls == ["requeue 7", "update JobId=7 ExcNodeList=n2"]
    assert lines[0] == "node n2 is excluded: 2 starts failed on it"


def test_a_node_that_another_rank_names_counts(job: Job) -> None:
    job.ends("lost", saves=4)
    assert job.ends("lost", start=1, saves=8)[2][-1] == "update JobId=7 ExcNodeList=n2"


@pytest.mark.parametrize(
    ("nodes", "code", "line"),
    [
        (("lost", "nan"), 65, "not restarted: rank 1 ended with exit code 65: NaN on n2"),
        (
            ("refused", "lost"),
            1,
            "not restarted, it would end the same way: rank 0 ended with exit code 1: --lr 0 on n1",
        ),
    ],
)
def test_what_would_recur_is_not_restarted(job: Job, nodes: tuple[str, ...], code: int, line: str) -> None:
    assert job.ends(*nodes, saves=8) == (code, [line], [])


def test_an_error_of_the_program_is_restarted_after_a_save_alone(job: Job) -> None:
    code, lines, calls = job.ends("fault")
    assert (code, calls) == (1, [])
    assert lines[-1].startswith("not restarted, since nothing was saved since the start: rank 1 ended")
    assert job.ends("fault", saves=4)[2] == REQUEUE


def test_asked_to_stop(job: Job) -> None:
    code, lines, calls = job.ends(ending="stopped 12", saves=12, code=0, asked="USR1")
    assert (code, calls) == (0, REQUEUE)
    assert lines == [
        "asked to stop by USR1: saved iteration 12; requeued: the job resumes from iteration 12"
    ]
    _, lines, calls = job.ends(code=0, start=1, asked="USR1")  # before a rank was there
    assert calls == REQUEUE
    assert lines[0].startswith("asked to stop by USR1 while the ranks started; requeued")


def test_a_request_in_start_up_is_bounded(job: Job) -> None:
    assert job.ends(code=0, asked="USR1")[2] == REQUEUE
    code, _, calls = job.ends(code=0, asked="USR1", start=1)
    assert (code, calls) == (1, [])


def test_slurm_refuses_to_requeue(job: Job) -> None:
    code, lines, _ = job.ends(ending="stopped 12", saves=12, code=0, asked="TERM", REFUSES="1")
    assert code == 1
    assert "but Slurm does not requeue the job" in lines[-1]
    assert lines[-1].endswith("Submit it again: it resumes from there")


def test_finished_and_paused(job: Job) -> None:
    assert job.ends(ending="finished 24", saves=24, code=0) == (0, ["finished at iteration 24"], [])
    code, lines, calls = job.ends(ending="paused 8", saves=8, code=0)
    assert (code, calls) == (0, [])
    assert lines == ["ended at iteration 8, as its arguments ask; submit the job again to resume"]


@pytest.mark.parametrize(
    ("slurm", "line"),
    [
        ({}, "cancelled: the job does not come back; submit it again to resume"),
        ({"RESTARTS": "1"}, "preempted, or a node was lost: Slurm starts the job again"),
        ({"END": "2001-01-01T00:00:00"}, "the time limit is over: submit the job again to resume"),
        (
            {"PREEMPTED": "2026-01-01T00:00:00"},
            "preempted in a partition that does not requeue: submit the job again to resume",
        ),
    ],
    ids=["cancelled", "requeued", "time limit", "preempted"],
)
def test_a_job_that_slurm_ends_is_left_to_slurm(job: Job, slurm: dict[str, str], line: str) -> None:
    ended = job.ends(ending="stopped 12", saves=12, code=0, asked="TERM", STATE="COMPLETING", **slurm)
    assert ended == (0, [f"{line} (saved: iteration 12)"], [])


def test_srun_that_fails_before_any_rank(job: Job) -> None:
    code, lines, calls = job.ends(code=127)
    assert (code, calls) == (127, [])
    assert lines[-1].endswith("srun ended with exit code 127 before any rank told why (see above)")


def told_at_start(job: Job) -> list[str]:
    """What the second start of a job is told of the first: seconds, node, reason."""
    script = f'asked=\nsource {SCRIPT}\nbegin_start\necho "$MEGATRON_EXACT_RESTART"'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env={
            **os.environ,
            "PATH": f"{job.folder}/bin:{os.environ['PATH']}",
            **{"SCRATCH": str(job.folder), "RUN_DIR": str(job.folder / "run"), "SLURM_JOB_ID": "7"},
            **{"SLURM_RESTART_COUNT": "1", "STATE": "RUNNING", "RESTARTS": "1", "END": "", "PREEMPTED": ""},
        },
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.rstrip("\n").split("\t")


def test_the_next_start_knows_why(job: Job) -> None:
    job.ends("killed", saves=8)
    seconds, node, why = told_at_start(job)
    assert abs(time.time() - int(seconds)) < 60
    assert (node, why) == ("n2", "rank 1 was ended by SIGKILL on n2")


@pytest.mark.parametrize("has_log", [True, False])
def test_a_start_that_slurm_began_takes_the_time_of_the_last_output(job: Job, has_log: bool) -> None:
    if has_log:
        log = job.folder / "run" / "logs" / "7-0" / "rank-00000.log"
        log.parent.mkdir(parents=True)
        log.touch()
        os.utime(log, (1_000_000_000, 1_000_000_000))
    seconds, node, why = told_at_start(job)
    assert (int(seconds) == 1_000_000_000) == has_log
    assert (node, why) == ("-", "requeued by Slurm (preempted, or a node was lost)")
