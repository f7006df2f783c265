"""Reading the weights of a Hugging Face folder: safetensors only, nothing mapped, nothing trusted.

A safetensors file is 8 bytes (little endian length N of the header), N bytes of JSON (name -> dtype,
shape, [begin, end) in the data), then the data (https://github.com/huggingface/safetensors, "Format").
Every number in it is checked against the size of the file before it is used: tensors fill the data without
gap or overlap.

The package `safetensors` checks headers, too, but its reader maps the file: one that is cut while it is
read ends the process by SIGBUS without a message, and every page that was read counts as memory of the job.
Here rows are read by `preadv` into one buffer, and an error names file, tensor and remedy.

Which files of a folder are the model follows transformers' loader (5.23, `_get_resolved_checkpoint_files`),
except that it reads `model.safetensors` without a look at the index: here an index that names other files,
all of them there, is an error, because either may be what an earlier save left behind.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_exact.conversion.checkpoint_layout import is_buffer
from megatron_exact.json_input import parse_json_object
from megatron_exact.model.family import HfNames
from megatron_exact.model.hf_folder import file_inside, read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LARGEST_HEADER_BYTES = 16 << 20  # 100,000 tensors
LARGEST_NUM_AXES = 8
READ_BYTES = 8 << 20
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Dtypes of weights; any other means a quantized model."""
BUFFER_DTYPES = {
    **DTYPES,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""Dtypes of buffers, which are not imported."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHER_SUFFIXES = (".gguf", ".msgpack", ".h5")
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """File, dtype, shape and offset of a tensor."""

    file: Path
    """Path of its file."""
    dtype: torch.dtype
    """Dtype of its elements."""
    shape: tuple[int, ...]
    """Shape; the data are row-major."""
    offset: int
    """First byte in the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """One safetensors file, for the record of an import."""

    name: str
    """Name in the folder."""
    bytes: int
    """Size of the file."""
    header_sha256: str
    """Hash of length and header: names, dtypes, shapes and offsets of its tensors."""


class SafetensorsFolder:
    """The tensors of a folder, read in rows by plain reads.

    `tensors` has what is learned, `buffers` what the model computes itself (`BUFFERS`), by the names
    in the files; `notes` has a line for each thing that was ignored.

    Args:
        folder: Hugging Face model folder.
        head: tensor of the output layer; index and files of a tied model may disagree about it.

    Raises:
        ValueError: no safetensors, or an incomplete or damaged folder, with file and remedy.
    """

    def __init__(self, folder: str | Path, *, head: str = HfNames().head_weight) -> None:
        self.folder = Path(folder)
        self.tensors: dict[str, StoredTensor] = {}
        self.buffers: dict[str, StoredTensor] = {}
        self.files: list[WeightFile] = []
        self.notes: list[str] = []
        self._descriptors: dict[Path, int] = {}
        names, weight_map = _weight_files(self.folder, self.notes)
        for name in names:
            header, entry = read_header(file_inside(self.folder, name))
            self.files.append(entry)
            for key, tensor in header.items():
                if is_buffer(key):
                    self.buffers[key] = tensor
                    continue
                if key in self.tensors:
                    raise ValueError(
                        f"{self.folder}: {key[:80]!r} is in {self.tensors[key].file.name} and in "
                        f"{name}: remove the file that does not belong to the model"
                    )
                self.tensors[key] = tensor
        if weight_map is not None:
            _check_weight_map(self.folder, weight_map, self.tensors, head)

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def rename(self, names: dict[str, str]) -> None:
        """Give tensors other names, old -> new.

        Raises:
            ValueError: two tensors would have one name.
        """
        renamed: dict[str, str] = {}
        for old in self.tensors:
            new = names.get(old, old)
            if new in renamed:
                raise ValueError(
                    f"{self.folder} contains {renamed[new][:80]!r} and {old[:80]!r}, which are one tensor "
                    "of the model: remove the file that does not belong to it"
                )
            renamed[new] = old
        self.tensors = {new: self.tensors[old] for new, old in renamed.items()}

    def read_rows(self, name: str, row: int, rows: int, out: memoryview) -> None:
        """Fill `out` (bytes) with rows [row, row + rows) of a tensor.

        Raises:
            ValueError: the file ends early.
        """
        tensor = self.tensors[name]
        assert 0 <= row <= row + rows <= tensor.shape[0]
        assert len(out) == rows * tensor.row_bytes
        read_fully(self._descriptor(tensor.file), out, tensor.offset + row * tensor.row_bytes, tensor.file)

    def read_tensor(self, tensor: StoredTensor, out: memoryview) -> None:
        """Fill `out` (bytes) with a whole tensor of one of the files.

        Raises:
            ValueError: the file ends early.
        """
        read_fully(self._descriptor(tensor.file), out, tensor.offset, tensor.file)

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]


def read_fully(descriptor: int, out: memoryview, offset: int, where: Path) -> None:
    """Fill `out` from a file.

    Raises:
        ValueError: the file ends early.
    """
    done = 0
    while done < len(out):
        count = os.preadv(descriptor, [out[done : done + READ_BYTES]], offset + done)
        if count == 0:
            raise ValueError(f"{where} ended early: it has changed while it was read; copy it again")
        done += count


def read_header(file: Path) -> tuple[dict[str, StoredTensor], WeightFile]:
    """Return the tensors of one file by name, and its record.

    Raises:
        ValueError: the file is not a safetensors file, or is damaged or cut off.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise _damaged(file, f"has {size} bytes, no header")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, LARGEST_HEADER_BYTES):
            raise _damaged(
                file,
                f"announces a header of {length:,} bytes, of {size:,} in all and "
                f"{LARGEST_HEADER_BYTES:,} allowed",
            )
        raw = stream.read(length)
    header = parse_json_object(
        raw, f"the header of {file}", "it is not a whole safetensors file, copy it again"
    )
    header.pop("__metadata__", None)
    data_start = 8 + length
    tensors = {name: _entry(file, name, value, data_start) for name, value in header.items()}
    _check_places(file, tensors, data_start, size)
    entry = WeightFile(name=file.name, bytes=size, header_sha256=hashlib.sha256(prefix + raw).hexdigest())
    return tensors, entry


