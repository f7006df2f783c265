"""Steps that run once: reused when nothing changed, continued or redone when something did, never mixed.

Each step owns a folder. Its stamp holds a hash of everything that the step depends on (options, the
hashes of earlier steps, the code) and, once it is finished, the sizes of the files it made. A folder
whose stamp does not fit is removed whole before the step runs again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_exact.files import write_json
from megatron_exact.folder_lock import LEASE, Lease
from megatron_exact.json_input import read_json_object

STAMP = "step.json"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A finished step."""

    name: str
    """Name of its folder."""
    folder: Path
    """Where its files are."""
    key: str
    """Hash of everything it depends on; later steps depend on this."""
    seconds: float
    """Wall time of making it, over all attempts that it was continued from."""
    reused: bool
    """Whether an earlier run of the demo had made it."""


def hash_of(value: Any) -> str:
    """Hex sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()


def hash_of_code(root: Path, parts: tuple[str, ...]) -> str:
    """Hash of the Python files among `parts` (files, or folders with all below) of `root`."""
    digest = hashlib.sha256()
    for part in parts:
        path = root / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(root)}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


class Workspace:
    """The folder of all steps, held by one process at a time."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder = folder
        self._say = say

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the workspace; ValueError if another process does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remedy = "choose another folder (DEMO_DIR)"
        with Lease(self.folder / LEASE, folder=self.folder, purpose="a demo", remedy=remedy):
            yield

    def step(
        self,
        name: str,
        depends_on: dict[str, Any],
        build: Callable[[Path], None],
        *,
        resumable: bool = False,
    ) -> Step:
        """Return the step, made now or earlier.

        Args:
            name: folder and heading.
            depends_on: JSON values; any change of them makes the step new.
            build: fills the folder, which holds nothing but the stamp unless the step is continued.
            resumable: `build` can go on in a folder that it left unfinished.
        """
        folder = self.folder / name
        key = hash_of(depends_on)
        stamp = read_stamp(folder)
        fits = stamp is not None and stamp["key"] == key
        if stamp is not None and fits and stamp["finished"] and has_files(folder, stamp["files"]):
            self._say(f"{name}: nothing changed, using what was made before")
            return Step(name=name, folder=folder, key=key, seconds=stamp["seconds"], reused=True)
        spent = 0.0
        if stamp is not None and fits and resumable and not stamp["finished"]:
            self._say(f"{name}: continuing where an earlier run stopped")
            spent = stamp["seconds"]
        else:
            if folder.exists():
                self._say(f"{name}: made from other inputs or not finished, starting it again")
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        self._build(folder, key, spent, build)
        finished = read_stamp(folder)
        assert finished is not None
        return Step(name=name, folder=folder, key=key, seconds=finished["seconds"], reused=False)

    def _build(self, folder: Path, key: str, spent: float, build: Callable[[Path], None]) -> None:
        started = time.monotonic()
        write_json(folder / STAMP, {"key": key, "finished": False, "seconds": spent})
        done = False
        try:
            build(folder)
            done = True
        finally:
            stamp = {"key": key, "finished": done, "seconds": spent + time.monotonic() - started}
            write_json(folder / STAMP, {**stamp, "files": list_files(folder) if done else {}})


def read_stamp(folder: Path) -> dict[str, Any] | None:
    """The stamp of a step's folder, None where there is none that can be read."""
    try:
        stamp = read_json_object(folder / STAMP, "remove the demo's folder")
        return {"files": {}, **stamp, "key": stamp["key"], "finished": stamp["finished"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def list_files(folder: Path) -> dict[str, int]:
    """Size in bytes of every file below `folder` except the stamp, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / STAMP)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def has_files(folder: Path, files: dict[str, int]) -> bool:
    """Whether every file is there with its size."""
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items()
    )
