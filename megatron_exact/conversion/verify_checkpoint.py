"""Verify a checkpoint: compare its tensors and its logits with the Hugging Face model.

Without the Hugging Face folder, files are compared with integrity.json, keys and shapes with
hf/config.json, every record with its CRC-32, and every number must be finite; each byte is read once for
all of this (`RecordScan`). With it, the configs are compared, each tensor bit for bit after the mapping,
and the logits of both models.

Where the dtypes differ, the side that was made from the other must equal the converted other side. A
folder counts as made from the checkpoint only if its record names this checkpoint by its content; any other
is the source. So float32 imported from bfloat16 is compared with every bit, and a comparison of rounded
numbers is marked as such.

Weights that agree bit for bit can still be used wrongly: rotary scaling left out is exact at
position 0 and wrong far out. So the same tokens go through Megatron's GPTModel and through transformers, in
float32 on the CPU: some at the beginning of the window, some in its middle and some beyond the original
length of the rotary embedding, in one short row whose positions jump. Both models then attend over real
distances of thousands of tokens at the cost of a few dozen. The models are in memory one after the other.

Megatron's model (one process, local layer spec) only verifies a conversion. The checkpoint is read by our
own reader. Megatron numbers the tokens of a row without gaps; here its own table
of rotary frequencies is computed to the last position and the rows of the wanted positions are taken out of
it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch
from isal.isal_zlib import crc32
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from megatron_exact.command_line import progress_bar
from megatron_exact.conversion.checkpoint_layout import (
    CACHED_BYTES,
    find_iteration,
    iteration_of,
    names_of,
    row_blocks,
)
from megatron_exact.conversion.export_hf import (
    HfTensor,
    PartReader,
    hf_tensors,
    open_checkpoint,
)
from megatron_exact.conversion.exported_files import (
    SUMMARY,
    is_export_of,
    length_limits,
    reached_tokens,
    read_run,
)
from megatron_exact.conversion.import_hf import check_weights, dtype_name, open_weights
from megatron_exact.conversion.safetensors_files import SafetensorsFolder, read_fully
from megatron_exact.conversion.tensors import WeightValues, as_tensor, row_runs, runs_of_rows
from megatron_exact.conversion.torch_dist_reader import (
    CRC_DIFFERS,
    Chunk,
    StoredData,
    TorchDistCheckpoint,
)
from megatron_exact.files import open_regular_file, sha256_file
from megatron_exact.integrity import OwnRun, check_integrity, read_seal
from megatron_exact.lineage import trained_row_tokens
from megatron_exact.model.family import LAYERS
from megatron_exact.model.hf_folder import HfFolder, hf_folder_of, read_hf_folder
from megatron_exact.model.shapes import ModelShape, YarnScaling, compare_shapes, megatron_arguments_of


@dataclass(frozen=True, kw_only=True)
class CheckpointCheck:
    """One line of the verification's table."""

    name: str
    """What was checked."""
    passed: bool
    """Whether it is as it must be."""
    shape: tuple[int, ...] | None = None
    """Shape of the tensor, if it is one."""
    max_difference: float | None = None
    """Largest absolute difference of two elements."""
    mean_difference: float | None = None
    """Mean absolute difference."""
    is_rounded: bool = False
    """Whether one side was rounded to the dtype of the other before the comparison."""
    detail: str = ""
    """The fault, or what was found."""

    def line(self, width: int) -> str:
        """Return the line, with its name padded to `width`."""
        shape = "x".join(map(str, self.shape)) if self.shape is not None else ""
        numbers = " ".join(
            f"{'' if value is None else format(value, '.2e'):>9}"
            for value in (self.max_difference, self.mean_difference)
        )
        verdict = "FAILED" if not self.passed else "rounded" if self.is_rounded else "ok"
        return f"{self.name:<{width}} {shape:>14} {numbers} {verdict:>7}  {self.detail}".rstrip()


def table_header(width: int) -> str:
    """Return the heading above `CheckpointCheck.line`."""
    return f"{'name':<{width}} {'shape':>14} {'max diff':>9} {'mean diff':>9} {'verdict':>7}"


