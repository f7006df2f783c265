"""Runs of `tokenize_corpus` that kill themselves at a chosen step, and what they read and leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from tiny_tokenizers import SENTENCES

from megatron_exact.data.indexed import GrowingCorpus
from megatron_exact.data.tokenize import tokenize_corpus

OPTIONS = {"batch_bytes": 400, "journal_bytes": 600, "skip_invalid": True}
SUFFIXES = (".bin", ".idx", ".json")
# A child does its work in one thread and leaves by os._exit; Arrow's threads know of forks.
FORK_WARNING = "ignore:This process .* is multi-threaded:DeprecationWarning"


def write_inputs(folder: Path) -> list[Path]:
    """Every way of finding a place again: an offset, decompressed lines, rows, whole files."""
    texts = [f"{number} " + "".join(SENTENCES[: number % 4]) for number in range(40)]
    lines = "".join(json.dumps({"text": text}) + "\n\n" * (len(text) % 2) for text in texts)
    (folder / "a.jsonl").write_text(lines + "bad\n" + json.dumps({"text": "an end without newline"}))
    (folder / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    rows = [*texts, None, "", *texts[:20]]
    pq.write_table(pa.table({"text": rows}), folder / "c.parquet", row_group_size=7)
    (folder / "d.txt").write_text("".join(SENTENCES[:9]))
    return sorted(folder.iterdir())


def contents(prefix: Path) -> list[bytes]:
    """The three files; in the record, the tokenizer's path relative to it made absolute."""
    bin_, idx, record = (prefix.with_name(prefix.name + suffix).read_bytes() for suffix in SUFFIXES)
    path = json.loads(record)["tokenizer"]["path"]
    return [bin_, idx, record.replace(path.encode(), os.path.abspath(prefix.parent / path).encode())]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def in_child(work: Callable[[], object]) -> int:
    """Exit status of a forked process that does `work`; -9 if it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killing_at(moment: int, after: bool) -> Callable[[], None]:
    """Make this process kill itself before (or after) its nth step that the disk could see."""
    steps = 0

    def watch(module: object, name: str) -> None:
        real = getattr(module, name)

        def step(*arguments: object, **options: object) -> object:
            nonlocal steps
            steps += 1
            is_last = steps == moment  # steps lie inside of steps
            if is_last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*arguments, **options)
            finally:
                if is_last and after:
                    os.kill(os.getpid(), signal.SIGKILL)

        setattr(module, name, step)

    def install() -> None:
        for name in ("fsync", "replace", "rename", "mkdir", "open", "unlink", "rmdir"):
            watch(os, name)
        watch(GrowingCorpus, "add")
        watch(GrowingCorpus, "sync")

    return install


def run_and_die(inputs: list[Path], spm: Path, prefix: Path, moment: int, *, after: bool) -> int:
    def work() -> None:
        killing_at(moment, after)()
        tokenize_corpus(inputs, spm, prefix, **OPTIONS)

    return in_child(work)
