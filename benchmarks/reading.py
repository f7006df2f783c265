"""Time reading a row: ours against the stock dataset of Megatron, on the same `.bin`.

    python benchmarks/reading.py
    python benchmarks/reading.py --tokens 2e7 --rows 100 --json reading.jsonl

Stock is `GPTDataset` with inter-document masking; ours is `PackedDataset`, packed by `concat`, which cuts
the stream as stock does, and by `best-fit`. All three give one sample of the same tensors, and ours two
more (bucket and weight of each target). The series of rows alternate, stock, concat, best-fit, stock, ...,
in one process on one thread.

* warm: the rows of a series were read before, all files are in the page cache.
* cold: for each series the dataset is opened again and the kernel is asked to drop the pages of all its
  files (POSIX_FADV_DONTNEED) before the first row.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measure
import numpy as np
import torch

from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.indexed import IndexedWriter
from megatron_exact.data.manifest import POLICIES, read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.exposure import build_weighting

VOCABULARY = 32_000
STOCK = "stock"


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lognormal document lengths."""

    name: str
    """In the table."""
    median: int
    """Tokens."""
    sigma: float
    """Of the logarithm."""


REGIMES = (
    Lengths(name="short", median=300, sigma=0.5),
    Lengths(name="heavy tailed", median=900, sigma=1.4),
    Lengths(name="long", median=20_000, sigma=1.0),
)


def write_tokens(prefix: Path, lengths: Lengths, tokens: int, seed: int) -> None:
    """A corpus of about `tokens` random tokens on disk."""
    generator = np.random.default_rng(seed)
    documents = int(tokens / (lengths.median * np.exp(lengths.sigma**2 / 2))) + 1
    drawn = generator.lognormal(np.log(lengths.median), lengths.sigma, documents)
    writer = IndexedWriter(f"{prefix}.bin", f"{prefix}.idx", VOCABULARY)
    for length in np.maximum(1, drawn).astype(np.int64):
        writer.add(generator.integers(1, VOCABULARY, length))
    writer.close()


def open_stock(prefix: Path, row_tokens: int, seed: int) -> Any:
    """Megatron's own dataset of the corpus, its index files in a cache beside it."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=row_tokens,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(prefix.parent / "cache"),
        tokenizer=SimpleNamespace(eod=0, vocab_size=VOCABULARY, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        inter_document_masking=True,
    )
    corpus = IndexedDataset(str(prefix), mmap=True)
    documents = np.arange(corpus.document_indices.size - 1, dtype=np.int32)
    return GPTDataset(corpus, str(prefix), documents, None, Split.train, config)


def open_ours(pack: Path, seed: int) -> PackedDataset:
    """Our dataset of a pack, weighed by EXACT."""
    manifest = read_manifest(pack)
    exposure = manifest.splits["train"].exposure
    weighting = build_weighting(
        "exact",
        exposure.counts,
        exposure.lower,
        manifest.row_tokens,
        tau=exposure.lower[1],  # the corpus of short documents has no targets beyond a quarter of a row
    )
    return PackedDataset(pack, "train", seed=seed, weighting=weighting)


def drop_from_page_cache(folder: Path) -> None:
    """Write out every file below a folder and ask the kernel to forget its pages."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def microseconds_a_row(dataset: Any, indices: Iterable[int], count: int) -> float:
    """Time of one series."""
    started = time.perf_counter()
    for index in indices:
        dataset[index]
    return (time.perf_counter() - started) / count * 1e6


def time_series(
    opened_by: dict[str, Callable[[], Any]], folder: Path, *, rows: int, rounds: int, cold: bool, seed: int
) -> dict[str, float]:
    """Median over the rounds of the time of a row, microseconds, by contender.

    Args:
        opened_by: contender to the function that opens it.
        folder: of all their files.
        rows: of one series, drawn at random.
        rounds: series of each contender.
        cold: see the module's head.
        seed: of the draw.
    """
    generator = np.random.default_rng(seed)
    kept = {} if cold else {name: open_one() for name, open_one in opened_by.items()}
    times: dict[str, list[float]] = {name: [] for name in opened_by}
    for _ in range(rounds):
        share = generator.random(rows)
        for name, open_one in opened_by.items():
            dataset = open_one() if cold else kept[name]
            indices = (share * len(dataset)).astype(int).tolist()
            if cold:
                drop_from_page_cache(folder)
            else:
                microseconds_a_row(dataset, indices, rows)
            times[name].append(microseconds_a_row(dataset, indices, rows))
            del dataset  # closes its maps: a mapped page is not dropped
    return {name: statistics.median(values) for name, values in times.items()}


def measure_regime(lengths: Lengths, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Two table rows of one regime, warm and cold."""
    prefix = folder / "corpus"
    write_tokens(prefix, lengths, options.tokens, options.seed)
    segments = {}
    for policy in POLICIES:
        plan = PackOptions(row_tokens=options.row_tokens, policy=policy, seed=options.seed)
        split = pack_corpora([str(prefix)], folder / policy, plan).splits["train"]
        segments[policy] = split.segments / split.rows
    opened_by: dict[str, Callable[[], Any]] = {
        STOCK: lambda: open_stock(prefix, options.row_tokens, options.seed),
        "concat": lambda: open_ours(folder / "concat", options.seed),
        "best-fit": lambda: open_ours(folder / "best-fit", options.seed),
    }
    opened_by[STOCK]()  # builds its index files
    table = []
    for cold in (False, True):
        print(f"  {lengths.name}, {'cold' if cold else 'warm'}", file=sys.stderr, flush=True)
        found = time_series(
            opened_by, folder, rows=options.rows, rounds=options.rounds, cold=cold, seed=options.seed
        )
        table.append(
            {
                "documents": f"{lengths.name}, median {lengths.median:,}",
                "segments a row": round(segments["concat"], 1),
                "page cache": "cold" if cold else "warm",
                "stock GPTDataset, us": round(found[STOCK]),
                "concat, us": round(found["concat"]),
                "best-fit, us": round(found["best-fit"]),
                "concat / stock": round(found["concat"] / found[STOCK], 2),
                "best-fit / stock": round(found["best-fit"] / found[STOCK], 2),
            }
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=measure.whole_number, default=256_000_000, help="of each corpus")
    parser.add_argument("--row-tokens", type=measure.whole_number, default=16_384)
    parser.add_argument("--rows", type=measure.whole_number, default=200, help="of one series")
    measure.add_common_arguments(parser)
    parser.set_defaults(rounds=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # a corpus without a record, a pack without validation
    table = []
    for lengths in REGIMES:
        with (
            tempfile.TemporaryDirectory(prefix="reading-") as folder,
            contextlib.redirect_stdout(sys.stderr),
        ):
            table += measure_regime(lengths, options, Path(folder))
    publish_table(table, options)


def publish_table(table: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print and store."""
    measure.publish(
        "reading",
        table,
        title=f"Reading one row of {options.row_tokens:,} tokens",
        notes=(
            f"Median of {options.rounds} series of {options.rows} random rows each, wall time of one "
            "`dataset[index]`; the same `.bin` for all, one process, one thread, series alternating.",
            "Ours gives two tensors more than stock: bucket and weight of each target.",
        ),
        file=options.json,
    )


if __name__ == "__main__":
    run_tool(main)
