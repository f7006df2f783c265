"""Reading rows of any tensor of a torch_dist checkpoint, whatever layout wrote it.

A checkpoint of a job is cut as its ranks were: row ranges, column ranges, layers. Only the bytes that are
asked for are read, straight out of the records, so a chunk of gigabytes costs no memory; optimizer states
are never touched. Before its first use the CRC-32 of a record is checked: torch does not do that, and
Megatron loads flipped bits in silence. The format is described in `layout.py`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_exact.conversion.layout import BACKEND, BACKEND_FILE, BLOCK_BYTES, INDEX_FILE
from megatron_exact.conversion.metadata_pickle import describe, load_metadata
from megatron_exact.conversion.records import find_tensor
from megatron_exact.conversion.safetensors_files import read_fully
from megatron_exact.model.hf_folder import read_json_object

LARGEST_NUM_CHUNKS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A rectangle of a tensor, stored as one record."""

    offsets: tuple[int, ...]
    """Where it begins in the tensor."""
    shape: tuple[int, ...]
    """Its extent."""
    file: Path
    """File of the record."""
    start: int
    """First byte of the record."""
    length: int
    """Bytes of the record."""


@dataclass(frozen=True, kw_only=True)
class ShardedTensor:
    """A tensor and the chunks that tile it."""

    shape: tuple[int, ...]
    """Global shape."""
    dtype: torch.dtype
    """Of its elements."""
    chunks: tuple[Chunk, ...]
    """They cover every element once."""


class TorchDistCheckpoint:
    """The tensors of one iteration.

    Args:
        folder: `CHECKPOINT/iter_0000100` or `CHECKPOINT/release`.
        wanted: key -> whether to look at this tensor at all; others are only listed in `keys`.

    Raises:
        ValueError: no such checkpoint, or a damaged one.
    """

    def __init__(self, folder: str | Path, wanted: Callable[[str], bool]) -> None:
        self.folder = Path(folder)
        _check_backend(self.folder)
        self._descriptors: dict[Path, int] = {}
        self._places: dict[Chunk, int] = {}
        index_file = self.folder / INDEX_FILE
        if not index_file.is_file():
            raise ValueError(f"{self.folder} holds no {INDEX_FILE}: it is no whole checkpoint")
        metadata = load_metadata(index_file)
        try:
            self.objects, self.other_tensors, self.tensors = _read_index(metadata, self.folder, wanted)
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise ValueError(f"{index_file} is damaged ({describe(error)}): copy it again") from error

    def __enter__(self) -> TorchDistCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read_rows(
        self, key: str, layer: int | None, row: int, rows: int, out: np.ndarray[Any, Any]
    ) -> None:
        """Fill `out` with rows [row, row + rows) of a tensor, or of one layer of it.

        Args:
            key: of the tensor.
            layer: index into the leading axis; None for a tensor without layers.
            row: first row.
            rows: how many.
            out: uint8 [rows * bytes of a row], contiguous.

        Raises:
            ValueError: a damaged record.
        """
        tensor = self.tensors[key]
        lead = () if layer is None else (layer,)
        tail = tensor.shape[len(lead) + 1 :]
        item = tensor.dtype.itemsize
        # [rows, columns, bytes of the axes after] with columns = the axis that tensor parallelism may cut
        columns = tail[0] if tail else 1
        inner = math.prod(tail[1:]) * item
        target = out.reshape(rows, columns, inner)
        for chunk in tensor.chunks:
            offsets, shape = chunk.offsets, chunk.shape
            if lead and not offsets[0] <= lead[0] < offsets[0] + shape[0]:
                continue
            depth = len(lead)
            low = max(row, offsets[depth])
            high = min(row + rows, offsets[depth] + shape[depth])
            if low >= high:
                continue
            if any(length != whole for length, whole in zip(shape[depth + 2 :], tail[1:], strict=True)):
                raise ValueError(f"{chunk.file}: {key} is cut along its third axis, which is not supported")
            column = offsets[depth + 1] if tail else 0
            width = shape[depth + 1] if tail else 1
            first_row = (lead[0] - offsets[0] if lead else 0) * shape[depth] + low - offsets[depth]
            self._read_rectangle(
                key,
                chunk,
                first_row,
                width * inner,
                target[low - row : high - row, column : column + width],
            )

    def _read_rectangle(
        self, key: str, chunk: Chunk, first_row: int, row_bytes: int, target: np.ndarray[Any, Any]
    ) -> None:
        """Rows of a chunk, each `row_bytes` long, into a view [rows, width, inner]."""
        place = self._place_of(key, chunk) + first_row * row_bytes
        descriptor = self._descriptor(chunk.file)
        if target.flags.c_contiguous:
            flat = target.reshape(-1)
            read_fully(descriptor, memoryview(cast(Any, flat)), place, chunk.file)
            return
        step = max(1, BLOCK_BYTES // 4 // max(1, row_bytes))
        for start in range(0, len(target), step):
            part = target[start : start + step]
            rows = np.empty(part.shape, np.uint8)
            read_fully(
                descriptor, memoryview(cast(Any, rows.reshape(-1))), place + start * row_bytes, chunk.file
            )
            part[...] = rows

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]

    def _place_of(self, key: str, chunk: Chunk) -> int:
        """Position in its file of a chunk's first element; its record is checked the first time."""
        if chunk not in self._places:
            try:
                self._places[chunk] = find_tensor(
                    self._descriptor(chunk.file),
                    chunk.start,
                    chunk.length,
                    self.tensors[key].dtype,
                    chunk.shape,
                )
            except ValueError as error:
                raise ValueError(
                    f"{chunk.file}: the record of {key} at {list(chunk.offsets)} is damaged "
                    f"({describe(error)}): take another checkpoint, or copy this one again"
                ) from error
        return self._places[chunk]


