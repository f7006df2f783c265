"""The counts of `benchmarks/context_schemes.py` against counting query by query, and its page."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from context_schemes import (
    STEPS,
    TILE,
    TOKENS,
    Costs,
    drawn_lengths,
    padding,
    page_tables,
    pairs_of,
    ring_tiles,
    span_tiles,
    spans,
    tiles_of,
    whole_documents,
)
from row_balance import MODEL, planned_arrays
from synthetic import MEDIAN_TOKENS, SIGMA

from megatron_exact.model.families import preset

PAGE = Path(__file__).resolve().parents[3] / "docs" / "sharing_attention.md"
ROW_TOKENS = 2048
COSTS = Costs.of(preset(MODEL))


def plain_tiles(query_places: list[int], key_places: list[int]) -> int:
    """Pairs of all tiles in which some query sees some key, tile by tile; places are ascending."""
    count = 0
    for first in range(0, len(query_places), TILE):
        last_query = query_places[first : first + TILE][-1]
        count += sum(key_places[key] <= last_query for key in range(0, len(key_places), TILE))
    return count * TILE**2


@pytest.mark.parametrize(
    ("queries", "before"), [(1, 0), (128, 0), (300, 0), (129, 1), (40, 700), (512, 256)]
)
def test_tiles_are_those_of_looking_at_each(queries: int, before: int) -> None:
    found = tiles_of(np.array([queries]), np.array([before]))
    assert found.tolist() == [
        plain_tiles([before + q for q in range(queries)], list(range(before + queries)))
    ]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("tokens", [16, 1600, 2048])
def test_a_ring_has_the_same_tiles_on_every_rank(tokens: int, ranks: int) -> None:
    """A rank meets its own keys, early ones of ranks before it, and with half its queries the others'."""
    piece = tokens // (2 * ranks)
    places = [
        [
            *range(rank * piece, (rank + 1) * piece),
            *range(tokens - (rank + 1) * piece, tokens - rank * piece),
        ]
        for rank in range(ranks)
    ]
    for rank in range(ranks):
        own = len(places[rank])
        found = plain_tiles(list(range(own)), list(range(own)))  # causal in the order of its own tokens
        for other in range(ranks):
            if other < rank:  # all its queries come after the early piece, and before the late one
                found += -(-2 * piece // TILE) * -(-piece // TILE) * TILE**2
                assert max(places[other][:piece]) < min(places[rank])
                assert min(places[other][piece:]) > max(places[rank])
            elif other > rank:  # its late queries come after both pieces
                found += -(-piece // TILE) * -(-2 * piece // TILE) * TILE**2
                assert max(places[other]) < min(places[rank][piece:])
        assert ring_tiles(np.array([tokens]), ranks).tolist() == [found]
    # without tiles it is all pairs of the document
    assert ranks * (2 * piece * (2 * piece + 1) // 2 + (ranks - 1) * 2 * piece**2) == pairs_of(
        np.array([tokens])
    )


def test_spans_count_the_busiest_rank() -> None:
    arrays = {"row_offsets": np.array([0, 2, 5]), "segment_tokens": np.array([1500, 300, 700, 900, 448])}
    edges, expected = range(0, ROW_TOKENS + 1, ROW_TOKENS // 4), 0
    for row in ([1500, 300, 248], [700, 900, 448]):  # padding last
        ends = np.cumsum([0, *row]).tolist()
        work = []
        for first, last in pairwise(edges):
            work.append(0)
            for start, end in pairwise(ends):
                queries = list(range(max(first, start), min(last, end)))
                work[-1] += plain_tiles(queries, list(range(start, queries[-1] + 1))) if queries else 0
        expected += max(work[0] + work[3], work[1] + work[2])
    assert span_tiles(arrays, ROW_TOKENS, 2) == expected


@pytest.fixture(scope="module")
def lengths() -> np.ndarray:
    return drawn_lengths(1 << 20, median=900, sigma=1.4, seed=1)


@pytest.mark.parametrize("ranks", [2, 8])
def test_padding_is_that_of_packing_again(lengths: np.ndarray, ranks: int) -> None:
    arrays = planned_arrays(lengths, ROW_TOKENS, 0)
    found = padding(lengths, arrays, ROW_TOKENS, ranks, COSTS, seed=0)
    rows = int(sum(-(-int(length) // (2 * ranks)) * 2 * ranks for length in lengths)) / ROW_TOKENS
    least = 1 - int(lengths.sum()) / ROW_TOKENS / np.ceil(rows)
    assert least <= found.lost < least + 0.002  # best fit leaves little beside the padding of segments
    unpadded = spans(arrays, ROW_TOKENS, ranks, COSTS).lost
    assert found.lost >= unpadded
    assert (found.lost > unpadded + 0.001) == (ranks == 8)
    assert 1 < found.layer < found.tiles


@pytest.mark.filterwarnings("ignore")  # Megatron's own, when imported
def test_whole_documents_are_all_placed_and_one_rank_alone_waits_for_nobody(lengths: np.ndarray) -> None:
    arrays = planned_arrays(lengths, ROW_TOKENS, 0)
    one, _ = whole_documents(arrays, ROW_TOKENS, 1, COSTS, steps=1)
    assert (one.layer, one.tiles, one.sent_bytes) == pytest.approx((1, 1, 0))
    four, passes = whole_documents(arrays, ROW_TOKENS, 4, COSTS, steps=1)
    assert min(four.attention, four.tokens, four.layer) > 1
    assert passes > 1 / 4  # more forward passes than an even share of rows
    assert four.held_bytes <= ROW_TOKENS / 4 * COSTS.kv_bytes


@pytest.mark.slow
def test_the_page_has_the_tables() -> None:
    drawn = drawn_lengths(TOKENS, median=MEDIAN_TOKENS, sigma=SIGMA, seed=0)
    page = PAGE.read_text()
    for table in page_tables(drawn, seed=0, steps=STEPS):
        assert table in page
