"""Raw inputs of a corpus: documents of `.jsonl[.gz|.zst]`, `.parquet` and `.txt` files.

Reading is apart from decoding: a reader cuts a file into parts of neighbouring records, as bytes, at the
speed of the disk, and whoever tokenizes a part decodes it (`decode_part`). So one process can feed many,
and a run that resumes after a kill skips what is done without decoding it. Memory holds a part (for
`.parquet` one small batch more), whatever the size of the file.

A fault of a single document is reported with file and line and can be skipped. A fault of a whole file,
such as truncated compression or a missing column, always stops. A document without text (an empty string, a
null, an empty `.txt`) is not invalid: it is counted and left out. White space is text.

`FileInputs` is what `tokenize_corpus` takes for files, `hub_sources.HubStream` for a stream of the Hub.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast

from megatron_exact.command_line import progress_bar
from megatron_exact.files import sha256_file
from megatron_exact.json_input import parse_corpus_line

DEFAULT_TEXT_KEY = "text"
JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*JSON_LINES_SUFFIXES, ".parquet", ".txt")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ZSTD_BLOCK_BYTES = 64 << 10
ZSTD_MAX_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` writes
STREAM_BUFFER_BYTES = 1 << 20
PARQUET_BATCH_ROWS = 64  # rows that are in memory at a time beside the part
HASHING_THREADS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """How far one input is read. The default is its beginning."""

    records: int = 0
    """Lines, blank ones included, or rows that are read."""
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
    """Name of the input, for messages."""
    kind: Literal["line", "row", "file"]
    """A JSON line; a row whose content is the text; a whole file."""
    first: int
    """Number of the first record, from 1."""
    contents: list[bytes | None]
    """Bytes of each record; None is a null."""


PartsWithCursors = Iterator[tuple[RawPart, Cursor]]
"""Parts of one input in its order, each with the cursor behind it."""


@contextlib.contextmanager
def open_lines(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Yield (the file as it lies on disk, the stream of its decompressed bytes); equal for plain text.

    Raises:
        ValueError: compression that is damaged or ends too early, whenever it is met.
    """
    name = path.name.lower()
    try:
        with open(path, "rb", buffering=STREAM_BUFFER_BYTES) as raw:
            if name.endswith(".gz"):
                with gzip.GzipFile(fileobj=raw) as unzipped:
                    yield raw, cast("BinaryIO", unzipped)
            elif name.endswith(".zst"):
                buffered = io.BufferedReader(_ZstdStream(raw), buffer_size=STREAM_BUFFER_BYTES)
                yield raw, cast("BinaryIO", buffered)
            else:
                yield raw, raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): fetch it again") from error