WINDOW_TOKENS = 16
TOLERANCE = 1e-4
"""Allowed difference, as a share of the largest logit or of 1 if that is larger.

float32 sums of two programs differ by less.
"""
LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Key of a layer in a checkpoint -> parameter of the local layer spec, where they differ."""


def verify_checkpoint(
    checkpoint: str | Path,
    *,
    hf: str | Path | None = None,
    iteration: int | None = None,
    with_logits: bool = True,
) -> Iterator[CheckpointCheck]:
    """Yield all checks of a checkpoint, one after the other.

    Args:
        checkpoint: folder of a run or of an import.
        hf: the Hugging Face folder that it must equal; None checks the checkpoint by itself.
        iteration: number of the iteration; None for the one that the tracker names.
        with_logits: whether to compare logits, which needs memory for one float32 model.

    Raises:
        ValueError: a folder that cannot be opened at all.
    """
    folder = find_iteration(checkpoint, iteration)
    own = read_hf_folder(hf_folder_of(checkpoint))
    with contextlib.ExitStack() as opened:
        stored: TorchDistCheckpoint | str
        try:
            stored = opened.enter_context(open_checkpoint(folder, own.shape))
        except ValueError as error:
            stored = str(error)
        scan = None if isinstance(stored, str) else RecordScan(stored, own.shape, with_values=hf is None)
        yield from _file_checks(folder, scan)
        if hf is None:
            yield from _own_checks(stored, own.shape, scan)
            return
        yield from _comparison(Path(checkpoint), folder, own, hf, stored, with_logits)


def _comparison(
    checkpoint: Path,
    folder: Path,
    own: HfFolder,
    hf: str | Path,
    stored: TorchDistCheckpoint | str,
    with_logits: bool,
) -> Iterator[CheckpointCheck]:
    """Compare a checkpoint, or the reason why it cannot be opened, with a Hugging Face folder."""
    theirs = read_hf_folder(hf)
    window = theirs.shape.max_position_embeddings
    differences = compare_shapes(replace(own.shape, max_position_embeddings=window), theirs.shape)
    yield CheckpointCheck(name="config.json", passed=not differences, detail="; ".join(differences))
    imported = own.shape.max_position_embeddings
    yield _window_check(window, imported, trained_row_tokens(read_run(checkpoint)))
    is_export = is_export_of(hf, folder)
    if is_export:
        reached = reached_tokens(own.shape, read_run(checkpoint), window)
        yield _limits_check(theirs, reached)
    if not differences:
        yield from compare_weights(stored, hf, own.shape, is_export=is_export)
    if with_logits:
        shape = replace(own.shape, max_position_embeddings=max(window, imported))
        yield from compare_logits(folder, shape, hf, is_export=is_export)


def _window_check(window: int, imported: int, trained: int | None) -> CheckpointCheck:
    """Check the window of an export, which may differ from the import's: weights do not depend on it."""
    detail = [f"{window}"]
    if window != imported:
        detail.append(f"{imported} as imported")
    if trained is not None and window < trained:
        detail.append(f"below the {trained} tokens of the rows of training: export again")
    passed = trained is None or window >= trained
    return CheckpointCheck(name="max_position_embeddings", passed=passed, detail=", ".join(detail))


def _limits_check(export: HfFolder, reached: int) -> CheckpointCheck:
    """Check that no file of an export limits the length to less than the model was trained on."""
    short = [
        f"{limit} is below {reached} tokens: export again"
        for limit in length_limits(export.path, export.config)
        if limit.tokens < reached
        and limit.field != "max_position_embeddings"  # which has a line of its own
    ]
    return CheckpointCheck(name="other limits of length", passed=not short, detail="; ".join(short))