def _check_backend(folder: Path) -> None:
    path = folder / BACKEND_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {BACKEND_FILE}: it is no torch_dist checkpoint of Megatron")
    found = read_json_object(path)
    if found.get("sharded_backend") != BACKEND["sharded_backend"]:
        raise ValueError(
            f"{path} says {json.dumps(found)[:120]}: only {BACKEND['sharded_backend']!r} can be read"
        )


def _read_index(
    metadata: Metadata, folder: Path, wanted: Callable[[str], bool]
) -> tuple[frozenset[str], frozenset[str], dict[str, ShardedTensor]]:
    """Keys of objects, keys of unwanted tensors, wanted tensors."""
    objects, others = set(), set()
    tensors = {}
    sizes: dict[Path, int] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise ValueError("a key is no text")
        if isinstance(entry, BytesStorageMetadata):
            objects.add(key)
        elif not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"{key} is neither tensor nor object")
        elif wanted(key):
            tensors[key] = _read_tensor(key, entry, metadata.storage_data, folder, sizes)
        else:
            others.add(key)
    return frozenset(objects), frozenset(others), tensors


def _read_tensor(
    key: str, entry: TensorStorageMetadata, storage: Any, folder: Path, sizes: dict[Path, int]
) -> ShardedTensor:
    shape, dtype = _counts(entry.size), entry.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{key} has no dtype")
    chunks = []
    for stored in entry.chunks:
        offsets, extent = _counts(stored.offsets), _counts(stored.sizes)
        inside = len(offsets) == len(extent) == len(shape) and all(
            offset + length <= whole for offset, length, whole in zip(offsets, extent, shape, strict=True)
        )
        if not inside:
            raise ValueError(f"{key} has a chunk at {offsets} of {extent} outside its shape {shape}")
        info = storage[MetadataIndex(key, torch.Size(offsets))]
        name = info.relative_path
        if not isinstance(name, str) or name != os.path.basename(name) or not name or "\0" in name:
            raise ValueError(f"{key} lies in {str(name)[:80]!r}, outside the folder")
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{key} is stored through a transformation, which is not supported")
        file = folder / name
        if file not in sizes:
            if not file.is_file():
                raise ValueError(f"{name} is missing")
            sizes[file] = file.stat().st_size
        start, length = _counts((info.offset, info.length))
        if start + length > sizes[file]:
            raise ValueError(f"{name} has {sizes[file]:,} bytes, {key} asks for {start + length:,}")
        chunks.append(Chunk(offsets=offsets, shape=extent, file=file, start=start, length=length))
    _check_tiling(key, shape, chunks)
    return ShardedTensor(shape=shape, dtype=dtype, chunks=tuple(chunks))


def _counts(values: Any) -> tuple[int, ...]:
    counts = tuple(values)
    if len(counts) > 8 or not all(type(value) is int and 0 <= value < 1 << 60 for value in counts):
        raise ValueError(f"{str(counts)[:80]} is no shape")
    return counts


def _check_tiling(key: str, shape: tuple[int, ...], chunks: list[Chunk]) -> None:
    """Chunks do not overlap and have as many elements as the tensor, so they cover it once."""
    if len(chunks) > LARGEST_NUM_CHUNKS:
        raise ValueError(f"{key} has {len(chunks):,} chunks, more than any checkpoint's")
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"the chunks of {key} do not fill its shape {shape}")
    starts = np.array([chunk.offsets for chunk in chunks], np.int64).reshape(len(chunks), len(shape))
    stops = starts + np.array([chunk.shape for chunk in chunks], np.int64).reshape(starts.shape)
    order = np.argsort(starts[:, 0], kind="stable") if shape else np.arange(len(chunks))
    starts, stops = starts[order], stops[order]
    for index in range(len(chunks) - 1):
        # only chunks that begin before this one ends on the first axis can meet it
        end = np.searchsorted(starts[:, 0], stops[index, 0]) if shape else len(chunks)
        overlap = (starts[index] < stops[index + 1 : end]) & (starts[index + 1 : end] < stops[index])
        if overlap.all(axis=1).any():
            raise ValueError(f"chunks of {key} overlap")
