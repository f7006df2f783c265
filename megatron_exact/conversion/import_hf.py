"""Import a Hugging Face folder as a torch_dist checkpoint, with a record of where it came from.

It reads and writes the model once, a megabyte at a time (`checkpoint_layout.CACHED_BYTES`;
benchmarks/conversion.py measures time and memory), and builds neither a model nor a process group. The
checkpoint appears under its name when all its files are on disk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megatron_exact.command_line import progress_bar
from megatron_exact.conversion.checkpoint_layout import (
    CACHED_BYTES,
    RELEASE,
    ROTARY_FREQUENCIES,
    TRACKER,
    hf_shapes,
    layers_of,
    megatron_shapes,
    names_of,
    row_blocks,
)
from megatron_exact.conversion.safetensors_files import SafetensorsFolder
from megatron_exact.conversion.tensors import RowRun, WeightValues, as_tensor, row_runs, runs_of_rows
from megatron_exact.conversion.torch_dist_writer import Block, objects_of_release, write_torch_dist
from megatron_exact.data.hf_tokenizer import look_at_vocabulary
from megatron_exact.files import atomic_folder, fsync_path, sha256_file, write_json
from megatron_exact.model.families import family_of, matching_preset, nearest_preset, preset, require_preset
from megatron_exact.model.family import TensorName
from megatron_exact.model.hf_folder import (
    CARRIED_FILES,
    CONFIG,
    HF_FOLDER,
    IMPORT_RECORD,
    HfFolder,
    copy_files,
    read_hf_folder,
    read_json_object,
    stated_licence,
)
from megatron_exact.model.shapes import ModelShape, shape_record

Dtype = Literal["keep", "float32", "bfloat16"]
READ_BY_EXPORT = ("generation_config.json", "tokenizer_config.json")
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """Summary of an import."""

    shape: ModelShape
    """Shape of the model."""
    preset: str | None
    """Name of the preset with this shape, if any; the one that was asked for may have a shorter window."""
    nearly: tuple[str, list[str]] | None
    """Without such a preset: one that differs in one or two fields, and those; the config may be edited."""
    parameters: int
    """Number of elements of all tensors."""
    dtypes: tuple[str, ...]
    """Names of the dtypes in the checkpoint."""
    num_bytes: int
    """Bytes of all tensors in the checkpoint."""
    has_tokenizer: bool
    """Whether the folder had tokenizer files."""
    warnings: tuple[str, ...]
    """What was ignored or looks wrong, one line each."""


def import_hf(
    hf: str | Path, output: str | Path, *, dtype: Dtype = "keep", preset_name: str | None = None
) -> ImportSummary:
    """Convert a Hugging Face folder to a checkpoint that `--load` takes at any layout.

    Args:
        hf: folder with config.json and safetensors.
        output: folder to create.
        dtype: dtype of the weights in the checkpoint.
        preset_name: the preset that the folder's config must equal, if any; its window may be longer.

    Raises:
        ValueError: an unsupported, incomplete or damaged folder, values that are not finite, another shape
            than the preset's, or an output that exists; nothing is left.
    """
    if not Path(hf).is_dir():
        raise ValueError(f"{hf} is not a folder: give the folder of a Hugging Face model")
    folder = read_hf_folder(hf)
    for name in READ_BY_EXPORT:
        if name in folder.files:
            read_json_object(folder.path / name)  # else the run could not be exported
    if preset_name is not None:
        # What a model computes does not depend on its window, and an export promises its rows of training
        window = min(folder.shape.max_position_embeddings, preset(preset_name).max_position_embeddings)
        shape = replace(folder.shape, max_position_embeddings=window)
        require_preset(shape, preset_name, of=str(folder.path))
    doubts = look_at_vocabulary(folder.path, folder.shape.vocab_size)
    with atomic_folder(output) as building, open_weights(hf, folder.shape) as weights:
        types = check_weights(weights, folder.shape, dtype)
        shapes = megatron_shapes(folder.shape)
        sizes = {key: int(np.prod(shape)) for key, shape in shapes.items()}
        num_bytes = sum(size * types[key].itemsize for key, size in sizes.items())
        release = building / RELEASE
        release.mkdir()
        with progress_bar("import", num_bytes, "B") as bar:
            reader = BlockReader(weights, folder.shape)
            blocks = list(_blocks(reader, folder.shape, types, bar.update))
            hashes = write_torch_dist(
                release, blocks, objects_of_release(folder.shape.num_layers, qk_norm=folder.shape.qk_norm)
            )
        if (found := reader.values.not_finite()) is not None:
            raise ValueError(
                f"{hf}: {found}: training would spread them to every weight; copy the model again, or take "
                "an earlier state of it"
            )
        _write_hf_files(folder, building / HF_FOLDER, weights, types, hashes)
        tracker = building / TRACKER
        tracker.write_text(RELEASE)
        fsync_path(tracker)
    return ImportSummary(
        shape=folder.shape,
        preset=preset_name or matching_preset(folder.shape),
        nearly=None if preset_name else nearest_preset(folder.shape),
        parameters=sum(sizes.values()),
        dtypes=tuple(sorted({dtype_name(found) for found in types.values()})),
        num_bytes=num_bytes,
        has_tokenizer=folder.has_tokenizer,
        warnings=(*doubts, *weights.notes, *reader.values.implausible()),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: `bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def open_weights(hf: str | Path, shape: ModelShape) -> SafetensorsFolder:
    """Open a folder and give its tensors the names in the whole model, as transformers' loader does.

    Raises:
        ValueError: a folder that cannot be read, or two tensors that are one of the model.
    """
    names = family_of(shape).names
    weights = SafetensorsFolder(hf, head=names.head_weight)
    if 4 * shape.num_layers > len(weights.tensors):  # it has 9 a layer; before all names are made
        raise ValueError(
            f"{weights.folder}: config.json says num_hidden_layers {shape.num_layers}, but the files "
            f"contain {len(weights.tensors)} tensors in all: config.json and weights are not of one model"
        )
    weights.rename(_names_in_model(weights, shape))
    if shape.tied_embeddings and names.embedding_weight not in weights.tensors:
        # safetensors' save_model keeps one of two names for the same memory: the first in the alphabet
        weights.rename({names.head_weight: names.embedding_weight})
    weights.notes.extend(_notes_on_frequencies(weights, shape))
    return weights


def _names_in_model(weights: SafetensorsFolder, shape: ModelShape) -> dict[str, str]:
    """Return new names for tensors with a `base_prefix` too few (saved without a head) or too many."""
    family_names = family_of(shape).names
    known = {*hf_shapes(shape), family_names.head_weight}
    names = {}
    for name in weights.tensors:
        others = (name.removeprefix(family_names.base_prefix), family_names.base_prefix + name)
        if name not in known:
            names[name] = next((other for other in others if other in known), name)
    return names


def _notes_on_frequencies(weights: SafetensorsFolder, shape: ModelShape) -> list[str]:
    """Return a line on the first stored rotary table that differs from the config's, or nothing.

    The model computes its table from the config, so a stored one changes nothing. But it shows with which
    rope_theta and head_dim the model was saved. The base is read from the end of its first quarter, which
    Llama 3's scaling does not change, and half precision rounds it by 1 % at most.
    """
    for name, tensor in weights.buffers.items():
        if not name.endswith(ROTARY_FREQUENCIES) or tensor.dtype not in (*DTYPES.values(), torch.float16):
            continue
        head = f"{name} is ignored, as transformers does, but it "
        if tensor.shape != (shape.rotary_dim // 2,):
            wanted = f"head_dim {shape.head_dim} asks for {shape.rotary_dim // 2}"
            return [f"{head}is {list(tensor.shape)} where {wanted}"]
        data = bytearray(tensor.num_bytes)
        weights.read_tensor(tensor, memoryview(data))
        found = torch.frombuffer(data, dtype=tensor.dtype).double()
        place = shape.rotary_dim // 8
        exponent = -2 * place / shape.rotary_dim
        ratio = float(found[place]) / shape.rope_theta**exponent
        if place and not 0.95 < ratio < 1.05:
            base = math.exp(min(700, math.log(found[place]) / exponent)) if found[place] > 0 else math.nan
            return [
                f"{head}was made with rope_theta {base:.0f}, where config.json says {shape.rope_theta:g}"
            ]
    return []


def check_weights(
    weights: SafetensorsFolder, shape: ModelShape, dtype: Dtype = "keep"
) -> dict[str, torch.dtype]:
    """Check that the folder has every tensor of the shape and no other.

    Returns:
        Megatron key -> dtype in the checkpoint.

    Raises:
        ValueError: the tensor, what was found and what was expected.
    """
    expected = hf_shapes(shape)
    head = family_of(shape).names.head_weight
    missing = [name for name in expected if name not in weights.tensors]
    if missing == [head]:
        raise ValueError(
            f"{weights.folder} lacks {head}, which its config asks for: copy the model again, or set "
            "tie_word_embeddings to true in config.json if the output layer of the model is its embedding"
        )
    if missing:
        raise ValueError(
            f"{weights.folder} lacks {_some(missing)}, which its config asks for: copy the model again"
        )
    unused = sorted(set(weights.tensors) - set(expected))
    has_tied_head = unused == [head] and shape.tied_embeddings
    if unused and not has_tied_head:
        raise ValueError(
            f"{weights.folder} contains {_some(unused)}, which its config has no place for: "
            "config.json and weights are not of one model"
        )
    for name, wanted in expected.items():
        found = weights.tensors[name].shape
        if found != wanted:
            raise ValueError(
                f"{weights.folder}: {name} is {list(found)} where config.json asks for {list(wanted)}: "
                "config.json and weights are not of one model"
            )
    if has_tied_head:
        _check_tied_head(weights, head, family_of(shape).names.embedding_weight)
    return {name.megatron: _type_of(name, weights, shape, dtype) for name in names_of(shape)}


def _type_of(name: TensorName, weights: SafetensorsFolder, shape: ModelShape, dtype: Dtype) -> torch.dtype:
    if dtype != "keep":
        return DTYPES[dtype]
    found = {
        weights.tensors[part.name.format(layer=layer)].dtype
        for layer in layers_of(name, shape)
        for part in name.parts
    }
    if len(found) > 1:
        names = " and ".join(sorted(dtype_name(one) for one in found))
        raise ValueError(
            f"{weights.folder}: the tensors that become {name.megatron} are {names}, but it can have only "
            "one dtype: choose it by --dtype"
        )
    return found.pop()


def _check_tied_head(weights: SafetensorsFolder, head_name: str, embedding_name: str) -> None:
    """Check that head and embedding are equal as numbers; one may have a wider dtype."""
    head, embedding = weights.tensors[head_name], weights.tensors[embedding_name]
    same = head.shape == embedding.shape
    for start, stop in row_blocks(head.shape[0], max(head.row_bytes, embedding.row_bytes)) if same else ():
        pair = []
        for name, tensor in ((head_name, head), (embedding_name, embedding)):
            rows = np.empty((stop - start) * tensor.row_bytes, np.uint8)
            weights.read_rows(name, start, stop - start, memoryview(rows))
            pair.append(as_tensor(rows, tensor.dtype).float())
        # as bits too, so that the same NaN in both is reported as a NaN
        same = same and (torch.equal(*pair) or torch.equal(*(rows.view(torch.int32) for rows in pair)))
    if not same:
        raise ValueError(
            f"{weights.folder}: config.json ties the output layer to the embedding, but {head_name} "
            f"differs from {embedding_name}: set tie_word_embeddings to false if the model was trained so"
        )


def _some(names: list[str]) -> str:
    """Return the first names, with control characters escaped."""
    shown = ", ".join(repr(name[:80])[1:-1] for name in names[:3])
    return shown + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")


class BlockReader:
    """Reads fused rows from a Hugging Face folder.

    Args:
        weights: the folder.
        shape: shape of the model.

    Attributes:
        values: statistics of the values that were read, after conversion.
    """

    def __init__(self, weights: SafetensorsFolder, shape: ModelShape) -> None:
        self.values = WeightValues()
        self._weights = weights
        self._runs = {name.megatron: row_runs(name, shape) for name in names_of(shape)}
        self._source = np.empty(0, np.uint8)
        self._target = np.empty(0, np.uint8)

    def read(
        self, name: TensorName, layer: int | None, start: int, stop: int, dtype: torch.dtype
    ) -> Iterator[np.ndarray[Any, Any]]:
        """Yield rows [start, stop) of a fused tensor in `dtype`, uint8, a few at a time.

        Each array is valid until the next one is asked for.
        """
        parts = [part.name.format(layer=layer) for part in name.parts]
        first = self._weights.tensors[parts[0]]
        row_bytes = int(np.prod(first.shape[1:])) * dtype.itemsize
        runs = self._runs[name.megatron]
        for low, high in row_blocks(stop - start, row_bytes, CACHED_BYTES):
            self._target = _at_least(self._target, (high - low) * row_bytes)
            target = self._target[: (high - low) * row_bytes]
            for run in runs_of_rows(runs, start + low, start + high):
                place = (run.row - start - low) * row_bytes
                self._read_run(parts[run.part], run, dtype, target[place : place + run.rows * row_bytes])
            yield target

    def _read_run(self, name: str, run: RowRun, dtype: torch.dtype, rows: np.ndarray[Any, Any]) -> None:
        """Fill `rows` (uint8) with rows of one tensor of the folder, in `dtype`."""
        stored = self._weights.tensors[name]
        if stored.dtype == dtype:
            self._weights.read_rows(name, run.part_row, run.rows, memoryview(rows))
            self.values.look(name, as_tensor(rows, dtype))
            return
        self._source = _at_least(self._source, run.rows * stored.row_bytes)
        source = self._source[: run.rows * stored.row_bytes]
        self._weights.read_rows(name, run.part_row, run.rows, memoryview(source))
        converted = as_tensor(rows, dtype).copy_(as_tensor(source, stored.dtype))
        self.values.look(f"{name} as {dtype_name(dtype)}", converted)


def _at_least(buffer: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    return buffer if buffer.size >= size else np.empty(max(size, CACHED_BYTES), np.uint8)


def _blocks(
    reader: BlockReader,
    shape: ModelShape,
    types: dict[str, torch.dtype],
    on_bytes: Callable[[int], object],
) -> Iterator[Block]:
    """Yield the pieces that tile every tensor, tensor by tensor, layer by layer."""
    for name in names_of(shape):
        one = name.lengths
        dtype = types[name.megatron]
        row_bytes = int(np.prod(one[1:])) * dtype.itemsize
        for layer in layers_of(name, shape):
            for start, stop in row_blocks(one[0], row_bytes):

                def parts(
                    name: TensorName = name,
                    layer: int | None = layer,
                    start: int = start,
                    stop: int = stop,
                    dtype: torch.dtype = dtype,
                ) -> Iterator[np.ndarray[Any, Any]]:
                    for part in reader.read(name, layer, start, stop, dtype):
                        yield part
                        on_bytes(part.nbytes)

                yield Block(
                    key=name.megatron,
                    global_shape=(*((shape.num_layers,) if layer is not None else ()), *one),
                    offsets=(*((layer,) if layer is not None else ()), start, *(0 for _ in one[1:])),
                    shape=(*(() if layer is None else (1,)), stop - start, *one[1:]),
                    dtype=dtype,
                    parts=parts,
                )


def import_record(
    folder: HfFolder, weights: SafetensorsFolder, dtypes: dict[str, str], hashes: dict[str, str]
) -> dict[str, Any]:
    """Return the content of `hf/megatron_exact_import.json`: shape, licence, dtypes and source of a model.

    Args:
        folder: the Hugging Face folder that is imported.
        weights: its files of weights.
        dtypes: name of the dtype of each parameter.
        hashes: hashes of the files of the written checkpoint.
    """
    return {
        "format_version": 1,
        "preset": matching_preset(folder.shape),
        "licence": stated_licence(folder.path),
        "shape": shape_record(folder.shape),
        "dtypes": dtypes,
        "source": {
            "config_sha256": sha256_file(folder.path / CONFIG),
            "weights": [dataclasses.asdict(file) for file in weights.files],
        },
        "checkpoint": hashes,
    }


def _write_hf_files(
    folder: HfFolder,
    target: Path,
    weights: SafetensorsFolder,
    types: dict[str, torch.dtype],
    hashes: dict[str, str],
) -> None:
    target.mkdir()
    copy_files(folder.path, target, CARRIED_FILES)
    dtypes = {key: dtype_name(dtype) for key, dtype in types.items()}
    write_json(target / IMPORT_RECORD, import_record(folder, weights, dtypes, hashes))
