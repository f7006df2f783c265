"""Text without evidence, by the token.

Filler is a long row of sentences, each tokenised by itself with the space before it. A piece of N tokens
ends where a sentence ends and is cut on its left: what follows it always starts after a full stop, and the
only broken word is the first of a piece. Byte-level BPE (Qwen2.5, Llama 3) never merges across the space
before a word, so that pieces joined as ids are what the joined text gives, but for that one cut.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.evaluation.text_files import read_text_file

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
SHORTEST_OWN_TOKENS = 20_000
"""Of our own filler: pieces of several items should differ."""
SENTENCES_AT_A_TIME = 256

WHO = (
    "The ferry", "A long train", "The old clock", "Some fog", "The morning light", "A narrow path",
    "The wooden bridge", "A row of lamps", "The market hall", "An empty cart", "The river",
    "A low wall", "The garden gate", "A heavy rain", "The quiet street", "A paper kite",
    "The stone tower", "A small boat",
)  # fmt: skip
WHAT = (
    "stood in the shade", "was late again", "moved a little", "looked grey from here",
    "made hardly any noise", "was painted last spring", "ended at the water", "came into view",
    "needed some repair", "was left behind", "turned towards the hills", "stayed where it was",
    "seemed larger than before", "could be heard at night",
)  # fmt: skip
WHEN = (
    "after the rain", "before noon", "in the first week of the month", "on the way back",
    "for most of the day", "while the shops were closed", "as on every other day",
    "near the end of the season", "during the holidays", "for no special reason",
    "since the wind had changed", "as far as anyone could tell", "in the evening",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Filler:
    """Sentences in a row, as token ids."""

    tokens: tuple[int, ...]
    """All of them; pieces share these numbers, so that a thousand long prompts take little memory."""
    ends: NDArray[np.int64]
    """[sentences], ascending: a sentence ends before each of these positions."""
    sha256: str
    """Of the text."""

    def draw(self, lengths: Sequence[int], draw: random.Random) -> list[tuple[int, ...]]:
        """Pieces of exactly these many tokens, one behind the other from a random sentence on.

        Raises:
            ValueError: the filler is too short.
        """
        starts = np.concatenate([[0], self.ends])
        longest = int(np.diff(starts).max())
        needed = sum(lengths) + longest * len(lengths)  # a piece goes on to the end of its sentence
        if needed > len(self.tokens):
            raise ValueError(
                f"the filler has {len(self.tokens):,} tokens and an item needs {needed:,}: give a longer "
                "--filler, or shorter distances and contexts"
            )
        choices = starts[starts <= len(self.tokens) - needed]
        place = int(choices[draw.randrange(len(choices))])
        pieces = []
        for length in lengths:
            end = int(self.ends[np.searchsorted(self.ends, place + length)]) if length else place
            pieces.append(self.tokens[end - length : end])
            place = end
        return pieces


def read_filler(path: str | Path, tokenizer: Any) -> Filler:
    """Filler from a text file (UTF-8).

    Raises:
        ValueError: a file without text.
    """
    text = read_text_file(Path(path), "--filler")
    sentences = [" ".join(sentence.split()) for sentence in SENTENCE_END.split(text.strip())]
    if not sentences[0]:
        raise ValueError(f"{path} holds no text: name another --filler")
    return _filler(sentences, _encoded(sentences, tokenizer))


def own_filler(tokens: int, tokenizer: Any) -> Filler:
    """Invented sentences that name no person, animal, object or place of the questions.

    Args:
        tokens: that the longest item needs.
        tokenizer: of transformers.
    """
    every = [f"{who} {what} {when}." for who in WHO for what in WHAT for when in WHEN]
    random.Random(0).shuffle(every)
    wanted, count = max(2 * tokens, SHORTEST_OWN_TOKENS), 0
    encoded: list[list[int]] = []
    while count < wanted and len(encoded) < len(every):
        encoded += _encoded(every[len(encoded) : len(encoded) + SENTENCES_AT_A_TIME], tokenizer)
        count = sum(map(len, encoded))
    rounds = -(-wanted // count)  # the same sentences again where there are too few
    return _filler(every[: len(encoded)] * rounds, encoded * rounds)


def _filler(sentences: Sequence[str], encoded: Sequence[Sequence[int]]) -> Filler:
    return Filler(
        tokens=tuple(token for ids in encoded for token in ids),
        ends=np.cumsum([len(ids) for ids in encoded]),
        sha256=hashlib.sha256("\n".join(sentences).encode()).hexdigest(),
    )


def _encoded(sentences: Sequence[str], tokenizer: Any) -> list[list[int]]:
    batch = [f" {sentence}" for sentence in sentences]
    return list(tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"])
