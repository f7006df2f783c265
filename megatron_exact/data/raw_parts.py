"""What readers of inputs hand to whoever tokenizes: parts of neighbouring records, and how far they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """How far one input is read. The default is its beginning."""

    records: int = 0
    """Lines (blank ones too) or rows that are read."""
    offset: int = 0
    """Where the next line of an uncompressed `.jsonl` starts, bytes; 0 in other inputs."""
    progress_bytes: int = 0
    """Bytes of the input that are read, for progress; estimated in parquet, 0 in a stream."""
    stream: dict[str, Any] | None = None
    """State of a Hub stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawPart:
    """Neighbouring records of one input, not decoded yet."""

    name: str
    """Of the input, for messages."""
    kind: Literal["line", "row", "file"]
    """A JSON line; a row whose content is the text; a whole file."""
    first: int
    """Number of the first record, from 1."""
    contents: list[bytes | None]
    """One a record; None is a null."""


PartsWithCursors = Iterator[tuple[RawPart, Cursor]]
"""Parts of one input in its order, each with the cursor behind it."""
