"""Writes that either happen whole or leave no trace, and hashes of files.

A file is written beside its target, flushed to disk and renamed; a folder is built under a hidden
name beside its target and renamed once every file in it is on disk. A process that is killed leaves
at most a `.NAME.partial-PID-TOKEN` beside the target, which nothing opens and the next writer removes.

A writer holds a lock (flock) on what it builds; the kernel releases it with the process. Process ids do not
identify a writer: in a container every writer may be number 1. Where the file system has no such locks, the
partials of a killed writer stay, and the random token keeps their names from colliding with the next one's.

Two writers of one folder might both work for hours, one of them in vain. A lease (`folder_lock.py`)
therefore stops the second one when it begins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_exact.folder_lock import held_output, output_lease, remove_dead_lease

HASH_BLOCK_BYTES = 4 << 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that only a write can cause: no space, no quota, a limit on the size of a file."""


def partial_path(path: Path) -> Path:
    """Return a new hidden name under which this process builds `path`."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")


def fsync_path(path: Path) -> None:
    """Flush one file, or the entries of one folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; on success flush it and rename it to `path`, on failure remove it.

    The temporary path is an empty file already: write into it, do not replace it. Parent folders are
    made, and removed again on failure.
    """
    path = Path(path)
    with parent_folders(path):
        remove_stale_partials(path)
        with _locked_partial(path, is_folder=False) as temporary:
            yield temporary
            fsync_path(temporary)
            os.replace(temporary, path)
            fsync_path(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically. Non-finite floats raise ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a hidden folder; on success flush everything in it and rename it to `path`.

    Raises:
        ValueError: `path` exists already and is not an empty folder, or another process is making it.
    """
    path = Path(path)
    require_free_folder(path)
    with parent_folders(path), held_output(path, "writing it"):
        remove_stale_partials(path)
        with _locked_partial(path, is_folder=True) as temporary:
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    fsync_path(Path(folder) / name)
                fsync_path(Path(folder))
            try:
                os.rename(temporary, path)  # replaces an empty folder, refuses any other
            except OSError as error:
                raise ValueError(
                    f"{path} was created by someone else meanwhile ({error.strerror}); "
                    "nothing was written: choose another output"
                ) from error
            fsync_path(path.parent)


@contextlib.contextmanager
def parent_folders(path: Path) -> Iterator[None]:
    """Create the folders above `path`; on failure remove those that were created, if they are empty."""
    made = [folder for folder in path.parents if not folder.exists()]  # deepest first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # not made, or in use by now
                folder.rmdir()
        raise


@contextlib.contextmanager
def _locked_partial(path: Path, *, is_folder: bool) -> Iterator[Path]:
    """Yield an empty, locked partial of `path`; remove it at the end if it still exists."""
    temporary, descriptor = _create_partial(path, is_folder=is_folder)
    try:
        yield temporary
    except OSError as error:
        _name_target(error, path, temporary)
        raise
    finally:
        _remove(temporary)
        os.close(descriptor)


def _name_target(error: OSError, path: Path, temporary: Path) -> None:
    """Let an error name `path`: a failed `write` names no file, and the hidden one is about to be removed.

    Other errors without a name are left alone: an input may have failed.
    """
    if error.filename is None and error.errno in FULL:
        error.filename = str(path)
    elif isinstance(error.filename, str) and Path(error.filename).is_relative_to(temporary):
        error.filename = str(path / Path(error.filename).relative_to(temporary))


def _create_partial(path: Path, *, is_folder: bool) -> tuple[Path, int]:
    while True:
        temporary = partial_path(path)
        if is_folder:
            temporary.mkdir()
        else:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            descriptor = os.open(temporary, os.O_RDONLY if is_folder else os.O_RDWR)
        except FileNotFoundError:  # another writer took it for stale before it was locked
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


def require_free_folder(path: Path) -> None:
    """Raise ValueError unless `path` is missing or an empty folder."""
    if path.is_symlink():
        raise ValueError(f"{path} is a link to {os.readlink(path)}: name a folder itself as the output")
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise ValueError(f"{path} exists already: remove it or choose another output")


def remove_stale_partials(path: Path) -> None:
    """Remove the partials of killed writers of `path`; those of running writers are locked and stay."""
    remove_dead_lease(output_lease(path))
    pattern = re.compile(re.escape(f".{path.name}.partial-") + r"\d+(-[0-9a-f]+)?")
    for left in [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]:
        try:
            descriptor = os.open(left, os.O_RDONLY if left.is_dir() else os.O_RDWR)
        except OSError:  # gone meanwhile, or somebody else's
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(left)
        except OSError:  # locked, or a file system without locks
            continue
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_regular_file(path: str | Path, most_bytes: int = 1 << 31) -> bytes:
    """Return the content of a regular file, or of a link to one.

    A plain `open` of a FIFO or a device would wait forever.

    Raises:
        ValueError: another kind of file, or one larger than `most_bytes`.
    """
    with open_regular_file(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most_bytes:
            raise ValueError(f"{path} has {size:,} bytes, at most {most_bytes:,} are read: copy it again")
        return stream.read()


@contextlib.contextmanager
def open_regular_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a regular file, or a link to one, for reading; ValueError for anything else."""
    with open(path, "rb", opener=_open_without_waiting) as stream:
        mode = os.fstat(stream.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is {kind_of_file(mode)}, not a file: put the file back there")
        yield stream


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def kind_of_file(mode: int) -> str:
    """Describe a file mode of `os.stat` or `os.lstat` in words."""
    kinds: tuple[tuple[Callable[[int], bool], str], ...] = (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISLNK, "a link"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((words for is_kind, words in kinds if is_kind(mode)), "a device")


def free_bytes(folder: str | Path) -> int:
    """Return the free bytes of the disk on which a folder is or will be."""
    path = Path(folder).resolve()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def sha256_file(path: str | Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """Return the hex sha256 of a file, read in blocks; `on_bytes(n)` is called after each block of n bytes.

    Raises:
        ValueError: a FIFO or device, which might never end.
    """
    digest = hashlib.sha256()
    with open_regular_file(path) as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()
