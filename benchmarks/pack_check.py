"""An independent check that a pack made by `tools/pack_corpus.py` holds what it should.

Written from the description of the arrays, without the package's own verification, in blocks over
mapped files: what is timed is also right.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "validation")
BLOCK_SEGMENTS = 1 << 22

Segments = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _blocks(folder: Path) -> Iterator[Segments]:
    """(document, start, tokens) of the segments in the folder of a split, in blocks, all int64."""
    names = ("segment_document", "segment_start", "segment_tokens")
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names]
    for first in range(0, arrays[0].size, BLOCK_SEGMENTS):
        block = [array[first : first + BLOCK_SEGMENTS].astype(np.int64) for array in arrays]
        yield block[0], block[1], block[2]


def check_pack(folder: Path, lengths: NDArray[np.int32], row_tokens: int) -> float:
    """Share of padding of all rows, once every token is known to be in one of them.

    Args:
        folder: a pack of one source, each document of it in one of the splits.
        lengths: int32 [documents], tokens of each document.
        row_tokens: inputs of a row.

    Raises:
        ValueError: a row is too full, or a token is missing or there twice.
    """
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    policy, splits = manifest["policy"], manifest["splits"]
    rows = sum(split["rows"] for split in splits.values())
    tokens = sum(_check_row_sizes(folder / name, splits[name], row_tokens) for name in SPLITS)
    _check_splits(folder, lengths.size)
    if policy == "best-fit":
        _check_pieces(folder, lengths, row_tokens)
    left_out = int(lengths.sum(dtype=np.int64)) - tokens
    stated = [split["left_out_tokens"] for split in splits.values()]
    most = row_tokens if policy == "concat" else 0  # a stream's last row is dropped where it is not full
    if left_out != sum(stated) or min(stated) < 0 or max(stated) > most:
        raise ValueError(f"{folder.name}: {left_out} tokens are in no row, {policy}")
    if policy == "concat":
        _check_coverage(folder, lengths, left_out)
    return float(1 - tokens / (rows * row_tokens))


def _check_splits(folder: Path, documents: int) -> None:
    """No document is in two splits."""
    seen = np.zeros((len(SPLITS), documents), np.bool_)
    for mine, name in zip(seen, SPLITS, strict=True):
        for document, _, _ in _blocks(folder / name):
            mine[document] = True
    if seen.all(axis=0).any():
        raise ValueError(f"{folder.name}: a document is in two splits")


def _check_row_sizes(folder: Path, split: dict[str, Any], row_tokens: int) -> int:
    """Every row has 1 to row_tokens tokens and the manifest's totals are right; returns the tokens."""
    where = f"{folder.parent.name}, {folder.name}"
    offsets = np.load(folder / "row_offsets.npy", mmap_mode="r", allow_pickle=False)
    if offsets.size == 1 and split["rows"] == split["segments"] == split["tokens"] == 0:
        return 0  # a validation split without rows
    ends = []
    total = segments = 0
    for _, _, block_tokens in _blocks(folder):
        if block_tokens.min() < 1:
            raise ValueError(f"{where}: a segment of no tokens")
        running = np.concatenate(([total], total + np.cumsum(block_tokens)))
        inside = offsets[
            np.searchsorted(offsets, segments) : np.searchsorted(offsets, segments + len(block_tokens))
        ]
        ends.append(running[inside - segments])
        total, segments = int(running[-1]), segments + block_tokens.size
    filled = np.diff(np.concatenate((*ends, [total])))
    if filled.size != split["rows"] or filled.min() < 1 or filled.max() > row_tokens:
        raise ValueError(f"{where}: rows of {filled.min()} to {filled.max()} tokens")
    padding = filled.size * row_tokens - total
    if (split["segments"], split["tokens"], split["padding_tokens"]) != (segments, total, padding):
        raise ValueError(f"{where}: the manifest's totals are not those of the arrays")
    return total


def _check_pieces(folder: Path, lengths: NDArray[np.int32], row_tokens: int) -> None:
    """Each document is cut at multiples of a row only, and each of its pieces is there once."""
    pieces = -(-lengths // row_tokens)
    first_piece = np.cumsum(pieces, dtype=np.int64) - pieces
    seen = np.zeros(int(pieces.sum(dtype=np.int64)), np.bool_)
    placed = 0
    for document, start, tokens in chain.from_iterable(_blocks(folder / name) for name in SPLITS):
        whole = np.minimum(row_tokens, lengths[document] - start)
        if (start % row_tokens).any() or not np.array_equal(tokens, whole):
            raise ValueError(f"{folder.name}: a document is cut where it need not be")
        seen[first_piece[document] + start // row_tokens] = True
        placed += document.size
    if placed != seen.size or not seen.all():
        raise ValueError(
            f"{folder.name}: {placed} segments for {seen.size} pieces: one is missing or twice there"
        )


def _check_coverage(folder: Path, lengths: NDArray[np.int32], left_out: int) -> None:
    """Segments of a document lie end to end: as many tokens as it has, but for the end of the stream."""
    missing = lengths.astype(np.int64)
    openings = np.zeros(lengths.size, np.uint8)
    for name in SPLITS:
        last: tuple[int, int] | None = None  # document and end of the segment before
        for document, start, tokens in _blocks(folder / name):
            # Rows are in stream order, so a segment opens a document or goes on where the one before ended.
            before = np.concatenate(([last[0] if last else -1], document[:-1]))
            end_before = np.concatenate(([last[1] if last else 0], (start + tokens)[:-1]))
            opens = start == 0
            if not (opens | ((document == before) & (start == end_before))).all():
                raise ValueError(f"{folder.name}: a segment neither opens a document nor continues one")
            np.subtract.at(missing, document, tokens)
            np.add.at(openings, document[opens], 1)
            last = int(document[-1]), int(start[-1] + tokens[-1])
    if missing.min() < 0 or missing.sum() != left_out or openings.max() > 1:
        raise ValueError(f"{folder.name}: a token is missing or there twice")
