"""Proof that a checkpoint holds a Hugging Face model: bit for bit, then by what it computes.

Without the Hugging Face folder: files against integrity.json, keys and shapes against hf/config.json,
every record against its CRC-32, every number finite. With it: config against config, each tensor bit for
bit after the mapping and finite, and the logits of both models in float32 (`logits.py`).

Where the types differ, the side that was made from the other must be what the other becomes in its type.
A folder counts as made from the checkpoint only if its record names this checkpoint by its content; any
other is the source. So float32 imported from bfloat16 is compared with every bit, and a comparison that
bits could hide from says that it rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_exact.command_line import progress_bar
from megatron_exact.conversion.checks import Check
from megatron_exact.conversion.export_hf import (
    HfTensor,
    PartReader,
    hf_tensors,
    open_checkpoint,
)
from megatron_exact.conversion.exported_files import is_export_of, length_limits, reached_tokens
from megatron_exact.conversion.import_hf import check_weights, dtype_name, open_weights
from megatron_exact.conversion.layout import find_iteration, iteration_of, row_blocks
from megatron_exact.conversion.model_card import SUMMARY, read_run
from megatron_exact.conversion.safetensors_files import SafetensorsFolder
from megatron_exact.conversion.tensors import as_tensor
from megatron_exact.conversion.weight_values import WeightValues
from megatron_exact.integrity import OwnRun, check_integrity, read_seal
from megatron_exact.model.hf_folder import HfFolder, hf_folder_of, read_hf_folder
from megatron_exact.model.shapes import ModelShape, compare_shapes
from megatron_exact.trainings import trained_row_tokens


def verify_checkpoint(
    checkpoint: str | Path,
    *,
    hf: str | Path | None = None,
    iteration: int | None = None,
    with_logits: bool = True,
) -> Iterator[Check]:
    """All checks, one after the other.

    Args:
        checkpoint: folder of a run or of an import.
        hf: the Hugging Face folder that it must equal; None checks the checkpoint by itself.
        iteration: its number; None for the one that the tracker names.
        with_logits: whether to compute logits, which takes the model in float32 in memory, one at a time.

    Raises:
        ValueError: a folder that cannot be opened at all.
    """
    folder = find_iteration(checkpoint, iteration)
    own = read_hf_folder(hf_folder_of(checkpoint))
    yield from _file_checks(folder)
    if hf is None:
        yield from _own_checks(folder, own.shape)
        return
    theirs = read_hf_folder(hf)
    window = theirs.shape.max_position_embeddings
    differences = compare_shapes(replace(own.shape, max_position_embeddings=window), theirs.shape)
    yield Check(name="config.json", passed=not differences, detail="; ".join(differences))
    imported = own.shape.max_position_embeddings
    yield _window_check(window, imported, trained_row_tokens(read_run(Path(checkpoint))))
    is_export = is_export_of(hf, folder)
    if is_export:
        reached = reached_tokens(own.shape, read_run(Path(checkpoint)), window)
        yield _limits_check(theirs, reached)
    if not differences:
        yield from compare_weights(folder, hf, own.shape, is_export=is_export)
    if with_logits:
        from megatron_exact.conversion.logits import compare_logits

        shape = replace(own.shape, max_position_embeddings=max(window, imported))
        yield from compare_logits(folder, shape, hf, is_export=is_export)


def _window_check(window: int, imported: int, trained: int | None) -> Check:
    """An export may promise another window than the import: no weight and no value depends on it."""
    detail = [f"{window}"]
    if window != imported:
        detail.append(f"{imported} as imported")
    if trained is not None and window < trained:
        detail.append(f"below the {trained} tokens of the rows of training: export again")
    passed = trained is None or window >= trained
    return Check(name="max_position_embeddings", passed=passed, detail=", ".join(detail))


def _limits_check(export: HfFolder, reached: int) -> Check:
    """No file of an export limits the length to less than the model was trained on."""
    short = [
        f"{limit} is below {reached} tokens: export again"
        for limit in length_limits(export.path, export.config)
        if limit.tokens < reached
        and limit.field != "max_position_embeddings"  # which has a line of its own
    ]
    return Check(name="other limits of length", passed=not short, detail="; ".join(short))


def _file_checks(folder: Path) -> Iterator[Check]:
    total = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    with progress_bar("hash", total, "B") as bar:
        results = check_integrity(folder, bar.update)
    if results is None:
        yield Check(name="integrity.json", passed=True, detail="none: each record has a CRC-32 of its own")
        return
    refusal = OwnRun.of(read_run(folder.parent)).refusal(iteration_of(folder) or 0, read_seal(folder))
    yield Check(name="run and iteration", passed=refusal is None, detail=refusal or "as the folder says")
    for name, fault in results:
        yield Check(name=f"{folder.name}/{name}", passed=fault is None, detail=fault or "sha256 agrees")


def _own_checks(folder: Path, shape: ModelShape) -> Iterator[Check]:
    """Keys, shapes, records and values of a checkpoint without anything to compare it with."""
    try:
        stored = open_checkpoint(folder, shape)
    except ValueError as error:
        yield Check(name="keys and shapes", passed=False, detail=str(error))
        return
    with stored:
        found = f"{len(stored.tensors)} tensors, as hf/config.json asks"
        yield Check(name="keys and shapes", passed=True, detail=found)
        reader = PartReader(stored, shape)
        tensors = list(hf_tensors(stored, shape))
        with progress_bar("read", sum(tensor.num_bytes for tensor in tensors), "B") as bar:
            for tensor in tensors:
                yield _check_values(reader, tensor)
                bar.update(tensor.num_bytes)


def _check_values(reader: PartReader, tensor: HfTensor) -> Check:
    values = WeightValues()
    try:
        for start, stop in row_blocks(tensor.shape[0], tensor.row_bytes):
            values.look(tensor.name, reader.read(tensor, start, stop))
    except ValueError as error:
        return Check(name=tensor.name, shape=tensor.shape, passed=False, detail=str(error))
    return Check(
        name=tensor.name,
        shape=tensor.shape,
        passed=values.not_finite() is None,
        detail=_seen(values),
    )


def _seen(values: WeightValues) -> str:
    """What is wrong or strange with the values of one tensor; empty if nothing is."""
    return values.not_finite() or "; ".join(values.implausible())


def compare_weights(
    folder: Path, hf: str | Path, shape: ModelShape, *, is_export: bool = False
) -> Iterator[Check]:
    """Every tensor of a Hugging Face folder against the checkpoint, bit for bit after mapping and type.

    Args:
        folder: of one iteration.
        hf: Hugging Face folder.
        shape: of both.
        is_export: whether the folder was made from the checkpoint, not the checkpoint from the folder.
    """
    try:
        weights = open_weights(hf, shape)
        check_weights(weights, shape, "float32")
        stored = open_checkpoint(folder, shape)
    except ValueError as error:
        yield Check(name="keys and shapes", passed=False, detail=str(error))
        return
    with weights, stored:
        reader = PartReader(stored, shape)
        tensors = list(hf_tensors(stored, shape))
        types = _types_check(weights, tensors, is_export)
        if types is not None:
            yield types
        with progress_bar("compare", sum(tensor.num_bytes for tensor in tensors), "B") as bar:
            for tensor in tensors:
                yield _compare_tensor(weights, reader, tensor, is_export)
                bar.update(tensor.num_bytes)


def _types_check(weights: SafetensorsFolder, tensors: list[HfTensor], is_export: bool) -> Check | None:
    """Which side is compared as what; None where all types agree."""
    pairs = {(weights.tensors[tensor.name].dtype, tensor.dtype) for tensor in tensors}
    if all(theirs == ours for theirs, ours in pairs):
        return None
    there, here = (" and ".join(sorted(map(dtype_name, set(types)))) for types in zip(*pairs, strict=True))
    role = (
        "and is an export of this checkpoint"
        if is_export
        else f"and is taken for its source: no {SUMMARY} there names the checkpoint as it is now"
    )
    return Check(
        name="types", passed=True, detail=f"the checkpoint has {here}; the folder has {there} {role}"
    )


def _compare_tensor(
    weights: SafetensorsFolder, reader: PartReader, tensor: HfTensor, is_export: bool
) -> Check:
    largest, total = 0.0, 0.0
    same = same_rounded = True
    values = WeightValues()
    origin = weights.tensors[tensor.name]
    try:
        for start, stop in row_blocks(tensor.shape[0], max(tensor.row_bytes, origin.row_bytes) * 4):
            ours = reader.read(tensor, start, stop)
            values.look(tensor.name, ours)
            buffer = np.empty((stop - start) * origin.row_bytes, np.uint8)
            weights.read_rows(tensor.name, start, stop - start, memoryview(buffer))
            theirs = as_tensor(buffer, origin.dtype).view(ours.shape)
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
        return Check(name=tensor.name, shape=tensor.shape, passed=False, detail=str(error))
    was, became = (tensor.dtype, origin.dtype) if is_export else (origin.dtype, tensor.dtype)
    is_rounded = torch.promote_types(was, became) != became
    detail = ""
    if is_rounded:
        side = "checkpoint" if is_export else "folder"
        detail = f"the {side}'s {dtype_name(was)} rounded to {dtype_name(became)}"
    elif not same and same_rounded:
        detail = f"equal only if the checkpoint's {dtype_name(became)} is rounded to {dtype_name(was)}"
    return Check(
        name=tensor.name,
        shape=tensor.shape,
        passed=same and values.not_finite() is None,
        max_difference=largest,
        mean_difference=total / max(1, math.prod(tensor.shape)),
        is_rounded=is_rounded,
        detail="; ".join(filter(None, (detail, _seen(values)))),
    )


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors of one type hold the same bytes, NaN and signed zero included."""
    return torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))
