"""Score a pack with a Hugging Face model: long and short context losses of every supervised target.

The long context of a target is its document in the row, the short one a window of `ShortWindows`. Scores
are computed shard by shard and written by `data/score_files.py`; a run that was killed resumes with the
missing shards.

The scorer computes each piece of text alone: it starts at position 0 and sees nothing else, as a document
does in a packed row. Pieces are not packed: with restarted position ids and a cache, transformers silently
lets packed documents see each other. They are padded at their end instead, where causal attention never
looks, so no mask is needed.

The output layer is applied to a few thousand positions at a time, so the logits of a whole piece are never
in memory. At the start the losses of this path are compared with those of the model's own logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from megatron_exact.command_line import progress_bar
from megatron_exact.data.manifest import Manifest, read_manifest
from megatron_exact.data.rows import RowReader
from megatron_exact.data.score_files import (
    FORMAT_VERSION,
    ScoreRecord,
    begin_scores,
    finish_scores,
    write_shard,
)
from megatron_exact.data.tokenizers import made_by
from megatron_exact.exposure.confidence import ShortWindows
from megatron_exact.files import sha256_file
from megatron_exact.low_precision import widen_products
from megatron_exact.shares import Share, default_device
from megatron_exact.tokenizer_files import TOKENIZER_FILES

SHARD_TOKENS = 1 << 20
LOGIT_BYTES = 256 << 20  # of a chunk of float32 logits
PROBE_TOKENS = 16
PROBE_TOLERANCE = 0.05  # nats; allows other rounding, but no scaling or capping of the logits
SHORTEST_SHARE = 0.5  # of the longest piece of a batch: padding stays below half
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How to score."""

    windows: ShortWindows
    """Windows of the short context."""
    splits: Sequence[str] = ("train",)
    """Splits to score."""
    batch_rows: int = 1
    """Size of the scorer's batches, in rows of the pack."""
    device: str | None = None
    """Device of the scorer; None for a GPU where there is one."""
    dtype: str = "auto"
    """Dtype of the scorer, one of DTYPES."""
    source_root: str | Path | None = None
    """Folder of the corpora, if it is not where the manifest says."""
    share: Share = field(default_factory=Share)
    """The shards that this process scores, while others write theirs to the same output."""


