"""Tokenize many input files as shards of one folder, one task per shard, on one machine or many.

`DIR/00000.{bin,idx,json}`, `DIR/00001...`: task n tokenizes its share of the inputs into shard n, by
`tokenize_corpus` with its journal, and a pack takes the folder as one source. Shares are of files, the same
on every machine and about equal in bytes. `DIR/shards.json` describes the job, so that a second run resumes
it or stops with an error, and a folder with missing shards is not mistaken for a whole corpus.

With `--shard I/N` a process makes every N-th shard that is not complete yet (`run_share`), in a job array
of the user's own. Otherwise datatrove distributes the tasks to processes of this machine or to a SLURM job
array: it counts them, marks the finished ones (`DIR/.tasks/completions`) and skips them when the same job
is started again. Its SLURM executor writes names and paths unquoted into a batch script, and passes the job
as a pickle in its own folder (it runs `launch_pickled_pipeline` on the node). So user input is limited to
letters, digits and a few signs, and the folder must not be writable by others.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_exact.data.corpus_record import read_corpus_record
from megatron_exact.data.documents import DEFAULT_TEXT_KEY, FileInputs
from megatron_exact.data.encoding_engine import CHECK_EVERY
from megatron_exact.data.tokenize import tokenize_corpus
from megatron_exact.data.tokenize_journal import unfinished_folder
from megatron_exact.data.tokenizers import load_tokenizer
from megatron_exact.files import write_json
from megatron_exact.json_input import as_json, read_json_object
from megatron_exact.shares import Share

FORMAT_VERSION = 1
JOB_FILE = "shards.json"
SAFE_WORD = re.compile(r"[A-Za-z0-9_./@%+=:,-]+")
INSTALL = "pip install 'megatron-exact[shards]', or pip install datatrove"


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """The job that makes one folder of shards. Calling it with a task number makes that shard."""

    inputs: tuple[str, ...]
    """Absolute paths, in the order of the corpus."""
    tokenizer: str
    """Absolute path, see `load_tokenizer`."""
    output: str
    """Absolute path of the folder."""
    tasks: int
    """Number of tasks, and so of shards."""
    workers_per_task: int = 1
    """Processes that tokenize in each task."""
    text_key: str = DEFAULT_TEXT_KEY
    """Field or column of the text."""
    skip_invalid: bool = False
    """Whether invalid documents are left out, see `tokenize_corpus`."""
    add_bos: bool = True
    """Whether documents start with the tokenizer's own start, see `tokenize_corpus`."""
    eod_token: str | None = None
    """Token that ends every document; None means the tokenizer's eos."""
    licence: str | None = None
    """Licence of the text, recorded in each shard."""
    force_eod: bool = False
    """Whether `eod_token` may be an ordinary piece of text, see `load_tokenizer`."""
    engine: str = "auto"
    """Library that encodes, see `tokenize_corpus`."""
    check_every: int = CHECK_EVERY
    """One document in so many is encoded by both libraries."""

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Make shard `rank` of `world_size`; datatrove calls the steps of a pipeline like this.

        Raises:
            ValueError, OSError: see `tokenize_corpus`; or `shards.json` describes another job.
        """
        assert world_size == self.tasks
        check_job(self)
        prefix = shard_prefix(self.output, rank)
        if _is_complete(prefix):  # the machine failed after the shard and before the mark
            return
        shares = split_inputs([Path(path).stat().st_size for path in self.inputs], self.tasks)
        tokenize_corpus(
            [self.inputs[number] for number in shares[rank]],
            self.tokenizer,
            prefix,
            workers=self.workers_per_task,
            text_key=self.text_key,
            skip_invalid=self.skip_invalid,
            add_bos=self.add_bos,
            eod_token=self.eod_token,
            force_eod=self.force_eod,
            licence=self.licence,
            engine=self.engine,
            check_every=self.check_every,
        )


def shard_prefix(output: str | Path, task: int) -> Path:
    """Return the path of a shard, without suffix."""
    return Path(output) / f"{task:05d}"


def split_inputs(sizes: Sequence[int], tasks: int) -> list[list[int]]:
    """Distribute inputs: the largest remaining file goes to the lightest task, ties to the first task.

    No share exceeds the mean by more than the largest file.

    Args:
        sizes: bytes of each input.
        tasks: number of shares, at most one per input.

    Returns:
        Numbers of the inputs of each task, ascending; every input once.

    Raises:
        ValueError: more tasks than inputs.
    """
    if not 1 <= tasks <= len(sizes):
        raise ValueError(
            f"{tasks} tasks for {len(sizes)} input files: files are not split, so at most one task a file"
        )
    shares: list[list[int]] = [[] for _ in range(tasks)]
    loads = [(0, 0, task) for task in range(tasks)]  # bytes, files, task: with files no share stays empty
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        load = min(range(tasks), key=loads.__getitem__)
        total, files, task = loads[load]
        loads[load] = (total + sizes[number], files + 1, task)
        shares[task].append(number)
    return [sorted(share) for share in shares]


def begin_job(job: ShardJob) -> None:
    """Check everything that can be checked before the tasks start, and write `DIR/shards.json`.

    Raises:
        ValueError, FileNotFoundError: bad inputs, tokenizer or number of tasks; or the folder contains the
            shards of another job.
    """
    FileInputs(job.inputs, text_key=job.text_key)
    split_inputs([Path(path).stat().st_size for path in job.inputs], job.tasks)
    load_tokenizer(job.tokenizer, eod_token=job.eod_token, add_bos=job.add_bos, force_eod=job.force_eod)
    folder = Path(job.output)
    if (folder / JOB_FILE).exists():
        check_job(job)
        return
    if folder.exists() and any(folder.glob("*.idx")):
        raise ValueError(f"{folder} contains corpora but no {JOB_FILE}: choose another output")
    write_json(folder / JOB_FILE, _description(job))


def check_job(job: ShardJob) -> None:
    """Raise ValueError unless `DIR/shards.json` describes this job."""
    path = Path(job.output) / JOB_FILE
    saved, now = _read(path), as_json(_description(job))
    for name in now:
        if saved.get(name) != now[name]:
            raise ValueError(
                f"{path} describes another job, {name} differs ({_short(saved.get(name))}, now "
                f"{_short(now[name])}): repeat the earlier command, or choose another output"
            )


def missing_shards(folder: str | Path) -> list[int]:
    """Return the numbers of missing shards of a folder; empty for a folder without `shards.json`.

    Raises:
        ValueError: `shards.json` is damaged.
    """
    path = Path(folder) / JOB_FILE
    if not path.exists():
        return []
    tasks = _read(path).get("tasks")
    if not isinstance(tasks, int):
        raise ValueError(f"{path} says tasks {tasks!r}: it was edited, restore it")
    return [task for task in range(tasks) if not _is_complete(shard_prefix(folder, task))]


def _is_complete(prefix: Path) -> bool:
    paths = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx", ".json")]
    if not all(path.exists() for path in paths) or unfinished_folder(prefix).exists():
        return False
    return read_corpus_record(prefix) is not None


def _description(job: ShardJob) -> dict[str, Any]:
    """Describe what the bytes of the shards depend on."""
    options = asdict(job)
    for name in ("output", "workers_per_task", "inputs", "licence", "engine", "check_every"):
        del options[name]
    if not job.force_eod:
        del options["force_eod"]  # as in older folders, made before this option existed
    files = [
        {
            "path": os.path.abspath(path),
            "bytes": os.stat(path).st_size,
            "modified_ns": os.stat(path).st_mtime_ns,
        }
        for path in job.inputs
    ]
    return {"format_version": FORMAT_VERSION, **options, "inputs": files}


def _read(path: Path) -> dict[str, Any]:
    remedy = "start with an empty output folder"
    try:
        return read_json_object(path, remedy)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {remedy}") from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """Options for sbatch."""

    partition: str
    """Partition to run in."""
    time: str
    """Time limit of one task, in SLURM's notation."""
    qos: str | None = None
    """Quality of service; None for SLURM's default."""
    account: str | None = None
    """Account to charge; None for SLURM's default."""
    memory_gb_per_cpu: int = 2
    """Memory per core, GB."""
    job_name: str = "tokenize"
    """Name of the job array."""

    def __post_init__(self) -> None:
        for name in ("partition", "time", "qos", "account", "job_name"):
            value = getattr(self, name)
            if value is not None:
                require_safe_word(value, f"--slurm-{name.replace('_', '-')}")


