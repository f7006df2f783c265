"""Reading the pickles of a torch_dist checkpoint without running what they ask for.

A checkpoint holds pickles in four places, and whoever can write the folder can rewrite them and their
hashes. Each place has a reader that makes listed classes only and rejects every other name:

`load_metadata`        `.metadata`: the classes that describe tensors and where they lie.
`load_record_tensor`   `data.pkl` of a tensor record, read by the conversion tools: one dense tensor.
`load_object`          a byte entry (`common_state`, `rng_state`, optimizer and rerun states), or
                       `common.pt`: torch's weights-only reader with the classes that Megatron registers.
`load_extra_state`     the pickle inside a byte entry of Transformer Engine (`_extra_state`): tensors and
                       recipes.

`.metadata` and the extra states are read by Python's unpickler class, not the C one: its memo is a dict,
which a prepared index cannot blow up, and it can be kept from changing a class itself (`load_build`).
"""

from __future__ import annotations

import collections
import io
import math
import pathlib
import pickle
import re
import sys
import types
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.serialization
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata

from megatron_exact.conversion.names import COMMON_STATE
from megatron_exact.files import read_regular_file

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
    """The `.metadata` of a checkpoint.

    Raises:
        ValueError: not such a file, damaged, or one that asks for foreign classes.
    """
    return parse_metadata(read_regular_file(file, LARGEST_METADATA_BYTES), file)


def parse_metadata(data: bytes, file: Path) -> Metadata:
    """The content of a `.metadata`.

    Args:
        data: the bytes.
        file: where they were read, for an error.

    Raises:
        ValueError: damaged, or it asks for foreign classes.
    """
    try:
        found = _Unpickler(io.BytesIO(data), _CLASSES).load()
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


def load_object(stream: io.BytesIO | str | Path, source: str) -> Any:
    """What torch.save wrote, through torch's weights-only reader.

    The classes are torch's own and those registered by `torch.serialization.add_safe_globals`, which
    Megatron does for its own when it is imported.

    Args:
        stream: bytes in memory, or a file.
        source: its name in an error.

    Raises:
        ValueError: damaged, or it asks for anything else; nothing of it was run.
    """
    data = stream if isinstance(stream, io.BytesIO) else io.BytesIO(read_regular_file(Path(stream)))
    try:
        return torch.load(data, weights_only=True)
    except Exception as error:  # damaged bytes may raise anything
        raise ValueError(f"{source} cannot be read ({_reason(error)}): {REMEDY}") from error


def stored_iteration(checkpoint: Path, metadata: Metadata) -> int | None:
    """The iteration that a checkpoint's own state names; None where that cannot be found.

    Read without any class of Megatron: whatever the state asks for becomes an inert stand-in.
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


REMEDY = "nothing of it was run; take a checkpoint whose origin you know, or copy this one again"


def _reason(error: Exception) -> str:
    """One line for torch's paragraphs about its weights-only reader."""
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
    """The state of a Transformer Engine module, which is a pickle inside a byte tensor.

    Transformer Engine itself would unpickle these bytes without a list of classes.

    Args:
        data: the bytes.
        source: their name in an error.

    Raises:
        ValueError: damaged, or it asks for anything but tensors and recipes; nothing of it was run.
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
        raise ValueError(f"{source} cannot be read ({describe(error)}): {REMEDY}") from error
