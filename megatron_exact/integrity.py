"""`integrity.json`: the files of a checkpoint with their hashes, and its run and iteration.

    {"algorithm": "sha256",
     "files": {name: hex},                    as Megatron's `--verify-integrity` reads and writes it
     "checkpoint": {
       "origin": "saved",                     by a job; "imported" or "sealed" by the tools
       "run_id": "6f0c...",                   of run.json; null for an import or a later seal
       "iteration": 100,                      0 for a release
       "weighting": "exact",                  rule of the run; null as above
       "fingerprint": "9a41...",              of its pack; null as above
       "sizes": {name: bytes},
       "previous": {"iteration": 50, "sha256": "77e0..."}}}

The first two keys are Megatron's own format (megatron/core/dist_checkpointing/validation.py), which ignores
the third. Checkpoints of Megatron and of older versions have no third key. `previous` is the checkpoint of
the run before this one, with the sha256 of its integrity.json, so the checkpoints of a run form a chain;
the first has null. The file is written last: a folder with this file contains a whole checkpoint, or was
damaged later.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_exact.files import kind_of_file, read_regular_file, sha256_file, write_json
from megatron_exact.json_input import parse_json_object

INTEGRITY_FILE = "integrity.json"
ALGORITHM = "sha256"
LARGEST_BYTES = 64 << 20  # hundreds of thousands of files
SILLY_RENAMED = ".nfs"
"""Prefix that NFS gives to a file that was removed while open; nothing reads such a file."""


@dataclass(frozen=True, kw_only=True)
class Previous:
    """The checkpoint of a run before another one."""

    iteration: int
    """Its iteration."""
    sha256: str
    """Hash of its integrity.json."""


@dataclass(frozen=True, kw_only=True)
class Belonging:
    """The run and iteration that a checkpoint belongs to."""

    origin: str
    """`saved`, `imported` or `sealed`."""
    iteration: int
    """Its iteration, 0 for a release."""
    run_id: str | None = None
    """Id of its run, from run.json."""
    weighting: str | None = None
    """Weighting rule of its run."""
    fingerprint: str | None = None
    """Fingerprint of the pack of its run."""
    previous: Previous | None = None
    """The checkpoint before it; None for the first one of a run."""

    def in_words(self) -> str:
        """Return a description for an error message."""
        parts = [f"iteration {self.iteration}"]
        if self.run_id is not None:
            parts.append(f"run {self.run_id[:12]}")
        if self.weighting is not None:
            parts.append(f"weighting {self.weighting}")
        if self.fingerprint is not None:
            parts.append(f"pack {self.fingerprint[:12]}")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Seal:
    """Content of an integrity.json."""

    files: dict[str, str]
    """Name -> sha256."""
    sizes: dict[str, int]
    """Name -> bytes; empty where Megatron or an older version wrote the file."""
    belonging: Belonging | None
    """The run and iteration; None where Megatron or an older version wrote the file."""
    sha256: str
    """Hash of the integrity.json itself."""


@dataclass(frozen=True, kw_only=True)
class OwnRun:
    """The run whose checkpoints lie in a folder, from its run.json."""

    run_id: str | None = None
    """Id of the run; None without run.json, or with one of an older version."""
    run_id_since: int = 0
    """Iteration up to which checkpoints lack the id: a run of an older version got it at a resume."""
    weighting: str | None = None
    """Weighting rule of the run."""
    fingerprint: str | None = None
    """Fingerprint of its pack."""

    @classmethod
    def of(cls, record: dict[str, Any] | None) -> OwnRun:
        """Return the run that a run.json describes, without entries where `record` is None."""
        record = record or {}
        weighting, since = record.get("weighting"), record.get("run_id_since")
        return cls(
            run_id=_text(record.get("run_id")),
            run_id_since=since if isinstance(since, int) else 0,
            weighting=_text(weighting.get("rule")) if isinstance(weighting, dict) else None,
            fingerprint=_text(record.get("fingerprint")),
        )

    def refusal(self, iteration: int, seal: Seal | None, *, is_checked: bool = True) -> str | None:
        """Return why a checkpoint does not belong to this run, as words that follow its name, or None.

        Args:
            iteration: the iteration in the name of its folder, 0 for a release.
            seal: its integrity.json, if it can be read.
            is_checked: whether it must name its run (False: `--skip-integrity-check`).
        """
        about = None if seal is None else seal.belonging
        if about is None:
            if is_checked and self.run_id is not None and iteration > self.run_id_since:
                return f"does not name its run, as all of this run do: its {INTEGRITY_FILE} was replaced"
            return None
        if about.iteration != iteration:
            return f"was renamed: its {INTEGRITY_FILE} says {about.in_words()}"
        pairs = (
            (self.run_id, about.run_id),
            (self.weighting, about.weighting),
            (self.fingerprint, about.fingerprint),
        )
        if any(None not in pair and pair[0] != pair[1] for pair in pairs):
            return f"belongs to another run: its {INTEGRITY_FILE} says {about.in_words()}"
        return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def write_integrity(
    folder: Path,
    hashes: Mapping[str, str],
    belonging: Belonging | None = None,
    sizes: Mapping[str, int] | None = None,
) -> None:
    """Write the integrity.json of a folder, atomically.

    Args:
        folder: folder of one iteration.
        hashes: file name -> sha256.
        belonging: the run and iteration; None for Megatron's own format.
        sizes: file name -> bytes; None to look them up.
    """
    content: dict[str, Any] = {"algorithm": ALGORITHM, "files": dict(sorted(hashes.items()))}
    if belonging is not None:
        sizes = {name: (folder / name).stat().st_size for name in hashes} if sizes is None else sizes
        content["checkpoint"] = {**asdict(belonging), "sizes": dict(sorted(sizes.items()))}
    write_json(folder / INTEGRITY_FILE, content)


def read_integrity(folder: Path) -> dict[str, str] | None:
    """Return file name -> sha256 of a checkpoint, or None without an integrity.json.

    Raises:
        ValueError: an integrity.json that cannot be read, or that names files outside the folder.
    """
    seal = read_seal(folder)
    return None if seal is None else seal.files


def read_seal(folder: Path) -> Seal | None:
    """Return the content of a checkpoint's integrity.json, or None without one.

    Raises:
        ValueError: it cannot be read, or it names files outside the folder.
    """
    path = folder / INTEGRITY_FILE
    if not path.is_file():
        return None
    data = read_regular_file(path, LARGEST_BYTES)
    content = parse_json_object(data, str(path), "copy the checkpoint again")
    try:
        files, about = content["files"], content.get("checkpoint")
        sizes = {} if about is None else about["sizes"]
        is_sound = (
            content.get("algorithm", ALGORITHM) == ALGORITHM
            and all(isinstance(digest, str) and is_name(name) for name, digest in files.items())
            and all(type(size) is int and name in files for name, size in sizes.items())
        )
        seal = Seal(
            files=dict(sorted(files.items())),
            sizes=dict(sizes),
            belonging=None if about is None else _belonging(about),
            sha256=hashlib.sha256(data).hexdigest(),
        )
    except (TypeError, KeyError, AttributeError):
        is_sound = False
    if not is_sound:
        raise ValueError(f"{path} is not a list of sha256 hashes: copy the checkpoint again")
    return seal


def _belonging(about: dict[str, Any]) -> Belonging:
    previous = about["previous"]
    if previous is not None:
        previous = Previous(iteration=previous["iteration"], sha256=previous["sha256"])
        if type(previous.iteration) is not int or not isinstance(previous.sha256, str):
            raise TypeError
    found = Belonging(
        **{name: about[name] for name in ("origin", "iteration", "run_id", "weighting", "fingerprint")},
        previous=previous,
    )
    words = (found.run_id, found.weighting, found.fingerprint)
    if type(found.iteration) is not int or not all(word is None or isinstance(word, str) for word in words):
        raise TypeError
    return found


def previous_of(folder: Path) -> Previous | None:
    """Return a checkpoint as the next one names it, or None without a readable integrity.json."""
    try:
        seal = read_seal(folder)
    except (ValueError, OSError):
        return None
    digits = folder.name.removeprefix("iter_")
    number = int(digits) if digits.isdigit() else 0  # a release
    return None if seal is None else Previous(iteration=number, sha256=seal.sha256)


def is_name(name: str) -> bool:
    """Return whether a text names a file inside a folder, not the folder, a parent or a path."""
    return name not in ("", ".", "..") and name == os.path.basename(name) and "\0" not in name


def file_fault(path: Path, expected: str, sha256: Callable[[Path], str] = sha256_file) -> str | None:
    """Describe what is wrong with a file that should have this sha256, or return None."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return "missing"
    if not stat.S_ISREG(mode):
        return f"{kind_of_file(mode)} lies in its place"
    return None if sha256(path) == expected else "sha256 differs"


