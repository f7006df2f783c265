"""The journal from which an interrupted tokenizing job resumes.

`.NAME.tokenizing/` beside `NAME.bin` contains `job.json` (what the bytes depend on: tokenizer, options,
inputs), `journal.json` (how far the inputs are read, what is on disk, its hash) and the files of a
`GrowingCorpus`. A journal entry is written, atomically, only after what it describes is on disk, so that
the last entry is true after a kill or a power loss at any moment. On resuming, everything beyond the last
entry is cut off and the rest is hashed again. A folder without an entry is of no use and is removed.

Once `idx` and `json` are written too, an entry says "complete" and the three files are renamed, the `.idx`
last; after a kill between the renames the next run finishes them. Only one process may work on a corpus: it
holds a lease (`folder_lock.py`) beside it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_exact.data.documents import Cursor
from megatron_exact.files import fsync_path, parent_folders, write_json
from megatron_exact.folder_lock import held_output, output_lease, remove_dead_lease
from megatron_exact.json_input import as_json, read_json_object

FORMAT_VERSION = 1
SUFFIXES_IN_ORDER = (".bin", ".json", ".idx")  # a corpus whose .idx is there is complete


@dataclass(frozen=True, kw_only=True)
class JournalEntry:
    """What has been done and is on disk."""

    input: int = 0
    """Number of the input that is being read."""
    cursor: Cursor = field(default_factory=Cursor)
    """How far that input is read."""
    documents: int = 0
    """Documents on disk."""
    tokens: int = 0
    """Tokens on disk."""
    bin_sha256: str = ""
    """Hex sha256 of the tokens on disk."""
    skipped: int = 0
    """Invalid documents left out."""
    empty: int = 0
    """Documents left out because they have no token."""
    skipped_examples: tuple[str, ...] = ()
    """Messages about the first skipped documents."""
    counted: dict[str, int] = field(default_factory=dict)
    """How often text became one of the tokenizer's counted tokens."""
    complete: bool = False
    """Whether all files are written and only wait for their final names."""


def unfinished_folder(prefix: Path) -> Path:
    """Return the folder in which the corpus `prefix` grows."""
    return prefix.with_name(f".{prefix.name}.tokenizing")


def require_free_outputs(prefix: Path) -> None:
    """Raise ValueError if one of the three files of a corpus exists."""
    remove_dead_lease(output_lease(prefix))
    for suffix in (".bin", ".idx", ".json"):
        path = prefix.with_name(prefix.name + suffix)
        if path.exists() or path.is_symlink():
            raise ValueError(f"{path} exists already: remove it or choose another --output-prefix")


def kept_work(prefix: Path) -> str | None:
    """Return one line about what an interrupted run has left, or None if it left nothing."""
    folder = unfinished_folder(prefix)
    try:
        entry = _read_entry(folder)
    except ValueError:
        return None
    if entry is None:
        return None
    return f"{entry.documents:,} documents are kept in {folder}, and the same command resumes from there"


def unfinished_job(prefix: Path) -> dict[str, Any] | None:
    """Return the job of an interrupted run of `prefix`, or None if it left nothing."""
    folder = unfinished_folder(prefix)
    return None if _read_entry(folder) is None else _read_json(folder / "job.json")


class UnfinishedCorpus:
    """The folder of an unfinished corpus, locked by this process. Made by `unfinished_corpus`.

    Attributes:
        prefix: prefix of the corpus.
        folder: path of the folder.
        entry: the last journal entry, None before the first.
    """

    def __init__(self, prefix: Path, folder: Path, job: dict[str, Any]) -> None:
        self.prefix, self.folder = prefix, folder
        self.entry = _read_entry(folder)
        if self.entry is None:
            for kept in folder.iterdir():
                shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
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
        if self.entry.skipped == 0:  # with and without --skip-invalid the result is the same so far
            saved, now = ({**options, "skip_invalid": None} for options in (saved, now))
        difference = _difference(saved, now)
        if difference is not None:
            raise ValueError(
                f"{self.folder} contains {self.entry.documents:,} documents of an unfinished corpus that "
                f"was begun with other options: {difference}; repeat the earlier command to resume it, or "
                "remove that folder to start over"
            )

    def write(self, entry: JournalEntry) -> None:
        """Make `entry` the last one; what it describes must be on disk already."""
        if self.entry is None:
            write_json(self.folder / "job.json", self._job)
        content = {"format_version": FORMAT_VERSION, **asdict(entry)}
        write_json(self.folder / "journal.json", content)
        if self.entry is None:
            fsync_path(self.folder.parent)
        self.entry = entry

    def discard(self) -> None:
        """Remove the journal, so that nothing of the work is kept."""
        (self.folder / "journal.json").unlink(missing_ok=True)
        self.entry = None

    def publish(self) -> None:
        """Give `bin`, `json` and `idx` their final names, the `.idx` last, and remove the folder.

        Raises:
            ValueError: meanwhile somebody else made a file of that name, or one was lost.
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
        prefix: path of the corpus without suffix.
        job: everything that the bytes depend on, as JSON values.

    Raises:
        ValueError: another process writes this corpus, the outputs exist, or the folder was begun by
            another job.
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
    """Describe the first option that differs."""
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
