"""Read a torch_dist checkpoint without Megatron, a process group, or the execution of any pickle.

`TorchDistCheckpoint` reads rows of any tensor, whatever layout wrote it. A checkpoint of a job is cut as
its ranks were: row ranges, column ranges, layers. Only the bytes that are asked for are read, straight out
of the records, so a chunk of gigabytes costs no memory; optimizer states are never read. The CRC-32
of a record is checked before its first use: torch does not check it, and Megatron loads flipped bits
silently. The format is described in `checkpoint_layout.py`.

A checkpoint contains pickles in four places, and whoever can write the folder can rewrite them and their
hashes. Each place has a reader that creates only listed classes and rejects every other name:

    load_metadata        `.metadata`: the classes that describe tensors and where they lie
    load_record_tensor   `data.pkl` of a tensor record, read by the conversion tools: one dense tensor
    load_object          a byte entry (`common_state`, `rng_state`, optimizer and rerun states), or
                         `common.pt`: torch's weights-only reader with the classes that Megatron registers
    load_extra_state     the pickle inside a byte entry of Transformer Engine (`_extra_state`): tensors and
                         recipes

`.metadata` and the extra states are read by Python's unpickler class, not the C one: its memo is a dict,
which a prepared index cannot blow up, and it can be kept from changing a class itself (`load_build`).
"""

from __future__ import annotations

import collections
import io
import json
import math
import os
import pathlib
import pickle
import re
import struct
import sys
import types
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.serialization
from isal.isal_zlib import crc32
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_exact.conversion.checkpoint_layout import (
    BACKEND,
    BACKEND_FILE,
    BLOCK_BYTES,
    COMMON_STATE,
    INDEX_FILE,
)
from megatron_exact.conversion.safetensors_files import read_fully
from megatron_exact.files import read_regular_file
from megatron_exact.model.hf_folder import read_json_object

