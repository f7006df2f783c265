"""Time reading rows from an object store that answers each request after 20 ms.

    python benchmarks/remote_reading.py
    python benchmarks/remote_reading.py --latency-ms 100 --rows 200 --json remote.jsonl

The store is a folder behind fsspec whose every request, for a range or for metadata, first sleeps. Rows are
read back to back by one process, as one data worker does while the model computes nothing, in the order of
the seed. A cold series begins with an empty cache, so its first row waits for the index too, whose requests
are counted apart. Series alternate; the table has medians.

* one request at a time: what a reader without `will_need` does.
* a row at once: all ranges of the row that is being read are in flight, none of later rows.
* read ahead: the ranges of the next 16 rows as well, the default from a URL.
* cached: as another process of the node, or a job after a restart, reads the same rows.

A training step takes longer than a row, so the last column is what matters there: the time a step waits
when the model computes for 100 ms between rows.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import measure
import reading

from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.data import remote
from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.pack import PackOptions, pack_corpora

COMPUTE_SECONDS = 0.1


class SlowStore(fsspec.AbstractFileSystem):
    """A folder whose requests take `seconds`."""

    protocol = "slow"
    root: ClassVar[Path]
    seconds: ClassVar[float]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        time.sleep(self.seconds)
        status = os.stat(self.root / path)
        return {"name": path, "size": status.st_size, "type": "file", "mtime": status.st_mtime_ns}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        time.sleep(self.seconds)
        with open(self.root / path, "rb") as stream:
            stream.seek(start or 0)
            return stream.read() if end is None else stream.read(end - (start or 0))


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of reading."""

    name: str
    """In the table."""
    read_ahead: int = 0
    """Rows."""
    in_flight: int = remote.IN_FLIGHT
    """Requests at a time."""
    is_cold: bool = True
    """Whether the cache is empty."""
    is_local: bool = False
    """Whether the corpus is read from disk, without a store."""


WAYS = (
    Way(name="disk", is_local=True),
    Way(name="cold, one request at a time", in_flight=1),
    Way(name="cold, a row at once"),
    Way(name="cold, read ahead", read_ahead=remote.READ_AHEAD_FROM_URL),
    Way(name="cached, a row at once", is_cold=False),
    Way(name="cached, read ahead", is_cold=False, read_ahead=remote.READ_AHEAD_FROM_URL),
)


def read_series(
    pack: Path, way: Way, rows: int, cache: Path, *, compute_seconds: float
) -> dict[str, float]:
    """Read the first rows in the order of the seed, as a new process would.

    Returns:
        Milliseconds waited and CPU milliseconds, requests and comparisons, all per row after the first.
    """
    remote._readers.clear()
    remote._stand_ins.clear()
    remote.IN_FLIGHT = way.in_flight
    os.environ[remote.FOLDER_VARIABLE] = str(cache)
    source_root = None if way.is_local else "slow://store"
    dataset = PackedDataset(pack, "train", seed=1, source_root=source_root, read_ahead=way.read_ahead)
    dataset.__getitems__([0])
    chunks = remote.chunk_reader()
    before = chunks.requests, chunks.comparisons
    waited, cpu = 0.0, time.process_time()
    for item in range(1, rows + 1):
        started = time.perf_counter()
        dataset.__getitems__([item])
        waited += time.perf_counter() - started
        time.sleep(compute_seconds)
    return {
        "ms": waited / rows * 1e3,
        "cpu": (time.process_time() - cpu) / rows * 1e3,
        "requests": (chunks.requests - before[0]) / rows,
        "comparisons": (chunks.comparisons - before[1]) / rows,
    }


def measure_ways(pack: Path, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One table row for each way."""
    found: dict[str, list[dict[str, float]]] = {way.name: [] for way in WAYS}
    steps: dict[str, list[float]] = {way.name: [] for way in WAYS}
    filled = folder / "filled"
    read_series(pack, Way(name="fill"), options.rows, filled, compute_seconds=0.0)
    for turn in range(options.rounds):
        for way in WAYS:
            print(f"  round {turn + 1} of {options.rounds}: {way.name}", file=sys.stderr, flush=True)
            for compute_seconds in (0.0, COMPUTE_SECONDS):
                cache = folder / f"{turn}-{way.name}-{compute_seconds}" if way.is_cold else filled
                one = read_series(pack, way, options.rows, cache, compute_seconds=compute_seconds)
                if compute_seconds:
                    steps[way.name].append(one["ms"])
                else:
                    found[way.name].append(one)

    def median(way: Way, name: str) -> float:
        return statistics.median(one[name] for one in found[way.name])

    return [
        {
            "from": way.name,
            "ms a row": round(median(way, "ms"), 1),
            "rows/s": round(1e3 / median(way, "ms"), 1),
            "CPU ms a row": round(median(way, "cpu"), 1),
            "ranges a row": round(median(way, "requests"), 1),
            "comparisons a row": round(median(way, "comparisons"), 1),
            "ms waited a step of 100 ms": round(statistics.median(steps[way.name]), 1),
        }
        for way in WAYS
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=measure.whole_number, default=100_000_000, help="of the corpus")
    parser.add_argument("--row-tokens", type=measure.whole_number, default=16_384)
    parser.add_argument("--rows", type=measure.whole_number, default=50, help="of one series")
    parser.add_argument("--latency-ms", type=float, default=20.0, help="of a request")
    measure.add_common_arguments(parser)
    parser.set_defaults(rounds=3)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # a corpus without a record, a pack without validation
    fsspec.register_implementation("slow", SlowStore)
    with (
        tempfile.TemporaryDirectory(prefix="remote-") as name,
        contextlib.redirect_stdout(sys.stderr),
    ):
        folder = Path(name)
        SlowStore.root, SlowStore.seconds = folder, options.latency_ms / 1e3
        (folder / "store").mkdir()
        prefix = folder / "store" / "corpus"
        lengths = next(one for one in reading.REGIMES if one.name == "heavy tailed")
        reading.write_tokens(prefix, lengths, options.tokens, options.seed)
        plan = PackOptions(row_tokens=options.row_tokens, policy="concat", seed=options.seed)
        split = pack_corpora([str(prefix)], folder / "pack", plan).splits["train"]
        table = measure_ways(folder / "pack", options, folder)
    measure.publish(
        "remote_reading",
        table,
        title=f"Reading rows of {options.row_tokens:,} tokens, {options.latency_ms:g} ms a request",
        notes=(
            f"Median of {options.rounds} series of {options.rows} rows each, one process; documents of "
            f"{lengths.median:,} tokens in the median, {split.segments / split.rows:.1f} segments a row. A "
            "comparison asks the store whether the object is still the same one.",
        ),
        file=options.json,
    )


if __name__ == "__main__":
    run_tool(main)
