"""Hand out the tasks of a `ShardJob` through datatrove: processes of this machine, or a SLURM job array.

datatrove counts tasks, marks the finished ones (`DIR/.tasks/completions`) and skips them when the same job
is started again; inside a task `tokenize_corpus` goes on from its own journal.

Its SLURM executor writes names and paths into a batch script as they are, and hands the job over as a
pickle in its own folder (it runs `launch_pickled_pipeline` on the node). So every word that comes from the
user is held to letters, digits and a few signs here, and the folder must not be writable by others.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_exact.data.shard_job import ShardJob, missing_shards

SAFE_WORD = re.compile(r"[A-Za-z0-9_./@%+=:,-]+")
INSTALL = "pip install 'megatron-exact[shards]', or pip install datatrove"


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """Words for sbatch."""

    partition: str
    """Partition to run in."""
    time: str
    """Limit of one task, as SLURM writes times."""
    qos: str | None = None
    """Quality of service; None asks for none."""
    account: str | None = None
    """Account to charge."""
    memory_gb_per_cpu: int = 2
    """Memory a core, GB."""
    job_name: str = "tokenize"
    """Name of the job array."""

    def __post_init__(self) -> None:
        for name in ("partition", "time", "qos", "account", "job_name"):
            value = getattr(self, name)
            if value is not None:
                require_safe_word(value, f"--slurm-{name.replace('_', '-')}")


def require_safe_word(word: str, what: str) -> None:
    """Raise ValueError unless a word means only itself in a shell."""
    if not SAFE_WORD.fullmatch(word):
        raise ValueError(
            f"{what} {word!r} would go into a batch script: use only letters, digits and _./@%+=:,-"
        )


def require_datatrove() -> None:
    """Raise ValueError with what to install unless datatrove is there."""
    try:
        import datatrove  # noqa: F401
    except ImportError as error:
        raise ValueError(f"tokenizing shards needs the package datatrove: {INSTALL}") from error


def tasks_folder(job: ShardJob) -> Path:
    """Where datatrove keeps logs, completions and its SLURM script."""
    return Path(job.output) / ".tasks"


def _forget_lost_shards(job: ShardJob) -> None:
    """Unmark tasks whose shard is not whole: datatrove would skip them for ever if one was removed."""
    for task in missing_shards(job.output):
        (tasks_folder(job) / "completions" / f"{task:05d}").unlink(missing_ok=True)


def run_local(job: ShardJob, workers: int) -> None:
    """Run all unfinished tasks as processes of this machine, `workers` at a time; wait for them.

    Raises:
        ValueError: datatrove is not installed.
        Exception: what a task raised.
    """
    require_datatrove()
    from datatrove.executor import LocalPipelineExecutor

    _forget_lost_shards(job)
    LocalPipelineExecutor(
        pipeline=[job],
        tasks=job.tasks,
        workers=min(workers, job.tasks),
        logging_dir=str(tasks_folder(job)),
        start_method="spawn",
    ).run()


def submit_slurm(job: ShardJob, workers: int, options: SlurmOptions) -> Path:
    """Submit one job array, a task a shard and at most `workers` of them at a time.

    Returns:
        The batch script that was submitted.

    Raises:
        ValueError: datatrove is not installed, a path has signs that a shell would read, the folder is
            writable by others, or sbatch refuses.
    """
    require_datatrove()
    from datatrove.executor import SlurmPipelineExecutor

    folder = tasks_folder(job)
    activate = Path(sys.prefix) / "bin" / "activate"
    for path in (folder, activate):
        require_safe_word(str(path), "the path")
    _make_private(folder)
    _forget_lost_shards(job)
    executor = SlurmPipelineExecutor(
        pipeline=[job],
        tasks=job.tasks,
        workers=min(workers, job.tasks),
        time=options.time,
        partition=options.partition,
        cpus_per_task=job.workers_per_task,
        mem_per_cpu_gb=options.memory_gb_per_cpu,
        qos=options.qos or "",
        job_name=options.job_name,
        sbatch_args={} if options.account is None else {"account": options.account},
        logging_dir=str(folder),
        venv_path=str(activate) if activate.exists() else None,
        mail_type="NONE",
    )
    try:
        executor.run()
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename} was not found: submit from a machine that has SLURM's commands"
        ) from error
    except Exception as error:  # sbatch's own refusal, which it has printed
        raise ValueError(f"the job was not submitted ({type(error).__name__}: {error})") from error
    return folder / "launch_script.slurm"


def _make_private(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = os.stat(folder)
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"{folder} can be written by others, and tasks load what lies there: chmod go-w it, or choose "
            "another output"
        )
