"""The checkpoint of an import, cut into the records and files that the ranks of a parallel job save.

A job of T tensor-parallel and P pipeline-parallel ranks writes one file a rank. Matrices are cut along rows
or columns, gate and up one by one; a pipeline stage has its layers, the first one the embedding, the last
one the final norm and the output layer. With the distributed optimizer each rank saves its states as flat
float32 buffers: the master parameters and both moments, one record for each parameter.

The weights lie in the same records of the same files as a real job's. Its states differ in detail: buckets
are padded, norms are kept by every rank, a tied embedding has a bucket of its own. The states here are
holes of their true size that take no room on the disk, at 12 bytes a parameter. No record stands in a hole,
so whatever reads a state fails.
"""

from __future__ import annotations

import functools
import itertools
import math
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_exact.conversion.checkpoint_layout import BACKEND_FILE, INDEX_FILE, RELEASE, TRACKER
from megatron_exact.conversion.export_hf import open_checkpoint
from megatron_exact.conversion.tensors import as_tensor
from megatron_exact.conversion.torch_dist_reader import load_metadata
from megatron_exact.conversion.torch_dist_writer import Block, objects_of_release, write_torch_dist
from megatron_exact.model.family import LAYERS
from megatron_exact.model.hf_folder import hf_folder_of
from megatron_exact.model.shapes import ModelShape

RECORD_FILE = "__0_0.distcp"
STATES = ("param", "exp_avg", "exp_avg_sq")
RECORD_OVERHEAD_BYTES = 1300  # of the zip file around a tensor's bytes


def write_as_ranks(
    source: Path, target: Path, shape: ModelShape, *, tensor: int, pipeline: int, has_states: bool = False
) -> None:
    """Write an import again as a job of this layout saves it.

    Args:
        source: folder of the import.
        target: folder to make.
        shape: of the model.
        tensor: tensor-parallel ranks.
        pipeline: pipeline-parallel ranks.
        has_states: whether the distributed optimizer's states stand beside the weights.
    """
    folder = target / RELEASE
    folder.mkdir(parents=True)
    (target / TRACKER).write_text(RELEASE)
    shutil.copytree(hf_folder_of(source), hf_folder_of(target))
    whole = Metadata(state_dict_metadata={}, storage_data={})
    with open_checkpoint(source / RELEASE, shape) as stored:
        for rank in range(tensor * pipeline):
            blocks = list(_blocks_of_rank(stored, shape, rank, tensor, pipeline))
            part = target / f"rank-{rank}"
            part.mkdir()
            write_torch_dist(
                part,
                blocks,
                objects_of_release(shape.num_layers, qk_norm=shape.qk_norm) if rank == 0 else {},
            )
            name = f"__{rank}_0.distcp"
            (part / RECORD_FILE).rename(folder / name)
            _merge(whole, load_metadata(part / INDEX_FILE), name)
            shutil.copyfile(part / BACKEND_FILE, folder / BACKEND_FILE)
            shutil.rmtree(part)
            if has_states:
                _add_states(whole, folder / name, rank, blocks)
    (folder / INDEX_FILE).write_bytes(pickle.dumps(whole))


def _blocks_of_rank(
    stored: Any, shape: ModelShape, rank: int, tensor: int, pipeline: int
) -> Iterator[Block]:
    """What one rank saves of the weights; what tensor-parallel ranks share is saved by the first."""
    pipeline_rank, tensor_rank = divmod(rank, tensor)
    layers = range(
        shape.num_layers * pipeline_rank // pipeline, shape.num_layers * (pipeline_rank + 1) // pipeline
    )
    for key, whole in stored.tensors.items():
        leads: list[tuple[int, ...]] = [(layer,) for layer in layers]
        if not key.startswith(LAYERS):
            owner = 0 if key.startswith("embedding") else pipeline - 1
            leads = [()] if pipeline_rank == owner else []
        for lead in leads:
            pieces = list(_pieces(key, whole.shape[len(lead) :], tensor))
            for starts, extent in pieces[tensor_rank::tensor]:
                yield Block(
                    key=key,
                    global_shape=whole.shape,
                    offsets=(*lead, *starts),
                    shape=(*(1 for _ in lead), *extent),
                    dtype=whole.dtype,
                    parts=functools.partial(_read_piece, stored, key, lead, starts, extent),
                )


def _pieces(
    key: str, lengths: tuple[int, ...], tensor: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, shape) of the records of one layer; rank t has the pieces t, t + `tensor`, and so on."""
    if "norm" in key:
        yield (0,) * len(lengths), lengths
        return
    axis = 1 if key.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
    pieces = 2 * tensor if key.endswith("linear_fc1.weight") else tensor  # gate and up are cut one by one
    bounds = [lengths[axis] * piece // pieces for piece in range(pieces + 1)]
    for start, stop in itertools.pairwise(bounds):
        starts = tuple(start if a == axis else 0 for a in range(len(lengths)))
        yield starts, tuple(stop - start if a == axis else length for a, length in enumerate(lengths))


def _read_piece(
    stored: Any,
    key: str,
    lead: tuple[int, ...],
    starts: tuple[int, ...],
    extent: tuple[int, ...],
) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the bytes of one record's tensor: whole rows are read, then the rank's columns are taken."""
    whole = stored.tensors[key]
    lengths = whole.shape[len(lead) :]
    data = np.empty(extent[0] * math.prod(lengths[1:]) * whole.dtype.itemsize, np.uint8)
    stored.read_rows(key, lead[0] if lead else None, starts[0], extent[0], data)
    rows = as_tensor(data, whole.dtype).view(extent[0], *lengths[1:])
    if len(extent) > 1:
        rows = rows[:, starts[1] : starts[1] + extent[1]]
    yield rows.reshape(-1).view(torch.uint8).numpy()


def _merge(whole: Metadata, part: Metadata, name: str) -> None:
    """Add the index of one rank's file, which has this name now."""
    for index, info in part.storage_data.items():
        info.relative_path = name
        whole.storage_data[index] = info
    for key, entry in part.state_dict_metadata.items():
        known = whole.state_dict_metadata.setdefault(key, entry)
        if known is not entry:
            known.chunks.extend(entry.chunks)


def _add_states(whole: Metadata, file: Path, rank: int, blocks: list[Block]) -> None:
    """Flat buffers of one model-parallel rank, at the end of its file."""
    counts = [math.prod(block.shape) for block in blocks]
    starts = np.cumsum([0, *counts]).tolist()
    end = file.stat().st_size
    dtype = blocks[0].dtype
    for state in STATES:
        key = (
            f"optimizer.distributed.dp_group_idx_{rank}.gbuf_idx_0.dtype_({dtype}, torch.float32)."
            f"bucket_idx_0.{state}"
        )
        whole.state_dict_metadata[key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=torch.float32),
            size=torch.Size([starts[-1]]),
            chunks=[
                ChunkStorageMetadata(torch.Size([start]), torch.Size([count]))
                for start, count in zip(starts, counts, strict=False)
            ],
        )
        for start, count in zip(starts, counts, strict=False):
            length = 4 * count + RECORD_OVERHEAD_BYTES
            info = _StorageInfo(relative_path=file.name, offset=end, length=length)
            whole.storage_data[MetadataIndex(key, torch.Size([start]))] = info
            end += length
    with open(file, "r+b") as stream:
        stream.truncate(end)
