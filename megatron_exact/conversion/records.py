"""One record of a torch_dist checkpoint: a tensor as `torch.save` wrote it, somewhere inside a file.

A record is a zip file without compression. It is opened to find where its bytes lie and to check them; the
bytes themselves are then read in rows by `torch_dist_reader.py`.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from typing import Any

import torch

from megatron_exact.conversion.metadata_pickle import (
    LARGEST_RECORD_PICKLE_BYTES,
    describe,
    load_record_tensor,
)

CRC_BLOCK_BYTES = 4 << 20
LOCAL_HEADER_BYTES = 30  # of a zip entry, before its name
ZIP_ERRORS = (
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
)
"""What zipfile raises on damaged bytes, besides ValueError."""


def find_tensor(
    descriptor: int, start: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> int:
    """Position in the file of a record's first element, after its CRC-32 was checked.

    Args:
        descriptor: of the file.
        start: first byte of the record.
        length: bytes of the record.
        dtype: that the tensor must have.
        shape: that it must have; row-major and without gaps.

    Raises:
        ValueError: a damaged record, or one of something else.
    """
    try:
        place, size, crc, offset = _find(descriptor, start, length, dtype, shape)
    except ZIP_ERRORS as error:
        raise ValueError(describe(error)) from error
    if _crc(descriptor, start + place, size) != crc:
        raise ValueError("its CRC-32 differs")
    return start + place + offset * dtype.itemsize


def _find(
    descriptor: int, start: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """Position of the storage in the record, its bytes, its CRC-32, first element of the tensor in it."""
    with zipfile.ZipFile(_Slice(descriptor, start, length)) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        pickled = entries.get("data.pkl")
        if pickled is None or pickled.file_size > LARGEST_RECORD_PICKLE_BYTES:
            raise ValueError("it holds no data.pkl of a tensor")
        if pickled.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed")
        tensor = load_record_tensor(archive.read(pickled))
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"it holds {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
    entry = entries.get(f"data/{tensor.storage}")
    if entry is None or entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its data are not there")
    wanted = (tensor.offset + math.prod(shape)) * dtype.itemsize
    if entry.file_size < wanted:
        raise ValueError(f"it has {entry.file_size:,} bytes where {wanted:,} are needed")
    header = os.pread(descriptor, LOCAL_HEADER_BYTES, start + entry.header_offset)
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    place = int(entry.header_offset) + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    if place + entry.file_size > length:
        raise ValueError("its data reach beyond it")
    return place, entry.file_size, entry.CRC, tensor.offset


def _crc(descriptor: int, start: int, length: int) -> int:
    buffer = bytearray(min(CRC_BLOCK_BYTES, length))
    value = 0
    done = 0
    while done < length:
        view = memoryview(buffer)[: min(len(buffer), length - done)]
        count = os.preadv(descriptor, [view], start + done)
        if count == 0:
            raise ValueError("the file ends early")
        value = zlib.crc32(view[:count], value)
        done += count
    return value


class _Slice(io.RawIOBase):
    """Part of a file as a file of its own; reads by position, so the file may be shared."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length = descriptor, start, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        base = {0: 0, 1: self._position, 2: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a position before its beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._position))
        count = os.preadv(self._descriptor, [memoryview(buffer)[:wanted]], self._start + self._position)
        self._position += count
        return count
