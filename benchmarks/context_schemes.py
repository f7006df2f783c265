"""Compare three ways to share packed rows over N context-parallel ranks: spans, padding, whole documents.

spans
    Ours: a row is cut into 2 N spans of one length wherever documents begin, and keys and values are
    gathered (`megatron_exact/model/context_parallel.py`).
padding
    Every segment is padded to a multiple of 2 N and cut into 2 N pieces, as the slicing of Transformer
    Engine needs it; keys and values travel around a ring. Documents are packed again with padded lengths.
whole documents
    Megatron's hybrid context parallelism: a document of up to row / N tokens stays on one rank, a longer
    one is shared by 2, 4, ... ranks. Megatron's own scheduler assigns the documents of each step
    (`BalancedCPScheduler` of megatron-core), with the documents of the rows that spans would read.

All of it is arithmetic on document lengths: spans alone run here, the other two were never run. "layer"
is the time of a layer of Llama-3.1-8B, counted in FLOP, over that of an even share of the same documents,
each whole; waiting, padding and idle ranks are in it, messages and launches are not. "tiles" is the same
with attention counted in tiles of 128 queries and 128 keys, which a flash kernel computes whole: it shows
what cutting short documents into many pieces costs. Attention kernels reach fewer FLOP/s than matrix
products, so what attention loses costs somewhat more than either says. "passes" are the forward passes of
the busiest rank for each row: spans and padding have one. "8 a rank" is "tiles" of spans if each rank had
eight of them, a quarter as long, in place of two, which is not implemented.

The second table is in MiB. "sent" is what a rank sends in forward and backward of a layer for each row of
tokens, in bfloat16 without tensor parallelism, which divides it. Spans: an all-gather and a
reduce-scatter, N - 1 shards of a row each. Padding: the ring of Transformer Engine 2.20 sends N - 1 shards
of keys and values forward and, backward, those again and as many of their gradients. Whole documents: the
same ring over the ranks that share a document. "held" is what the largest rank keeps of keys and values of
one layer until its backward.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from row_balance import MODEL, planned_arrays
from synthetic import MEDIAN_TOKENS, SIGMA

from megatron_exact.command_line import ToolParser, positive_int, progress_bar, run_tool
from megatron_exact.data.attention_work import attention_balance, row_pairs
from megatron_exact.data.lengths import read_length_file
from megatron_exact.model.families import preset
from megatron_exact.model.shapes import ModelShape
from megatron_exact.report.page import markdown_table
from megatron_exact.training.memory_forecast import layer_parameters

EPILOG = """examples:
  python benchmarks/context_schemes.py
  python benchmarks/context_schemes.py --median 12000 --sigma 1.2
  python benchmarks/context_schemes.py --lengths tokens/web.idx
"""
ROWS = (32_768, 65_536, 131_072)
SIZES = (2, 4, 8, 16)
STEP_TOKENS = 1 << 19
BYTES = 2
"""Of a number in bfloat16."""
MIB = 1 << 20
NAMES = ("spans", "padding", "whole")
TOKENS = 1 << 27
STEPS = 64
FINER = 8
"""Spans a rank of a finer cut, which is not implemented."""
TILE = 128
"""Queries and keys of a tile: that of FlashAttention 2 and 3 and of cuDNN for heads of 128, or near it."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a layer costs, in pairs of a query and a key of attention (4 FLOP a channel of the heads)."""

    of_token: float
    """Pairs that cost as much as the matrices do for one token."""
    kv_bytes: int
    """Bytes of the keys and values of one token."""

    @classmethod
    def of(cls, shape: ModelShape) -> Costs:
        """Return those of a model without tensor parallelism."""
        width = shape.num_attention_heads * shape.head_dim
        return cls(
            of_token=layer_parameters(shape, 1) / (2 * width),
            kv_bytes=2 * shape.num_query_groups * shape.head_dim * BYTES,
        )


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What one scheme makes of the rows."""

    lost: float
    """Share of all row tokens that are padding."""
    attention: float
    """Attention work of the busiest rank over the mean, weighted by work."""
    tokens: float
    """Tokens of the fullest rank over the mean."""
    layer: float
    """Time of a layer over that of an even share of the documents alone."""
    tiles: float
    """The same with attention counted in whole tiles."""
    finer: float = 0.0
    """The same as `tiles` with FINER spans a rank."""
    sent_bytes: float
    """Sent by a rank for each row of tokens and layer, forward and backward."""
    held_bytes: float
    """Keys and values of one layer that the largest rank keeps."""


def pairs_of(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the pairs of whole documents of these lengths."""
    return tokens * (tokens + 1) // 2


