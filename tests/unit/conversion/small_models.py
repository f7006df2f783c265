"""Tiny Hugging Face folders with random weights, and checkpoints put together by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_exact.conversion.checkpoint_layout import hf_shapes
from megatron_exact.conversion.export_hf import open_checkpoint
from megatron_exact.conversion.tensors import as_tensor
from megatron_exact.conversion.torch_dist_writer import Block, objects_of_release, write_torch_dist
from megatron_exact.model.families import hf_config_of_shape
from megatron_exact.model.family import LAYERS
from megatron_exact.model.hf_folder import hf_folder_of, read_hf_folder
from megatron_exact.model.shapes import Llama3Scaling, ModelShape

LLAMA = ModelShape(
    architecture="llama",
    num_layers=2,
    hidden_size=48,
    ffn_hidden_size=56,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,  # not hidden_size / num_attention_heads
    vocab_size=70,
    max_position_embeddings=32_768,
    norm_epsilon=1e-5,
    rope_theta=500_000.0,
    rope_scaling=Llama3Scaling(factor=8.0),
    tied_embeddings=False,
    qkv_bias=False,
)
QWEN = dataclasses.replace(
    LLAMA,
    architecture="qwen2",
    num_query_groups=1,
    max_position_embeddings=4096,
    rope_theta=10_000.0,
    rope_scaling=None,
    tied_embeddings=True,
    qkv_bias=True,
)
QWEN3 = dataclasses.replace(LLAMA, architecture="qwen3", rope_scaling=None, qk_norm=True)
SHAPES = {
    "llama untied": LLAMA,
    "llama tied, all groups": dataclasses.replace(LLAMA, tied_embeddings=True, num_query_groups=4),
    "qwen2 tied": QWEN,
    "qwen2 untied, 2 groups": dataclasses.replace(QWEN, tied_embeddings=False, num_query_groups=2),
    "qwen3 untied, 2 groups": QWEN3,
    "mistral untied, 2 groups": dataclasses.replace(LLAMA, architecture="mistral", rope_scaling=None),
    "phi3 untied, 2 groups, half of each head turns": dataclasses.replace(
        LLAMA, architecture="phi3", head_dim=12, rope_scaling=None, rotary_fraction=0.5
    ),
    "olmo2 untied, 2 groups": dataclasses.replace(
        LLAMA, architecture="olmo2", head_dim=12, rope_scaling=None, qk_norm=True, post_norm=True
    ),
    "smollm3 tied, second layer without RoPE": dataclasses.replace(
        LLAMA, architecture="smollm3", rope_scaling=None, tied_embeddings=True, layers_without_rope=(1,)
    ),
}


def random_weights(
    shape: ModelShape, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """Hugging Face name -> tensor; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, lengths in hf_shapes(shape).items():
        noise = 0.3 * torch.randn(lengths, generator=generator)
        weights[name] = (noise + 1 if "norm" in name else noise).to(dtype)
    return weights


