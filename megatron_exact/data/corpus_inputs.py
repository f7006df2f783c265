"""What a corpus is made from, as `tokenize_corpus` sees it: files on disk, or a stream (`hub_sources`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from megatron_exact.command_line import progress_bar
from megatron_exact.data.documents import DEFAULT_TEXT_KEY, FileInput, check_inputs
from megatron_exact.data.raw_parts import Cursor, PartsWithCursors
from megatron_exact.files import sha256_file

HASHING_THREADS = 4


class Input(Protocol):
    """One input, read from any cursor."""

    def read(self, start: Cursor, part_bytes: int) -> PartsWithCursors:
        """See `FileInput.read`."""
        ...


class CorpusInputs(Protocol):
    """All inputs of one corpus, in order."""

    text_key: str
    """Field that holds the text."""

    def readers(self) -> Sequence[Input]:
        """The inputs."""
        ...

    def sizes(self) -> Sequence[int]:
        """Bytes of each input, for progress; 0 where nobody knows."""
        ...

    def identity(self) -> list[Any]:
        """JSON values, one an input, that change when it does."""
        ...

    def names(self) -> list[str]:
        """For messages."""
        ...

    def raw_files(self) -> list[dict[str, Any]]:
        """{`path`, `bytes`, `sha256`} of each file, for the record; ValueError if one has changed."""
        ...

    def hub(self) -> dict[str, Any] | None:
        """Where on the Hub the text is from, for the record."""
        ...


class FileInputs:
    """Files on disk.

    Args:
        paths: with the suffixes of `documents.SUFFIXES`, in the order of the corpus.
        text_key: field or column that holds the text.
        hub: what is known of the files' origin, recorded as it is.

    Raises:
        ValueError, FileNotFoundError: see `check_inputs`.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        text_key: str = DEFAULT_TEXT_KEY,
        hub: dict[str, Any] | None = None,
    ) -> None:
        self.text_key = text_key
        self._paths = [Path(path) for path in paths]
        self._hub = hub
        check_inputs(self._paths)
        self._stamps = [_stamp(path) for path in self._paths]

    def readers(self) -> Sequence[Input]:
        return [FileInput(path=path, text_key=self.text_key) for path in self._paths]

    def sizes(self) -> Sequence[int]:
        return [size for size, _ in self._stamps]

    def identity(self) -> list[Any]:
        return [
            {"path": os.path.abspath(path), "bytes": size, "modified_ns": modified}
            for path, (size, modified) in zip(self._paths, self._stamps, strict=True)
        ]

    def names(self) -> list[str]:
        return [str(path) for path in self._paths]

    def hub(self) -> dict[str, Any] | None:
        return self._hub

    def raw_files(self) -> list[dict[str, Any]]:
        """Name, size and hash of every input; names start at the inputs' common folder."""
        absolute = [Path(os.path.abspath(path)) for path in self._paths]  # links keep their own names
        folder = os.path.commonpath([path.parent for path in absolute])
        files = []
        total = sum(self.sizes())
        with progress_bar("hash inputs", total, "B") as bar, ThreadPoolExecutor(HASHING_THREADS) as threads:
            hashes = threads.map(lambda path: sha256_file(path, bar.update), self._paths)
            for path, stamp, sha256 in zip(absolute, self._stamps, hashes, strict=True):
                if _stamp(path) != stamp:
                    raise ValueError(
                        f"{path} changed while it was read: tokenize again once it is complete"
                    )
                name = path.relative_to(folder).as_posix()
                files.append({"path": name, "bytes": stamp[0], "sha256": sha256})
        return files


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