def score_pack(
    pack: str | Path, model: str | Path, output: str | Path, options: ScoreOptions
) -> ScoreRecord:
    """Score a pack with a Hugging Face model.

    Returns:
        The record of the output; complete unless other processes still have shards to write.

    Raises:
        ValueError: a fault of the pack or the model, or an output that belongs to others.
        FileNotFoundError: the pack or the model is missing.
    """
    pack, model = Path(pack), Path(model)
    manifest = read_manifest(pack)
    unknown = [split for split in options.splits if split not in manifest.splits]
    if unknown or not options.splits:
        known = ", ".join(manifest.splits)
        raise ValueError(f"{pack} has no split {', '.join(unknown) or 'without a name'}: choose of {known}")
    identity = model_identity(model)
    scorer = Scorer(model, manifest.row_tokens, device=options.device, dtype=options.dtype)
    record = ScoreRecord(
        format_version=FORMAT_VERSION,
        fingerprint=manifest.fingerprint,
        row_tokens=manifest.row_tokens,
        model=identity,
        dtype=scorer.dtype,
        short_window=options.windows.window,
        short_stride=options.windows.stride,
        short_border=options.windows.border,
        shard_rows=max(1, SHARD_TOKENS // manifest.row_tokens),
        rows={split: manifest.splits[split].rows for split in options.splits},
        is_complete=False,
    )
    missing = [(split, shard) for split, shard in begin_scores(output, record) if options.share.has(shard)]
    with progress_bar("scoring", sum(record.shape(*place)[0] for place in missing), "row") as bar:
        for split, shard in missing:
            reader = RowReader(pack, split, source_root=options.source_root)
            first = shard * record.shard_rows
            rows = range(first, first + record.shape(split, shard)[0])
            arrays: dict[str, list[NDArray[np.float32]]] = {"long": [], "difference": []}
            for begin in range(rows.start, rows.stop, options.batch_rows):
                some = range(begin, min(begin + options.batch_rows, rows.stop))
                for name, part in score_rows(reader, some, options.windows, scorer).items():
                    arrays[name].append(part)
                bar.update(len(some))
            stacked = {name: np.concatenate(parts) for name, parts in arrays.items()}
            write_shard(output, record, split, shard, stacked)
    return record if begin_scores(output, record) else finish_scores(output, record)


def score_rows(
    reader: RowReader, rows: Sequence[int], windows: ShortWindows, scorer: Scorer
) -> dict[str, NDArray[np.float32]]:
    """Score some rows of a split.

    Returns:
        `long` and `difference`, each [rows, row_tokens].
    """
    long, short = np.zeros((2, len(rows), reader.row_tokens), dtype=np.float32)
    pieces: list[Piece] = []
    destinations: list[tuple[NDArray[np.float32], slice]] = []
    is_scored = np.zeros(long.shape, dtype=np.bool_)
    supervised = np.zeros(long.shape, dtype=np.bool_)
    of_context = np.arange(reader.row_tokens + 1)
    for index, row_id in enumerate(rows):
        row = reader.read(row_id)
        supervised[index] = row.loss_mask > 0
        is_scored[index] = windows.scored(row.by_context(of_context), supervised[index])
        spans = [
            (long, begin, begin, end)
            for begin, end in zip(row.cu_seqlens[:-1], row.cu_seqlens[1:], strict=True)
            if supervised[index, begin:end].any()
        ]
        spans += [
            (short, window.start, window.first_scored, window.stop)
            for window in windows.place(row.cu_seqlens, is_scored[index])
        ]
        for array, start, first, stop in spans:
            pieces.append(Piece(tokens=row.tokens[start:stop], labels=row.labels[first:stop]))
            destinations.append((array[index], slice(first, stop)))
    found = scorer.losses(pieces, len(rows) * reader.row_tokens)
    for (array, targets), losses in zip(destinations, found, strict=True):
        array[targets] = losses
    return {"long": long * supervised, "difference": np.where(is_scored, long - short, 0.0)}


def doubt_about_tokenizer(manifest: Manifest, model: str | Path) -> str | None:
    """Return a warning where the scorer's tokenizer files are not those of the pack, or None."""
    model = Path(model)
    if manifest.tokenizer is None or not any((model / name).is_file() for name in TOKENIZER_FILES):
        return None
    if made_by(manifest.tokenizer.sha256, model):
        return None
    return (
        f"the tokenizer files of {model} are not those of the pack ({manifest.tokenizer.path}): scores "
        "mean something only if every id means the same token in both"
    )


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of tokens whose last targets are scored."""

    tokens: NDArray[np.int64]
    """[n], inputs."""
    labels: NDArray[np.int64]
    """[m], the targets of the last m inputs."""


def model_identity(folder: Path) -> dict[str, Any]:
    """Return the hashes of config and weights, without path or name, so that a copy is the same scorer.

    Raises:
        ValueError: the folder is not that of a Hugging Face model.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json: name a Hugging Face model folder, or --checkpoint for one of "
            "Megatron's"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} has no *.safetensors: save the model again in that format")
    return {
        "config_sha256": sha256_file(folder / "config.json"),
        "weights_sha256": {path.name: sha256_file(path) for path in weights},
    }


