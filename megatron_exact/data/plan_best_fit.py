"""The `best-fit` policy: documents are cut only where they are longer than a row.

A document longer than a row gives full rows and a remainder; remainders and short documents are packed
by best-fit decreasing (Ding et al. 2024, arXiv 2404.10830), here over the histogram of their lengths:
pieces of one length are interchangeable, so equal rows are planned together and the cost of planning
depends on the number of distinct lengths, not of documents (`best_fit_patterns`).

Then every planned place of a length gets a number, and the i-th place takes the i-th piece of that length
in the shuffled order of documents. Rows come in shuffled order, and so do the segments inside a row:
neither order nor company follows the corpus or the lengths. Padding stands only at a row's end.

Copies of a repeated document have one length, and best-fit decreasing puts equal lengths side by side: the
only two documents of some length would share a row whenever they are copies. So where documents are
repeated, each goes to as many *rounds* as it has copies, drawn by its number, every round is planned by
itself, and the rows of all rounds are shuffled together: no row holds a document twice, and how near two
copies come is chance. It costs the padding of one row a round.

Memory: the lengths, one number a piece (4 bytes up to four billion documents) and a few blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megatron_exact.data.best_fit import RowPatterns, best_fit_patterns
from megatron_exact.data.manifest import TokenPlace
from megatron_exact.data.plan import BLOCK_DOCUMENTS, ChosenDocuments, PlanBlock, number_dtype
from megatron_exact.data.shuffle import KeyedPermutation, derive_key, random_bits

RADIX_BITS = 16  # numpy sorts 16-bit keys by radix, in linear time
MAX_KINDS = 1 << 24  # an array of them is 128 MB
ROW_BITS = 24  # of a sorting key: rows of a block, the rest is random


class BestFitPlan:
    """Rows that hold every token of every chosen document once, see `plan.Plan`.

    Args:
        chosen: documents of at least one token each.
        row_tokens: inputs of a row.
        seed: of the pack.
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
        """All segments, row after row."""
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
        """Pieces of each kind: int64 [kinds]; those of the last fill a row alone."""
        if self._rounds == 1:
            return piece_histogram(self._chosen, self.row_tokens)
        histogram = np.zeros(self._kinds, dtype=np.int64)
        for numbers, tokens, positions in self._chosen.in_order_with_positions():
            kinds, full_rows = self._kinds_of(numbers, tokens, positions)
            histogram += np.bincount(kinds, minlength=self._kinds)
            histogram[-1] += int(full_rows.sum(dtype=np.int64))
        histogram[0] = 0
        return histogram

    def _plan_rounds(self, histogram: NDArray[np.int64]) -> list[tuple[list[int], int]]:
        """The patterns of all rounds, in kinds."""
        patterns = []
        for number, lengths in enumerate(histogram.reshape(self._rounds, -1)):
            first = number * lengths.size
            for pieces, rows in best_fit_patterns(lengths, self.row_tokens):
                patterns.append(([first + length for length in pieces] if first else pieces, rows))
        return patterns

    def _kinds_of(
        self, numbers: NDArray[np.integer], tokens: NDArray[np.integer], positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        """Kind of the last piece of each document, 0 where it has full rows only, and its full rows.

        Args:
            numbers, tokens, positions: [n], of documents, as `in_order_with_positions` gives them.
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
        """Pieces by kind, those of one kind in the shuffled order of documents.

        Returns:
            [pieces], number of the document of each; [full rows], which of its document's full rows it is.
        """
        piece_number = np.empty(int(self._first_piece[-1]), dtype=number_dtype(len(self.pool)))
        first_full = int(self._first_piece[-2])
        full_index = np.empty(piece_number.size - first_full, dtype=np.uint32)
        cursor = self._first_piece[:-1].copy()
        for numbers, tokens, positions in self._chosen.in_order_with_positions():
            kinds, full_rows = self._kinds_of(numbers, tokens, positions)
            order = _order_by_kind(kinds, self._kinds)
            count = np.bincount(kinds, minlength=self._kinds)
            order = order[count[0] :]  # no remainder, no piece
            count[0] = 0
            # The k-th of the sorted pieces is the (k - pieces of smaller kinds)-th of its kind.
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
        """Segments of planned rows, shuffled inside each row; `done` segments were made before them."""
        patterns = self._patterns
        pattern, times = patterns.find(planned)
        sizes = patterns.sizes[pattern]
        last = np.cumsum(sizes)
        row = np.repeat(np.arange(planned.size), sizes)
        slot = np.arange(row.size) + (patterns.first_slot[pattern] - (last - sizes))[row]
        bits = random_bits(self._segment_key, np.arange(done, done + row.size))
        keys = (row.astype(np.uint64) << np.uint64(64 - ROW_BITS)) | (bits >> np.uint64(ROW_BITS))
        slot = slot[np.argsort(keys)]  # rows stay where they are
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
            goes_on=start + tokens < document_tokens,
            ends_row=ends_row,
        )


def piece_histogram(chosen: ChosenDocuments, row_tokens: int) -> NDArray[np.int64]:
    """Pieces of each length: int64 [row_tokens + 1]; those of row_tokens fill a row alone."""
    histogram = np.zeros(row_tokens + 1, dtype=np.int64)
    for tokens in chosen.as_they_stand():
        full_rows = tokens // row_tokens
        histogram += np.bincount(tokens - full_rows * row_tokens, minlength=row_tokens + 1)
        histogram[row_tokens] += int(full_rows.sum(dtype=np.int64))
    histogram[0] = 0
    return histogram


def _order_by_kind(kinds: NDArray[np.integer], limit: int) -> NDArray[np.int64]:
    """Stable argsort of numbers below `limit`, by as many radix passes as they need."""
    order = np.argsort(kinds.astype(np.uint16), kind="stable")
    if limit > 1 << RADIX_BITS:
        order = order[np.argsort((kinds >> RADIX_BITS).astype(np.uint16)[order], kind="stable")]
    return order
