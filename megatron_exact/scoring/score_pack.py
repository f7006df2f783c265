"""Score a pack: long and short context losses of every supervised target, shard by shard.

The long context of a target is its document in the row, the short one a window of `ShortWindows`.
`data/score_files.py` writes the results; a run that was killed resumes with the missing shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
from megatron_exact.scoring.scorer import Piece, Scorer, model_identity
from megatron_exact.shares import Share
from megatron_exact.tokenizer_files import TOKENIZER_FILES

SHARD_TOKENS = 1 << 20


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
    """Dtype of the scorer, one of `scorer.DTYPES`."""
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
