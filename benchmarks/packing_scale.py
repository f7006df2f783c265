"""The whole packing tool at growing sizes: time, memory, bytes, and a straight line to 10^9 documents."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from measure import Row, publish
from pack_check import check_pack
from synthetic import document_lengths, write_corpus
from tool_runs import run_tool_process

from megatron_exact.data.indexed import IndexedTokens
from megatron_exact.data.sources import load_pool

EXTRAPOLATED_DOCUMENTS = 10**9
VALIDATION_FRACTION = "0.01"  # as README.md's examples; it takes memory that 0 does not
GIB = 2**30
READING = "reading the index, CPU s"
MEASURED = (
    *("seconds", "CPU seconds", READING),
    *("peak anonymous GiB", "peak resident GiB", "pack GiB", "index GiB"),
)


def measure_scale(
    options: argparse.Namespace,
    folder: Path,
    pack_corpus_words: Callable[..., list[str]],
) -> None:
    """Run the tool once at each of `options.scale`, check each pack, publish the table."""
    rows = []
    for documents in sorted(options.scale):
        rows.append(_measure_size(options, folder, documents, pack_corpus_words))
        print(f"  {rows[-1]}", file=sys.stderr, flush=True)
    if len(rows) > 1:
        rows.append(extrapolate(rows, EXTRAPOLATED_DOCUMENTS))
    publish(
        "packing",
        rows,
        title=f"The whole packing tool by size, {options.policy}, rows of {options.row_tokens:,}",
        notes=[
            "One run of `pack_corpus.py` a size, start to end, with "
            f"`--validation-fraction {VALIDATION_FRACTION}`, one source and no weights. Anonymous memory "
            "is the private memory that the tool needs; resident memory also counts pages of mapped files, "
            "which the kernel takes back when others need them, and so does the scratch file of best-fit. "
            "Reading the index is what the tool does with it before planning: checking, hashing, and the "
            "lengths. The index (.idx) is what it reads, the "
            "pack what it leaves.",
            "The line that says *extrapolated* was not measured: it is the straight line through the two "
            "largest sizes.",
        ],
        file=options.json,
    )


def _measure_size(
    options: argparse.Namespace,
    folder: Path,
    documents: int,
    pack_corpus_words: Callable[..., list[str]],
) -> Row:
    corpus, pack = folder / f"corpus-{documents}", folder / f"pack-{documents}"
    write_corpus(corpus, documents, options.seed)
    words = pack_corpus_words(options, corpus, pack, validation_fraction=VALIDATION_FRACTION)
    index = corpus.with_name(corpus.name + ".idx")
    started = time.process_time()
    load_pool([IndexedTokens(corpus)])
    IndexedTokens(corpus).check()
    reading = time.process_time() - started
    run = run_tool_process(words, cwd=folder)
    padding = check_pack(pack, document_lengths(documents, options.seed), options.row_tokens)
    pack_bytes = sum(path.stat().st_size for path in pack.rglob("*") if path.is_file())
    values = (
        run.wall_seconds,
        run.cpu_seconds,
        reading,
        run.peak_anonymous_bytes / GIB,
        run.peak_resident_bytes / GIB,
        pack_bytes / GIB,
        index.stat().st_size / GIB,
    )
    shutil.rmtree(pack)
    index.unlink()
    for suffix in (".bin", ".json"):
        corpus.with_name(corpus.name + suffix).unlink()
    return {
        "documents": f"{documents:,}",
        **dict(zip(MEASURED, values, strict=True)),
        "written GiB": run.storage_bytes / GIB,
        "documents/s": documents / run.wall_seconds,
        "padding": f"{padding:.4%}",
    }


def extrapolate(rows: list[Row], documents: int) -> Row:
    """The straight line through the last two rows, at `documents`."""
    (small, before), (large, last) = [(int(row["documents"].replace(",", "")), row) for row in rows[-2:]]
    row: Row = {"documents": f"{documents:,} (extrapolated)"}
    for column in (*MEASURED, "written GiB"):
        slope = (last[column] - before[column]) / (large - small)
        row[column] = last[column] + slope * (documents - large)
    row["documents/s"] = documents / row["seconds"]
    return row
