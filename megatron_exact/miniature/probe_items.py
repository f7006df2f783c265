"""Questions for the probe: documents as in training, the distance of the evidence being exact.

A prompt is a document of the `distant` design up to the question it ends with. The fact asked for is
the last one of the first quarter; the other facts of the document are asked for in between, as in training.
In the ablated prompt another fact, with a key and a value that the document has not, stands in its place,
so both prompts have the same length, the same words elsewhere and as many facts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_exact.files import atomic_file
from megatron_exact.miniature.corpus import FACTS_REGION, WORDS_A_FACT, draw_facts, question, scatter
from megatron_exact.miniature.language import ASK, TOKEN_IDS, VALUES

KIND = "recall"


def prompt_tokens(distance: int) -> int:
    """Tokens of a prompt whose evidence ends its first quarter, `distance` before the answer."""
    return distance + max(2, distance // (FACTS_REGION - 1)) - 1


def draw_item(number: int, distance: int, most_facts: int, chance: random.Random) -> dict[str, Any]:
    """One item for `tools/probe_evidence.py --items`.

    Args:
        number: for its name.
        distance: tokens from the value in the evidence to the answer, at least 5.
        most_facts: of the document, as in `CorpusDesign.most_facts`.
        chance: random numbers.
    """
    length = prompt_tokens(distance)
    region = length + 1 - distance  # words up to and with the evidence
    stated = min(most_facts, max(1, length // WORDS_A_FACT), region // 2)
    facts = draw_facts(stated + 1, chance)
    *others, asked, replacement = facts
    head = scatter([list(fact) for fact in others], region - 2, chance)
    rest = distance - 3  # between the evidence and the two words that ask
    asked_before = others[: max(0, rest // 3)]
    body = scatter([question(fact) for fact in asked_before], rest, chance)
    end = [*body, ASK, asked[0]]
    answer = [[TOKEN_IDS[value]] for value in VALUES]
    competitor = others[0][1] if others else replacement[1]
    return {
        "id": f"{distance}-{number}",
        "kind": KIND,
        "distance": distance,
        "context": length,
        "prompt": [TOKEN_IDS[word] for word in (*head, *asked, *end)],
        "prompt_ablated": [TOKEN_IDS[word] for word in (*head, *replacement, *end)],
        "gold": [TOKEN_IDS[asked[1]]],
        "candidates": answer,
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
