"""A piece of a book with a needle in it, cut such that the prompt fills its window.

Text is cut between tokens of the book, but what counts is the number of tokens of the whole prompt after it
is put together, since pieces merge differently than they were cut: the cut is corrected until the count is
right, or a token or two below where no cut gives it exactly.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_CORRECTIONS = 12


@dataclass(frozen=True, kw_only=True)
class Insertion:
    """A sentence to put into the haystack."""

    text: str
    """The needle, or a distractor."""
    depth: float
    """Share of the haystack before it, 0..1."""


class Book:
    """A text and where its tokens begin."""

    def __init__(self, name: str, text: str, tokenizer: Any) -> None:
        """`tokenizer` of transformers, a fast one: its offsets say where tokens lie in the text."""
        if not tokenizer.is_fast:
            raise ValueError("NoLiMa needs a fast tokenizer (tokenizer.json): save one beside the model")
        self.name = name
        self.text = text
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = sorted({start for start, end in encoded["offset_mapping"] if end > start})
        self.starts = [*starts, len(text)]
        """Characters at which a token begins, and the end of the text."""

    @property
    def tokens(self) -> int:
        """How many cuts the text has."""
        return len(self.starts) - 1

    def cut(self, first: int, tokens: int) -> str:
        """`tokens` tokens of the text from token `first` on."""
        return self.text[self.starts[first] : self.starts[min(first + tokens, self.tokens)]]


def insert(haystack: str, insertions: list[Insertion]) -> str:
    """Put sentences on lines of their own at the line ends nearest to their depths.

    Depth 0 is before everything and depth 1 behind it. A text without line ends is split at white space.
    """
    ends = [i + 1 for i, character in enumerate(haystack) if character == "\n"]
    if not ends:
        ends = [i + 1 for i, character in enumerate(haystack) if character.isspace()]
    places = [0, *ends, len(haystack)]
    parts: list[str] = []
    last = 0
    for insertion in sorted(insertions, key=lambda item: item.depth):
        place = max(last, _nearest(places, insertion.depth * len(haystack)))
        before = haystack[last:place]
        parts += [before, "" if not before or before.endswith("\n") else "\n", insertion.text, "\n"]
        last = place
    return "".join([*parts, haystack[last:]])


def _nearest(places: list[int], target: float) -> int:
    right = min(bisect.bisect_left(places, target), len(places) - 1)
    left = max(0, right - 1)
    return places[left] if target - places[left] < places[right] - target else places[right]


def fill(
    book: Book,
    insertions: list[Insertion],
    *,
    start: float,
    budget: int,
    measure: Callable[[str], int],
) -> str:
    """A haystack with its insertions for which `measure` gives `budget` tokens, or barely less.

    Args:
        book: where the text comes from.
        insertions: needle and distractors.
        start: 0..1, where in the book to begin, as a share of the places where it can.
        budget: tokens that the whole prompt may have.
        measure: tokens of the whole prompt with a given haystack.

    Raises:
        ValueError: a book that is too short, or a budget that the prompt without a book exceeds.
    """
    empty = measure(insert("", insertions))
    wanted = budget - empty
    if wanted < 0:
        raise ValueError(
            f"a window leaves {budget:,} tokens for a prompt of {empty:,}: choose a longer one"
        )
    if wanted > book.tokens:
        raise ValueError(
            f"{book.name} has {book.tokens:,} tokens, this window needs {wanted:,}: choose shorter windows "
            "or a longer book"
        )
    # corrections may ask for a few tokens more than the first guess
    first = int(start * max(0, book.tokens - wanted - 2 * MAX_CORRECTIONS))
    best, best_count = insert("", insertions), empty
    for _ in range(MAX_CORRECTIONS):
        candidate = insert(book.cut(first, wanted), insertions)
        count = measure(candidate)
        if best_count < count <= budget:
            best, best_count = candidate, count
        if count == budget:
            break
        wanted = max(0, wanted + budget - count)
    return best
