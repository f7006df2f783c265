"""Many input files tokenized as shards of one folder, a task a shard, on one machine or many.

`DIR/00000.{bin,idx,json}`, `DIR/00001...`: task n tokenizes its share of the inputs into shard n, by
`tokenize_corpus` with its journal, and a pack takes the folder as one source. Shares are of files, the
same on every machine and about equal in bytes. `DIR/shards.json` says what the shards are made of, so
that a second run goes on with the same job or refuses, and that a folder in which some are missing is not
taken for a whole corpus.

The engine that hands out tasks (`shard_engines`) only needs `ShardJob`, which is called with a task number.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_exact.data.corpus_inputs import FileInputs
from megatron_exact.data.corpus_record import read_corpus_record
from megatron_exact.data.documents import DEFAULT_TEXT_KEY
from megatron_exact.data.tokenize import tokenize_corpus
from megatron_exact.data.tokenize_journal import unfinished_folder
from megatron_exact.data.tokenizers import load_tokenizer
from megatron_exact.files import write_json
from megatron_exact.json_input import as_json, read_json_object

FORMAT_VERSION = 1
JOB_FILE = "shards.json"


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """One folder of shards. Called with a task number it makes that shard."""

    inputs: tuple[str, ...]
    """Absolute paths, in the order of the corpus."""
    tokenizer: str
    """Absolute path, see `load_tokenizer`."""
    output: str
    """Absolute path of the folder."""
    tasks: int
    """Shards."""
    workers_per_task: int = 1
    """Processes that tokenize in each task."""
    text_key: str = DEFAULT_TEXT_KEY
    """Field or column of the text."""
    skip_invalid: bool = False
    """See `tokenize_corpus`."""
    add_bos: bool = True
    """See `tokenize_corpus`."""
    eod_token: str | None = None
    """See `tokenize_corpus`."""
    licence: str | None = None
    """Recorded in each shard."""
    force_eod: bool = False
    """See `tokenize_corpus`."""

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        """Make shard `rank` of `world_size`; this is how datatrove calls a step of a pipeline.

        Raises:
            ValueError, OSError: see `tokenize_corpus`; or the job on disk is another one.
        """
        assert world_size == self.tasks
        check_job(self)
        prefix = shard_prefix(self.output, rank)
        if _is_complete(prefix):  # it was done when the machine failed to say so
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
        )


def shard_prefix(output: str | Path, task: int) -> Path:
    """Path of a shard, without suffix."""
    return Path(output) / f"{task:05d}"


def split_inputs(sizes: Sequence[int], tasks: int) -> list[list[int]]:
    """Numbers of the inputs of each task: the largest file goes to the lightest task, ties to the first.

    No share exceeds the mean by more than the largest file.

    Args:
        sizes: bytes of each input.
        tasks: how many shares, at most one an input.

    Returns:
        One list a task, ascending inside; every input once.

    Raises:
        ValueError: more tasks than inputs.
    """
    if not 1 <= tasks <= len(sizes):
        raise ValueError(
            f"{tasks} tasks for {len(sizes)} input files: files are not split, so at most one task a file"
        )
    shares: list[list[int]] = [[] for _ in range(tasks)]
    loads = [(0, 0, task) for task in range(tasks)]  # bytes, files, task: no share stays empty
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        load = min(range(tasks), key=loads.__getitem__)
        total, files, task = loads[load]
        loads[load] = (total + sizes[number], files + 1, task)
        shares[task].append(number)
    return [sorted(share) for share in shares]


def begin_job(job: ShardJob) -> None:
    """Check everything that can be checked before the tasks start, and write `DIR/shards.json`.

    Raises:
        ValueError, FileNotFoundError: bad inputs, tokenizer or number of tasks; or the folder holds the
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
        raise ValueError(f"{folder} holds corpora but no {JOB_FILE}: choose another output")
    write_json(folder / JOB_FILE, _description(job))


def check_job(job: ShardJob) -> None:
    """Raise ValueError unless `DIR/shards.json` is of this job."""
    path = Path(job.output) / JOB_FILE
    saved, now = _read(path), as_json(_description(job))
    for name in now:
        if saved.get(name) != now[name]:
            raise ValueError(
                f"{path} is of another job, {name} differs ({_short(saved.get(name))}, now "
                f"{_short(now[name])}): repeat the earlier command, or choose another output"
            )


def missing_shards(folder: str | Path) -> list[int]:
    """Numbers of the shards that a folder still lacks; empty for a folder without `shards.json`.

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
    """What the bytes of the shards depend on."""
    options = asdict(job)
    for name in ("output", "workers_per_task", "inputs", "licence"):
        del options[name]
    if not job.force_eod:
        del options["force_eod"]  # as in folders that were begun before there was such an option
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
