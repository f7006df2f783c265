"""A language of 82 words in which the only thing to know is which value a document gave to which key.

A document is a line of words. `k07 v21` states a fact: the value of k07 is v21, in this document only.
`ask k07` asks for it and is followed by its value. Filler words carry no information. So a value after
`ask` can be known from nothing but the statement, whose distance is in our hands, and every other value
and filler word cannot be known at all.

Here are its words and tokenizer, the documents of a corpus, and the questions of the evidence probe.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_exact.files import atomic_file, write_json
from megatron_exact.json_input import parse_json

END = "<end>"
ASK = "ask"
KEYS = tuple(f"k{number:02}" for number in range(32))
VALUES = tuple(f"v{number:02}" for number in range(32))
FILLERS = tuple(f"w{number:02}" for number in range(16))
VOCABULARY = (END, ASK, *KEYS, *VALUES, *FILLERS)
TOKEN_IDS = {word: number for number, word in enumerate(VOCABULARY)}

WORDS_A_FACT = 8
"""A document states one fact for so many of its words, up to `CorpusDesign.most_facts`."""
FACTS_REGION = 4
"""Facts of a `distant` document stand in its first 1/4."""
DRILL_FACTS = (2, 3, 4)
"""Facts of a `drill` document, one of these numbers."""
PROBE_KIND = "recall"
"""Kind of the questions, for tools/probe_evidence.py."""

Fact = tuple[str, str]


def write_tokenizer(folder: Path, *, window_tokens: int) -> None:
    """Write a Hugging Face tokenizer with one token a word, the end-of-document token being the first.

    Args:
        folder: exists; receives `tokenizer.json` and `tokenizer_config.json`.
        window_tokens: longest text that the model is made for.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    # A word that the language does not have becomes END, which tokenising then refuses to find in a text
    tokenizer = Tokenizer(WordLevel(TOKEN_IDS, unk_token=END))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    write_json(folder / "tokenizer.json", parse_json(tokenizer.to_str(), "the tokenizer", "make it again"))
    config = {
        "tokenizer_class": "TokenizersBackend",
        "eos_token": END,
        "unk_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": window_tokens,
    }
    write_json(folder / "tokenizer_config.json", config)


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
    """Draw the number of words of one document."""
    if design.median == 0:
        return chance.randint(design.shortest, design.longest)
    length = round(math.exp(chance.gauss(math.log(design.median), design.spread)))
    return min(max(length, design.shortest), design.longest)


def draw_facts(number: int, chance: random.Random) -> list[Fact]:
    """Draw the facts of one document: neither a key nor a value comes twice."""
    return list(zip(chance.sample(KEYS, number), chance.sample(VALUES, number), strict=True))


def scatter(pieces: Sequence[Iterable[str]], words: int, chance: random.Random) -> list[str]:
    """Put the pieces in random order at random places among filler words, `words` words in all."""
    slots = [list(piece) for piece in pieces]
    fillers = words - sum(map(len, slots))
    assert fillers >= 0, "more pieces than words"
    slots += [[word] for word in chance.choices(FILLERS, k=fillers)]
    chance.shuffle(slots)
    return [word for slot in slots for word in slot]


def question(fact: Fact) -> list[str]:
    """Return the words that ask for a fact and answer."""
    return [ASK, *fact]


def draw_document(design: CorpusDesign, chance: random.Random) -> list[str]:
    """Draw the words of one document, without the end-of-document token."""
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
    head = scatter(facts, region, chance)
    return head + scatter([question(fact) for fact in facts], length - region, chance)


def question_distances(words: Sequence[str]) -> list[int]:
    """Return the distance in tokens from the value of a fact to that of each question about it.

    Args:
        words: one document of the `distant` or `near` design, in which every fact is asked for once.
    """
    stated: dict[str, int] = {}
    found = []
    for place, word in enumerate(words):
        if not word.startswith("k"):
            continue
        if place and words[place - 1] == ASK:
            found.append(place - stated[word])
        else:
            stated[word] = place
    return found


def documents(design: CorpusDesign, seed: int) -> Iterator[list[str]]:
    """Yield documents without end, the same for the same design and seed."""
    chance = random.Random(f"documents {seed}")
    while True:
        yield draw_document(design, chance)


def write_corpus(path: Path, design: CorpusDesign, *, seed: int, tokens: int) -> int:
    """Write documents as JSON lines, atomically, until they hold so many tokens, their ends included.

    Returns:
        Number of documents.
    """
    written = number = 0
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for document in documents(design, seed):
            number += 1
            stream.write(json.dumps({"text": " ".join(document)}) + "\n")
            written += len(document) + 1
            if written >= tokens:
                break
    return number


def prompt_tokens(distance: int) -> int:
    """Return the tokens of a prompt whose evidence ends its first quarter, `distance` before the answer."""
    return distance + max(2, distance // (FACTS_REGION - 1)) - 1


def draw_item(number: int, distance: int, most_facts: int, chance: random.Random) -> dict[str, Any]:
    """Draw one question for `tools/probe_evidence.py --items`.

    The prompt is a document of the `distant` design up to the question it ends with. The fact asked for is
    the last one of the first quarter; the others are asked for in between, as in training. In the ablated
    prompt another fact, with a key and a value that the document has not, stands in its place, so both
    prompts have the same length, the same words elsewhere and as many facts.

    Args:
        number: for its name.
        distance: tokens from the value in the evidence to the answer, at least 5.
        most_facts: of the document, as in `CorpusDesign.most_facts`.
        chance: random numbers.
    """
    length = prompt_tokens(distance)
    region = length + 1 - distance  # words up to and with the evidence
    stated = min(most_facts, max(1, length // WORDS_A_FACT), region // 2)
    *others, asked, replacement = draw_facts(stated + 1, chance)
    head = scatter(others, region - 2, chance)
    rest = distance - 3  # between the evidence and the two words that ask
    body = scatter([question(fact) for fact in others[: max(0, rest // 3)]], rest, chance)
    end = [*body, ASK, asked[0]]
    competitor = others[0][1] if others else replacement[1]
    return {
        "id": f"{distance}-{number}",
        "kind": PROBE_KIND,
        "distance": distance,
        "context": length,
        "prompt": [TOKEN_IDS[word] for word in (*head, *asked, *end)],
        "prompt_ablated": [TOKEN_IDS[word] for word in (*head, *replacement, *end)],
        "gold": [TOKEN_IDS[asked[1]]],
        "candidates": [[TOKEN_IDS[value]] for value in VALUES],
        "competitor": [TOKEN_IDS[competitor]],
    }


def write_items(
    path: Path, *, distances: Sequence[int], items_per_distance: int, most_facts: int = 8, seed: int = 0
) -> None:
    """Write the items of all distances as JSON lines, atomically; the same for the same arguments."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for distance in distances:
            chance = random.Random(f"items {seed} {distance}")
            for number in range(items_per_distance):
                stream.write(json.dumps(draw_item(number, distance, most_facts, chance)) + "\n")
