"""Submit a plan of stages to SLURM: one job a run, each after the run that it starts from.

The jobs are `examples/slurm/train.sbatch`, which requeues itself until its run is finished; a run that
fails takes the runs after it out of the queue. Called again, what is finished is skipped and what waits or
runs is left alone.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_exact.training.stages.plan import StageRun

SCRIPT = Path("examples/slurm/train.sbatch")
Call = Callable[[Sequence[str], Mapping[str, str]], str]
"""Runs a command with these environment variables added; returns what it prints."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What became of one run."""

    run: StageRun
    """Of the plan."""
    job: str | None
    """Number of its job; None where the run is finished."""
    is_new: bool
    """Whether the job was submitted now."""

    def describe(self) -> str:
        """One line for a terminal."""
        if self.job is None:
            return f"{self.run.name}: finished"
        verb = "submitted as" if self.is_new else "is in the queue as"
        return f"{self.run.name}: {verb} job {self.job}"


def job_name(run: StageRun) -> str:
    """The same for every call with the same folder, and for no other folder."""
    digest = hashlib.sha256(str(run.folder.resolve()).encode()).hexdigest()[:8]
    return f"{run.stage}-{run.arm}-{digest}"


def submit_chain(
    runs: Sequence[StageRun],
    options: Sequence[str] = (),
    processes: int | None = None,
    *,
    call: Call | None = None,
) -> list[Submission]:
    """Submit what is neither finished nor in the queue.

    Args:
        runs: from `plan_chain`.
        options: for every `sbatch`, such as a partition and a time limit.
        processes: ranks a node, if not the recipe's number of GPUs.
        call: runs a command (default: a child process).

    Raises:
        ValueError: the script is not there, no number of ranks, or a command of SLURM that failed.
    """
    if not SCRIPT.is_file():
        raise ValueError(f"{SCRIPT} is not here: submit from the checkout, whose folder the jobs run in")
    run_command = call or _call
    jobs: dict[Path, str] = {}
    submissions = []
    for run in runs:
        job: str | None = None
        is_new = False
        if not run.is_finished():
            job = _queued(run, run_command)
            is_new = job is None
            job = job or _submit(run, options, processes, jobs.get(run.previous or Path()), run_command)
            jobs[run.folder] = job
        submissions.append(Submission(run=run, job=job, is_new=is_new))
    return submissions


def _queued(run: StageRun, call: Call) -> str | None:
    """Number of the job of this run that waits or runs."""
    found = call(["squeue", "--noheader", "--me", "--format=%A", f"--name={job_name(run)}"], {})
    return found.split()[0] if found.split() else None


def _submit(
    run: StageRun, options: Sequence[str], processes: int | None, after: str | None, call: Call
) -> str:
    ranks = processes or run.gpus_per_node
    if ranks is None:
        raise ValueError("--nproc-per-node is missing: say how many processes a node has")
    logs = run.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = ["sbatch", "--parsable", f"--job-name={job_name(run)}", f"--nodes={run.nodes or 1}"]
    command += [f"--output={logs}/%x-%j.out"]
    if after is not None:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    variables = {"RUN_DIR": str(run.folder), "GPUS_PER_NODE": str(ranks)}
    printed = call([*command, *options, str(SCRIPT), *run.arguments], variables)
    return printed.strip().split(";")[0]


def _call(command: Sequence[str], variables: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ValueError(f"{command[0]} is not there: submit on a machine of the SLURM cluster") from error
    if done.returncode:
        raise ValueError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout
