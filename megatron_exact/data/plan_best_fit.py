"""The `best-fit` policy: documents are cut only where they are longer than a row.

A document longer than a row gives full rows and a remainder; remainders and short documents are packed
by best-fit decreasing (Ding et al. 2024, arXiv 2404.10830), here over the histogram of their lengths:
pieces of one length are interchangeable, so equal rows are planned together and the cost of planning
depends on the number of distinct lengths, not of documents. Then documents are assigned to the planned
places by sorting, and rows, and segments inside a row, are shuffled, so that neither order nor company
in a row follows the corpus or the lengths. Padding stands only at a row's end.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.plan import ChosenDocuments, Plan, empty_plan
from megatron_exact.data.shuffle import KeyedPermutation, derive_key, random_bits

RADIX_SORT_LIMIT = 1 << 16  # numpy sorts 16-bit keys by radix, in linear time


@dataclass(frozen=True)
class _Pattern:
    """Contents of a partly filled row: `times` pieces of `length` on top of `below`."""

    length: int
    times: int
    below: _Pattern | None

    def pieces(self) -> list[int]:
        """Lengths of all pieces."""
        lengths: list[int] = []
        node: _Pattern | None = self
        while node is not None:
            lengths += [node.length] * node.times
            node = node.below
        return lengths


def best_fit_patterns(histogram: NDArray[np.integer], row_tokens: int) -> list[tuple[list[int], int]]:
    """Best-fit decreasing over a histogram of lengths.

    Each piece, longest first, goes into the fullest open row that it fits; a new row is opened when none
    has the room. Rows of the same room are filled one after the other.

    Args:
        histogram: integers [row_tokens + 1], pieces of each length.
        row_tokens: room of an empty row.

    Returns:
        (lengths of the pieces of a row, how many rows look so).
    """
    rows_with_room: defaultdict[int, list[tuple[_Pattern, int]]] = defaultdict(list)
    has_room = 0  # bit k set: rows with room k exist, so the best fit is the lowest set bit >= length
    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            fitting = has_room >> length
            if not fitting:
                groups: list[tuple[_Pattern | None, int]] = [(None, -(-left // (row_tokens // length)))]
                room = row_tokens
            else:
                room = length + (fitting & -fitting).bit_length() - 1
                groups = list(rows_with_room.pop(room))
                has_room &= ~(1 << room)
            each = room // length
            for pattern, rows in groups:
                for times, count in _share_pieces(left, rows, each):
                    left -= times * count
                    filled = _Pattern(length, times, pattern) if times else pattern
                    if filled is not None:
                        rows_with_room[room - times * length].append((filled, count))
                        has_room |= 1 << (room - times * length)
    finished = [group for groups in rows_with_room.values() for group in groups]
    return [(pattern.pieces(), rows) for pattern, rows in finished]


def _share_pieces(pieces: int, rows: int, each: int) -> list[tuple[int, int]]:
    """Fill `rows` equal rows with `each` pieces one after the other: [(pieces in a row, such rows)]."""
    full = min(rows, pieces // each)
    rest = min(each, pieces - full * each) if full < rows else 0
    shared = [(each, full), (rest, 1 if rest else 0)]
    shared.append((0, rows - full - (1 if rest else 0)))
    return [(times, count) for times, count in shared if count]


def plan_best_fit(chosen: ChosenDocuments, row_tokens: int, *, seed: int, split: str) -> Plan:
    """Pack the chosen documents, whose order is already shuffled.

    Args:
        chosen: documents of at least one token each.
        row_tokens: inputs of a row.
        seed: of the pack.
        split: name of the split, part of the shuffle keys.

    Returns:
        A plan that holds every token of every chosen document once.
    """
    if not len(chosen):
        return empty_plan(left_out_tokens=0)
    full_rows = chosen.tokens // row_tokens
    remainder = (chosen.tokens - full_rows * row_tokens).astype(np.int32)
    short = np.flatnonzero(remainder)
    place_length, pieces_in_row = _lay_out_rows(remainder[short], row_tokens, seed, split)
    document = np.empty(place_length.size, dtype=np.int64)
    # The i-th place of a length takes the i-th document of that length, in the shuffled order.
    document[_order_by_length(place_length, row_tokens)] = short[
        _order_by_length(remainder[short], row_tokens)
    ]
    start = chosen.tokens[document] - place_length
    # Full rows, one segment each, stand behind the others before all rows are shuffled.
    long = np.repeat(np.arange(len(chosen)), full_rows)
    first_of_document = np.repeat(np.cumsum(full_rows) - full_rows, full_rows)
    long_start = (np.arange(long.size) - first_of_document) * row_tokens
    sizes = np.concatenate((pieces_in_row, np.ones(long.size, np.int64)))
    order = KeyedPermutation(sizes.size, derive_key("rows of best-fit", seed, split)).all()
    gather, row_offsets = _gather_rows(sizes, order)
    document = np.concatenate((document, long))[gather]
    return Plan(
        row_offsets=row_offsets,
        segment_source=chosen.source[document],
        segment_document=chosen.document[document],
        segment_start=np.concatenate((start, long_start))[gather],
        segment_tokens=np.concatenate((place_length, np.full(long.size, row_tokens, np.int32)))[gather],
        left_out_tokens=0,
        next_token=None,
    )


def _lay_out_rows(
    lengths: NDArray[np.int32], row_tokens: int, seed: int, split: str
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Plan rows for pieces and shuffle the pieces inside each row.

    Returns:
        int32 [pieces], the length of each place, row after row; int64 [rows], places in each row.
    """
    histogram = np.bincount(lengths, minlength=row_tokens + 1)
    by_size: defaultdict[int, tuple[list[list[int]], list[int]]] = defaultdict(lambda: ([], []))
    for pieces, rows in best_fit_patterns(histogram, row_tokens):
        patterns, counts = by_size[len(pieces)]
        patterns.append(pieces)
        counts.append(rows)
    key = derive_key("segments of a row", seed, split)
    place_length = np.empty(lengths.size, dtype=np.int32)
    sizes = []
    done = 0
    for size in sorted(by_size):
        patterns, counts = by_size[size]
        block = np.repeat(np.array(patterns, dtype=np.int32), counts, axis=0)  # [rows of this size, size]
        if size > 1:
            bits = random_bits(key, np.arange(done, done + block.size)).reshape(block.shape)
            block = np.take_along_axis(block, np.argsort(bits, axis=1), axis=1)
        place_length[done : done + block.size] = block.ravel()
        done += block.size
        sizes.append(np.full(block.shape[0], size, dtype=np.int64))
    assert done == lengths.size, "every piece has a place"
    return place_length, np.concatenate(sizes) if sizes else np.zeros(0, np.int64)


def _order_by_length(lengths: NDArray[np.int32], row_tokens: int) -> NDArray[np.int64]:
    """Stable argsort of lengths below row_tokens."""
    keys = lengths.astype(np.uint16) if row_tokens <= RADIX_SORT_LIMIT else lengths
    return np.argsort(keys, kind="stable")


def _gather_rows(
    sizes: NDArray[np.int64], order: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Index of segments that puts row order[i] at place i, and the offsets of the rows after that."""
    starts = np.cumsum(sizes) - sizes
    new_sizes = sizes[order]
    offsets = np.concatenate(([0], np.cumsum(new_sizes)))
    gather = np.repeat(starts[order] - offsets[:-1], new_sizes) + np.arange(offsets[-1])
    return gather, offsets
