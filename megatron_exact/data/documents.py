"""Documents of raw text files, one at a time: `.jsonl[.gz|.zst]`, `.parquet` and `.txt`.

Every file is streamed, so memory holds one document (one small batch of a `.parquet`), whatever the size
of the file. What is wrong with a single document is reported with file and line and can be skipped; what
is wrong with a whole file (truncated compression, missing column) always stops.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

DEFAULT_TEXT_KEY = "text"
JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*JSON_LINES_SUFFIXES, ".parquet", ".txt")
PARQUET_BATCH_ROWS = 64
ZSTD_BLOCK_BYTES = 64 << 10
ZSTD_MAX_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` writes


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


def check_inputs(paths: list[Path], *, skip_invalid: bool = False) -> None:
    """Raise before any work for inputs that cannot be read at all.

    Args:
        paths: files, in the order of the corpus.
        skip_invalid: an empty `.txt` is an invalid document, to be skipped, instead of an error.

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
        if path.stat().st_size == 0 and not (skip_invalid and suffix == ".txt"):
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
    """Yield the documents of one file in its order.

    Args:
        path: a file with a suffix of SUFFIXES.
        text_key: field (`.jsonl`) or column (`.parquet`) that holds the text; unused for `.txt`.
        on_invalid: called with one line for each invalid document, which is then left out;
            None raises instead. Blank lines of a `.jsonl` are no documents.

    Raises:
        ValueError: an invalid document (see `on_invalid`), or a file that is damaged as a whole.
    """
    path = Path(path)
    suffix = input_suffix(path)
    if suffix == ".parquet":
        candidates = _parquet_texts(path, text_key)
    elif suffix == ".txt":
        candidates = _whole_file(path)
    else:
        candidates = _json_lines(path, suffix, text_key)
    for location, position_bytes, decode in candidates:
        try:
            text = decode()
            _check_text(text)
        except (ValueError, RecursionError) as error:  # deeply nested JSON recurses
            message = f"{location}: {_reason(error)}"
            if on_invalid is None:
                raise ValueError(f"{message}; correct it or leave such out with --skip-invalid") from error
            on_invalid(message)
            continue
        yield Document(text=text, location=location, position_bytes=position_bytes)


# (location, position_bytes, function that gives the text or raises ValueError)
Candidates = Iterator[tuple[str, int, Callable[[], str]]]


def _check_text(text: str) -> None:
    if not text:
        raise ValueError("the text is empty")
    text.encode("utf-8")  # UnicodeEncodeError: a lone surrogate, which JSON's \ud800 can smuggle in


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"invalid UTF-8 (byte 0x{byte:02x} at offset {error.start} of this document)"
    if isinstance(error, UnicodeEncodeError):
        return f"invalid Unicode (a lone surrogate at character {error.start})"
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    return str(error)


def _whole_file(path: Path) -> Candidates:
    yield str(path), path.stat().st_size, lambda: path.read_bytes().decode("utf-8-sig")


def _json_lines(path: Path, suffix: str, text_key: str) -> Candidates:
    with open(path, "rb") as raw, _decompressed(raw, suffix) as stream:
        lines = _lines(path, stream)
        for number, line in enumerate(lines, start=1):
            line = line.rstrip(b"\r\n")
            if not line.strip():
                continue
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line

            def decode(content: bytes = content) -> str:
                return _field(json.loads(content.decode("utf-8")), text_key)

            yield f"{path}:{number}", raw.tell(), decode


def _field(value: object, text_key: str) -> str:
    if not isinstance(value, dict):
        raise ValueError(f"the line is no JSON object but a {type(value).__name__}")
    if text_key not in value:
        raise ValueError(
            f"no field {text_key!r} (--text-key), only {', '.join(map(repr, value)) or 'none'}"
        )
    text = value[text_key]
    if not isinstance(text, str):
        raise ValueError(f"the field {text_key!r} is no text but a {type(text).__name__}")
    return text


@contextlib.contextmanager
def _decompressed(raw: BinaryIO, suffix: str) -> Iterator[BinaryIO]:
    if suffix.endswith(".gz"):
        with gzip.GzipFile(fileobj=raw) as stream:
            yield cast("BinaryIO", stream)
    elif suffix.endswith(".zst"):
        yield cast("BinaryIO", io.BufferedReader(_ZstdStream(raw), buffer_size=1 << 20))
    else:
        yield raw


def _lines(path: Path, stream: BinaryIO) -> Iterator[bytes]:
    """Lines of a stream; damage of the compression names the file."""
    try:
        yield from stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): fetch it again") from error


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of all frames; unlike `zstandard`'s reader it notices a truncated frame."""

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


def _parquet_texts(path: Path, text_key: str) -> Candidates:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError("reading .parquet needs the package pyarrow: pip install pyarrow") from error
    size = path.stat().st_size
    try:
        # pre_buffer would hold a whole row group, which may be gigabytes of text
        with pq.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                raise ValueError(f"{path} has no column {text_key!r} (--text-key), only {', '.join(names)}")
            kind = file.schema_arrow.field(text_key).type
            value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
            if value_type not in (pa.string(), pa.large_string(), pa.string_view()):
                raise ValueError(f"{path}: the column {text_key!r} holds {kind}, not text (--text-key)")
            rows = max(1, file.metadata.num_rows)
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=[text_key]):
                for value in batch.column(0):
                    number += 1

                    def decode(value: pa.Scalar = value) -> str:
                        text = value.as_py()
                        if text is None:
                            raise ValueError(f"the column {text_key!r} is null")
                        return cast("str", text)

                    yield f"{path}:row {number}", size * number // rows, decode
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged or no parquet file ({error}): fetch it again") from error
