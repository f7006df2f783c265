"""The hidden folder beside a corpus in which it grows, and the journal that lets a killed run go on.

`.NAME.tokenizing/` beside `NAME.bin` holds `job.json` (what makes the bytes: tokenizer, options, inputs),
`journal.json` (how far the inputs are read, what stands on disk, its hash), `bin` and `lengths`. A journal
entry is written, atomically, only after what it speaks of is on disk, so a kill or a power loss at any
moment leaves the last entry true. A folder without an entry is worth nothing and is removed.

Once `idx` and `json` stand there too, an entry says "complete" and the three files are renamed, the `.idx`
last; a kill between the renames is mended by the next run. One process at a time: it holds a lease
(`folder_lock.py`) beside the corpus.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_exact.data.raw_parts import Cursor
from megatron_exact.files import fsync_path, parent_folders, write_json
from megatron_exact.folder_lock import held_output, output_lease, remove_dead_lease
from megatron_exact.json_input import as_json, read_json_object

FORMAT_VERSION = 1
SUFFIXES_IN_ORDER = (".bin", ".json", ".idx")  # a corpus whose .idx is there is complete


@dataclass(frozen=True, kw_only=True)
class JournalEntry:
    """What is done and on disk."""

    input: int = 0
    """Number of the input being read."""
    cursor: Cursor = field(default_factory=Cursor)
    """How far it is read."""
    documents: int = 0
    """Documents on disk."""
    tokens: int = 0
    """Their tokens."""
    bin_sha256: str = ""
    """Hex sha256 of these tokens."""
    skipped: int = 0
    """Documents left out."""
    empty: int = 0
    """Documents without a token, left out."""
    skipped_examples: tuple[str, ...] = ()
    """The first of them."""
    counted: dict[str, int] = field(default_factory=dict)
    """How often text became one of the tokenizer's counted tokens."""
    complete: bool = False
    """All is written and waits for its final names."""


def unfinished_folder(prefix: Path) -> Path:
    """Where the corpus `prefix` grows."""
    return prefix.with_name(f".{prefix.name}.tokenizing")


def require_free_outputs(prefix: Path) -> None:
    """Raise ValueError if one of the three files of a corpus is there."""
    remove_dead_lease(output_lease(prefix))
    for suffix in (".bin", ".idx", ".json"):
        path = prefix.with_name(prefix.name + suffix)
        if path.exists() or path.is_symlink():
            raise ValueError(f"{path} exists already: remove it or choose another --output-prefix")


def kept_work(prefix: Path) -> str | None:
    """One line on what a stopped run has left, or None when it left nothing."""
    folder = unfinished_folder(prefix)
    try:
        entry = _read_entry(folder)
    except ValueError:
        return None
    if entry is None:
        return None
    return f"{entry.documents:,} documents are kept in {folder}, and the same command goes on from there"


def unfinished_job(prefix: Path) -> dict[str, Any] | None:
    """The job of a stopped run of `prefix`, or None when it left nothing."""
    folder = unfinished_folder(prefix)
    return None if _read_entry(folder) is None else _read_json(folder / "job.json")