class _ZstdStream(io.RawIOBase):
    """Stream of the decompressed bytes of all frames.

    Unlike the reader of `zstandard` it notices a truncated frame.
    """

    def __init__(self, raw: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ValueError("reading .zst needs the package zstandard: pip install zstandard") from error
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW_BYTES)
        self._raw = raw
        self._frame = self._decompressor.decompressobj()
        self._pending = b""
        self._ready = memoryview(b"")
        self._inside_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            if self._frame.eof:
                self._pending = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
                self._inside_frame = False
            block = self._pending or self._raw.read(ZSTD_BLOCK_BYTES)
            self._pending = b""
            if not block:
                if self._inside_frame:
                    raise EOFError("the last zstd frame ends too early")
                return 0
            self._inside_frame = True
            try:
                self._ready = memoryview(self._frame.decompress(block))
            except self._error as error:
                raise EOFError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def read_rows(path: Path, text_key: str, start: Cursor, part_bytes: int) -> PartsWithCursors:
    """Yield the parts of a column after `start`, see `FileInput.read`."""
    size = path.stat().st_size
    contents: list[bytes | None] = []
    records, part_size, total_rows = start.records, 0, 1
    for value, total_rows in _values(path, text_key, records):
        contents.append(value)
        part_size += len(value or b"")
        if part_size >= part_bytes:
            part = RawPart(name=str(path), kind="row", first=records + 1, contents=contents)
            records += len(contents)
            yield part, Cursor(records=records, progress_bytes=size * records // total_rows)
            contents, part_size = [], 0
    if contents:
        part = RawPart(name=str(path), kind="row", first=records + 1, contents=contents)
        yield part, Cursor(records=records + len(contents), progress_bytes=size)


def _values(path: Path, text_key: str, skipped_rows: int) -> Iterator[tuple[bytes | None, int]]:
    """Yield (UTF-8 of the text, rows of the file) of each row; whole row groups are skipped unread."""
    try:  # here and not at the top: pyarrow is slow to import
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError("reading .parquet needs the package pyarrow: pip install pyarrow") from error
    try:
        # pre_buffer would keep a whole row group in memory, which may be gigabytes of text
        with pq.ParquetFile(path, pre_buffer=False) as file:
            _check_column(pa, path, file.schema_arrow, text_key)
            groups, ahead = list(range(file.metadata.num_row_groups)), skipped_rows
            while groups and file.metadata.row_group(groups[0]).num_rows <= ahead:
                ahead -= file.metadata.row_group(groups.pop(0)).num_rows
            batches = file.iter_batches(
                batch_size=PARQUET_BATCH_ROWS, row_groups=groups, columns=[text_key]
            )
            for batch in batches:
                # A nested column of the same first name comes along: parquet's names are paths
                column = batch.column(batch.schema.get_field_index(text_key)).slice(ahead)
                ahead -= min(ahead, batch.num_rows)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                for value in column.cast(pa.large_binary()).to_pylist():
                    yield value, file.metadata.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or not a parquet file ({error}): fetch it again") from error


def _check_column(pa: Any, path: Path, schema: Any, text_key: str) -> None:
    if text_key not in schema.names:
        raise ValueError(f"{path} has no column {text_key!r} (--text-key), only {', '.join(schema.names)}")
    if schema.names.count(text_key) > 1:
        raise ValueError(
            f"{path} has {schema.names.count(text_key)} columns named {text_key!r}: rename all but one of "
            "them, so that it is clear which one contains the text"
        )
    kind = schema.field(text_key).type
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    if value_type not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        raise ValueError(f"{path}: the column {text_key!r} contains {kind}, not text (--text-key)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One source text."""

    text: str
    """The text: valid Unicode, at least one character."""
    location: str
    """`FILE:LINE`, `FILE:row N` (both from 1) or `FILE`, for messages."""
    position_bytes: int
    """Bytes of the input file that are read up to this document, for progress; estimated in parquet."""


OnInvalid = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class FileInput:
    """One raw file as an input of a corpus."""

    path: Path
    """Path of the file, with a suffix of SUFFIXES."""
    text_key: str = DEFAULT_TEXT_KEY
    """Field (`.jsonl`) or column (`.parquet`) that contains the text; unused for `.txt`."""

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
    """Check, before any work, that inputs can be read at all.

    An empty `.txt` is a document without text, which is left out later. Any other empty file is an error,
    because it is more likely a failed download.

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
    """Return the suffix in SUFFIXES that `path` ends with; ValueError if it has another one."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise ValueError(f"{path} has an unknown suffix: inputs end in {', '.join(SUFFIXES)}")


class Input(Protocol):
    """One input, read from any cursor."""

    def read(self, start: Cursor, part_bytes: int) -> PartsWithCursors:
        """See `FileInput.read`."""
        ...


class CorpusInputs(Protocol):
    """All inputs of one corpus, in order."""

    text_key: str
    """Field that contains the text."""

    def readers(self) -> Sequence[Input]:
        """The inputs."""
        ...

    def sizes(self) -> Sequence[int]:
        """Bytes of each input, for progress; 0 where they are not known."""
        ...

    def identity(self) -> list[Any]:
        """One JSON value for each input, which changes when the input does."""
        ...

    def names(self) -> list[str]:
        """Names of the inputs, for messages."""
        ...

    def raw_files(self) -> list[dict[str, Any]]:
        """{`path`, `bytes`, `sha256`} of each file, for the record; ValueError if one has changed."""
        ...

    def hub(self) -> dict[str, Any] | None:
        """Where on the Hub the text comes from, for the record."""
        ...


class FileInputs:
    """Files on disk as the inputs of a corpus.

    Args:
        paths: files with suffixes of SUFFIXES, in the order of the corpus.
        text_key: field or column that contains the text.
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
        """Return name, size and hash of every input; names are relative to the inputs' common folder."""
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


def read_documents(
    path: str | Path, *, text_key: str = DEFAULT_TEXT_KEY, on_invalid: OnInvalid | None = None
) -> Iterator[Document]:
    """Yield the documents of one file that have text, in its order, one record in memory at a time.

    Args:
        path: a file with a suffix of SUFFIXES.
        text_key: field (`.jsonl`) or column (`.parquet`) that contains the text; unused for `.txt`.
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
    """Yield (location, text, "") of each document, or (location, None, reason) of an invalid one.

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
        raise ValueError(f"the line is not a JSON object but a {type(value).__name__}")
    if text_key not in value:
        raise ValueError(
            f"no field {text_key!r} (--text-key), only {', '.join(map(repr, value)) or 'none'}"
        )
    text = value[text_key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"the field {text_key!r} is not text but a {type(text).__name__}")
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