def tiles_of(queries: NDArray[np.int64], before: NDArray[np.int64] | int = 0) -> NDArray[np.int64]:
    """Return the tiles that a causal kernel computes, each in pairs, TILE^2.

    Args:
        queries: int64 [n], queries of each segment, the last ones of its keys.
        before: int64 [n], keys of the segment before its first query.

    Returns:
        int64 [n], pairs in tiles.
    """
    full, rest = queries // TILE, queries % TILE
    tiles = full * (full + 1) // 2 + full * -(-before // TILE)
    return (tiles + np.where(rest > 0, -(-(before + queries) // TILE), 0)) * TILE**2


def ring_tiles(tokens: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """Return the tiles, in pairs, of each of m ranks that share documents in 2 m pieces around a ring.

    A rank has two pieces of c tokens. It meets its own keys once, and those of the others either with all
    its queries and the earlier half of the keys, or with the later half of its queries and all keys.

    Args:
        tokens: int64 [n], lengths of documents, multiples of 2 m.
        ranks: m.

    Returns:
        int64 [n], the same on every rank.
    """
    piece = tokens // (2 * ranks)
    met = -(-piece // TILE) * -(-2 * piece // TILE) * TILE**2
    return tiles_of(2 * piece) + (ranks - 1) * met


def ideal_layers(tokens: NDArray[np.int64], costs: Costs) -> tuple[float, float]:
    """Return the work of a layer on whole documents, without padding, counted in pairs and in tiles."""
    rest = float(tokens.sum() * costs.of_token)
    return rest + float(pairs_of(tokens).sum()), rest + float(tiles_of(tokens).sum())


def span_tiles(
    arrays: dict[str, NDArray[np.int64]], row_tokens: int, ranks: int, *, spans_of_rank: int = 2
) -> float:
    """Return the tiles, in pairs, of the busiest rank of each row, summed over rows.

    With more than two spans a rank, which our attention does not have, every next 2 N of them are dealt
    alike.
    """
    num_spans = spans_of_rank * ranks
    edges = np.arange(num_spans + 1) * (row_tokens // num_spans)
    total = 0.0
    for first, last in pairwise(arrays["row_offsets"].tolist()):
        ends = np.cumsum(arrays["segment_tokens"][first:last])
        starts = np.unique(np.concatenate([[0], ends, [row_tokens]]))  # padding is a segment
        cuts = np.union1d(starts, edges)
        begin, queries = cuts[:-1], np.diff(cuts)
        before = begin - starts[np.searchsorted(starts, begin, side="right") - 1]
        span = np.searchsorted(edges, begin, side="right") - 1
        work = np.bincount(span, tiles_of(queries, before), minlength=num_spans)
        work = work.reshape(-1, 2 * ranks).sum(axis=0)
        total += float((work[:ranks] + work[: ranks - 1 : -1]).max())
    return total


def spans(arrays: dict[str, NDArray[np.int64]], row_tokens: int, ranks: int, costs: Costs) -> Scheme:
    """Return the costs of our scheme."""
    rows, padded = arrays["row_offsets"].size - 1, row_pairs(arrays, row_tokens=row_tokens)
    uneven = 1 / (1 - attention_balance(arrays, row_tokens=row_tokens, ranks=ranks).waiting)
    rest = rows * row_tokens * costs.of_token
    in_pairs, in_tiles = ideal_layers(arrays["segment_tokens"], costs)
    return Scheme(
        lost=lost_share(arrays, row_tokens),
        attention=uneven,
        tokens=1.0,
        layer=(rest + uneven * float(padded.sum())) / in_pairs,
        tiles=(rest + ranks * span_tiles(arrays, row_tokens, ranks)) / in_tiles,
        finer=(rest + ranks * span_tiles(arrays, row_tokens, ranks, spans_of_rank=FINER)) / in_tiles,
        sent_bytes=2 * (ranks - 1) * row_tokens / ranks * costs.kv_bytes,
        held_bytes=row_tokens * costs.kv_bytes,
    )


def lost_share(arrays: dict[str, NDArray[np.int64]], row_tokens: int) -> float:
    """Return the share of the rows' tokens that are in no segment."""
    return 1 - float(arrays["segment_tokens"].sum()) / ((arrays["row_offsets"].size - 1) * row_tokens)


def row_ends(arrays: dict[str, NDArray[np.int64]], row_tokens: int) -> NDArray[np.int64]:
    """Return the tokens of padding at the end of each row that has some."""
    filled = np.add.reduceat(arrays["segment_tokens"], arrays["row_offsets"][:-1])
    return row_tokens - filled[filled < row_tokens]


def padding(
    lengths: NDArray[np.int32],
    arrays: dict[str, NDArray[np.int64]],
    row_tokens: int,
    ranks: int,
    costs: Costs,
    *,
    seed: int,
) -> Scheme:
    """Return the costs of segments padded to multiples of 2 N: the documents are packed again so."""
    piece = 2 * ranks
    repacked = planned_arrays(-(-lengths // piece) * piece, row_tokens, seed)
    rows = repacked["row_offsets"].size - 1
    real = float(lengths.sum(dtype=np.int64))
    # Every segment, and so the padding at a row's end, is cut into 2 N pieces of one length: rank r has
    # the r-th and the r-th last, which is the same work for every rank
    rest = rows * row_tokens * costs.of_token
    pieces = np.concatenate([repacked["segment_tokens"], row_ends(repacked, row_tokens)])
    in_pairs, in_tiles = ideal_layers(arrays["segment_tokens"], costs)
    shards = rows * row_tokens / (real / row_tokens) / ranks  # of padded tokens, for a row of real ones
    return Scheme(
        lost=1 - real / (rows * row_tokens),
        attention=1.0,
        tokens=1.0,
        layer=(rest + float(pairs_of(pieces).sum())) / in_pairs,
        tiles=(rest + ranks * float(ring_tiles(pieces, ranks).sum())) / in_tiles,
        sent_bytes=3 * (ranks - 1) * shards * costs.kv_bytes,
        held_bytes=row_tokens / ranks * costs.kv_bytes,
    )


class _Group:
    """Stands in for Megatron's process group, of which its scheduler reads the size."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        """Return the number of ranks."""
        return self._size


def whole_documents(
    arrays: dict[str, NDArray[np.int64]], row_tokens: int, ranks: int, costs: Costs, *, steps: int
) -> tuple[Scheme, float]:
    """Return the costs of Megatron's hybrid context parallelism, and forward passes a rank for each row.

    Each step has the documents of STEP_TOKENS of rows. Ranks wait for each other at the end of a group of
    documents, where Megatron has a barrier; a document shared by m ranks is an m-th of its work on each.
    """
    from megatron.core.pipeline_parallel.hybrid_cp_schedule import BalancedCPScheduler

    scheduler = BalancedCPScheduler(row_tokens // ranks, _Group(ranks))
    offsets, tokens = arrays["row_offsets"], arrays["segment_tokens"]
    rows_of_step = STEP_TOKENS // row_tokens
    steps = min(steps, (offsets.size - 1) // rows_of_step)
    sent = held = passes = 0.0
    time, ideal, most, mean = np.zeros((4, 2))
    for step in range(steps):
        here = tokens[offsets[step * rows_of_step] : offsets[(step + 1) * rows_of_step]]
        ideal += np.array(ideal_layers(here, costs)) / ranks
        documents = list(enumerate(here.tolist()))
        _, groups = scheduler.get_groups_and_subsamples(documents, None)
        totals = np.zeros((2, ranks))  # tokens and pairs of each rank in the step
        for group in groups:
            shared_by: dict[int, int] = {}
            for samples in group:
                for sample in samples:
                    shared_by[sample] = shared_by.get(sample, 0) + 1
            done = np.zeros((3, ranks))  # tokens, pairs, pairs in tiles
            for rank, samples in enumerate(group):
                for sample in samples:
                    length, shared = int(here[sample]), shared_by[sample]
                    pairs = length * (length + 1) / 2 / shared
                    padded = -(-here[sample : sample + 1] // (2 * shared)) * 2 * shared
                    tiles = (
                        ring_tiles(padded, shared) if shared > 1 else tiles_of(here[sample : sample + 1])
                    )
                    done[:, rank] += length / shared, pairs, float(tiles[0])
                    sent += 3 * (shared - 1) / shared * length * costs.kv_bytes / ranks
                    held = max(held, length / shared * costs.kv_bytes)
            time += (done[0] * costs.of_token + done[1:]).max(axis=1)
            totals += done[:2]
        passes += max(sum(len(group[rank]) for group in groups) for rank in range(ranks))
        if not np.isclose(totals[0].sum(), here.sum()):
            raise ValueError(f"the scheduler placed {totals[0].sum():.0f} of {here.sum()} tokens")
        most += totals.max(axis=1)
        mean += totals.mean(axis=1)
    fullest = most / mean
    scheme = Scheme(
        lost=0.0,
        attention=float(fullest[1]),
        tokens=float(fullest[0]),
        layer=float(time[0] / ideal[0]),
        tiles=float(time[1] / ideal[1]),
        sent_bytes=sent / (steps * rows_of_step),
        held_bytes=held,
    )
    return scheme, passes / (steps * rows_of_step)


def drawn_lengths(tokens: int, *, median: float, sigma: float, seed: int) -> NDArray[np.int32]:
    """Draw lognormal document lengths until they have this many tokens."""
    mean = median * np.exp(sigma**2 / 2)
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, int(1.5 * tokens / mean) + 100)
    lengths = np.clip(drawn, 1, 1 << 24).astype(np.int32)
    return lengths[: int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), tokens)) + 1]


def measure(
    lengths: NDArray[np.int32], *, seed: int, steps: int
) -> tuple[list[list[str]], list[list[str]]]:
    """Return the lines of both tables: one for each length of row and number of ranks."""
    costs = Costs.of(preset(MODEL))
    times, messages = [], []
    with progress_bar("schemes", len(ROWS) * len(SIZES), " layouts") as bar:
        for row_tokens in ROWS:
            arrays = planned_arrays(lengths, row_tokens, seed)
            for ranks in SIZES:
                ours = spans(arrays, row_tokens, ranks, costs)
                padded = padding(lengths, arrays, row_tokens, ranks, costs, seed=seed)
                whole, passes = whole_documents(arrays, row_tokens, ranks, costs, steps=steps)
                layout = [f"{row_tokens // 1024}K", f"{ranks}"]
                times.append(
                    [
                        *(*layout, f"{ours.attention:.2f}", f"{ours.layer:.3f}", f"{ours.tiles:.3f}"),
                        f"{ours.finer:.3f}",
                        *(f"{padded.lost:.2%}", f"{padded.layer:.3f}", f"{padded.tiles:.3f}"),
                        *(f"{whole.attention:.2f}", f"{whole.tokens:.2f}"),
                        *(f"{whole.layer:.3f}", f"{whole.tiles:.3f}", f"{passes:.1f}"),
                    ]
                )
                schemes = (ours, padded, whole)
                sent = [f"{scheme.sent_bytes / MIB:,.0f}" for scheme in schemes]
                messages.append([*layout, *sent, *(f"{one.held_bytes / MIB:,.0f}" for one in schemes)])
                bar.update(1)
    return times, messages


TIMES = (
    *(
        "row",
        "CP",
        "spans: attention",
        "layer",
        "tiles",
        f"{FINER} a rank",
        "padding: lost",
        "layer",
        "tiles",
    ),
    *("whole: attention", "tokens", "layer", "tiles", "passes"),
)
MESSAGES = ("row", "CP", *(f"{what}: {name}" for what in ("sent", "held") for name in NAMES))


def page_tables(lengths: NDArray[np.int32], *, seed: int = 0, steps: int = STEPS) -> tuple[str, str]:
    """Return both tables in Markdown: times, then MiB sent and held."""
    times, messages = measure(lengths, seed=seed, steps=steps)
    return markdown_table(TIMES, times), markdown_table(MESSAGES, messages)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Parse the options."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths", type=Path, metavar="FILE", help="document lengths: .idx, .npy, .txt, .csv or .json"
    )
    parser.add_argument(
        "--median", type=float, default=MEDIAN_TOKENS, metavar="N", help="of drawn lengths (%(default)s)"
    )
    parser.add_argument(
        "--sigma", type=float, default=SIGMA, metavar="X", help="of their logarithm (%(default)s)"
    )
    parser.add_argument(
        "--tokens", type=positive_int, default=TOKENS, metavar="N", help="to draw (%(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        default=STEPS,
        metavar="N",
        help="steps of 0.5 M tokens that Megatron's scheduler assigns (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="(default: %(default)s)")
    return parser.parse_args(words)


def main() -> None:
    """Print the table."""
    options = parse()
    if options.lengths is not None:
        known = read_length_file(options.lengths)
        lengths = np.repeat(known.lengths, known.counts).astype(np.int32)
    else:
        lengths = drawn_lengths(
            options.tokens, median=options.median, sigma=options.sigma, seed=options.seed
        )
    print("\n".join(page_tables(lengths, seed=options.seed, steps=options.steps)), end="")


if __name__ == "__main__":
    run_tool(main)
