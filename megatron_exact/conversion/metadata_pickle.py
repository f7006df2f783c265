"""Opening the pickles inside a torch_dist checkpoint without running what they say.

`.metadata` is a pickle, and each tensor record holds a small one. Here only the classes that describe
tensors can be made from them; any other name is refused, so a prepared file cannot run code. Python's own
unpickler class is used, not the C one: its memo is a dict, which a prepared index cannot blow up.
"""

from __future__ import annotations

import collections
import io
import math
import pathlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.serialization
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata

LARGEST_METADATA_BYTES = 512 << 20  # thousands of ranks
LARGEST_RECORD_PICKLE_BYTES = 1 << 16
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
    # the folder that the writer was told, which is not looked at
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib", "WindowsPath"): pathlib.PureWindowsPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "WindowsPath"): pathlib.PureWindowsPath,
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Unpickler(pickle._Unpickler):
    """Makes the listed classes and nothing else."""

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
    """The `.metadata` of a checkpoint.

    Raises:
        ValueError: not such a file, damaged, or one that asks for foreign classes.
    """
    size = file.stat().st_size
    if size > LARGEST_METADATA_BYTES:
        raise ValueError(f"{file} has {size:,} bytes, more than any checkpoint's: copy it again")
    try:
        found = _Unpickler(io.BytesIO(file.read_bytes()), _CLASSES).load()
    except Exception as error:  # damaged bytes may raise anything
        raise ValueError(f"{file} cannot be read ({describe(error)}): copy it again") from error
    if not isinstance(found, Metadata):
        raise ValueError(f"{file} holds no metadata of a checkpoint: copy it again")
    return found


def describe(error: BaseException) -> str:
    """A short reason."""
    return (str(error) or type(error).__name__)[:200]


@dataclass(frozen=True, kw_only=True)
class RecordTensor:
    """The tensor that the `data.pkl` of a record describes."""

    storage: str
    """Name of its bytes in the record."""
    dtype: torch.dtype
    """Of its elements."""
    shape: tuple[int, ...]
    """Row-major and without gaps."""
    offset: int
    """Its first element in the storage."""


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
    """In the place of torch._utils._rebuild_tensor_v2: a description instead of a tensor."""
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
            raise pickle.UnpicklingError("it refers to something that is no storage")
        if storage_type.dtype is None or not isinstance(name, str):
            raise pickle.UnpicklingError("it refers to a storage without a type")
        return name, storage_type.dtype


_RECORD_CLASSES = {
    **_STORAGE_TYPES,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("collections", "OrderedDict"): collections.OrderedDict,
}


def load_record_tensor(data: bytes) -> RecordTensor:
    """What a record's `data.pkl` describes.

    Raises:
        ValueError: damaged, or anything but one dense tensor.
    """
    try:
        found = _RecordUnpickler(io.BytesIO(data), _RECORD_CLASSES).load()
    except Exception as error:  # damaged bytes may raise anything
        raise ValueError(describe(error)) from error
    if not isinstance(found, RecordTensor):
        raise ValueError("it holds no tensor")
    return found
