"""Lines of `.jsonl`, `.jsonl.gz` and `.jsonl.zst`: a stream of bytes that notices damaged compression."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

ZSTD_BLOCK_BYTES = 64 << 10
ZSTD_MAX_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` writes
STREAM_BUFFER_BYTES = 1 << 20


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
