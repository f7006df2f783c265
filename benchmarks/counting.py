"""Time the exposure counts of a plan against `numpy.bincount` over the same array.

Counts in closed form need one pass over the segment lengths; a bincount is the least that such a pass can
cost. Arrays are int32 lengths as a pack stores them, in memory and memory-mapped (in the page cache),
lognormal (median 900, sigma 1.4) and cut to a row. Contenders run in turn, A B A B; the table has medians
and the ratio of medians. Counting token by token, the plain reference, is timed on as many segments as
keep it short, and both ways must give the same counts.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from measure import (
    REPOSITORY,
    Row,
    add_common_arguments,
    publish,
    time_interleaved,
    whole_number,
    whole_numbers,
)
from numpy.typing import NDArray
from synthetic import document_lengths

from megatron_exact.command_line import ToolParser, positive_int, run_tool
from megatron_exact.exposure import bucket_index, exposure_counts

EPILOG = """example:
  python benchmarks/counting.py --segments 1e6,1e7 --rounds 5
"""
TOKENS_A_CHUNK = 1 << 22


def segment_lengths(segments: int, row_tokens: int, seed: int) -> NDArray[np.int32]:
    """int32 [segments], lognormal, cut to a row."""
    lengths = document_lengths(segments, seed)
    return np.minimum(lengths, row_tokens, out=lengths)


def token_by_token_counts(segment_tokens: NDArray[np.int32], row_tokens: int) -> NDArray[np.int64]:
    """Targets per bucket with one array element a token, in chunks: the plain reference.

    The target of a segment's input i (from 0) has context i + 1; the last input's is left out.
    """
    counts = np.zeros(bucket_index(row_tokens, row_tokens) + 1, np.int64)
    ends = np.cumsum(segment_tokens, dtype=np.int64)
    first = 0
    while first < segment_tokens.size:
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + TOKENS_A_CHUNK, side="right")))
        lengths = segment_tokens[first:last].astype(np.int64)
        context = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        inside = context[context > 0]
        counts += np.bincount(bucket_index(inside, row_tokens), minlength=counts.size)
        first = last
    return counts


def compare_with_bincount(options: argparse.Namespace, folder: Path) -> None:
    """One line a size and kind of array."""
    rows: list[Row] = []
    row_tokens = options.row_tokens
    for segments in sorted(options.segments):
        path = folder / "segment_tokens.npy"
        lengths = segment_lengths(segments, row_tokens, options.seed)
        np.save(path, lengths)
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        for kind, array in (("in memory", lengths), ("memory-mapped", mapped)):
            timings = time_interleaved(
                {
                    f"exposure_counts, {segments:,} {kind}": partial(exposure_counts, array, row_tokens),
                    f"bincount, {segments:,} {kind}": partial(np.bincount, array, minlength=row_tokens + 1),
                },
                options.rounds,
            )
            ours, theirs = timings.values()
            rows.append(
                {
                    "array": f"{segments:,} segments, {kind}",
                    "exposure_counts, s": ours.wall_seconds,
                    "numpy.bincount, s": theirs.wall_seconds,
                    "ratio": round(ours.wall_seconds / theirs.wall_seconds, 2),
                    "ratio of CPU": round(ours.cpu_seconds / theirs.cpu_seconds, 2),
                    "segments/s": segments / ours.wall_seconds,
                }
            )
        del mapped, array
        path.unlink()
    publish(
        "counting",
        rows,
        title=f"Counting in closed form against numpy.bincount, rows of {row_tokens:,}",
        notes=[f"Medians of {options.rounds} rounds."],
        file=options.json,
    )


def compare_with_tokens(options: argparse.Namespace) -> None:
    """Closed form against token by token, which must agree."""
    row_tokens = options.row_tokens
    lengths = segment_lengths(options.token_segments, row_tokens, options.seed)
    found: dict[str, NDArray[np.int64]] = {}
    timings = time_interleaved(
        {
            "closed form": lambda: exposure_counts(lengths, row_tokens),
            "token by token": lambda: token_by_token_counts(lengths, row_tokens),
        },
        options.rounds,
        inspect=found.__setitem__,
    )
    if not np.array_equal(found["closed form"], found["token by token"]):
        raise ValueError("the two ways of counting disagree: one of them is wrong")
    tokens = int(lengths.sum(dtype=np.int64))
    publish(
        "counting",
        [
            {
                "way": name,
                "seconds": timing.wall_seconds,
                "million tokens/s": tokens / timing.wall_seconds / 1e6,
                "times as fast": round(timings["token by token"].wall_seconds / timing.wall_seconds),
            }
            for name, timing in timings.items()
        ],
        title=f"Counting in closed form against token by token, {lengths.size:,} segments",
        notes=[f"{tokens:,} tokens; both give the same counts; medians of {options.rounds} rounds."],
        file=options.json,
    )


def build_parser() -> ToolParser:
    """Arguments of this benchmark."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--segments",
        type=whole_numbers,
        default=(10**6, 10**7, 10**8),
        metavar="N,N,...",
        help="sizes of the arrays; 1e8 need 1 GB of memory (default: 1e6,1e7,1e8)",
    )
    parser.add_argument(
        "--token-segments", type=whole_number, default=100_000, help="counted token by token; default: 1e5"
    )
    parser.add_argument("--row-tokens", type=positive_int, default=16_384, help="default: %(default)s")
    parser.add_argument(
        "--work-folder",
        default=str(REPOSITORY / ".cache" / "bench"),
        metavar="DIR",
        help="where the mapped arrays are made, and removed again (default: .cache/bench)",
    )
    add_common_arguments(parser)
    parser.set_defaults(rounds=7)  # they take milliseconds
    return parser


def main() -> int:
    """Run the benchmark."""
    options = build_parser().parse_args()
    Path(options.work_folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work_folder) as folder:
        compare_with_bincount(options, Path(folder))
    compare_with_tokens(options)
    return 0


if __name__ == "__main__":
    run_tool(main)
