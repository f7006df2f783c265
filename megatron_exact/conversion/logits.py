"""The same tokens through Megatron's GPTModel and through transformers, in float32 on the CPU.

Weights that agree bit for bit can still be computed with wrongly: rotary scaling left out is exact at
position 0 and wrong far out. So some tokens stand at the beginning of the window, some in its middle and
some beyond the original length of the rotary embedding, in one short row whose positions jump. Both models
then attend over real distances of thousands of tokens at the cost of a few dozen.

The models are in memory one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_exact.conversion.checks import Check
from megatron_exact.conversion.export_hf import open_checkpoint
from megatron_exact.conversion.gpt_model import megatron_logits
from megatron_exact.conversion.import_hf import open_weights
from megatron_exact.conversion.safetensors_files import SafetensorsFolder
from megatron_exact.conversion.torch_dist_reader import TorchDistCheckpoint
from megatron_exact.model.shapes import ModelShape

WINDOW_TOKENS = 16
TOLERANCE = 1e-4
"""Of the largest logit, or of 1 where that is smaller; float32 sums of two programs differ by less."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Neighbouring positions of the row."""

    name: str
    """For the table."""
    first: int
    """First position."""
    tokens: int
    """How many."""


def windows_of(shape: ModelShape) -> tuple[Window, ...]:
    """Short, middle and long positions, in ascending order and without overlap."""
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


def compare_logits(
    folder: Path, shape: ModelShape, hf: str | Path, *, is_export: bool = False
) -> Iterator[Check]:
    """One check a window: logits of the checkpoint as a model of `shape` against the folder's own model.

    Where the types differ, both compute with the same numbers: those of the side that was converted.

    Args:
        folder: of one iteration.
        shape: what Megatron builds.
        hf: Hugging Face folder, of which transformers builds what its config says.
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
        yield Check(name="logits", passed=False, detail=str(error))
        return
    allowed = TOLERANCE * max(1.0, float(theirs.abs().max()))
    row = 0
    for window in windows:
        part = slice(row, row + window.tokens)
        row += window.tokens
        difference = (ours[part].double() - theirs[part].double()).abs()
        largest = float(difference.max())
        yield Check(
            name=f"logits, {window.name}: positions {window.first} to {window.first + window.tokens - 1}",
            shape=tuple(difference.shape),
            passed=largest <= allowed,  # false for NaN as well
            max_difference=largest,
            mean_difference=float(difference.mean()),
            detail=f"allowed {allowed:.1e}",
        )


def _single_type(weights: SafetensorsFolder | TorchDistCheckpoint) -> torch.dtype:
    """The type of all tensors; float32, which rounds nothing, for several: then none was converted."""
    dtypes = {tensor.dtype for tensor in weights.tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


@torch.no_grad()
def transformers_logits(folder: Path, tokens: Tensor, positions: Tensor, rounding: torch.dtype) -> Tensor:
    """Logits [T, V] of the Hugging Face model in float32, weights rounded to `rounding` before.

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