def write_model(
    folder: Path,
    shape: ModelShape,
    weights: dict[str, Tensor] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    num_files: int = 1,
) -> Path:
    """A Hugging Face folder; tensors go to the files in turn."""
    folder.mkdir(parents=True)
    weights = random_weights(shape, dtype) if weights is None else weights
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(hf_config_of_shape(shape, dtype=name)))
    if num_files == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        members = {key: weights[key] for key in list(weights)[number::num_files]}
        save_file(members, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(members, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder, read by the safetensors library."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def read_checkpoint(checkpoint: Path) -> dict[str, Tensor]:
    """Megatron key -> whole tensor, read by torch's own loader."""
    import torch.distributed.checkpoint as torch_checkpoint

    folder = checkpoint / "release"
    with open_checkpoint(folder, read_hf_folder(hf_folder_of(checkpoint)).shape) as stored:
        tensors = {key: torch.empty(t.shape, dtype=t.dtype) for key, t in stored.tensors.items()}
    torch_checkpoint.load(tensors, storage_reader=torch_checkpoint.FileSystemReader(folder), no_dist=True)
    return tensors


Cut = Callable[[str, tuple[int, ...]], Iterator[tuple[tuple[int, ...], tuple[int, ...]]]]


def whole(key: str, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """One record a tensor."""
    yield (0,) * len(shape), shape


def as_ranks(key: str, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, shape) of the records that two tensor-parallel ranks write, layer by layer."""
    layered = key.startswith(LAYERS)
    lead = [(layer,) for layer in range(shape[0])] if layered else [()]
    lengths = shape[1:] if layered else shape
    axis = 1 if key.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
    pieces = 1 if "norm" in key else 4 if key.endswith("linear_fc1.weight") else 2
    bounds = np.linspace(0, lengths[axis], pieces + 1).astype(int).tolist()
    for layer in lead:
        for low, high in itertools.pairwise(bounds):
            starts = tuple(low if a == axis else 0 for a in range(len(lengths)))
            extent = tuple(high - low if a == axis else n for a, n in enumerate(lengths))
            yield (*layer, *starts), (*(1 for _ in layer), *extent)


def write_checkpoint(
    checkpoint: Path,
    tensors: dict[str, Tensor],
    num_layers: int,
    *,
    cut: Cut = whole,
    objects: dict[str, bytes] | None = None,
    iteration: int | None = None,
) -> Path:
    """A checkpoint folder with these tensors, in records as `cut` says; its `hf` is not made."""
    name = "release" if iteration is None else f"iter_{iteration:07d}"
    folder = checkpoint / name
    folder.mkdir(parents=True)
    blocks = [
        Block(
            key=key,
            global_shape=tuple(tensor.shape),
            offsets=offsets,
            shape=extent,
            dtype=tensor.dtype,
            parts=lambda t=tensor, o=offsets, e=extent: iter(  # type: ignore[misc]
                [cut_out(t, o, e).reshape(-1).contiguous().view(torch.uint8).numpy()]
            ),
        )
        for key, tensor in tensors.items()
        for offsets, extent in cut(key, tuple(tensor.shape))
    ]
    qk_norm = any("q_layernorm" in key for key in tensors)
    write_torch_dist(folder, blocks, {**objects_of_release(num_layers, qk_norm=qk_norm), **(objects or {})})
    tracker = "release" if iteration is None else str(iteration)
    (checkpoint / "latest_checkpointed_iteration.txt").write_text(tracker)
    return checkpoint


def cut_out(tensor: Tensor, offsets: tuple[int, ...], extent: tuple[int, ...]) -> Tensor:
    """A rectangle of a tensor, dense."""
    for axis, (start, length) in enumerate(zip(offsets, extent, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor.contiguous()


def changed_checkpoint(
    source: Path, target: Path, change: Callable[[dict[str, Tensor]], None], *, cut: Cut = whole
) -> Path:
    """A checkpoint with the tensors of another one after `change`, intact in every other respect."""
    tensors = read_checkpoint(source)
    change(tensors)
    num_layers = read_hf_folder(hf_folder_of(source)).shape.num_layers
    write_checkpoint(target, tensors, num_layers, cut=cut)
    shutil.copytree(hf_folder_of(source), hf_folder_of(target))
    return target


def flip_bit(file: Path, position: int) -> None:
    """Change one bit of a file."""
    with open(file, "r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))


def rows_of(stored: object, key: str, layer: int | None, start: int, stop: int) -> Tensor:
    """Rows of a tensor through our reader."""
    tensor = stored.tensors[key]  # type: ignore[attr-defined]
    tail = tensor.shape[(0 if layer is None else 1) + 1 :]
    data = np.empty((stop - start) * int(np.prod(tail)) * tensor.dtype.itemsize, np.uint8)
    stored.read_rows(key, layer, start, stop - start, data)  # type: ignore[attr-defined]
    return as_tensor(data, tensor.dtype).view(stop - start, *tail)