def require_safe_word(word: str, what: str) -> None:
    """Raise ValueError unless a shell reads a word literally."""
    if not SAFE_WORD.fullmatch(word):
        raise ValueError(
            f"{what} {word!r} would go into a batch script: use only letters, digits and _./@%+=:,-"
        )


def require_datatrove() -> None:
    """Raise ValueError with what to install unless datatrove is installed."""
    try:
        import datatrove  # noqa: F401
    except ImportError as error:
        raise ValueError(f"tokenizing shards needs the package datatrove: {INSTALL}") from error


def tasks_folder(job: ShardJob) -> Path:
    """Return the folder of datatrove's logs, completions and SLURM script."""
    return Path(job.output) / ".tasks"


def _forget_lost_shards(job: ShardJob) -> None:
    """Unmark tasks whose shard is not complete; otherwise datatrove would never make a removed shard."""
    for task in missing_shards(job.output):
        (tasks_folder(job) / "completions" / f"{task:05d}").unlink(missing_ok=True)


def run_share(job: ShardJob, share: Share) -> None:
    """Make the shards of a share that are not whole, one after the other; needs no datatrove.

    Raises:
        ValueError, OSError: what a task raised.
    """
    for task in missing_shards(job.output):
        if share.has(task):
            job(None, task, job.tasks)


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
    """Submit one job array with a task per shard, at most `workers` of them at a time.

    Returns:
        The batch script that was submitted.

    Raises:
        ValueError: datatrove is not installed, a path has signs with a meaning in a shell, the folder is
            writable by others, or sbatch fails.
    """
    require_datatrove()
    from datatrove.executor import SlurmPipelineExecutor

    folder = tasks_folder(job)
    activate = Path(sys.prefix) / "bin" / "activate"
    for path in (folder, activate):
        require_safe_word(str(path), "the path")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = os.stat(folder)
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"{folder} can be written by others, and tasks load what lies there: chmod go-w it, or choose "
            "another output"
        )
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
    except Exception as error:  # sbatch failed and has printed why
        raise ValueError(f"the job was not submitted ({type(error).__name__}: {error})") from error
    return folder / "launch_script.slurm"
