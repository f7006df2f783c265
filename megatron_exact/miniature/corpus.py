"""Documents of the made-up language: how long they are, and how far a question is from its answer."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_exact.files import atomic_file
from megatron_exact.miniature.language import ASK, FILLERS, KEYS, VALUES

WORDS_A_FACT = 8
"""A document states one fact for so many of its words, up to `CorpusDesign.most_facts`."""
FACTS_REGION = 4
"""Facts of a `distant` document stand in its first 1/4."""
DRILL_FACTS = (2, 3, 4)
"""Facts of a `drill` document, one of these numbers."""

Fact = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class CorpusDesign:
    """How the documents of one corpus are drawn."""

    evidence: Literal["drill", "distant", "near"]
    """drill: two to four facts, then nothing but questions about them, again and again; distant: facts
    stand in the first quarter, questions anywhere behind it; near: every fact is asked for a few words
    after it was stated, anywhere in the document."""
    shortest: int
    """Words."""
    longest: int
    """Words; lengths beyond it are cut to it."""
    median: float = 0
    """Of the lognormal lengths, words; 0 draws lengths evenly between the shortest and the longest."""
    spread: float = 0
    """Standard deviation of the logarithm of the lengths."""
    most_facts: int = 8
    """distant, near: facts of a long document; each is asked for once."""
    near_words: int = 24
    """near: at most so many filler words between a fact and its question."""


def draw_length(design: CorpusDesign, chance: random.Random) -> int:
    """Words of one document."""
    if design.median == 0:
        return chance.randint(design.shortest, design.longest)
    length = round(math.exp(chance.gauss(math.log(design.median), design.spread)))
    return min(max(length, design.shortest), design.longest)


def draw_facts(number: int, chance: random.Random) -> list[Fact]:
    """Facts of one document: neither a key nor a value comes twice."""
    return list(zip(chance.sample(KEYS, number), chance.sample(VALUES, number), strict=True))


def scatter(pieces: list[list[str]], words: int, chance: random.Random) -> list[str]:
    """The pieces in random order at random places among filler words, `words` words in all."""
    fillers = words - sum(map(len, pieces))
    assert fillers >= 0, "more pieces than words"
    slots: list[list[str]] = [*pieces, *([word] for word in chance.choices(FILLERS, k=fillers))]
    chance.shuffle(slots)
    return [word for slot in slots for word in slot]


def question(fact: Fact) -> list[str]:
    """The words that ask for a fact and answer."""
    return [ASK, *fact]


def draw_document(design: CorpusDesign, chance: random.Random) -> list[str]:
    """Words of one document, without the end-of-document token."""
    length = draw_length(design, chance)
    if design.evidence == "drill":
        facts = draw_facts(chance.choice(DRILL_FACTS), chance)
        stated = [word for fact in facts for word in fact]
        questions = (length - len(stated)) // 3
        return stated + [word for fact in chance.choices(facts, k=questions) for word in question(fact)]
    facts = draw_facts(min(design.most_facts, max(1, length // WORDS_A_FACT)), chance)
    if design.evidence == "near":
        room = length // len(facts) - 5  # a fact and its question are five words
        gaps = [chance.randint(0, min(design.near_words, room)) for _ in facts]
        pieces = [
            [*fact, *chance.choices(FILLERS, k=gap), *question(fact)]
            for fact, gap in zip(facts, gaps, strict=True)
        ]
        return scatter(pieces, length, chance)
    region = length // FACTS_REGION
    head = scatter([list(fact) for fact in facts], region, chance)
    return head + scatter([question(fact) for fact in facts], length - region, chance)


def question_distances(words: Sequence[str]) -> list[int]:
    """Distance in tokens from the value of a fact to that of each question about it.

    Args:
        words: one document of the `distant` or `near` design, in which every fact is asked for once.
    """
    stated: dict[str, int] = {}
    found = []
    keys = set(KEYS)
    for place, word in enumerate(words):
        if word not in keys:
            continue
        if place and words[place - 1] == ASK:
            found.append(place - stated[word])
        else:
            stated[word] = place
    return found


def documents(design: CorpusDesign, seed: int) -> Iterator[list[str]]:
    """Documents without end, the same for the same design and seed."""
    chance = random.Random(f"documents {seed}")
    while True:
        yield draw_document(design, chance)


def write_corpus(path: Path, design: CorpusDesign, *, seed: int, tokens: int) -> int:
    """Write documents as JSON lines until they hold so many tokens, their ends included.

    Args:
        path: of the `.jsonl` file, written atomically.
        design: of the documents.
        seed: of the draw.
        tokens: at least so many.

    Returns:
        Number of documents.
    """
    written = number = 0
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for document in documents(design, seed):
            stream.write(json.dumps({"text": " ".join(document)}) + "\n")
            number += 1
            written += len(document) + 1
            if written >= tokens:
                break
    return number
