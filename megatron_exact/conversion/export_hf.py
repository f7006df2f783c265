"""Megatron checkpoint -> Hugging Face folder, a block of rows at a time.

Reads any torch_dist checkpoint of a GPTModel: any tensor and pipeline parallel layout, local or
Transformer Engine layers, with or without optimizer states, which are not read. It
needs only the checkpoint's folder, whose `hf/` contains config and tokenizer, and builds neither a model
nor a process group.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from megatron_exact.command_line import progress_bar
from megatron_exact.conversion import exported_files
from megatron_exact.conversion.checkpoint_layout import (
    CACHED_BYTES,
    find_iteration,
    in_model_order,
    is_extra_state,
    is_training_state,
    iteration_of,
    megatron_shapes,
    names_of,
    row_blocks,
)
from megatron_exact.conversion.exported_files import (
    LengthLimit,
    exported_window,
    origin_of,
    sampling_fields,
    write_files_beside_weights,
)
from megatron_exact.conversion.import_hf import DTYPES, Dtype, dtype_name
from megatron_exact.conversion.safetensors_files import (
    DTYPE_NAMES,
    INDEX_FILE,
    SINGLE_FILE,
)
from megatron_exact.conversion.tensors import WeightValues, as_tensor, row_runs, runs_of_part
from megatron_exact.conversion.torch_dist_reader import TorchDistCheckpoint
from megatron_exact.files import atomic_folder, write_json
from megatron_exact.integrity import OwnRun, read_seal
from megatron_exact.model.family import TensorName
from megatron_exact.model.hf_folder import CONFIG, hf_folder_of, read_hf_folder
from megatron_exact.model.shapes import ModelShape

DEFAULT_SHARD_BYTES = 5_000_000_000
WRITE_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class ExportSummary:
    """Summary of an export."""

    iteration: int | None
    """Iteration of the checkpoint; None for an import that was not trained."""
    parameters: int
    """Number of elements of all tensors."""
    num_bytes: int
    """Bytes of all tensors."""
    files: tuple[str, ...]
    """Names of the weight files."""
    dtypes: tuple[str, ...]
    """Names of the dtypes of the weights."""
    has_tokenizer: bool
    """Whether the checkpoint had tokenizer files."""
    window: int
    """`max_position_embeddings` of the export, tokens."""
    imported_window: int
    """`max_position_embeddings` of the imported config, tokens."""
    raised: tuple[LengthLimit, ...]
    """Other limits of length that were raised to the window, with the values that they had."""
    sampling: dict[str, Any]
    """Sampling fields of generation_config.json, which is copied unchanged."""
    warnings: tuple[str, ...]
    """Doubts about the weights, one line each."""


@dataclass(frozen=True, kw_only=True)
class HfTensor:
    """One tensor to write."""

    name: str
    """Hugging Face name."""
    source: TensorName
    """The Megatron tensor of which it is a part."""
    part: int
    """Number of the part."""
    layer: int | None
    """Number of the layer; None outside the layers."""
    shape: tuple[int, ...]
    """Shape of the tensor."""
    dtype: torch.dtype
    """Dtype in the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.shape[0] * self.row_bytes


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    *,
    iteration: int | None = None,
    dtype: Dtype = "keep",
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    window: int | None = None,
) -> ExportSummary:
    """Convert one iteration of a run, or an import, to a folder for `from_pretrained`.

    Args:
        checkpoint: folder of the run or of the import.
        output: folder to create.
        iteration: number of the iteration; None for the newest one.
        dtype: dtype of the weights in the files.
        shard_bytes: largest weight file, except that a larger tensor has a file of its own.
        window: `max_position_embeddings` of the export; None for the imported one or the longest rows of
            training, whichever is longer.

    Raises:
        ValueError: a missing, damaged or foreign checkpoint, values that are not finite, a window below the
            rows of training, or an output that exists; nothing is left.
    """
    if shard_bytes < 1:
        raise ValueError(
            f"a shard size of {shard_bytes} bytes has no room for a tensor: give a size such as 5GB"
        )
    folder = find_iteration(checkpoint, iteration)
    hf = read_hf_folder(hf_folder_of(checkpoint))
    run = exported_files.read_run(Path(checkpoint))
    refusal = OwnRun.of(run).refusal(iteration_of(folder) or 0, read_seal(folder))
    if refusal is not None:
        raise ValueError(f"{folder} {refusal}; put the right {folder.name} back, or export another one")
    if run is not None:
        exported_files.check_run_against_config(run, hf)
    window = exported_window(hf.shape, run, window)
    with atomic_folder(output) as building, open_checkpoint(folder, hf.shape) as stored:
        tensors = list(hf_tensors(stored, hf.shape, dtype))
        shards = _shards(tensors, shard_bytes)
        num_bytes = sum(tensor.num_bytes for tensor in tensors)
        reader, values = PartReader(stored, hf.shape), WeightValues()
        with progress_bar("export", num_bytes, "B") as bar:
            for name, members in shards.items():
                _write_shard(building / name, members, reader, values, bar.update)
        if (found := values.not_finite()) is not None:
            raise ValueError(
                f"{folder}: {found}: every output of the model would be NaN; export an earlier iteration "
                "(--iteration)" + ("" if dtype == "keep" else ", or keep the dtype (--dtype keep)")
            )
        if len(shards) > 1:
            index = {tensor.name: file for file, members in shards.items() for tensor in members}
            write_json(building / INDEX_FILE, {"metadata": {"total_size": num_bytes}, "weight_map": index})
        dtypes = sorted({dtype_name(tensor.dtype) for tensor in tensors})
        origin = origin_of(folder)
        raised = write_files_beside_weights(building, hf, run, origin=origin, dtypes=dtypes, window=window)
    return ExportSummary(
        iteration=origin["iteration"],
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        num_bytes=num_bytes,
        files=tuple(shards),
        dtypes=tuple(dtypes),
        has_tokenizer=hf.has_tokenizer,
        window=window,
        imported_window=hf.shape.max_position_embeddings,
        raised=raised,
        sampling=sampling_fields(hf),
        warnings=tuple(values.implausible()),
    )


