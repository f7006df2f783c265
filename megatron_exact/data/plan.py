"""Plan a pack: which segment of which document fills which row, by concatenation or best fit.

Plans are streams of blocks, never whole arrays: planning a corpus of a billion documents needs memory for
their lengths and one permutation of their numbers. The documents of all sources are numbered consecutively,
source after source (`DocumentPool`); only the written arrays name source and document separately.

`ConcatPlan` lays documents end to end and cuts the stream every row_tokens. `BestFitPlan` cuts only
documents longer than a row and packs by best-fit decreasing (Ding et al. 2024, arXiv 2404.10830) over the
histogram of lengths: pieces of one length are interchangeable, so equal rows are planned together and the
cost depends on the number of distinct lengths, not of documents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_exact.data.manifest import TokenPlace
from megatron_exact.data.shuffle import KeyedPermutation, derive_key, random_bits
from megatron_exact.data.targets import supervises_row_end
from megatron_exact.exposure import counts_from_histogram, segment_length_histogram

BLOCK_DOCUMENTS = 1 << 17  # documents, or segments, of one block: a few megabytes of temporaries
GAP_BITS = 7  # of the directory of `NumbersWithGaps`
MOST_STEPS = 8  # from a number of the directory; beyond it a search is faster
WORD_SHIFT = 9
WORD_MASK = (1 << WORD_SHIFT) - 1
RADIX_BITS = 16  # numpy sorts 16-bit keys by radix, in linear time
MAX_KINDS = 1 << 24  # an array of them is 128 MB
ROW_BITS = 24  # of a sorting key: rows of a block, the rest is random


@dataclass(frozen=True, kw_only=True)
class DocumentPool:
    """The documents of all sources of a pack, numbered consecutively."""

    tokens: NDArray[np.integer]
    """int32 or int64 [documents], length of each; 0 for an empty document, which is in no split."""
    first: NDArray[np.int64]
    """[sources + 1], number of the first document of each source; the last is the number of all."""
    first_target: NDArray[np.int32] | None = None
    """[documents], each document's first supervised token; None where all tokens are supervised."""

    def __len__(self) -> int:
        return int(self.first[-1])

    def locate(self, number: NDArray[np.integer]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        """Return source, and document number inside it, of documents of the pool: both [n]."""
        if self.first.size == 2:
            return np.zeros(number.size, dtype=np.uint16), number.astype(np.int64, copy=False)
        source = np.searchsorted(self.first, number, side="right") - 1
        return source.astype(np.uint16), number - self.first[source]


def number_dtype(documents: int) -> type[np.unsignedinteger]:
    """Return the dtype for the numbers of that many documents: half the memory up to four billion."""
    return np.uint32 if documents <= 1 << 32 else np.uint64


class NumbersWithGaps:
    """Ascending document numbers of which few are missing: indexed like an array, in 3% of its memory.

    The k-th number is `first + k + g`, where g of the missing numbers come before it. With the i-th missing
    number at `first + missing[i]`, g is how many of `missing[i] - i` are at most k. A directory gives g at
    every 128th k, and the few that follow are counted one by one.

    Args:
        first: smallest number, if it is not missing.
        documents: numbers with the missing ones.
        missing: [missing], ascending, those that are left out, counted from `first`.
        dtype: of the numbers.
    """

    def __init__(
        self, first: int, documents: int, missing: NDArray[np.integer], dtype: type[np.unsignedinteger]
    ) -> None:
        self.size = documents - missing.size
        self._first = first
        self._dtype = dtype
        self._places = np.full(missing.size + 1, np.iinfo(dtype).max, dtype)  # the last is beyond every k
        self._places[:-1] = missing - np.arange(missing.size)
        starts = np.arange(0, self.size + 1, 1 << GAP_BITS)
        self._before = np.searchsorted(self._places[:-1], starts).astype(dtype)

    def __getitem__(self, where: slice | NDArray[np.integer]) -> NDArray[np.unsignedinteger]:
        if isinstance(where, slice):
            where = np.arange(*where.indices(self.size))
        gaps = self._before[where >> GAP_BITS].astype(np.int64)
        behind = np.flatnonzero(self._places[gaps] <= where)
        for _ in range(MOST_STEPS):
            if not behind.size:
                break
            gaps[behind] += 1
            behind = behind[self._places[gaps[behind]] <= where[behind]]
        if behind.size:  # many missing numbers in a row
            gaps[behind] = np.searchsorted(self._places[:-1], where[behind], side="right")
        numbers: NDArray[np.unsignedinteger] = (where + gaps + self._first).astype(self._dtype)
        return numbers

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        numbers = np.empty(self.size, self._dtype if dtype is None else dtype)
        for first in range(0, self.size, BLOCK_DOCUMENTS):
            numbers[first : first + BLOCK_DOCUMENTS] = self[first : first + BLOCK_DOCUMENTS]
        return numbers


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Which of the chosen documents were taken in which pass over their source."""

    ends: NDArray[np.int64]
    """[parts], where in `ChosenDocuments.numbers` each part ends; a part contains no document twice."""
    number: NDArray[np.int64]
    """[parts], 0 for the first pass over a source."""

    @property
    def most(self) -> int:
        """Most times that a document was taken."""
        return int(self.number.max()) + 1

    def of(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the pass in which the documents at these positions were taken, [n]."""
        return self.number[np.searchsorted(self.ends, positions, side="right")]


@dataclass(frozen=True, kw_only=True)
class ChosenDocuments:
    """The documents of one split and their order; a repeated document occurs several times."""

    pool: DocumentPool
    """Pool to which the numbers refer."""
    numbers: NDArray[np.unsignedinteger] | NumbersWithGaps | None
    """[chosen], in any order; None means every document of the pool, once."""
    key: int | None
    """Key of the permutation that orders them; None keeps them in their order."""
    passes: Passes | None = None
    """Passes over the sources, which distinguish copies of a document; None where there are no copies."""

    def __len__(self) -> int:
        return len(self.pool) if self.numbers is None else self.numbers.size

    def as_they_stand(self) -> Iterator[NDArray[np.integer]]:
        """Yield lengths, block by block, in any order: the fast way to sums and histograms."""
        for first in range(0, len(self), BLOCK_DOCUMENTS):
            if self.numbers is None:
                yield self.pool.tokens[first : first + BLOCK_DOCUMENTS]
            else:
                yield self.pool.tokens[self.numbers[first : first + BLOCK_DOCUMENTS]]

    def in_order(self) -> Iterator[tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.int64]]]:
        """Yield (numbers, lengths, positions), block by block, in the shuffled order of packing.

        Positions say where each document stands in `numbers`, which `passes` asks for.
        """
        for positions in self._positions():
            numbers = positions if self.numbers is None else self.numbers[positions]
            yield numbers, self.pool.tokens[numbers], positions

    def _positions(self) -> Iterator[NDArray[np.int64]]:
        if self.key is not None:
            yield from KeyedPermutation(len(self), self.key).blocks(BLOCK_DOCUMENTS)
            return
        for first in range(0, len(self), BLOCK_DOCUMENTS):
            yield np.arange(first, min(first + BLOCK_DOCUMENTS, len(self)))


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

    Memory: the lengths, one number per piece (4 bytes up to four billion documents) and a few blocks.

    Args:
        chosen: documents of at least one token each.
        row_tokens: inputs of a row.
        seed: seed of the pack.
        split: name of the split, part of the shuffle keys.
    """

    def __init__(self, chosen: ChosenDocuments, row_tokens: int, *, seed: int, split: str) -> None:
        self.pool = chosen.pool
        self.row_tokens = row_tokens
        self.left_out_tokens = 0
        self.next_token: TokenPlace | None = None
        self._row_key = derive_key("rows of best-fit", seed, split)
        self._segment_key = derive_key("segments of a row", seed, split)
        self._chosen = chosen
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

    def blocks(self) -> Iterator[PlanBlock]:
        """Yield all segments, row after row."""
        if not self.rows:
            return
        piece_number, full_index = self._sort_pieces()
        mean_segments = max(1, piece_number.size // self.rows)
        rows_at_once = min(max(1, BLOCK_DOCUMENTS // mean_segments), 1 << ROW_BITS)
        order = KeyedPermutation(self.rows, self._row_key)
        done = 0
        for planned in order.blocks(rows_at_once):
            block = self._fill_rows(planned, done, piece_number, full_index)
            done += block.number.size
            yield block

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

    def _sort_pieces(self) -> tuple[NDArray[np.unsignedinteger], NDArray[np.uint32]]:
        """Sort pieces by kind, those of one kind in the shuffled order of documents.

        Returns:
            [pieces], number of the document of each; [full rows], which of its document's full rows it is.
        """
        piece_number = np.empty(int(self._first_piece[-1]), dtype=number_dtype(len(self.pool)))
        first_full = int(self._first_piece[-2])
        full_index = np.empty(piece_number.size - first_full, dtype=np.uint32)
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
        return piece_number, full_index

    def _fill_rows(
        self,
        planned: NDArray[np.int64],
        done: int,
        piece_number: NDArray[np.unsignedinteger],
        full_index: NDArray[np.uint32],
    ) -> PlanBlock:
        """Return the segments of planned rows, shuffled inside each row, after `done` earlier segments."""
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
        tokens = kinds if self._rounds == 1 else kinds % np.int32(self.row_tokens + 1)
        piece = self._first_piece[kinds] + patterns.slot_rank[slot] + times[row]
        number = piece_number[piece]
        document_tokens = self.pool.tokens[number].astype(np.int64)
        start = document_tokens - tokens
        full = np.flatnonzero(tokens == self.row_tokens)
        first_full = self._first_piece[-2]
        start[full] = full_index[piece[full] - first_full] * np.int64(self.row_tokens)
        ends_row = np.zeros(row.size, dtype=np.bool_)
        ends_row[last - 1] = True
        return PlanBlock(
            number=number,
            start=start,
            tokens=tokens,
            continues=start + tokens < document_tokens,
            ends_row=ends_row,
        )


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
        total = sum(int(tokens.sum(dtype=np.int64)) for tokens in chosen.as_they_stand())
        self.pool = chosen.pool
        self.row_tokens = row_tokens
        self.rows = max(0, (total - 1) // row_tokens)
        self.left_out_tokens = total - self.rows * row_tokens
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
