"""Chains of stages as jobs of SLURM; `tests/slurm` submits them to a real one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from stage_runs import save_checkpoint

from megatron_exact.training.stages import StageRun, job_name, submit_chain


class Queue:
    """Stands in for sbatch, squeue and scancel."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.states: dict[str, str] = {}
        self.submitted: list[tuple[list[str], dict[str, str]]] = []
        self.cancelled: list[str] = []

    def __call__(self, command: Sequence[str], variables: Mapping[str, str]) -> str:
        words = {word.split("=")[0]: word.partition("=")[2] for word in command}
        if command[0] == "squeue":
            number = self.jobs.get(words["--name"], "")
            return f"{number}|{self.states.get(number, 'RUNNING|None')}\n" if number else ""
        if command[0] == "scancel":
            self.cancelled.append(command[1])
            return ""
        assert command[0] == "sbatch"
        self.submitted.append((list(command), dict(variables)))
        number = str(100 + len(self.submitted))
        self.jobs[words["--job-name"]] = number
        return f"{number};cluster\n"


def option(command: Sequence[str], name: str) -> str | None:
    return next((word.partition("=")[2] for word in command if word.startswith(name + "=")), None)


def test_each_run_waits_for_the_one_it_starts_from(runs: list[StageRun]) -> None:
    queue = Queue()
    submissions = submit_chain(runs, ["--partition=gpu"], 2, call=queue)
    assert [(item.job, item.is_new) for item in submissions] == [
        (str(number), True) for number in range(101, 105)
    ]
    assert submissions[2].describe() == "128 none: submitted as job 103"
    commands = [command for command, _ in queue.submitted]
    assert [option(command, "--dependency") for command in commands] == [
        None,
        None,
        "afterok:101",  # none on none
        "afterok:102",  # exact on exact
    ]
    assert all("--kill-on-invalid-dep=yes" in command for command in commands[2:])
    for (command, variables), run in zip(queue.submitted, runs, strict=True):
        position = command.index("examples/slurm/train.sbatch")
        assert command[position + 1 :] == list(run.arguments)
        assert "--partition=gpu" in command[:position]
        assert variables == {"RUN_DIR": str(run.folder), "GPUS_PER_NODE": "2"}


def test_a_second_call_leaves_alone_what_is_finished_or_in_the_queue(
    runs: list[StageRun],
) -> None:
    queue = Queue()
    submit_chain(runs[:2], (), 2, call=queue)
    save_checkpoint(runs[0].folder, 10)
    queue.jobs[job_name(runs[0])] = ""  # ended
    queue.submitted.clear()
    submissions = submit_chain(runs, (), 2, call=queue)
    assert [item.describe().split(": ")[1] for item in submissions] == [
        "finished",
        "is in the queue as job 102",
        "submitted as job 101",
        "submitted as job 102",
    ]
    assert [option(command, "--dependency") for command, _ in queue.submitted] == [None, "afterok:102"]


def add_start(run: StageRun, job: str, line: str) -> None:
    logs = run.folder / "logs" / f"{job}-0"
    logs.mkdir(parents=True)
    (logs / "last_line").write_text(line + "\n")


def test_after_a_stage_that_failed_the_same_call_submits_what_is_missing(runs: list[StageRun]) -> None:
    """SLURM has ended the first arm's job; its dependent is gone, about to go, or was not looked at yet."""
    queue = Queue()
    submit_chain(runs, (), 2, call=queue)
    for reason in ("gone", "PENDING|DependencyNeverSatisfied", "PENDING|Dependency"):
        earlier = len(queue.submitted)
        first = queue.jobs.pop(job_name(runs[0]))
        waiting = queue.jobs[job_name(runs[2])]
        add_start(runs[0], first, "not restarted: NaN")
        if reason == "gone":
            del queue.jobs[job_name(runs[2])]
        else:
            queue.states[waiting] = reason
        queue.cancelled.clear()
        submissions = submit_chain(runs, (), 2, call=queue)
        assert [item.is_new for item in submissions] == [True, False, True, False]
        assert submissions[0].describe().endswith(f"(job {first} has ended: not restarted: NaN)")
        assert queue.cancelled == ([waiting] if reason == "PENDING|Dependency" else [])
        if reason != "PENDING|Dependency":
            assert f"(job {waiting} has ended: job {waiting} waits for" in submissions[2].describe()
        after = [option(command, "--dependency") for command, _ in queue.submitted[earlier:]]
        assert after == [None, f"afterok:{submissions[0].job}"]


@pytest.mark.parametrize("becomes", ["gone", "PENDING|BeginTime", "COMPLETING|None"])
def test_a_job_that_is_ending_is_waited_for(
    runs: list[StageRun], becomes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be over or start again; squeue calls it COMPLETING in both cases."""
    queue = Queue()
    submit_chain(runs[:1], (), 2, call=queue)
    queue.states["101"] = "COMPLETING|None"
    add_start(runs[0], "101", "not restarted: NaN")
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3 and becomes == "gone":
            queue.jobs.clear()
        elif len(looks) == 3:
            queue.states["101"] = becomes

    monkeypatch.setattr("megatron_exact.training.stages.time.sleep", sleep)
    if becomes == "COMPLETING|None":
        with pytest.raises(ValueError, match=r"64 none: job 101 is still ending .* run the same"):
            submit_chain(runs[:1], (), 2, call=queue)
        return
    (submission,) = submit_chain(runs[:1], (), 2, call=queue)
    assert len(looks) == 3
    assert capsys.readouterr().out == "64 none: job 101 is ending, waiting for it\n"
    assert submission.is_new == (becomes == "gone")
    assert submission.describe().endswith(
        "(job 101 has ended: not restarted: NaN)" if submission.is_new else "is in the queue as job 101"
    )


@pytest.mark.parametrize(
    "option",
    ["--dependency=afterok:77", "--dep=afterok:77", "-dafterok:77", "-d", "--job-name=mine", "-J"],
)
def test_options_that_would_unchain_the_jobs_are_refused(runs: list[StageRun], option: str) -> None:
    """sbatch takes the last of two options: the chain's own would be lost."""
    queue = Queue()
    with pytest.raises(ValueError, match=rf"--sbatch {option}: the chain sets --(dependency|job-name) of"):
        submit_chain(runs, ["--partition=gpu", option], 2, call=queue)
    assert queue.submitted == []


@pytest.mark.parametrize("flag", ["--exit-interval", "--exit-duration-in-mins"])
def test_a_stage_that_others_wait_for_may_not_pause(runs: list[StageRun], flag: str) -> None:
    """Its job would end with 0, and `afterok` be satisfied, before its last iteration."""
    pausing = [replace(run, arguments=(*run.arguments, flag, "5")) for run in runs]
    queue = Queue()
    with pytest.raises(ValueError, match=f"{flag}: 64 none would end before its last iteration"):
        submit_chain(pausing, ["--deadline=now+1day", "--partition=d"], 2, call=queue)
    assert queue.submitted == []
    last = [run for run in pausing if run.stage == "128"]  # nobody waits for these
    assert [item.is_new for item in submit_chain(last, (), 2, call=queue)] == [True, True]


def test_what_cannot_be_submitted(
    runs: list[StageRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="--nproc-per-node is missing"):
        submit_chain(runs, call=Queue())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="squeue is not there: submit on a machine of the SLURM cluster"):
        submit_chain(runs, (), 2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"train\.sbatch is not here: submit from the checkout"):
        submit_chain(runs, (), 2, call=Queue())