LARGEST_METADATA_BYTES = 512 << 20  # thousands of ranks
LARGEST_RECORD_PICKLE_BYTES = 1 << 16
LARGEST_NUM_CHUNKS = 1 << 16
CRC_BLOCK_BYTES = 256 << 10  # stays in the processor's cache between reading and summing
CRC_DIFFERS = "its CRC-32 differs"
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
"""Exceptions of zipfile on damaged bytes, besides ValueError."""
REMEDY = "nothing of it was run; take a checkpoint whose origin you know, or copy this one again"
_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    },
    **{
        (planner.__name__, name): getattr(planner, name)
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    },
    **{
        (filesystem.__name__, name): getattr(filesystem, name)
        for name in ("_StorageInfo", "_StoragePrefix")
    },
    # subclasses that older versions of Megatron wrote
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): Metadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): planner.SavePlan,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): collections.OrderedDict,
    # the folder that the writer was given, which is ignored
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib", "WindowsPath"): pathlib.PureWindowsPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "WindowsPath"): pathlib.PureWindowsPath,
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Unpickler(pickle._Unpickler):
    """Creates the listed classes and nothing else."""

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        """Set the state of an instance; the state of a class or function would change it for everybody."""
        stack: list[Any] = self.stack  # type: ignore[attr-defined]  # of Python's own unpickler
        if isinstance(stack[-2], type | types.FunctionType | types.BuiltinFunctionType):
            raise pickle.UnpicklingError(f"it would change {stack[-2].__name__} itself")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]

    def __init__(self, stream: io.BytesIO, classes: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(stream)
        self._classes = classes

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in self._classes:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tensor needs")
        return self._classes[module, name]


def load_metadata(file: Path) -> Metadata:
    """Read the `.metadata` of a checkpoint.

    Raises:
        ValueError: the file is damaged, something else, or asks for other classes.
    """
    return parse_metadata(read_regular_file(file, LARGEST_METADATA_BYTES), file)


def parse_metadata(data: bytes, file: Path) -> Metadata:
    """Parse the content of a `.metadata`.

    Args:
        data: the bytes.
        file: the file, for an error.

    Raises:
        ValueError: the data are damaged or ask for other classes.
    """
    try:
        found = _Unpickler(io.BytesIO(data), _CLASSES).load()
    except Exception as error:  # damaged bytes may raise anything
        raise ValueError(f"{file} cannot be read ({short_reason(error)}): copy it again") from error
    if not isinstance(found, Metadata):
        raise ValueError(f"{file} contains no metadata of a checkpoint: copy it again")
    return found


def short_reason(error: BaseException) -> str:
    """Return a short reason."""
    return (str(error) or type(error).__name__)[:200]


@dataclass(frozen=True, kw_only=True)
class RecordTensor:
    """The tensor that the `data.pkl` of a record describes."""

    storage: str
    """Name of its bytes in the record."""
    dtype: torch.dtype
    """Dtype of its elements."""
    shape: tuple[int, ...]
    """Shape; the data are row-major and without gaps."""
    offset: int
    """Index of its first element in the storage."""


@dataclass(frozen=True)
class _StorageType:
    dtype: torch.dtype | None


_STORAGE_TYPES: dict[tuple[str, str], Any] = {
    ("torch", "FloatStorage"): _StorageType(torch.float32),
    ("torch", "BFloat16Storage"): _StorageType(torch.bfloat16),
    ("torch", "HalfStorage"): _StorageType(torch.float16),
    ("torch", "DoubleStorage"): _StorageType(torch.float64),
}


def _rebuild_tensor(
    storage: tuple[str, torch.dtype],
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool = False,
    hooks: object = None,
    tensor_metadata: object = None,
) -> RecordTensor:
    """Return a description instead of a tensor; replaces torch._utils._rebuild_tensor_v2."""
    counts = (*shape, *stride, offset)
    if len(shape) != len(stride) or not all(type(n) is int and 0 <= n < 1 << 60 for n in counts):
        raise pickle.UnpicklingError("its shape is damaged")
    dense = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    steps = zip(shape, stride, dense, strict=True)
    if any(length > 1 and step != wanted for length, step, wanted in steps):
        raise pickle.UnpicklingError("its rows are not stored one after the other")
    name, dtype = storage
    return RecordTensor(storage=name, dtype=dtype, shape=shape, offset=offset)


class _RecordUnpickler(_Unpickler):
    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        kind, storage_type, name, _, _ = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError("it refers to something that is not a storage")
        if storage_type.dtype is None or not isinstance(name, str):
            raise pickle.UnpicklingError("it refers to a storage without a type")
        return name, storage_type.dtype


_RECORD_CLASSES = {
    **_STORAGE_TYPES,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


def load_record_tensor(data: bytes) -> RecordTensor:
    """Return what a record's `data.pkl` describes.

    Raises:
        ValueError: the data are damaged, or not one dense tensor.
    """
    try:
        found = _RecordUnpickler(io.BytesIO(data), _RECORD_CLASSES).load()
    except Exception as error:  # damaged bytes may raise anything
        raise ValueError(short_reason(error)) from error
    if not isinstance(found, RecordTensor):
        raise ValueError("it contains no tensor")
    return found


def load_object(stream: io.BytesIO | str | Path, source: str) -> Any:
    """Load what torch.save wrote, through torch's weights-only reader.

    The classes are torch's own and those registered by `torch.serialization.add_safe_globals`, which
    Megatron does for its own when it is imported.

    Args:
        stream: bytes in memory, or a file.
        source: name of the data in an error.

    Raises:
        ValueError: the data are damaged or ask for other classes; nothing was executed.
    """
    data = stream if isinstance(stream, io.BytesIO) else io.BytesIO(read_regular_file(Path(stream)))
    try:
        return torch.load(data, weights_only=True)
    except Exception as error:  # damaged bytes may raise anything
        raise ValueError(f"{source} cannot be read ({_reason(error)}): {REMEDY}") from error


def stored_iteration(checkpoint: Path, metadata: Metadata) -> int | None:
    """Return the iteration in a checkpoint's own state, or None if it cannot be found.

    No class of Megatron is needed: every class that the state asks for becomes an inert stand-in.
    """
    record = next(
        (info for place, info in metadata.storage_data.items() if place.fqn == COMMON_STATE), None
    )
    if record is None:
        return None
    try:
        with open(checkpoint / Path(record.relative_path).name, "rb") as stream:
            stream.seek(record.offset)
            data = stream.read(min(record.length, LARGEST_METADATA_BYTES))
        with zipfile.ZipFile(io.BytesIO(data)) as files:
            name = next(name for name in files.namelist() if name.endswith("data.pkl"))
            (state,) = _InertUnpickler(io.BytesIO(files.read(name)), {}).load()
        iteration = state["iteration"]
    except Exception:  # another layout, or damage that the hashes and CRCs are there for
        return None
    return iteration if type(iteration) is int else None


class _Inert(dict[Any, Any]):
    """Stands for an object of any class: takes what the pickle gives it and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    __hash__ = object.__hash__  # type: ignore[assignment]  # as a key


class _InertUnpickler(_Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, pid: Any) -> None:
        return None


def _reason(error: Exception) -> str:
    """Return one line for torch's paragraphs about its weights-only reader."""
    text = str(error)
    asked = re.search(r"\bGLOBAL ([\w.]+)", text)
    if asked is not None:
        return f"it asks for {asked[1]}, which no checkpoint of Megatron needs"
    text = text.rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
    return text.splitlines()[0][:200]


RECIPES = "transformer_engine.common.recipe"
RECIPE_CLASSES = (
    *("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"),
    *("NVFP4BlockScaling", "Format", "_FormatHelper", "MMParams", "QParams"),
)


def load_extra_state(data: bytes, source: str) -> Any:
    """Load the state of a Transformer Engine module, which is a pickle inside a byte tensor.

    Transformer Engine itself would unpickle these bytes without a list of classes.

    Args:
        data: the bytes.
        source: name of the data in an error.

    Raises:
        ValueError: the data are damaged or ask for anything but tensors and recipes; nothing was executed.
    """
    recipes = sys.modules.get(RECIPES)

    def load_storage(data: bytes) -> Any:
        return torch.load(io.BytesIO(data), weights_only=True)

    classes = {
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch.storage", "_load_from_bytes"): load_storage,
        # the name under which Megatron replaces the one before
        ("megatron.core.safe_globals", "safe_load_from_bytes"): load_storage,
        ("torch", "Size"): torch.Size,
        ("collections", "OrderedDict"): collections.OrderedDict,
        **{(RECIPES, name): getattr(recipes, name) for name in RECIPE_CLASSES if hasattr(recipes, name)},
    }
    delayed = getattr(
        sys.modules.get("megatron.core.extensions.transformer_engine"), "TEDelayedScaling", None
    )
    if isinstance(delayed, type):
        classes[delayed.__module__, delayed.__name__] = delayed
    try:
        return _Unpickler(io.BytesIO(data), classes).load()
    except Exception as error:  # damaged bytes may raise anything
        raise ValueError(f"{source} cannot be read ({short_reason(error)}): {REMEDY}") from error


def find_tensor(
    descriptor: int, start: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> int:
    """Return the position in the file of a record's first element, after its CRC-32 was checked.

    A record is a zip file without compression, as `torch.save` wrote it, somewhere inside a file. It is
    opened to find where its bytes lie and to check them; the bytes themselves are read in rows later.

    Args:
        descriptor: descriptor of the file.
        start: first byte of the record.
        length: bytes of the record.
        dtype: expected dtype of the tensor.
        shape: expected shape; the data must be row-major and without gaps.

    Raises:
        ValueError: the record is damaged or not this tensor.
    """
    try:
        place, size, crc, offset = _find(descriptor, start, length, dtype, shape)
    except ZIP_ERRORS as error:
        raise ValueError(short_reason(error)) from error
    if _crc(descriptor, start + place, size) != crc:
        raise ValueError(CRC_DIFFERS)
    return start + place + offset * dtype.itemsize


def _find(
    descriptor: int, start: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """Return position, bytes and CRC-32 of a record's storage, and the tensor's first element in it."""
    with zipfile.ZipFile(FileSlice(descriptor, start, length)) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        pickled = entries.get("data.pkl")
        if pickled is None or pickled.file_size > LARGEST_RECORD_PICKLE_BYTES:
            raise ValueError("it contains no data.pkl of a tensor")
        if pickled.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed")
        tensor = load_record_tensor(archive.read(pickled))
    if tensor.dtype != dtype or tensor.shape != shape:
        raise ValueError(f"it contains {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
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
        value = crc32(view[:count], value)
        done += count
    return value


class FileSlice(io.RawIOBase):
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


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A rectangle of a tensor, stored as one record."""

    offsets: tuple[int, ...]
    """Indices of its first element in the tensor."""
    shape: tuple[int, ...]
    """Lengths along the axes."""
    file: Path
    """File of the record."""
    start: int
    """First byte of the record."""
    length: int
    """Bytes of the record."""


@dataclass(frozen=True, kw_only=True)
class StoredData:
    """Where the data of a record lie in its file."""

    start: int
    """First byte."""
    size: int
    """Number of bytes."""
    crc: int
    """CRC-32 of these bytes, as the record states it."""
    first: int
    """First byte of the tensor among them."""


@dataclass(frozen=True, kw_only=True)
class ShardedTensor:
    """A tensor and the chunks that tile it."""

    shape: tuple[int, ...]
    """Global shape."""
    dtype: torch.dtype
    """Dtype of its elements."""
    chunks: tuple[Chunk, ...]
    """Chunks that cover every element once."""
    _by_layer: dict[int, tuple[Chunk, ...]] = field(default_factory=dict, repr=False, compare=False)

    def chunks_of(self, layer: int | None) -> tuple[Chunk, ...]:
        """Return the chunks with a part of one index of the leading axis; all of them for None.

        The choice is kept: a layer is read a megabyte at a time, and an import has a chunk for each 32 MiB
        of each layer: 2,240 in `linear_fc1` of Llama 3.1 70B, which 71,680 reads would go through.
        """
        if layer is None:
            return self.chunks
        if layer not in self._by_layer:
            self._by_layer[layer] = tuple(
                chunk
                for chunk in self.chunks
                if chunk.offsets[0] <= layer < chunk.offsets[0] + chunk.shape[0]
            )
        return self._by_layer[layer]


class TorchDistCheckpoint:
    """The tensors of one iteration.

    Args:
        folder: `CHECKPOINT/iter_0000100` or `CHECKPOINT/release`.
        wanted: key -> whether to read this tensor; others are only listed in `other_tensors`.

    Raises:
        ValueError: the checkpoint is missing or damaged.
    """

    def __init__(self, folder: str | Path, wanted: Callable[[str], bool]) -> None:
        self.folder = Path(folder)
        _check_backend(self.folder)
        self._descriptors: dict[Path, int] = {}
        self._places: dict[Chunk, int] = {}
        index_file = self.folder / INDEX_FILE
        if not index_file.is_file():
            raise ValueError(f"{self.folder} contains no {INDEX_FILE}: it is not a whole checkpoint")
        metadata = load_metadata(index_file)
        try:
            self.objects, self.other_tensors, self.tensors = _read_index(metadata, self.folder, wanted)
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise ValueError(f"{index_file} is damaged ({short_reason(error)}): copy it again") from error

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
            key: key of the tensor.
            layer: index into the leading axis; None for a tensor without layers.
            row: first row.
            rows: number of rows.
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
        for chunk in tensor.chunks_of(layer):
            offsets, shape = chunk.offsets, chunk.shape
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
        """Read rows of a chunk, each `row_bytes` long, into a view [rows, width, inner]."""
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

    def stored_data(self, key: str, chunk: Chunk) -> StoredData:
        """Return where the data of a chunk lie, without reading them.

        Raises:
            ValueError: a damaged record.
        """
        descriptor, dtype = self._descriptor(chunk.file), self.tensors[key].dtype
        try:
            place, size, crc, offset = _find(descriptor, chunk.start, chunk.length, dtype, chunk.shape)
        except (*ZIP_ERRORS, ValueError) as error:
            raise self.record_error(key, chunk, short_reason(error)) from error
        return StoredData(start=chunk.start + place, size=size, crc=crc, first=offset * dtype.itemsize)

    def accept(self, chunk: Chunk, data: StoredData) -> None:
        """Read this chunk without summing it: the caller has compared its CRC-32."""
        self._places[chunk] = data.start + data.first

    def record_error(self, key: str, chunk: Chunk, reason: str) -> ValueError:
        """Make the error of a damaged record."""
        return ValueError(
            f"{chunk.file}: the record of {key} at {list(chunk.offsets)} is damaged "
            f"({reason}): take another checkpoint, or copy this one again"
        )

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]

    def _place_of(self, key: str, chunk: Chunk) -> int:
        """Return the position of a chunk's first element in its file; checks the record the first time."""
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
                raise self.record_error(key, chunk, short_reason(error)) from error
        return self._places[chunk]


def _check_backend(folder: Path) -> None:
    path = folder / BACKEND_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} contains no {BACKEND_FILE}: it is not a torch_dist checkpoint of Megatron"
        )
    found = read_json_object(path)
    if found.get("sharded_backend") != BACKEND["sharded_backend"]:
        raise ValueError(
            f"{path} says {json.dumps(found)[:120]}: only {BACKEND['sharded_backend']!r} can be read"
        )


def _read_index(
    metadata: Metadata, folder: Path, wanted: Callable[[str], bool]
) -> tuple[frozenset[str], frozenset[str], dict[str, ShardedTensor]]:
    """Return the keys of objects, the keys of unwanted tensors, and the wanted tensors."""
    objects, others = set(), set()
    tensors = {}
    sizes: dict[Path, int] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise ValueError("a key is not text")
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
        raise ValueError(f"{str(counts)[:80]} is not a shape")
    return counts


def _check_tiling(key: str, shape: tuple[int, ...], chunks: list[Chunk]) -> None:
    """Check that chunks do not overlap and have as many elements as the tensor, so they cover it once."""
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
