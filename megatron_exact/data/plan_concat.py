"""The `concat` policy: documents end to end in one stream, cut every row_tokens.

Every row is full, and a document that crosses a row's edge is cut there and loses its context: the rows
are those of stock Megatron's `GPTDataset` with inter-document masking for the same document order.
The stream needs one token more than its inputs, the last label, so T tokens give (T - 1) // row_tokens
rows; what is left over is dropped and counted.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_exact.data.manifest import TokenPlace
from megatron_exact.data.plan import ChosenDocuments, PlanBlock


class ConcatPlan:
    """Rows of the stream of the chosen documents, see `plan.Plan`.

    Row r continues where row r - 1 ended. There is no row when there are too few tokens.
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
        """All segments, row after row."""
        used = self.rows * self.row_tokens
        place = 0  # in the stream, of the next block's first token
        for numbers, tokens in self._chosen.in_order():
            if place > used or used == 0:
                return
            ends = place + np.cumsum(tokens, dtype=np.int64)
            starts = ends - tokens
            place = int(ends[-1])
            if place > used:
                last = int(np.searchsorted(ends, used, side="right"))  # the one that holds token `used`
                self.next_token = self._token_place(int(numbers[last]), used - int(starts[last]))
                keep = last + int(starts[last] < used)
                numbers, starts, ends = numbers[:keep], starts[:keep], ends[:keep]
            if numbers.size:
                yield _cut(numbers, starts, ends, self.row_tokens, used)

    def _token_place(self, number: int, start: int) -> TokenPlace:
        source, document = self.pool.locate(np.array([number]))
        return TokenPlace(source=int(source[0]), document=int(document[0]), start=start)


def _cut(
    numbers: np.ndarray, starts: np.ndarray, ends: np.ndarray, row_tokens: int, used: int
) -> PlanBlock:
    """Segments of documents that lie at [starts, ends) of the stream, up to its place `used`."""
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
        goes_on=end < document_end,
        ends_row=end == row_end,
    )