class Scorer:
    """A causal language model from a folder.

    Args:
        folder: folder with config.json and *.safetensors.
        row_tokens: length of the longest piece.
        device: such as `cpu` or `cuda:0`; None for a GPU where there is one.
        dtype: one of DTYPES; `auto` for the dtype in which the model is stored.

    Raises:
        ValueError: a model that transformers does not know, whose window is shorter than `row_tokens`, or
            whose logits are more than its output layer; or a GPU that is named and not there.
    """

    def __init__(self, folder: Path, row_tokens: int, *, device: str | None, dtype: str) -> None:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            )
        except Exception as error:  # many types, from several libraries
            raise ValueError(
                f"{folder} could not be loaded as a causal language model ({type(error).__name__}: "
                f"{error}): check the folder"
            ) from error
        window = getattr(model.config, "max_position_embeddings", None)
        if window is not None and window < row_tokens:
            raise ValueError(
                f"{folder} sees {window} tokens (max_position_embeddings), rows have {row_tokens}: it "
                "cannot score at long context; take a model with a longer window"
            )
        self.device = device or default_device()
        self.model = model.to(self.device).eval().requires_grad_(False)
        widen_products(self.model)
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.dtype = str(model.dtype).removeprefix("torch.")
        self._chunk_tokens = max(1, LOGIT_BYTES // (4 * self.vocab_size))
        self._compare_with_own_logits(folder)

    def losses(self, pieces: Sequence[Piece], batch_tokens: int) -> list[NDArray[np.float32]]:
        """Return the cross-entropies of the pieces' targets, nats, in the order of the pieces.

        Args:
            pieces: in any order.
            batch_tokens: largest batch in inputs, padding included; a longer piece is a batch of its own.

        Raises:
            ValueError: a token beyond the model's vocabulary.
        """
        results: list[NDArray[np.float32] | None] = [None] * len(pieces)
        with torch.inference_mode():
            for batch in batches([piece.tokens.size for piece in pieces], batch_tokens):
                found = self._batch_losses([pieces[index] for index in batch])
                for index, losses in zip(batch, found, strict=True):
                    results[index] = losses
        return [result for result in results if result is not None]

    def _batch_losses(self, pieces: Sequence[Piece]) -> list[NDArray[np.float32]]:
        longest = max(piece.tokens.size for piece in pieces)
        tokens = np.zeros((len(pieces), longest), dtype=np.int64)
        is_scored = np.zeros(tokens.shape, dtype=np.bool_)
        for row, piece in enumerate(pieces):
            tokens[row, : piece.tokens.size] = piece.tokens
            is_scored[row, piece.tokens.size - piece.labels.size : piece.tokens.size] = True
        labels = np.concatenate([piece.labels for piece in pieces])
        largest = max(int(tokens.max()), int(labels.max(initial=0)))
        if largest >= self.vocab_size:
            raise ValueError(
                f"the pack has token {largest}, the scorer {self.vocab_size} of them: take a scorer of the "
                "same tokenizer"
            )
        hidden = self._hidden(torch.from_numpy(tokens))[torch.from_numpy(is_scored).to(self.device)]
        losses = self._head_losses(hidden, torch.from_numpy(labels).to(self.device))
        parts = torch.split(losses.cpu(), [piece.labels.size for piece in pieces])
        return [part.numpy() for part in parts]

    def _hidden(self, tokens: Tensor) -> Tensor:
        """[pieces, n] -> [pieces, n, hidden size]."""
        output = self.model.get_decoder()(input_ids=tokens.to(self.device), use_cache=False)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def _head_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """[m, hidden size] and [m] -> float32 [m]."""
        head = self.model.get_output_embeddings()
        size = self._chunk_tokens
        parts = zip(torch.split(hidden, size), torch.split(labels, size), strict=True)
        return torch.cat([F.cross_entropy(head(h).float(), t, reduction="none") for h, t in parts])

    def _compare_with_own_logits(self, folder: Path) -> None:
        tokens = torch.arange(PROBE_TOKENS, device=self.device) % self.vocab_size
        with torch.inference_mode():
            ours = self._head_losses(self._hidden(tokens[None])[0], tokens.roll(-1))
            logits = self.model(input_ids=tokens[None], use_cache=False).logits[0].float()
            own = F.cross_entropy(logits, tokens.roll(-1), reduction="none")
        if not torch.allclose(ours, own, rtol=0.01, atol=PROBE_TOLERANCE):
            raise ValueError(
                f"{folder}: the logits of this architecture are more than its output layer (scaled or "
                "capped), which is not supported: take a Qwen2.5 or Llama 3 model as scorer"
            )


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices of pieces, the longest first, so that little is padded.

    Args:
        lengths: lengths of the pieces.
        batch_tokens: largest product of number of pieces and longest piece.
    """
    batch: list[int] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        is_full = (len(batch) + 1) * longest > batch_tokens or lengths[index] < SHORTEST_SHARE * longest
        if batch and is_full:
            yield batch
            batch = []
        if not batch:
            longest = lengths[index]
        batch.append(index)
    if batch:
        yield batch
