"""What an interrupted tokenizing job resumes from: the growing corpus and its journal.

`.NAME.tokenizing/` beside `NAME.bin` contains `job.json` (what makes the bytes: tokenizer, options,
inputs), `journal.json` (how far the inputs are read, what is on disk, its hash), `bin` (tokens) and
`lengths` (int32, one a document). A journal entry is written, atomically, only after what it speaks of is
on disk, so a kill or a power loss at any moment leaves the last entry true. On resuming, everything beyond
the last entry is cut off and the rest is hashed again. A folder without an entry is worth nothing and is
removed. Memory does not grow with the number of documents: the index is written from the file of lengths.

Once `idx` and `json` are there too, an entry says "complete" and the three files are renamed, the `.idx`
last; a kill between the renames is mended by the next run. One process at a time: it has a lease
(`folder_lock.py`) beside the corpus.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.corpus_guard import BlockHasher
from megatron_exact.data.documents import Cursor
from megatron_exact.data.indexed import index_blocks
from megatron_exact.files import fsync_path, parent_folders, write_json
from megatron_exact.folder_lock import held_output, output_lease, remove_dead_lease
from megatron_exact.json_input import as_json, read_json_object

BLOCK_BYTES = 4 << 20  # a multiple of every item size
WRITE_BUFFER_BYTES = 1 << 20
FORMAT_VERSION = 1
SUFFIXES_IN_ORDER = (".bin", ".json", ".idx")  # a corpus whose .idx is there is complete


@dataclass(frozen=True, kw_only=True)
class CorpusTotals:
    """What has been appended."""

    documents: int = 0
    """Documents."""
    tokens: int = 0
    """Their tokens."""
    bin_digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    """sha256 of the tokens' bytes; copied, never updated in place."""
    largest_id: int = -1
    """Largest token id so far, -1 before the first."""
    bin_blocks: BlockHasher = field(default_factory=BlockHasher)
    """sha256 of each block of the bytes so far."""


class GrowingCorpus:
    """Append-only tokens and lengths in a folder.

    Args:
        folder: contains `bin` (tokens of `dtype`) and `lengths` (int32, one a document); made if missing.
        dtype: of the stored token ids.

    Attributes:
        totals: what `add` has appended; replaced as a whole, so that an interrupt finds it consistent.
    """

    def __init__(self, folder: Path, dtype: np.dtype[np.integer]) -> None:
        self.dtype = dtype
        self.bin_path, self._lengths_path = folder / "bin", folder / "lengths"
        self.totals = CorpusTotals()
        with contextlib.ExitStack() as stack:
            self._bin = stack.enter_context(_open(self.bin_path))
            self._lengths = stack.enter_context(_open(self._lengths_path))
            self._files = stack.pop_all()

    def restore(
        self, documents: int, tokens: int, bin_sha256: str, on_bytes: Callable[[int], object]
    ) -> None:
        """Cut both files to what the journal says, and verify that it is still there.

        Args:
            documents, tokens, bin_sha256: of the journal.
            on_bytes: called with the number of bytes after each block.

        Raises:
            ValueError: less or other bytes than the journal says.
        """
        damaged = ValueError(
            f"{self.bin_path.parent} does not hold the {documents:,} documents of {tokens:,} tokens of its "
            "journal: the disk lost something, remove that folder to start over"
        )
        for stream, size in ((self._bin, tokens * self.dtype.itemsize), (self._lengths, documents * 4)):
            if os.fstat(stream.fileno()).st_size < size:
                raise damaged
            stream.truncate(size)
        digest, blocks = hashlib.sha256(), BlockHasher()
        largest = -1
        for block in _blocks(self._bin):
            digest.update(block)
            blocks.update(block)
            if len(block) % self.dtype.itemsize == 0:
                largest = max(largest, int(np.frombuffer(block, self.dtype).max()))
            on_bytes(len(block))
        summed = sum(int(lengths.sum(dtype=np.int64)) for lengths in self._length_blocks())
        if digest.hexdigest() != bin_sha256 or summed != tokens:
            raise damaged
        for stream in (self._bin, self._lengths):
            stream.seek(0, os.SEEK_END)
        self.totals = CorpusTotals(
            documents=documents,
            tokens=tokens,
            bin_digest=digest,
            bin_blocks=blocks,
            largest_id=largest,
        )

    def add(self, ids: NDArray[np.integer], lengths: NDArray[np.int32]) -> None:
        """Append documents: [tokens] of `dtype` back to back, and [documents] how many each has."""
        self._bin.write(np.ascontiguousarray(ids, self.dtype))
        self._lengths.write(np.ascontiguousarray(lengths, np.int32))
        digest, blocks = self.totals.bin_digest.copy(), self.totals.bin_blocks.copy()
        digest.update(np.ascontiguousarray(ids, self.dtype))
        blocks.update(np.ascontiguousarray(ids, self.dtype).data)
        self.totals = CorpusTotals(
            documents=self.totals.documents + len(lengths),
            tokens=self.totals.tokens + len(ids),
            bin_digest=digest,
            bin_blocks=blocks,
            largest_id=max(self.totals.largest_id, int(ids.max())) if len(ids) else self.totals.largest_id,
        )

    def sync(self) -> None:
        """Everything that was appended is on disk when this returns."""
        for stream in (self._bin, self._lengths):
            stream.flush()
            os.fsync(stream.fileno())

    def write_index(self, path: Path) -> str:
        """Write the `.idx` to `path`, flushed to disk; returns its hex sha256."""
        self._lengths.flush()
        count = self.totals.documents
        digest = hashlib.sha256()
        with open(path, "wb", buffering=WRITE_BUFFER_BYTES) as stream:
            for block in index_blocks(self.dtype, count, self._length_blocks):
                stream.write(block)
                digest.update(block)
            stream.flush()
            os.fsync(stream.fileno())
        return digest.hexdigest()

    def _length_blocks(self) -> Iterator[NDArray[np.int32]]:
        for block in _blocks(self._lengths):
            yield np.frombuffer(block, np.int32)

    def close(self) -> None:
        """Close both files, whatever is still in their buffers."""
        with contextlib.suppress(OSError):  # the disk is full: that error was raised by `add` already
            self._files.close()


def _open(path: Path) -> BinaryIO:
    path.touch()
    return open(path, "r+b", buffering=WRITE_BUFFER_BYTES)


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    stream.seek(0)
    while block := stream.read(BLOCK_BYTES):
        yield block


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
    """The folder, while this process has its lock. Made by `unfinished_corpus`.

    Attributes:
        prefix: of the corpus.
        folder: its path.
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
