"""Small corpora, packs of them, and a plain reading of a pack that shares no code with the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exact.data.corpus_guard import hash_blocks
from megatron_exact.data.corpus_record import CorpusRecord, write_corpus_record
from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.files import sha256_file

VOCAB_SIZE = 1000
Documents = list[list[int]]


def random_documents(lengths: Sequence[int], seed: int = 0) -> Documents:
    """Documents of these lengths; ids from 1, so that padding (0) is told apart."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB_SIZE, length).tolist() for length in lengths]


def heavy_tailed_lengths(count: int, seed: int = 0) -> list[int]:
    """Lognormal lengths of at least one token."""
    rng = np.random.default_rng(seed)
    return np.maximum(1, rng.lognormal(3, 1.2, count).astype(int)).tolist()


def write_corpus(
    prefix: Path, documents: Documents, *, tokenizer_sha256: str | None = None, licence: str | None = None
) -> str:
    """Write a corpus, with a record if a tokenizer is named; returns the prefix as text."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    bin_path, idx_path = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
    writer = IndexedWriter(bin_path, idx_path, VOCAB_SIZE)
    for document in documents:
        writer.add(np.array(document, dtype=np.int64))
    writer.close()
    if tokenizer_sha256 is not None:
        record = CorpusRecord(
            raw_files=[{"path": "raw.jsonl", "bytes": 12, "sha256": "0" * 64}],
            tokenizer={
                "path": str(prefix.parent / "tokenizer.model"),
                "kind": "sentencepiece",
                "vocab_size": VOCAB_SIZE,
                "sha256": tokenizer_sha256,
            },
            special_tokens={"prefix_ids": [], "eod_id": VOCAB_SIZE - 1, "eod_token": "</s>"},
            documents=len(documents),
            tokens=sum(map(len, documents)),
            skipped=0,
            dtype="uint16",
            bin_sha256=sha256_file(bin_path),
            idx_sha256=sha256_file(idx_path),
            bin_blocks=hash_blocks(bin_path),
            licence=licence,
        )
        write_corpus_record(prefix, record)
    return str(prefix)


def ended_documents(documents: Documents) -> Documents:
    """The same documents with one EOD each, as their last token."""
    return [
        [min(token, VOCAB_SIZE - 2) for token in document[:-1]] + [VOCAB_SIZE - 1] for document in documents
    ]


@dataclass
class PlainRow:
    """What a row must hold, token by token."""

    tokens: list[int]
    labels: list[int]
    mask: list[int]
    context: list[int]
    boundaries: list[int]


def read_rows_plainly(pack_dir: Path, split: str, corpora: Sequence[Documents]) -> list[PlainRow]:
    """Every row of a split, with loops over tokens, from the manifest's JSON and the arrays."""
    manifest: dict[str, Any] = json.loads((pack_dir / "manifest.json").read_text())
    names = ("row_offsets", "segment_source", "segment_document", "segment_start", "segment_tokens")
    arrays = {name: np.load(pack_dir / split / f"{name}.npy").tolist() for name in names}
    offsets = arrays.pop("row_offsets")
    segments = list(zip(*arrays.values(), strict=True))
    masked, best_fit = manifest["mask_cross_document_targets"], manifest["policy"] == "best-fit"
    rows = []
    for row in range(len(offsets) - 1):
        mine = segments[offsets[row] : offsets[row + 1]]
        out = PlainRow([], [], [], [], [0])
        for index, (source, document, start, length) in enumerate(mine):
            text = corpora[source][document]
            for position in range(start, start + length):
                out.tokens.append(text[position])
                in_segment = position + 1 < start + length
                is_last_input = index == len(mine) - 1 and not in_segment
                if in_segment or (is_last_input and position + 1 < len(text)):
                    label, context = text[position + 1], position + 1 - start
                elif is_last_input and best_fit:
                    label, context = None, 0
                else:
                    if not is_last_input:
                        follower = mine[index + 1][:3]
                    elif row + 2 < len(offsets):
                        follower = segments[offsets[row + 1]][:3]
                    else:
                        place = manifest["splits"][split]["next_token"]
                        follower = (place["source"], place["document"], place["start"])
                    label, context = corpora[follower[0]][follower[1]][follower[2]], 0
                    if masked:
                        label = None
                out.labels.append(0 if label is None else label)
                out.mask.append(int(label is not None))
                out.context.append(context)
            out.boundaries.append(len(out.tokens))
        missing = manifest["row_tokens"] - len(out.tokens)
        if missing:
            for values in (out.tokens, out.labels, out.mask, out.context):
                values.extend([0] * missing)
            out.boundaries.append(manifest["row_tokens"])
        rows.append(out)
    return rows


def plain_bucket(context: int, row_tokens: int) -> int:
    """floor(log2 context) - 2 from 0 upwards, the row length folded into the top bucket."""
    bucket = 0
    edge = 8
    while edge <= context and edge < row_tokens:
        bucket += 1
        edge *= 2
    return bucket