class UnfinishedCorpus:
    """The folder, while this process holds its lock. Made by `unfinished_corpus`.

    Attributes:
        prefix: of the corpus.
        folder: its path.
        entry: the last journal entry, None before the first.
    """

    def __init__(self, prefix: Path, folder: Path, job: dict[str, Any]) -> None:
        self.prefix, self.folder = prefix, folder
        self.entry = _read_entry(folder)
        if self.entry is None:
            _empty(folder)
            require_free_outputs(prefix)
        elif not self.entry.complete:
            require_free_outputs(prefix)
            self._require_same_job(job)
        elif (folder / "job.json").exists():
            self._require_same_job(job)
        self._job = job

    def _require_same_job(self, job: dict[str, Any]) -> None:
        assert self.entry is not None
        path = self.folder / "job.json"
        saved = _read_json(path)
        now = as_json(job)
        if self.entry.skipped == 0:  # both rules give the same so far
            saved, now = ({**options, "skip_invalid": None} for options in (saved, now))
        difference = _difference(saved, now)
        if difference is not None:
            raise ValueError(
                f"{self.folder} holds {self.entry.documents:,} documents of an unfinished corpus that was "
                f"begun otherwise: {difference}; repeat the earlier command to go on, or remove that "
                "folder to start over"
            )

    def write(self, entry: JournalEntry) -> None:
        """Make `entry` the last one; what it speaks of must be on disk already."""
        if self.entry is None:
            write_json(self.folder / "job.json", self._job)
        content = {"format_version": FORMAT_VERSION, **asdict(entry)}
        write_json(self.folder / "journal.json", content)
        if self.entry is None:
            fsync_path(self.folder.parent)
        self.entry = entry

    def discard(self) -> None:
        """Forget the journal: nothing of the work is kept."""
        (self.folder / "journal.json").unlink(missing_ok=True)
        self.entry = None

    def publish(self) -> None:
        """Give `bin`, `json` and `idx` their final names, the `.idx` last, and remove the folder.

        Raises:
            ValueError: a file of that name has come from elsewhere meanwhile, or one is lost.
        """
        assert self.entry is not None
        assert self.entry.complete
        for suffix in SUFFIXES_IN_ORDER:
            source = self.folder / suffix[1:]
            target = self.prefix.with_name(self.prefix.name + suffix)
            if source.exists():
                if target.exists():
                    raise ValueError(
                        f"{target} was made by someone else while the corpus was tokenized: move it away "
                        f"and run the same command again; the finished corpus waits in {self.folder}"
                    )
                os.rename(source, target)
            elif not target.exists():
                raise ValueError(
                    f"{target} is gone, removed before the corpus was complete: remove {self.folder} and "
                    f"what is left of {self.prefix}.* and tokenize again"
                )
        fsync_path(self.folder.parent)
        for name in ("lengths", "job.json", "journal.json"):  # the journal last: it says that all is done
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def unfinished_corpus(prefix: Path, job: dict[str, Any]) -> Iterator[UnfinishedCorpus]:
    """Lock the folder of `prefix`, new or left by a stopped run of the same job.

    Args:
        prefix: of the corpus, without suffix.
        job: everything that the bytes depend on, as JSON values.

    Raises:
        ValueError: another process is at it, the outputs exist, or the folder was begun by another job.
    """
    folder = unfinished_folder(prefix)
    with (
        parent_folders(folder),
        held_output(prefix, "writing this corpus", "choose another --output-prefix"),
    ):
        folder.mkdir(exist_ok=True)
        try:
            yield UnfinishedCorpus(prefix, folder, job)
        finally:
            with contextlib.suppress(ValueError):
                if folder.exists() and _read_entry(folder) is None:
                    shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _read_entry(folder: Path) -> JournalEntry | None:
    path = folder / "journal.json"
    if not path.exists():
        return None
    content = _read_json(path)
    try:
        if content.pop("format_version") != FORMAT_VERSION:
            raise ValueError("it is of another version of this program")
        cursor = Cursor(**content.pop("cursor"))
        examples = tuple(map(str, content.pop("skipped_examples")))
        return JournalEntry(**content, cursor=cursor, skipped_examples=examples)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be used ({error}): remove {folder} to start over") from error


def _read_json(path: Path) -> dict[str, Any]:
    remedy = f"remove {path.parent} to start over"
    try:
        return read_json_object(path, remedy)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {remedy}") from error


def _difference(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first option that is not the same, in words."""
    for name in [*saved, *(name for name in now if name not in saved)]:
        before, after = saved.get(name), now.get(name)
        if before == after:
            continue
        if name == "inputs" and isinstance(before, list) and isinstance(after, list):
            if len(before) != len(after):
                return f"it had {len(before)} inputs, now there are {len(after)}"
            number = next(n for n, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
            return f"input {number + 1} was {_input(before[number])}, now it is {_input(after[number])}"
        return f"{name} was {before!r}, now it is {after!r}"
    return None


def _input(described: Any) -> str:
    if isinstance(described, dict) and {"path", "bytes", "modified_ns"} <= described.keys():
        return "{path} of {bytes:,} bytes (modified at {modified_ns} ns)".format(**described)
    return str(described)
