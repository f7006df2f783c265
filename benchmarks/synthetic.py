"""Synthetic corpora for benchmarks: lognormal document lengths, an `.idx`, a sparse `.bin`.

Packing reads lengths only, so the `.bin` is a hole of the right size: 10^8 documents are 480 GB of tokens
that take no disk. A record states its largest id, which packing would otherwise look for in all of it. The
`.idx` is written here straight from its format (`megatron_exact/data/indexed.py`), in blocks, so that
making a corpus of 10^8 documents needs little memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.corpus_record import CorpusRecord, write_corpus_record
from megatron_exact.data.indexed import CODE_OF_DTYPE, HEADER, MAGIC, VERSION
from megatron_exact.files import sha256_file

MEDIAN_TOKENS = 900
SIGMA = 1.4
BLOCK_DOCUMENTS = 1 << 20
TOKEN_DTYPE = np.dtype(np.uint16)


def length_blocks(documents: int, seed: int) -> Iterator[NDArray[np.int32]]:
    """Lognormal lengths, at least 1 token each, in blocks; block b depends on (seed, b) only."""
    for block, first in enumerate(range(0, documents, BLOCK_DOCUMENTS)):
        generator = np.random.default_rng([seed, block])
        count = min(BLOCK_DOCUMENTS, documents - first)
        lengths = generator.lognormal(np.log(MEDIAN_TOKENS), SIGMA, count)
        yield np.clip(lengths, 1, np.iinfo(np.int32).max).astype(np.int32)


def document_lengths(documents: int, seed: int) -> NDArray[np.int32]:
    """int32 [documents], all blocks in one array."""
    lengths = np.empty(documents, np.int32)
    first = 0
    for block in length_blocks(documents, seed):
        lengths[first : first + block.size] = block
        first += block.size
    return lengths


def pieces_of(lengths: NDArray[np.int32], row_tokens: int) -> NDArray[np.int64]:
    """int64 [pieces]: each document's remainder (if any), then the full rows of all long documents.

    This is what is given to packers that cannot cut: the cutting is our gift to them.
    """
    remainders = lengths % row_tokens
    full_rows = int((lengths // row_tokens).sum(dtype=np.int64))
    return np.concatenate((remainders[remainders > 0], np.full(full_rows, row_tokens))).astype(np.int64)


def write_corpus(prefix: Path, documents: int, seed: int) -> None:
    """Write `PREFIX.idx`, a sparse `PREFIX.bin` of `documents` documents, and a record of them."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    offset = 0
    lengths_at = HEADER.size
    offsets_at = lengths_at + 4 * documents
    boundaries_at = offsets_at + 8 * documents
    with open(prefix.with_name(prefix.name + ".idx"), "wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[TOKEN_DTYPE], documents, documents + 1))
        first = 0
        for lengths in length_blocks(documents, seed):
            bytes_each = lengths.astype(np.int64) * TOKEN_DTYPE.itemsize
            ends = offset + np.cumsum(bytes_each)
            stream.seek(lengths_at + 4 * first)
            stream.write(lengths.astype("<i4").tobytes())
            stream.seek(offsets_at + 8 * first)
            stream.write((ends - bytes_each).astype("<i8").tobytes())
            stream.seek(boundaries_at + 8 * first)
            stream.write(np.arange(first, first + lengths.size, dtype="<i8").tobytes())
            first += lengths.size
            offset = int(ends[-1])
        stream.write(np.array([documents], dtype="<i8").tobytes())
        stream.flush()
        os.fsync(stream.fileno())  # or the tool that is timed next would pay for writing it out
    with open(prefix.with_name(prefix.name + ".bin"), "wb") as stream:
        stream.truncate(offset)
    index = sha256_file(prefix.with_name(prefix.name + ".idx"))
    record = CorpusRecord(
        raw_files=[],
        tokenizer={"path": "none", "kind": "huggingface", "vocab_size": 2, "sha256": "0" * 64},
        special_tokens={"prefix_ids": [], "eod_id": 0, "eod_token": "none"},
        documents=documents,
        tokens=offset // TOKEN_DTYPE.itemsize,
        skipped=0,
        dtype=str(TOKEN_DTYPE),
        bin_sha256="0" * 64,  # not the hash of the hole; packing copies it and reads no tokens
        idx_sha256=index,
        largest_id=0,
    )
    write_corpus_record(prefix, record)
