"""Evidence put at an exact distance from the answer.

    prompt    start | lead filler | evidence | filler between | question      context tokens in all
    ablated   start | lead filler | filler   | filler between | question      as many

With C = context and D = distance, the first answer token has position C and the last token of the evidence
position C - D. `start` is what the tokenizer puts before a text (BOS, or nothing).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_exact.evaluation.probe.filler import Filler
from megatron_exact.evaluation.probe.items import ProbeCell, ProbeItem

Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What an item asks, as text; every part but the answers begins with a space."""

    evidence: str
    """Sentences that hold the answer."""
    counterfactual: str | None
    """Stands there instead in the ablated prompt; None: filler of the same length."""
    cloze: str
    """Ends right before the answer."""
    gold: str
    """With the space before it."""
    candidates: tuple[str, ...]
    """Gold among them."""
    competitor: str
    """Of the candidates."""


class Writer:
    """Tokens of texts, with what the tokenizer puts at a start."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` of transformers."""
        self.tokenizer = tokenizer
        word = self.encode(" a")
        whole = tuple(tokenizer.encode(" a"))
        found = [n for n in range(len(whole)) if whole[n : n + len(word)] == word]
        if not found:
            raise ValueError(
                "the tokenizer writes a word differently at the start of a text: give --items of your own"
            )
        self.start: Ids = whole[: found[0]]
        """Such as BOS; may be empty."""

    def encode(self, text: str) -> Ids:
        """Tokens of a piece of text."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def place(
    question: Question, cell: ProbeCell, name: str, *, writer: Writer, filler: Filler, draw: random.Random
) -> ProbeItem:
    """The item of a question at the distance and context of a cell.

    Raises:
        ValueError: the distance leaves no room for the cloze, the context none for the evidence, or the
            filler is too short.
    """
    evidence, cloze = writer.encode(question.evidence), writer.encode(question.cloze)
    other = None if question.counterfactual is None else writer.encode(question.counterfactual)
    between = cell.distance - 1 - len(cloze)
    before = cell.context - cell.distance + 1 - len(writer.start)  # lead and evidence
    longest = max(len(evidence), len(other or ()))
    if between < 0 or before < longest:
        raise ValueError(
            f"{cell}: the question takes {len(cloze)} tokens and the evidence {longest}, which do not fit: "
            "choose a longer distance, or a longer context for it"
        )
    lead, instead, gap = filler.draw([before, longest, between], draw)

    def written(middle: Ids) -> Ids:
        # the lead is cut on its left: the longer of two sentences takes from the far end of the prompt
        return (*writer.start, *lead[len(middle) :], *middle, *gap, *cloze)

    return ProbeItem(
        id=name,
        kind=cell.kind,
        distance=cell.distance,
        context=cell.context,
        prompt=written(evidence),
        prompt_ablated=written(instead[longest - len(evidence) :] if other is None else other),
        gold=question.gold,
        candidates=question.candidates,
        competitor=question.competitor,
    )


def of_equal_length(words: Sequence[str], at_least: int, writer: Writer) -> list[str]:
    """The words that take as many tokens as each other, behind a space; as few as possible.

    Raises:
        ValueError: there are not `at_least` words of one length.
    """
    lengths: dict[int, list[str]] = {}
    for word in words:
        lengths.setdefault(len(writer.encode(f" {word}")), []).append(word)
    for length in sorted(lengths):
        if len(lengths[length]) >= at_least:
            return lengths[length]
    raise ValueError(
        f"the tokenizer has no {at_least} words of one length among {', '.join(words[:3])}, ...: "
        "give --items of your own"
    )