def open_checkpoint(folder: Path, shape: ModelShape) -> TorchDistCheckpoint:
    """Open one iteration and check that it contains exactly the model of this shape.

    Raises:
        ValueError: the key and both shapes.
    """
    stored = TorchDistCheckpoint(folder, lambda key: not is_training_state(key))
    expected = megatron_shapes(shape)
    missing = sorted(set(expected) - set(stored.tensors))
    if missing:
        raise ValueError(
            f"{folder} lacks {missing[0]}, which hf/{CONFIG} asks for"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
            + ": checkpoint and config are not of one model"
        )
    objects = {key for key in stored.objects if not (is_training_state(key) or is_extra_state(key))}
    unknown = sorted((set(stored.tensors) - set(expected)) | objects)
    if unknown:
        raise ValueError(
            f"{folder} contains {unknown[0]}, which hf/{CONFIG} has no place for"
            + (f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else "")
            + ": checkpoint and config are not of one model"
        )
    for key, wanted in expected.items():
        tensor = stored.tensors[key]
        if tensor.shape != wanted:
            raise ValueError(
                f"{folder}: {key} is {list(tensor.shape)} where hf/{CONFIG} asks for {list(wanted)}: "
                "checkpoint and config are not of one model"
            )
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"{folder}: {key} is {dtype_name(tensor.dtype)}, which is not a dtype of weights"
            )
    return stored


def hf_tensors(stored: TorchDistCheckpoint, shape: ModelShape, dtype: Dtype = "keep") -> Iterator[HfTensor]:
    """Yield every Hugging Face tensor of a checkpoint, in model order."""
    for name, layer in in_model_order(shape):
        kept = stored.tensors[name.megatron].dtype
        for number, part in enumerate(name.parts):
            yield HfTensor(
                name=part.name.format(layer=layer),
                source=name,
                part=number,
                layer=layer,
                shape=part.lengths,
                dtype=kept if dtype == "keep" else DTYPES[dtype],
            )


class PartReader:
    """Reads rows of Hugging Face tensors out of a checkpoint.

    Args:
        stored: the checkpoint.
        shape: shape of the model.
    """

    def __init__(self, stored: TorchDistCheckpoint, shape: ModelShape) -> None:
        self._stored = stored
        self._runs = {name.megatron: row_runs(name, shape) for name in names_of(shape)}
        self._rows = np.empty(0, np.uint8)

    def read(self, tensor: HfTensor, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor in its own type; valid until the next call."""
        key = tensor.source.megatron
        kept = self._stored.tensors[key].dtype
        row_bytes = math.prod(tensor.shape[1:]) * kept.itemsize
        num_bytes = (stop - start) * row_bytes
        if self._rows.size < num_bytes:
            self._rows = np.empty(num_bytes, np.uint8)
        rows = self._rows[:num_bytes]
        for run in runs_of_part(self._runs[key], tensor.part, start, stop):
            first = (run.part_row - start) * row_bytes
            target = rows[first : first + run.rows * row_bytes]
            self._stored.read_rows(key, tensor.layer, run.row, run.rows, target)
        return as_tensor(rows, kept).view(stop - start, *tensor.shape[1:]).to(tensor.dtype)


def _shards(tensors: Sequence[HfTensor], shard_bytes: int) -> dict[str, list[HfTensor]]:
    """Return file name -> tensors, each file at most `shard_bytes` unless one tensor is larger."""
    groups: list[list[HfTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def _write_shard(
    path: Path,
    tensors: Sequence[HfTensor],
    reader: PartReader,
    values: WeightValues,
    on_bytes: Callable[[int], object],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.num_bytes],
        }
        end += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data start at a multiple of 8, as the format asks
    with open(path, "wb", buffering=0) as stream:
        _write(stream, memoryview(struct.pack("<Q", len(text)) + text))
        for tensor in tensors:
            for start, stop in row_blocks(tensor.shape[0], tensor.row_bytes, CACHED_BYTES):
                rows = reader.read(tensor, start, stop)
                values.look(tensor.name, rows)
                _write(stream, memoryview(rows.reshape(-1).view(torch.uint8).numpy()))
                on_bytes(rows.nbytes)
        os.fsync(stream.fileno())


def _write(stream: BinaryIO, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += stream.write(data[done : done + WRITE_BYTES])
