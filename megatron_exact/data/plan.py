"""Plan a pack: which segment of which document fills which row, by concatenation or best fit.

Plans are streams of blocks, never whole arrays: planning a corpus of a billion documents needs memory for
their lengths alone. Documents have their numbers in the pool (`document_pool.py`); only the written arrays
name source and document separately.

`ConcatPlan` lays documents end to end and cuts the stream every row_tokens. `BestFitPlan` cuts only
documents longer than a row and packs by best-fit decreasing (Ding et al. 2024, arXiv 2404.10830) over the
histogram of lengths: pieces of one length are interchangeable, so equal rows are planned together and the
cost depends on the number of distinct lengths, not of documents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import batched
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.document_pool import (
    BLOCK_DOCUMENTS,
    ChosenDocuments,
    DocumentPool,
    number_dtype,
    scratch_array,
)
from megatron_exact.data.manifest import TokenPlace
from megatron_exact.data.shuffle import KeyedPermutation, derive_key, random_bits
from megatron_exact.data.targets import supervises_row_end
from megatron_exact.exposure import counts_from_histogram, segment_length_histogram

WORD_SHIFT = 9
WORD_MASK = (1 << WORD_SHIFT) - 1
RADIX_BITS = 16  # numpy sorts 16-bit keys by radix, in linear time
MAX_KINDS = 1 << 24  # an array of them is 128 MB
ROW_BITS = 24  # of a sorting key: rows of a block, the rest is random
WINDOW_BITS = 21  # pieces that are looked up together in a scratch file: 8 MiB of it
SWEEPS = 64  # over a scratch file; pieces of 1/64 of all rows are looked up together


@dataclass(frozen=True, kw_only=True)
class PlanBlock:
    """Consecutive segments of a plan; a row may begin in one block and end in the next."""

    number: NDArray[np.integer]
    """[segments], the document's number in the pool."""
    start: NDArray[np.int64]
    """[segments], token offset inside the document."""
    tokens: NDArray[np.int32]
    """[segments], >= 1."""
    continues: NDArray[np.bool_]
    """[segments], whether its document has tokens after it."""
    ends_row: NDArray[np.bool_]
    """[segments], whether it is the last one of its row."""


class Plan(Protocol):
    """Rows of one split, ready to be read as often as needed; the same blocks each time."""

    pool: DocumentPool
    row_tokens: int
    rows: int
    least_segments: int
    """Segments in all rows; concat, which counts them only as it cuts, has at least so many."""
    scratch_bytes: int
    """Bytes that `blocks` needs beside them, on disk where there is a folder for them."""
    left_out_tokens: int
    """Tokens of the chosen documents that are not in any row."""
    next_token: TokenPlace | None
    """The token after the last row's last input where the stream continues there, else None. Known once
    `blocks` was read to its end."""

    def blocks(self) -> Iterator[PlanBlock]:
        """Yield all segments, row after row."""
        ...


@dataclass(kw_only=True)
class PlanMeasure:
    """Sums over the segments of a plan, or of the part of it that was added so far.

    Sizes and supervised targets follow from histograms of segment lengths and a few sums, so they are
    counted while a plan's blocks go by, at a fraction of the cost of planning.
    """

    row_tokens: int
    """Inputs of a row."""
    first_target: NDArray[np.int32] | None = None
    """First targets as in `DocumentPool`; where given, every segment is a whole document."""
    rows: int = 0
    """Rows that have ended."""
    segments: int = 0
    """Segments."""
    tokens: int = 0
    """Inputs that are tokens of documents."""
    segment_histogram: NDArray[np.int64] = field(init=False)
    """[row_tokens + 1], segments of each length."""
    continuing_histogram: NDArray[np.int64] = field(init=False)
    """[row_tokens + 1], those row-final segments whose document continues after the row."""
    prompt_histogram: NDArray[np.int64] = field(init=False)
    """[row_tokens + 1], segments by the number of tokens before their first supervised target."""

    def __post_init__(self) -> None:
        self.segment_histogram = np.zeros(self.row_tokens + 1, dtype=np.int64)
        self.continuing_histogram = np.zeros(self.row_tokens + 1, dtype=np.int64)
        self.prompt_histogram = np.zeros(self.row_tokens + 1, dtype=np.int64)

    @property
    def padding_tokens(self) -> int:
        """Inputs that are padding."""
        return self.rows * self.row_tokens - self.tokens

    def add(self, block: PlanBlock) -> None:
        """Count one block."""
        self.rows += int(np.count_nonzero(block.ends_row))
        self.segments += block.tokens.size
        self.tokens += int(block.tokens.sum(dtype=np.int64))
        self.segment_histogram += segment_length_histogram(block.tokens, self.row_tokens)
        cut = block.tokens[block.ends_row & block.continues]
        self.continuing_histogram += segment_length_histogram(cut, self.row_tokens)
        if self.first_target is not None:
            prompts = self.first_target[block.number]
            self.prompt_histogram += segment_length_histogram(prompts, self.row_tokens)

    def counts(self, *, policy: str, mask_cross_document_targets: bool) -> NDArray[np.int64]:
        """Count supervised targets per bucket, in closed form.

        An inner segment ends its document, so its last input predicts another document's first token with
        context 0; `supervises_row_end` decides on a row's last input. In a segment of n tokens whose first
        supervised target is token a, the targets have contexts a to n - 1: those of a segment of n tokens
        without those of a segment of a tokens.

        Returns:
            int64 [buckets].
        """
        boundary_targets = 0 if mask_cross_document_targets else self.segments - self.rows
        if supervises_row_end(policy, mask_cross_document_targets, continues=False):
            boundary_targets += self.rows - int(self.continuing_histogram.sum())
        counts = counts_from_histogram(
            self.segment_histogram,
            continuing=self.continuing_histogram,
            boundary_targets=boundary_targets,
        )
        return counts - counts_from_histogram(self.prompt_histogram)


Patterns = Sequence[tuple[list[int], int]]
"""(lengths of the pieces of a row, how many rows look so)."""


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
    """Patterns as arrays.

    Planned row p has the pattern whose range of rows contains p. A slot is one piece of a pattern, and
    stands for one place in each of the pattern's rows.
    """

    first_row: NDArray[np.int64]
    """[patterns + 1], planned rows before each pattern."""
    sizes: NDArray[np.int64]
    """[patterns], number of slots of each."""
    first_slot: NDArray[np.int64]
    """[patterns], first slot of each."""
    slot_kind: NDArray[np.int32]
    """[slots], kind of the piece: its length, or round * (row_tokens + 1) + its length."""
    slot_rank: NDArray[np.int64]
    """[slots], number of places of the same kind in the slots before it."""

    @classmethod
    def of(cls, patterns: Patterns, histogram: NDArray[np.int64]) -> RowPatterns:
        """Make the arrays of patterns of kinds that place every piece of `histogram`, int64 [kinds]."""
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
        """Return (pattern, number among the pattern's rows) of planned rows, each [n]."""
        pattern = np.searchsorted(self.first_row, planned, side="right") - 1
        return pattern, planned - self.first_row[pattern]


class BestFitPlan:
    """Rows of the `best-fit` policy: they contain every token of every chosen document once.

    A document longer than a row gives full rows and a remainder; remainders and short documents are packed
    by `best_fit_patterns`. Then every planned place of a length gets a number, and the i-th place takes the
    i-th piece of that length in the shuffled order of documents. Rows are shuffled, and so are the segments
    inside a row, so that neither the order of rows nor the documents that share one follow the corpus or
    the lengths. Padding stands only at a row's end.

    Copies of a repeated document have equal lengths, and best-fit decreasing puts equal lengths side by
    side: the only two documents of some length would share a row whenever they are copies. So where
    documents are repeated, each goes to as many *rounds* as it has copies, drawn by its number, every round
    is planned separately, and the rows of all rounds are shuffled together. Then no row contains a document
    twice, and the distance of two copies is random. The price is the padding of one row per round.

    Memory: a few blocks. The numbers of the pieces, 4 bytes each up to four billion documents, lie in a
    scratch file; rows look them up in the order of the file, window by window, for many blocks at once, so
    that the file need not fit in memory.

    Args:
        chosen: documents of at least one token each.
        row_tokens: inputs of a row.
        seed: seed of the pack.
        split: name of the split, part of the shuffle keys.
        scratch: folder of the scratch file; None keeps the numbers in memory.
    """

    def __init__(
        self,
        chosen: ChosenDocuments,
        row_tokens: int,
        *,
        seed: int,
        split: str,
        scratch: Path | None = None,
    ) -> None:
        self.pool = chosen.pool
        self.row_tokens = row_tokens
        self.left_out_tokens = 0
        self.next_token: TokenPlace | None = None
        self._row_key = derive_key("rows of best-fit", seed, split)
        self._segment_key = derive_key("segments of a row", seed, split)
        self._chosen = chosen
        self._scratch = scratch
        self._rounds = 1 if chosen.passes is None else chosen.passes.most
        self._round_key = derive_key("rounds of best-fit", seed, split)
        self._kinds = self._rounds * (row_tokens + 1)
        if self._rounds > 1 and self._kinds > MAX_KINDS:
            raise ValueError(
                f"a document would be taken {self._rounds} times: with rows of {row_tokens} tokens "
                f"best-fit keeps at most {MAX_KINDS // (row_tokens + 1)} copies apart; choose a smaller "
                "--train-tokens or --policy concat"
            )
        histogram = self._piece_histogram()
        self._patterns = RowPatterns.of(self._plan_rounds(histogram), histogram)
        self.rows = self._patterns.rows
        # Pieces of kind k stand at [first_piece[k], first_piece[k + 1]), full rows at the end.
        self._first_piece = np.concatenate(([0], np.cumsum(histogram)))
        self.least_segments = int(self._first_piece[-1])
        # As `_sort_pieces` asks for
        number, full_rows = number_dtype(len(self.pool)), int(histogram[-1])
        self.scratch_bytes = self.least_segments * np.dtype(number).itemsize + full_rows * 4

    def blocks(self) -> Iterator[PlanBlock]:
        """Yield all segments, row after row."""
        if not self.rows:
            return
        pieces = self._sort_pieces()
        mean_segments = max(1, pieces.number.size // self.rows)
        rows_at_once = min(max(1, BLOCK_DOCUMENTS // mean_segments), 1 << ROW_BITS)
        order = KeyedPermutation(self.rows, self._row_key)
        blocks_at_once = -(-self.rows // (rows_at_once * SWEEPS)) if pieces.is_mapped else 1
        done = 0
        for group in batched(order.blocks(rows_at_once), blocks_at_once):
            laid = []
            for planned in group:
                laid.append(self._lay_rows(planned, done))
                done += laid[-1].kinds.size
            found = pieces.look_up([rows.piece for rows in laid])
            for rows, (number, index) in zip(laid, found, strict=True):
                yield self._fill_rows(rows, number, index)

    def _piece_histogram(self) -> NDArray[np.int64]:
        """Count pieces of each kind, int64 [kinds]; a piece of the last kind fills a row alone."""
        if self._rounds == 1:
            return piece_histogram(self._chosen, self.row_tokens)
        histogram = np.zeros(self._kinds, dtype=np.int64)
        for numbers, tokens, positions in self._chosen.in_order():
            kinds, full_rows = self._kinds_of(numbers, tokens, positions)
            histogram += np.bincount(kinds, minlength=self._kinds)
            histogram[-1] += int(full_rows.sum(dtype=np.int64))
        histogram[0] = 0
        return histogram

    def _plan_rounds(self, histogram: NDArray[np.int64]) -> list[tuple[list[int], int]]:
        """Return the patterns of all rounds, in kinds."""
        patterns = []
        for number, lengths in enumerate(histogram.reshape(self._rounds, -1)):
            first = number * lengths.size
            for pieces, rows in best_fit_patterns(lengths, self.row_tokens):
                patterns.append(([first + length for length in pieces] if first else pieces, rows))
        return patterns

    def _kinds_of(
        self, numbers: NDArray[np.integer], tokens: NDArray[np.integer], positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        """Return the kind of the last piece of each document, 0 without a remainder, and its full rows.

        Args:
            numbers, tokens, positions: [n], documents as `in_order` yields them.
        """
        full_rows = tokens // self.row_tokens
        remainder = tokens - full_rows * self.row_tokens
        if self._chosen.passes is None:
            return remainder, full_rows
        first = (random_bits(self._round_key, numbers) % np.uint64(self._rounds)).astype(np.int64)
        rounds = (first + self._chosen.passes.of(positions)) % self._rounds
        kinds = remainder + rounds * (self.row_tokens + 1)
        return np.where(remainder > 0, kinds, 0), full_rows

    def _sort_pieces(self) -> _SortedPieces:
        """Sort pieces by kind, those of one kind in the shuffled order of documents."""
        total, first_full = int(self._first_piece[-1]), int(self._first_piece[-2])
        piece_number = scratch_array(total, number_dtype(len(self.pool)), self._scratch)
        full_index = scratch_array(total - first_full, np.uint32, self._scratch)
        cursor = self._first_piece[:-1].copy()
        for numbers, tokens, positions in self._chosen.in_order():
            kinds, full_rows = self._kinds_of(numbers, tokens, positions)
            order = _order_by_kind(kinds, self._kinds)
            count = np.bincount(kinds, minlength=self._kinds)
            order = order[count[0] :]  # no remainder, no piece
            count[0] = 0
            # The k-th of the sorted pieces is the (k - pieces of smaller kinds)-th of its kind
            shift = cursor - (np.cumsum(count) - count)
            place = np.arange(order.size) + shift[kinds[order]]
            piece_number[place] = numbers[order]
            if full_rows.any():
                long = np.flatnonzero(full_rows)
                each = full_rows[long].astype(np.int64)
                count[-1] = stop = int(each.sum())
                first = int(cursor[-1])
                piece_number[first : first + stop] = np.repeat(numbers[long], each)
                index = np.arange(stop) - np.repeat(np.cumsum(each) - each, each)
                full_index[first - first_full : first - first_full + stop] = index
            cursor += count
        assert np.array_equal(cursor, self._first_piece[1:]), "every piece has its number"
        return _SortedPieces(number=piece_number, full_index=full_index)

    def _lay_rows(self, planned: NDArray[np.int64], done: int) -> _LaidRows:
        """Return the pieces of planned rows, shuffled inside each row, after `done` earlier segments."""
        patterns = self._patterns
        pattern, times = patterns.find(planned)
        sizes = patterns.sizes[pattern]
        last = np.cumsum(sizes)
        row = np.repeat(np.arange(planned.size), sizes)
        slot = np.arange(row.size) + (patterns.first_slot[pattern] - (last - sizes))[row]
        bits = random_bits(self._segment_key, np.arange(done, done + row.size))
        keys = (row.astype(np.uint64) << np.uint64(64 - ROW_BITS)) | (bits >> np.uint64(ROW_BITS))
        slot = slot[np.argsort(keys)]  # the high bits are the row, so rows keep their order
        kinds = patterns.slot_kind[slot]
        piece = self._first_piece[kinds] + patterns.slot_rank[slot] + times[row]
        return _LaidRows(
            kinds=kinds, piece=piece.astype(number_dtype(int(self._first_piece[-1]))), last=last - 1
        )

    def _fill_rows(
        self, laid: _LaidRows, number: NDArray[np.unsignedinteger], full_index: NDArray[np.uint32]
    ) -> PlanBlock:
        """Return the segments of rows.

        Args:
            laid: their pieces.
            number: [segments], the document of each piece.
            full_index: [full rows among the segments], which of its document's full rows each is.
        """
        kinds = laid.kinds
        tokens = kinds if self._rounds == 1 else kinds % np.int32(self.row_tokens + 1)
        document_tokens = self.pool.tokens[number].astype(np.int64)
        start = document_tokens - tokens
        start[tokens == self.row_tokens] = full_index * np.int64(self.row_tokens)
        ends_row = np.zeros(kinds.size, dtype=np.bool_)
        ends_row[laid.last] = True
        return PlanBlock(
            number=number,
            start=start,
            tokens=tokens,
            continues=start + tokens < document_tokens,
            ends_row=ends_row,
        )


@dataclass(frozen=True, kw_only=True)
class _LaidRows:
    """The pieces of some rows."""

    kinds: NDArray[np.int32]
    """[segments], kind of each piece."""
    piece: NDArray[np.unsignedinteger]
    """[segments], place of each piece in `_SortedPieces`."""
    last: NDArray[np.int64]
    """[rows], last segment of each row."""


@dataclass(frozen=True, kw_only=True)
class _SortedPieces:
    """All pieces by kind, those of one kind in the shuffled order of documents."""

    number: NDArray[np.unsignedinteger]
    """[pieces], number of the document of each."""
    full_index: NDArray[np.uint32]
    """[full rows], which of its document's full rows each of the last pieces is."""

    @property
    def is_mapped(self) -> bool:
        """Whether the numbers lie in a scratch file."""
        return self.number.base is not None

    def look_up(
        self, blocks: Sequence[NDArray[np.unsignedinteger]]
    ) -> Iterator[tuple[NDArray[np.unsignedinteger], NDArray[np.uint32]]]:
        """Yield for each block of places the numbers there, and the index of each full row among them.

        Random reads of a file that is larger than memory would each wait for the disk. So the places of all
        blocks are taken window by window, which reads the file once from front to back.
        """
        first_full = self.number.size - self.full_index.size
        if not self.is_mapped:
            for piece in blocks:
                full = np.flatnonzero(piece >= first_full)
                yield self.number[piece], self.full_index[piece[full] - first_full]
            return
        piece = np.concatenate(blocks)
        order = np.argsort((piece >> WINDOW_BITS).astype(np.uint16), kind="stable")
        piece = piece[order]
        number = np.empty(piece.size, self.number.dtype)
        number[order] = self.number[piece]
        full = np.flatnonzero(piece >= first_full)
        index = np.empty(piece.size if full.size else 0, np.uint32)
        index[order[full]] = self.full_index[piece[full] - first_full]
        ends = np.cumsum([block.size for block in blocks])[:-1]
        indices = np.split(index, ends) if full.size else [index] * len(blocks)
        for block, numbers, mine in zip(blocks, np.split(number, ends), indices, strict=True):
            yield numbers, mine[np.flatnonzero(block >= first_full)]


def piece_histogram(chosen: ChosenDocuments, row_tokens: int) -> NDArray[np.int64]:
    """Count pieces of each length, int64 [row_tokens + 1]; one of row_tokens fills a row alone."""
    histogram = np.zeros(row_tokens + 1, dtype=np.int64)
    for tokens in chosen.as_they_stand():
        full_rows = tokens // row_tokens
        histogram += np.bincount(tokens - full_rows * row_tokens, minlength=row_tokens + 1)
        histogram[row_tokens] += int(full_rows.sum(dtype=np.int64))
    histogram[0] = 0
    return histogram


def _order_by_kind(kinds: NDArray[np.integer], limit: int) -> NDArray[np.int64]:
    """Sort numbers below `limit` stably, by as many radix passes as they need; return the order."""
    order = np.argsort(kinds.astype(np.uint16), kind="stable")
    if limit > 1 << RADIX_BITS:
        order = order[np.argsort((kinds >> RADIX_BITS).astype(np.uint16)[order], kind="stable")]
    return order


class ConcatPlan:
    """Rows of the `concat` policy: documents end to end in one stream, cut every row_tokens.

    Row r continues where row r - 1 ended. Every row is full, and a document that crosses the end of a row
    is cut there and loses its context. The rows are those of stock Megatron's `GPTDataset` with
    inter-document masking for the same document order. The stream needs one token more than its inputs, the
    last label, so T tokens give (T - 1) // row_tokens rows; the remaining tokens are dropped and counted.
    """

    def __init__(self, chosen: ChosenDocuments, row_tokens: int) -> None:
        total = documents = 0
        for tokens in chosen.as_they_stand():
            total += int(tokens.sum(dtype=np.int64))
            documents += int(np.count_nonzero(tokens))
        self.pool = chosen.pool
        self.row_tokens = row_tokens
        self.rows = max(0, (total - 1) // row_tokens)
        self.left_out_tokens = total - self.rows * row_tokens
        # What is left out may be documents of one token
        self.least_segments = max(self.rows, documents - self.left_out_tokens) if self.rows else 0
        self.scratch_bytes = 0
        self.next_token: TokenPlace | None = None
        self._chosen = chosen

    def blocks(self) -> Iterator[PlanBlock]:
        """Yield all segments, row after row."""
        used = self.rows * self.row_tokens
        place = 0  # in the stream, of the next block's first token
        for numbers, tokens, _ in self._chosen.in_order():
            if place > used or used == 0:
                return
            ends = place + np.cumsum(tokens, dtype=np.int64)
            starts = ends - tokens
            place = int(ends[-1])
            if place > used:
                last = int(np.searchsorted(ends, used, side="right"))  # the one that contains token `used`
                source, document = self.pool.locate(numbers[last : last + 1])
                self.next_token = TokenPlace(
                    source=int(source[0]), document=int(document[0]), start=used - int(starts[last])
                )
                keep = last + int(starts[last] < used)
                numbers, starts, ends = numbers[:keep], starts[:keep], ends[:keep]
            if numbers.size:
                yield _cut(numbers, starts, ends, self.row_tokens, used)


def _cut(
    numbers: np.ndarray, starts: np.ndarray, ends: np.ndarray, row_tokens: int, used: int
) -> PlanBlock:
    """Cut documents that lie at [starts, ends) of the stream into segments, up to its token `used`."""
    first_row = starts // row_tokens
    pieces = np.minimum(ends - 1, used - 1) // row_tokens - first_row + 1
    document = np.repeat(np.arange(numbers.size), pieces)
    piece = np.arange(document.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    row_start = (first_row[document] + piece) * row_tokens
    row_end = row_start + row_tokens
    document_start, document_end = starts[document], ends[document]
    begin = np.maximum(row_start, document_start)
    end = np.minimum(row_end, document_end)
    return PlanBlock(
        number=numbers[document],
        start=begin - document_start,
        tokens=(end - begin).astype(np.int32),
        continues=end < document_end,
        ends_row=end == row_end,
    )