def _damaged(file: Path, what: str) -> ValueError:
    return ValueError(f"{file} {what}: it is not a whole safetensors file, copy it again")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _entry(file: Path, name: str, value: Any, data_start: int) -> StoredTensor:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= set(value):
        raise _damaged(file, f"describes tensor {name[:80]!r} without dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if (
        not isinstance(shape, list)
        or len(shape) > LARGEST_NUM_AXES
        or not all(_is_count(length) for length in shape)
    ):
        raise _damaged(file, f"gives tensor {name[:80]!r} the shape {str(shape)[:80]}")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _damaged(file, f"gives tensor {name[:80]!r} the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(o) for o in offsets):
        raise _damaged(file, f"places tensor {name[:80]!r} at {str(offsets)[:80]}")
    wanted = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != wanted:
        raise _damaged(
            file,
            f"gives tensor {name[:80]!r} {offsets[1] - offsets[0]:,} bytes where {dtype} {shape} "
            f"takes {wanted:,}",
        )
    dtypes = BUFFER_DTYPES if is_buffer(name) else DTYPES
    if dtype not in dtypes:
        raise ValueError(
            f"{file}: tensor {name[:80]!r} is {dtype}: only {', '.join(DTYPES)} can be imported; a "
            "quantized model must be converted to one of these first"
        )
    return StoredTensor(file=file, dtype=dtypes[dtype], shape=tuple(shape), offset=data_start + offsets[0])


def _check_places(file: Path, tensors: dict[str, StoredTensor], data_start: int, size: int) -> None:
    """Check that tensors follow one another without gap or overlap and end with the file."""
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset != end:
            relation = "overlaps the tensor" if tensor.offset < end else "leaves a gap after what is"
            raise _damaged(file, f"has tensor {name[:80]!r} where it {relation} before it")
        end += tensor.num_bytes
    if end != size:
        raise _damaged(file, f"has {size:,} bytes where its header asks for {end:,}")


def _weight_files(folder: Path, notes: list[str]) -> tuple[list[str], dict[str, str] | None]:
    """Return the names of the weight files of a folder, and the index if it names them."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give a Hugging Face model folder")
    if (folder / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"{folder} contains {ADAPTER_CONFIG}: transformers would change the model by that adapter; "
            "merge it into the model first (peft's merge_and_unload), or remove its files"
        )
    for name in (SINGLE_FILE, INDEX_FILE):
        if (folder / name).exists() and not (folder / name).is_file():
            raise ValueError(f"{folder / name} is not a regular file: copy the model again")
    has_single, has_index = (folder / SINGLE_FILE).is_file(), (folder / INDEX_FILE).is_file()
    if not has_single and not has_index:
        raise ValueError(_no_weights(folder))
    if not has_index:
        return [SINGLE_FILE], None
    weight_map = read_json_object(file_inside(folder, INDEX_FILE)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        if has_single:
            raise ValueError(
                f"{folder} contains {SINGLE_FILE} and an {INDEX_FILE} without a weight_map: remove the one "
                "that is not the model"
            )
        raise ValueError(f"{folder / INDEX_FILE} has no weight_map: copy it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        plain = name == os.path.basename(name) and name.isprintable() and not name.startswith(".")
        if not plain or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{folder / INDEX_FILE} names {name[:80]!r}, which is not a .safetensors file of the "
                "folder: a model consists of files in its own folder"
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if has_single and SINGLE_FILE not in names:
        if not missing:
            raise ValueError(
                f"{folder} contains {SINGLE_FILE} and an {INDEX_FILE} that names {names[0]}, which is "
                "there as well: remove the one that is not the model"
            )
        # save_pretrained over a folder of shards removes the shards and leaves their index
        notes.append(f"{INDEX_FILE} names {missing[0]}, which is gone: {SINGLE_FILE} is read instead")
        return [SINGLE_FILE], None
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]}, which {INDEX_FILE} names: copy the missing shard")
    return names, {str(key): str(name) for key, name in weight_map.items()}


def _no_weights(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())

    def first(*suffixes: str) -> str | None:
        return next((repr(name)[1:-1] for name in names if name.endswith(suffixes)), None)

    if shard := first(".safetensors"):
        return (
            f"{folder} contains {shard} but neither {SINGLE_FILE} nor {INDEX_FILE}: copy the index of the "
            f"shards as well, or call the file {SINGLE_FILE} if it is the whole model"
        )
    if pickle := first(*PICKLE_SUFFIXES):
        return (
            f"{folder} contains {pickle} and no safetensors: such files can run code when they are opened "
            "and are not read here; take the safetensors of the same model, or convert them where you "
            "trust them: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    if other := first(*OTHER_SUFFIXES):
        return f"{folder} contains {other} and no safetensors: take the safetensors of the same model"
    return f"{folder} contains no {SINGLE_FILE} and no {INDEX_FILE}: give a Hugging Face model folder"


def _check_weight_map(
    folder: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor], head: str
) -> None:
    """Check that index and shards agree, except in buffers and in the output layer of a tied model.

    Savers that leave these out of the files may keep them in the index, and the other way round.
    """

    def counts(name: str) -> bool:
        return name != head and not is_buffer(name)

    for key, file in weight_map.items():
        if counts(key) and (key not in tensors or tensors[key].file.name != file):
            raise ValueError(
                f"{folder / INDEX_FILE} says tensor {key[:80]!r} is in {file}, where it is not: "
                "copy index and shards of one model again"
            )
    unlisted = sorted(key for key in tensors if counts(key) and key not in weight_map)
    if unlisted:
        raise ValueError(
            f"{folder}: {tensors[unlisted[0]].file.name} contains tensor {unlisted[0][:80]!r}, which "
            f"{INDEX_FILE} does not name: copy index and shards of one model again"
        )
