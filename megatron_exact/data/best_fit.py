"""Best-fit decreasing over a histogram of lengths: rows planned by the kind, not one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Patterns = Sequence[tuple[list[int], int]]
"""(lengths of the pieces of a row, how many rows look so)."""


WORD_SHIFT = 9
WORD_MASK = (1 << WORD_SHIFT) - 1


class _Pattern(NamedTuple):
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


class _Rooms:
    """Which rooms exist: a set of whole numbers that finds its smallest member from a bound on.

    Two levels of bits, so that a row of 131,072 tokens costs no more than one of 4,096.
    """

    def __init__(self, limit: int) -> None:
        self._words = [0] * ((limit >> WORD_SHIFT) + 1)
        self._used = 0  # bit w set: word w is not 0

    def add(self, room: int) -> None:
        word = room >> WORD_SHIFT
        self._words[word] |= 1 << (room & WORD_MASK)
        self._used |= 1 << word

    def remove(self, room: int) -> None:
        word = room >> WORD_SHIFT
        self._words[word] &= ~(1 << (room & WORD_MASK))
        if not self._words[word]:
            self._used &= ~(1 << word)

    def smallest_from(self, bound: int) -> int | None:
        """The smallest room >= `bound`; None if there is none."""
        word = bound >> WORD_SHIFT
        bits = self._words[word] >> (bound & WORD_MASK)
        if bits:
            return bound + (bits & -bits).bit_length() - 1
        later = self._used >> (word + 1)
        if not later:
            return None
        word += (later & -later).bit_length()
        bits = self._words[word]
        return (word << WORD_SHIFT) + (bits & -bits).bit_length() - 1


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
    rooms = _Rooms(row_tokens)
    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            room = rooms.smallest_from(length)
            if room is None:
                room = row_tokens
                groups: list[tuple[_Pattern | None, int]] = [(None, -(-left // (row_tokens // length)))]
            else:
                groups = list(rows_with_room.pop(room))
                rooms.remove(room)
            each = room // length
            for pattern, rows in groups:
                for times, count in _share_pieces(left, rows, each):
                    left -= times * count
                    filled = _Pattern(length, times, pattern) if times else pattern
                    if filled is not None:
                        rows_with_room[room - times * length].append((filled, count))
                        rooms.add(room - times * length)
    finished = [group for groups in rows_with_room.values() for group in groups]
    return [(pattern.pieces(), rows) for pattern, rows in finished]


def _share_pieces(pieces: int, rows: int, each: int) -> list[tuple[int, int]]:
    """Fill `rows` equal rows with `each` pieces one after the other: [(pieces in a row, such rows)]."""
    full = min(rows, pieces // each)
    rest = min(each, pieces - full * each) if full < rows else 0
    shared = [(each, full), (rest, 1 if rest else 0)]
    shared.append((0, rows - full - (1 if rest else 0)))
    return [(times, count) for times, count in shared if count]


@dataclass(frozen=True, kw_only=True)
class RowPatterns:
    """Patterns as arrays. Planned row p is of the pattern whose range of rows holds p; a slot is one
    piece of a pattern, and stands for one place in each of the pattern's rows."""

    first_row: NDArray[np.int64]
    """[patterns + 1], planned rows before each pattern."""
    sizes: NDArray[np.int64]
    """[patterns], slots of each."""
    first_slot: NDArray[np.int64]
    """[patterns], first slot of each."""
    slot_kind: NDArray[np.int32]
    """[slots], kind of the piece: its length, or round * (row_tokens + 1) + its length."""
    slot_rank: NDArray[np.int64]
    """[slots], places of the same kind in the slots before it."""

    @classmethod
    def of(cls, patterns: Patterns, histogram: NDArray[np.int64]) -> RowPatterns:
        """Arrays of patterns, of kinds instead of lengths, that place every piece of `histogram` (int64
        [kinds])."""
        rows = np.array([count for _, count in patterns], dtype=np.int64)
        sizes = np.array([len(pieces) for pieces, _ in patterns], dtype=np.int64)
        slot_kind = np.fromiter(
            (kind for pieces, _ in patterns for kind in pieces), np.int32, int(sizes.sum())
        )
        places = np.repeat(rows, sizes)
        order = np.argsort(slot_kind, kind="stable")
        before = np.cumsum(places[order]) - places[order]
        smaller = np.cumsum(histogram) - histogram  # [kinds], pieces of smaller kinds
        slot_rank = np.empty_like(places)
        slot_rank[order] = before - smaller[slot_kind[order]]
        assert int(places.sum()) == int(histogram.sum()), "every piece has a place"
        return cls(
            first_row=np.concatenate(([0], np.cumsum(rows))),
            sizes=sizes,
            first_slot=np.cumsum(sizes) - sizes,
            slot_kind=slot_kind,
            slot_rank=slot_rank,
        )

    @property
    def rows(self) -> int:
        """Planned rows."""
        return int(self.first_row[-1])

    def find(self, planned: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(pattern, which of the pattern's rows) of planned rows, each [n]."""
        pattern = np.searchsorted(self.first_row, planned, side="right") - 1
        return pattern, planned - self.first_row[pattern]