def unlisted_files(folder: Path, files: Mapping[str, str]) -> list[str]:
    """Return the names of entries of a folder that its integrity.json does not list."""
    there = {entry.name for entry in folder.iterdir() if not entry.name.startswith(SILLY_RENAMED)}
    return sorted(there - set(files) - {INTEGRITY_FILE})


def special_file(folder: Path) -> str | None:
    """Describe the first entry of a folder that is not a regular file, or return None.

    A link leads out of the folder, and opening a FIFO blocks.
    """
    for entry in sorted(folder.iterdir()):
        mode = entry.lstat().st_mode
        if not stat.S_ISREG(mode):
            return f"{entry.name}, which is {kind_of_file(mode)}"
    return None


def check_integrity(
    folder: Path, sha256: Callable[[Path], str] = sha256_file
) -> list[tuple[str, str | None]] | None:
    """Hash every file of a checkpoint again, in this process.

    Args:
        folder: folder of one iteration.
        sha256: returns the hex sha256 of a file; a caller may do more with the bytes that it reads.

    Returns:
        (file name, fault or None) for each file that is listed or exists; None without an integrity.json.

    Raises:
        ValueError: an integrity.json that cannot be read.
    """
    files = read_integrity(folder)
    if files is None:
        return None
    results = [(name, file_fault(folder / name, digest, sha256)) for name, digest in files.items()]
    return results + [(name, "not listed") for name in unlisted_files(folder, files)]


def content_digest(files: Mapping[str, str]) -> str:
    """Return one sha256 for a whole checkpoint, from the hashes of its files."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
