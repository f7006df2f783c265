"""Random packed plans, and their targets counted one by one: the plain reference of these tests."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st


@dataclass(frozen=True)
class PlainRow:
    """Segments of one row and what follows its last input."""

    lengths: list[int]
    """Tokens of each segment; they may fill the row or leave padding."""
    ending: str
    """Last input: `continues` (its document goes on), `opens` (predicts another document) or `none`."""


@st.composite
def plans(draw: st.DrawFn, max_row_tokens: int = 70) -> tuple[int, list[PlainRow]]:
    """(row_tokens, rows); row lengths are mostly no powers of two."""
    row_tokens = draw(st.integers(1, max_row_tokens))
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        lengths: list[int] = []
        free = row_tokens
        while free and (not lengths or draw(st.integers(0, 7))):
            lengths.append(draw(st.integers(1, free)))
            free -= lengths[-1]
        rows.append(PlainRow(lengths, draw(st.sampled_from(["continues", "opens", "none"]))))
    return row_tokens, rows


def plain_contexts(row: PlainRow) -> list[int]:
    """Effective context of each supervised target of a row, by walking over its tokens."""
    contexts = []
    for number, length in enumerate(row.lengths):
        is_last_segment = number == len(row.lengths) - 1
        for position in range(length):
            if position + 1 < length:
                contexts.append(position + 1)  # the next token of the same segment sees these
            elif not is_last_segment or row.ending == "opens":
                contexts.append(0)
            elif row.ending == "continues":
                contexts.append(length)
    return contexts


def plain_bucket(context: int, row_tokens: int) -> int:
    """METHOD: b = max(0, floor(log2 l) - 2), and a context of the whole row belongs to the top bucket."""
    seen = min(context, row_tokens - 1)
    return max(0, seen.bit_length() - 1 - 2)


def plain_counts(row_tokens: int, rows: list[PlainRow]) -> list[int]:
    """Targets per bucket, token by token."""
    buckets = [plain_bucket(context, row_tokens) for row in rows for context in plain_contexts(row)]
    return [buckets.count(bucket) for bucket in range(plain_bucket(row_tokens, row_tokens) + 1)]