class RecordScan:
    """Checks the records of a checkpoint while their files are hashed, so that each byte is read once.

    Args:
        stored: the checkpoint. Records that are whole are not summed again when it is read later.
        shape: shape of the model.
        with_values: whether to look at the values of the weights, too.

    Attributes:
        with_values: see above.
        faults: Hugging Face name -> first fault of the records that contain a part of the tensor.
        values: Hugging Face name -> what its values are.
    """

    def __init__(self, stored: TorchDistCheckpoint, shape: ModelShape, *, with_values: bool) -> None:
        self.with_values = with_values
        self.faults: dict[str, str] = {}
        self.values: defaultdict[str, WeightValues] = defaultdict(WeightValues)
        self._stored = stored
        self._buffer = np.empty(CACHED_BYTES, np.uint8)
        self._names = {name.megatron: name for name in names_of(shape)}
        self._runs = {key: row_runs(name, shape) for key, name in self._names.items()}
        self._chunks: dict[Path, list[tuple[str, Chunk]]] = {}
        for key, tensor in stored.tensors.items():
            for chunk in tensor.chunks:
                self._chunks.setdefault(chunk.file, []).append((key, chunk))

    @property
    def files(self) -> tuple[Path, ...]:
        """Files with records that were not read yet."""
        return tuple(self._chunks)

    def sha256(self, file: Path, on_bytes: Callable[[int], object]) -> str:
        """Read a file once, check its records, and return its hex sha256.

        Raises:
            ValueError: the file ends early, or is not a regular one.
        """
        digest = hashlib.sha256()
        self._check(file, on_bytes, digest.update)
        return digest.hexdigest()

    def check(self, file: Path, on_bytes: Callable[[int], object]) -> None:
        """Check the records of a file; other bytes, such as states of the optimizer, are not read.

        Raises:
            ValueError: the file ends early, or is not a regular one.
        """
        self._check(file, on_bytes, None)

    def _check(
        self, file: Path, on_bytes: Callable[[int], object], update: Callable[[Any], object] | None
    ) -> None:
        """Check the records of a file; `update` gets all of its bytes, in their order."""

        def pass_by(start: int, stop: int) -> None:
            if update is None:
                on_bytes(stop - start)
                return
            for part in self._read(stream, start, stop):
                update(part)
                on_bytes(part.nbytes)

        with open_regular_file(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            position = 0
            for key, chunk, data in self._in_order(file):
                if data.start < position:  # two records in one place
                    self._note(key, chunk, self._stored.record_error(key, chunk, "it overlaps another"))
                    continue
                pass_by(position, data.start)
                crc = 0
                for part in self._read_data(stream, key, chunk, data):
                    crc = crc32(part, crc)
                    if update is not None:
                        update(part)
                    on_bytes(part.nbytes)
                position = data.start + data.size
                if crc != data.crc:
                    self._note(key, chunk, self._stored.record_error(key, chunk, CRC_DIFFERS))
                else:
                    self._stored.accept(chunk, data)
            pass_by(position, size)

    def _in_order(self, file: Path) -> list[tuple[str, Chunk, StoredData]]:
        """Return the records of a file, in its order, and note those whose place cannot be found."""
        found = []
        for key, chunk in self._chunks.pop(file, []):
            try:
                found.append((key, chunk, self._stored.stored_data(key, chunk)))
            except ValueError as error:
                self._note(key, chunk, error)
        return sorted(found, key=lambda one: one[2].start)

    def _read(self, stream: BinaryIO, start: int, stop: int) -> Iterator[np.ndarray[Any, Any]]:
        for first in range(start, stop, CACHED_BYTES):
            part = self._buffer[: min(CACHED_BYTES, stop - first)]
            read_fully(stream.fileno(), memoryview(part), first, Path(stream.name))
            yield part

    def _read_data(
        self, stream: BinaryIO, key: str, chunk: Chunk, data: StoredData
    ) -> Iterator[np.ndarray[Any, Any]]:
        """Yield the data of a record, a few rows at a time, and look at the values."""
        dtype = self._stored.tensors[key].dtype
        layered = len(chunk.shape) > len(self._names[key].lengths)
        rows, *tail = chunk.shape[1:] if layered else chunk.shape
        row_bytes = math.prod(tail) * dtype.itemsize
        first_row = chunk.offsets[1 if layered else 0]
        first_layer, layers = (chunk.offsets[0], chunk.shape[0]) if layered else (None, 1)
        place = data.start + data.first
        yield from self._read(stream, data.start, place)
        for layer in range(layers):
            number = None if first_layer is None else first_layer + layer
            for low, high in row_blocks(rows, row_bytes, CACHED_BYTES):
                size = (high - low) * row_bytes
                if size > self._buffer.size:
                    self._buffer = np.empty(size, np.uint8)
                part = self._buffer[:size]
                read_fully(stream.fileno(), memoryview(part), place, chunk.file)
                place += size
                if self.with_values and size:
                    self._look(key, number, first_row + low, part, row_bytes, dtype)
                yield part
        yield from self._read(stream, place, data.start + data.size)

    def _look(
        self,
        key: str,
        layer: int | None,
        row: int,
        part: np.ndarray[Any, Any],
        row_bytes: int,
        dtype: torch.dtype,
    ) -> None:
        """Look at rows of a fused tensor, those of each Hugging Face tensor by themselves."""
        for run in runs_of_rows(self._runs[key], row, row + part.size // row_bytes):
            name = self._names[key].parts[run.part].name.format(layer=layer)
            start = (run.row - row) * row_bytes
            values = as_tensor(part[start : start + run.rows * row_bytes], dtype)
            self.values[name].look(name, values)

    def _note(self, key: str, chunk: Chunk, error: ValueError) -> None:
        """Note a fault for every Hugging Face tensor that has rows in a record."""
        name = self._names[key]
        layered = len(chunk.shape) > len(name.lengths)
        first, rows = (axis[1 if layered else 0] for axis in (chunk.offsets, chunk.shape))
        layers = range(chunk.offsets[0], chunk.offsets[0] + chunk.shape[0]) if layered else (None,)
        for run in runs_of_rows(self._runs[key], first, first + rows):
            for layer in layers:
                self.faults.setdefault(name.parts[run.part].name.format(layer=layer), str(error))


def _file_checks(folder: Path, scan: RecordScan | None) -> Iterator[CheckpointCheck]:
    """Compare the files with integrity.json, and read all records."""
    total = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    with progress_bar("read", total, "B") as bar:

        def sha256(path: Path) -> str:
            if scan is None or path not in scan.files:
                return sha256_file(path, bar.update)
            return scan.sha256(path, bar.update)

        results = check_integrity(folder, sha256)
        if scan is not None and scan.with_values:  # a comparison checks the records that it reads
            for path in scan.files:  # not listed there
                scan.check(path, bar.update)
    if results is None:
        yield CheckpointCheck(
            name="integrity.json", passed=True, detail="none: each record has a CRC-32 of its own"
        )
        return
    refusal = OwnRun.of(read_run(folder.parent)).refusal(iteration_of(folder) or 0, read_seal(folder))
    yield CheckpointCheck(
        name="run and iteration", passed=refusal is None, detail=refusal or "as the folder says"
    )
    for name, fault in results:
        yield CheckpointCheck(
            name=f"{folder.name}/{name}", passed=fault is None, detail=fault or "sha256 agrees"
        )


def _own_checks(
    stored: TorchDistCheckpoint | str, shape: ModelShape, scan: RecordScan | None
) -> Iterator[CheckpointCheck]:
    """Give the results of a scan, tensor by tensor."""
    if isinstance(stored, str) or scan is None:
        yield CheckpointCheck(name="keys and shapes", passed=False, detail=str(stored))
        return
    found = f"{len(stored.tensors)} tensors, as hf/config.json asks"
    yield CheckpointCheck(name="keys and shapes", passed=True, detail=found)
    for tensor in hf_tensors(stored, shape):
        fault, values = scan.faults.get(tensor.name), scan.values[tensor.name]
        yield CheckpointCheck(
            name=tensor.name,
            shape=tensor.shape,
            passed=fault is None and values.not_finite() is None,
            detail=fault or _seen(values),
        )


def _seen(values: WeightValues) -> str:
    """Return what is wrong or strange with the values of one tensor, or nothing."""
    return values.not_finite() or "; ".join(values.implausible())


def compare_weights(
    stored: TorchDistCheckpoint | str, hf: str | Path, shape: ModelShape, *, is_export: bool = False
) -> Iterator[CheckpointCheck]:
    """Compare every tensor of a Hugging Face folder with the checkpoint, bit for bit after conversion.

    Args:
        stored: the checkpoint, or the reason why it cannot be opened.
        hf: Hugging Face folder.
        shape: shape of both models.
        is_export: whether the folder was made from the checkpoint, not the checkpoint from the folder.
    """
    try:
        weights = open_weights(hf, shape)
        check_weights(weights, shape, "float32")
    except ValueError as error:
        stored = str(error)
    if isinstance(stored, str):
        yield CheckpointCheck(name="keys and shapes", passed=False, detail=stored)
        return
    with weights:
        reader = PartReader(stored, shape)
        tensors = list(hf_tensors(stored, shape))
        types = _types_check(weights, tensors, is_export)
        if types is not None:
            yield types
        with progress_bar("compare", sum(tensor.num_bytes for tensor in tensors), "B") as bar:
            for tensor in tensors:
                yield _compare_tensor(weights, reader, tensor, is_export)
                bar.update(tensor.num_bytes)


def _types_check(
    weights: SafetensorsFolder, tensors: list[HfTensor], is_export: bool
) -> CheckpointCheck | None:
    """Return a note on the dtypes and on which side was made from the other; None if all dtypes agree."""
    pairs = {(weights.tensors[tensor.name].dtype, tensor.dtype) for tensor in tensors}
    if all(theirs == ours for theirs, ours in pairs):
        return None
    there, here = (" and ".join(sorted(map(dtype_name, set(types)))) for types in zip(*pairs, strict=True))
    role = (
        "and is an export of this checkpoint"
        if is_export
        else f"and is taken for its source: no {SUMMARY} there names the checkpoint as it is now"
    )
    return CheckpointCheck(
        name="types", passed=True, detail=f"the checkpoint has {here}; the folder has {there} {role}"
    )


def _compare_tensor(
    weights: SafetensorsFolder, reader: PartReader, tensor: HfTensor, is_export: bool
) -> CheckpointCheck:
    largest, total = 0.0, 0.0
    same = same_rounded = True
    values = WeightValues()
    origin = weights.tensors[tensor.name]
    buffer = np.empty(0, np.uint8)
    try:
        for start, stop in row_blocks(
            tensor.shape[0], max(tensor.row_bytes, origin.row_bytes), CACHED_BYTES
        ):
            ours = reader.read(tensor, start, stop)
            values.look(tensor.name, ours)
            buffer = buffer if buffer.size else np.empty((stop - start) * origin.row_bytes, np.uint8)
            rows = buffer[: (stop - start) * origin.row_bytes]  # the first block is the largest
            weights.read_rows(tensor.name, start, stop - start, memoryview(rows))
            theirs = as_tensor(rows, origin.dtype).view(ours.shape)
            exported = ours.to(theirs.dtype)
            pair = (exported, theirs) if is_export else (ours, theirs.to(ours.dtype))
            if same_bits(*pair):
                continue
            same = False
            same_rounded = same_rounded and same_bits(exported, theirs)
            difference = (pair[0].float() - pair[1].float()).abs()
            largest = max(largest, float(difference.max()))
            total += float(difference.sum(dtype=torch.float64))
    except ValueError as error:
        return CheckpointCheck(name=tensor.name, shape=tensor.shape, passed=False, detail=str(error))
    was, became = (tensor.dtype, origin.dtype) if is_export else (origin.dtype, tensor.dtype)
    is_rounded = torch.promote_types(was, became) != became
    detail = ""
    if is_rounded:
        side = "checkpoint" if is_export else "folder"
        detail = f"the {side}'s {dtype_name(was)} rounded to {dtype_name(became)}"
    elif not same and same_rounded:
        detail = f"equal only if the checkpoint's {dtype_name(became)} is rounded to {dtype_name(was)}"
    return CheckpointCheck(
        name=tensor.name,
        shape=tensor.shape,
        passed=same and values.not_finite() is None,
        max_difference=largest,
        mean_difference=total / max(1, math.prod(tensor.shape)),
        is_rounded=is_rounded,
        detail="; ".join(filter(None, (detail, _seen(values)))),
    )


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether two tensors of one dtype have the same bytes, NaN and signed zero included."""
    return torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def compare_logits(
    folder: Path, shape: ModelShape, hf: str | Path, *, is_export: bool = False
) -> Iterator[CheckpointCheck]:
    """Compare the logits of the checkpoint with those of the folder's own model, one check a window.

    Where the dtypes differ, both compute with the same numbers: those of the side that was converted.

    Args:
        folder: folder of one iteration.
        shape: shape of the model that Megatron builds.
        hf: Hugging Face folder, from whose config transformers builds its model.
        is_export: whether the folder was made from the checkpoint, not the checkpoint from the folder.
    """
    windows = windows_of(shape)
    positions = torch.cat([torch.arange(w.first, w.first + w.tokens) for w in windows])
    tokens = torch.randint(shape.vocab_size, positions.shape, generator=torch.Generator().manual_seed(0))
    try:
        with open_weights(hf, shape) as weights:
            exported = _single_type(weights) if is_export else torch.float32
        with open_checkpoint(folder, shape) as stored:
            imported = torch.float32 if is_export else _single_type(stored)
            ours = megatron_logits(stored, shape, tokens, positions, exported)
        theirs = transformers_logits(Path(hf), tokens, positions, imported)
    except ValueError as error:
        yield CheckpointCheck(name="logits", passed=False, detail=str(error))
        return
    allowed = TOLERANCE * max(1.0, float(theirs.abs().max()))
    row = 0
    for window in windows:
        part = slice(row, row + window.tokens)
        row += window.tokens
        difference = (ours[part].double() - theirs[part].double()).abs()
        largest = float(difference.max())
        yield CheckpointCheck(
            name=f"logits, {window.name}: positions {window.first} to {window.first + window.tokens - 1}",
            shape=tuple(difference.shape),
            passed=largest <= allowed,  # false for NaN as well
            max_difference=largest,
            mean_difference=float(difference.mean()),
            detail=f"allowed {allowed:.1e}",
        )


@dataclass(frozen=True, kw_only=True)
class Window:
    """A range of positions of the row."""

    name: str
    """Name in the table."""
    first: int
    """First position."""
    tokens: int
    """Number of positions."""


def windows_of(shape: ModelShape) -> tuple[Window, ...]:
    """Return short, middle and long positions, in ascending order and without overlap."""
    limit = shape.max_position_embeddings
    original = limit
    if shape.rope_scaling is not None:
        original = min(limit, shape.rope_scaling.original_max_position_embeddings)
        limit = min(limit, 2 * original)
    tokens = max(1, min(WINDOW_TOKENS, limit // 4))
    starts = {"short": 0, "middle": limit // 4, "long": max(limit - tokens, 3 * (limit // 4))}
    if limit < 4:
        starts = {"short": 0}
    return tuple(Window(name=name, first=first, tokens=tokens) for name, first in starts.items())


def _single_type(weights: SafetensorsFolder | TorchDistCheckpoint) -> torch.dtype:
    """Return the dtype of all tensors, or float32, which rounds nothing, if they have several."""
    dtypes = {tensor.dtype for tensor in weights.tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


@torch.no_grad()
def transformers_logits(folder: Path, tokens: Tensor, positions: Tensor, rounding: torch.dtype) -> Tensor:
    """Return logits [T, V] of the Hugging Face model in float32, with weights rounded to `rounding`.

    Raises:
        ValueError: transformers cannot load the folder.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",
        )
    except Exception as error:  # many types, from several libraries
        raise ValueError(f"{folder} could not be loaded by transformers ({error})") from error
    model.eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(rounding).float()
    count = len(tokens)
    # An explicit mask: without one, transformers takes jumping positions for packed documents
    mask = torch.full((count, count), torch.finfo(torch.float32).min).triu(1)
    output = model(
        input_ids=tokens[None],
        position_ids=positions[None],
        attention_mask=mask[None, None],
        use_cache=False,
    )
    logits: Tensor = output.logits[0]
    return logits


@torch.no_grad()
def megatron_logits(
    stored: TorchDistCheckpoint, shape: ModelShape, tokens: Tensor, positions: Tensor, rounding: torch.dtype
) -> Tensor:
    """Return logits [T, V] of a GPTModel in float32, with rounded weights of a checkpoint.

    Args:
        stored: the checkpoint.
        shape: shape of the model.
        tokens: int64 [T].
        positions: int64 [T], ascending.
        rounding: dtype to which weights are rounded; float32 keeps them.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # Megatron compiles small functions when imported
    with _quiet(), _one_process_group():
        from megatron.core.packed_seq_params import PackedSeqParams

        model = build_model(shape)
        load_weights(model, stored)
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.to(rounding))
        model.rotary_pos_emb = _RowsOfTable(model.rotary_pos_emb, positions)
        boundaries = torch.tensor([0, len(tokens)], dtype=torch.int32)
        packing = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            max_seqlen_q=len(tokens),
            max_seqlen_kv=len(tokens),
        )
        logits: Tensor = model(
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=None,
            packed_seq_params=packing,
        )
    return logits[0]


class _RowsOfTable(torch.nn.Module):
    """Megatron's rotary embedding at chosen positions."""

    def __init__(self, rotary: Any, positions: Tensor) -> None:
        super().__init__()
        self._rotary = rotary
        with _cpu_as_device():
            self._rows: Tensor = rotary.get_emb(int(positions.max()) + 1).cpu()[positions]

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """Return the length as Megatron's embedding does."""
        length: int = self._rotary.get_rotary_seq_len(*args, **kwargs)
        return length

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Return the chosen rows of the table, [T, 1, 1, rotary_dim]."""
        return self._rows


def build_model(shape: ModelShape) -> Any:
    """Return a GPTModel of a shape with the local layer spec, float32, in evaluation mode."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_exact.model.layer_specs import packed_block_spec
    from megatron_exact.model.yarn import softmax_scale, yarn_frequencies

    yarn = shape.rope_scaling if isinstance(shape.rope_scaling, YarnScaling) else None
    # the arguments of a job; those that TransformerConfig calls by another name are given below
    arguments = megatron_arguments_of(shape)
    config = TransformerConfig(
        **{
            field.name: arguments[field.name]
            for field in fields(TransformerConfig)
            if field.name in arguments
        },
        gated_linear_unit=arguments["swiglu"],
        activation_func=torch.nn.functional.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        softmax_scale=None if yarn is None else softmax_scale(yarn, shape.head_dim),
        params_dtype=torch.float32,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=packed_block_spec(
            SimpleNamespace(transformer=config), post_norm=shape.post_norm
        ),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        parallel_output=False,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        position_embedding_type=arguments["position_embedding_type"],
        rotary_base=arguments["rotary_base"],
        rotary_percent=arguments["rotary_percent"],
        rope_scaling=arguments["use_rope_scaling"],
        **{name: arguments[name] for name in ("rope_scaling_factor",) if name in arguments},
    )
    if yarn is not None:
        rotary = model.rotary_pos_emb
        rotary.inv_freq = yarn_frequencies(rotary.inv_freq, yarn, shape.rope_theta)
    return model.eval()


def load_weights(model: Any, stored: TorchDistCheckpoint) -> None:
    """Fill every parameter of a GPTModel (local spec, one process) from a checkpoint, in blocks."""
    for key, tensor in stored.tensors.items():
        layers: list[int | None] = list(range(tensor.shape[0])) if key.startswith(LAYERS) else [None]
        for layer in layers:
            name = key
            if layer is not None:
                inner = key.removeprefix(LAYERS)
                name = f"{LAYERS}{layer}.{LOCAL_NAMES.get(inner, inner)}"
            parameter = model.get_parameter(name).data
            row_bytes = parameter[:1].numel() * tensor.dtype.itemsize
            for start, stop in row_blocks(parameter.shape[0], row_bytes):
                rows = np.empty((stop - start) * row_bytes, np.uint8)
                stored.read_rows(key, layer, start, stop - start, rows)
                parameter[start:stop] = as_tensor(rows, tensor.dtype).view(parameter[start:stop].shape)


@contextlib.contextmanager
def _cpu_as_device() -> Iterator[None]:
    """Let RotaryEmbedding.get_emb, which moves its frequencies to the CUDA device, find the CPU."""
    stock = torch.cuda.current_device
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    try:
        yield
    finally:
        torch.cuda.current_device = stock


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Megatron's remarks on kernels that a float32 comparison on the CPU does not need."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _one_process_group() -> Iterator[None]:
    """Make Megatron's groups for a world of this process alone, unless they exist already.

    torch's fake backend: groups of one never communicate, and gloo's threads do not survive a later fork.
    """
    import torch.testing._internal.distributed.fake_pg  # registers the backend
    from megatron.core import parallel_state

    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("fake", store=HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
