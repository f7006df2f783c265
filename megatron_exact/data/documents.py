"""Documents of raw text files: `.jsonl[.gz|.zst]`, `.parquet` and `.txt`.

Reading is apart from decoding: a reader cuts a file into parts of neighbouring records, as bytes, at the
speed of the disk, and whoever tokenizes a part decodes it. So one process can feed many, and a run that
goes on after a kill passes over what is done without decoding it. Memory holds a part (of a `.parquet` one
small batch more), whatever the size of the file. What is wrong with a single document is reported with file
and line and can be skipped; what is wrong with a whole file (truncated compression, missing column) always
stops.

A document without text (an empty string, a null, an empty `.txt`) is not invalid: it is counted and left
out, as it would fill nothing. White space is text.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_exact.data.compressed_lines import open_lines
from megatron_exact.data.parquet_rows import read_rows
from megatron_exact.data.raw_parts import Cursor, PartsWithCursors, RawPart
from megatron_exact.json_input import parse_corpus_line

DEFAULT_TEXT_KEY = "text"
JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*JSON_LINES_SUFFIXES, ".parquet", ".txt")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One source text."""

    text: str
    """Valid Unicode, at least one character."""
    location: str
    """`FILE:LINE`, `FILE:row N` (both from 1) or `FILE`, for messages."""
    position_bytes: int
    """Bytes of the input file that are read once this document is, for progress; estimated in parquet."""


OnInvalid = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class FileInput:
    """One raw file as an input of a corpus."""

    path: Path
    """With a suffix of SUFFIXES."""
    text_key: str = DEFAULT_TEXT_KEY
    """Field (`.jsonl`) or column (`.parquet`) that holds the text; unused for `.txt`."""

    def read(self, start: Cursor, part_bytes: int) -> PartsWithCursors:
        """Yield the parts after `start`, each with the cursor behind it.

        Args:
            start: a cursor that an earlier call on the same file gave, or `Cursor()`.
            part_bytes: a part ends with the record that reaches this size.

        Raises:
            ValueError: the file is damaged as a whole.
        """
        suffix = input_suffix(self.path)
        if suffix == ".parquet":
            return read_rows(self.path, self.text_key, start, part_bytes)
        if suffix == ".txt":
            return _whole_file(self.path, start)
        return _json_lines(self.path, suffix, start, part_bytes)


def check_inputs(paths: list[Path]) -> None:
    """Raise before any work for inputs that cannot be read at all.

    An empty `.txt` is a document without text, which is left out later; any other empty file is an error,
    for it is more likely a download that failed.

    Args:
        paths: files, in the order of the corpus.

    Raises:
        ValueError: no input, a folder, an unknown suffix, a file given twice, an empty file.
        FileNotFoundError: a file that does not exist.
    """
    if not paths:
        raise ValueError("no input file: name at least one")
    seen: set[Path] = set()
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name the files in it, for instance {path}/*.jsonl")
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: check the spelling of the input")
        suffix = input_suffix(path)
        try:
            str(path).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the name {str(path)!r} is not valid UTF-8: rename the file") from error
        if path.resolve() in seen:
            raise ValueError(f"{path} is given twice: every input may appear once")
        seen.add(path.resolve())
        if path.stat().st_size == 0 and suffix != ".txt":
            raise ValueError(f"{path} is empty: remove it from the inputs")


def input_suffix(path: Path) -> str:
    """The suffix in SUFFIXES that `path` ends with; ValueError if there is none."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise ValueError(f"{path} has an unknown suffix: inputs end in {', '.join(SUFFIXES)}")


def read_documents(
    path: str | Path, *, text_key: str = DEFAULT_TEXT_KEY, on_invalid: OnInvalid | None = None
) -> Iterator[Document]:
    """Yield the documents of one file that have text, in its order, one record in memory at a time.

    Args:
        path: a file with a suffix of SUFFIXES.
        text_key: field (`.jsonl`) or column (`.parquet`) that holds the text; unused for `.txt`.
        on_invalid: called with one line for each invalid document, which is then left out;
            None raises instead. Blank lines of a `.jsonl` are not documents.

    Raises:
        ValueError: an invalid document (see `on_invalid`), or a file that is damaged as a whole.
    """
    parts = FileInput(path=Path(path), text_key=text_key).read(Cursor(), 1)
    for part, cursor in parts:
        for location, text, reason in decode_part(part, text_key):
            if text == "":
                continue
            if text is not None:
                yield Document(text=text, location=location, position_bytes=cursor.progress_bytes)
            elif on_invalid is None:
                raise ValueError(f"{location}: {reason}; correct it or leave such out with --skip-invalid")
            else:
                on_invalid(f"{location}: {reason}")


def decode_part(part: RawPart, text_key: str) -> Iterator[tuple[str, str | None, str]]:
    """(location, text, "") of each document; (location, None, reason) of an invalid one.

    The text is empty for a document without text, which its reader counts and leaves out.
    """
    for number, content in enumerate(part.contents, start=part.first):
        if part.kind == "line":
            location = f"{part.name}:{number}"
            content = (content or b"").rstrip(b"\r\n")
            content = content.removeprefix(BYTE_ORDER_MARK) if number == 1 else content
            if not content.strip():
                continue
        else:
            location = part.name if part.kind == "file" else f"{part.name}:row {number}"
        try:
            yield location, _text(part.kind, content, text_key), ""
        except ValueError as error:
            yield location, None, _reason(error)


def _text(kind: str, content: bytes | None, text_key: str) -> str:
    if content is None:  # a null of a column
        return ""
    if kind != "line":
        return content.decode("utf-8-sig" if kind == "file" else "utf-8")
    text = _field(parse_corpus_line(content.decode("utf-8"), text_key), text_key)
    text.encode("utf-8")  # UnicodeEncodeError: a lone surrogate, which JSON's \ud800 can smuggle in
    return text


def _field(value: object, text_key: str) -> str:
    if not isinstance(value, dict):
        raise ValueError(f"the line is no JSON object but a {type(value).__name__}")
    if text_key not in value:
        raise ValueError(
            f"no field {text_key!r} (--text-key), only {', '.join(map(repr, value)) or 'none'}"
        )
    text = value[text_key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"the field {text_key!r} is no text but a {type(text).__name__}")
    return text


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"invalid UTF-8 (byte 0x{byte:02x} at offset {error.start} of this document)"
    if isinstance(error, UnicodeEncodeError):
        return f"invalid Unicode (a lone surrogate at character {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    return str(error)


def _whole_file(path: Path, start: Cursor) -> PartsWithCursors:
    if start.records:
        return
    part = RawPart(name=str(path), kind="file", first=1, contents=[path.read_bytes()])
    yield part, Cursor(records=1, progress_bytes=path.stat().st_size)


def _json_lines(path: Path, suffix: str, start: Cursor, part_bytes: int) -> PartsWithCursors:
    records = start.records
    with open_lines(path) as (raw, stream):
        if suffix == ".jsonl":
            stream.seek(start.offset)
        else:
            deque(itertools.islice(stream, records), maxlen=0)
        while lines := stream.readlines(part_bytes):
            part = RawPart(name=str(path), kind="line", first=records + 1, contents=[*lines])
            records += len(lines)
            position = raw.tell()
            offset = position if suffix == ".jsonl" else 0
            yield part, Cursor(records=records, offset=offset, progress_bytes=position)
