"""The evidence-sensitivity field: NoLiMa-like questions on a grid of distance x context.

The evidence shares no content word with the question; it has to be used, not found. In the counterfactual
prompt a distractor of its type replaces it: the same sentence with another argument, and with the same
person. The right name thus stands in both prompts, and

    effect = margin(original) - margin(distractor in the place of the evidence)

is what the fact contributes, without what the mere sight of the name does. The paper says no more about its
distractors than "same-type".
"""

from __future__ import annotations

import random
from pathlib import Path

from megatron_exact.evaluation.probe.cloze import CANDIDATES, PEOPLE, Maker
from megatron_exact.evaluation.probe.placement import Question, Writer, of_equal_length
from megatron_exact.evaluation.suites.nolima import Needle, read_needles

EVIDENCE_FIELD = "evidence-field"
OWN_SENTENCES = (
    (
        "lives next to {1}",
        "has been living in {1}",
        (
            ("the Eiffel Tower", "France"), ("the Colosseum", "Italy"), ("Big Ben", "England"),
            ("the Kremlin", "Russia"), ("the Taj Mahal", "India"), ("the Acropolis", "Greece"),
            ("the Statue of Liberty", "America"), ("the Brandenburg Gate", "Germany"),
            ("the Forbidden City", "China"), ("the Sydney Opera House", "Australia"),
        ),
    ),
    (
        "does not eat {1}",
        "avoids {1}",
        (
            ("oranges and lemons", "citrus"), ("beef and pork", "meat"), ("salmon and tuna", "fish"),
            ("cheese and butter", "milk products"), ("bread and noodles", "wheat"),
            ("almonds and walnuts", "nuts"), ("cake and chocolate", "sweets"),
        ),
    ),
)  # fmt: skip
"""(evidence, question, (argument of the evidence, argument of the question)s)."""


def own_needles() -> list[Needle]:
    """The needle set of this module; public facts and our own sentences."""
    return [
        Needle(
            name=f"own{number}_{place}",
            group=f"own{number}",
            needle=f"Actually, {{CHAR}} {evidence.replace('{1}', here)}.",
            question=f"Who {question.replace('{1}', asked)}?",
            distractor=None,
            characters=PEOPLE,
            answers=(),
            template="",
        )
        for number, (evidence, question, arguments) in enumerate(OWN_SENTENCES)
        for place, (here, asked) in enumerate(arguments)
    ]


def read_field_needles(path: Path) -> list[Needle]:
    """Needles of a NoLiMa needle set that have a distractor of their type and a drawn name as the answer.

    Raises:
        ValueError: no needle set, or none of its needles will do.
    """
    needles = [needle for needle in read_needles(path) if not needle.answers]
    usable = [
        needle
        for needle in needles
        if _others(needle, needles) and len(set(needle.characters)) >= CANDIDATES
    ]
    if not usable:
        raise ValueError(
            f"{path}: no needle has another one of its kind and {CANDIDATES} names to choose from: "
            "take needle_set.json, or leave --needles out"
        )
    return usable


def _others(needle: Needle, needles: list[Needle]) -> list[Needle]:
    """Same sentence and kind of question, other evidence and other question."""
    return [
        other
        for other in needles
        if other.group == needle.group
        and other.needle != needle.needle
        and other.question != needle.question
        and "{CHAR}" not in needle.question
    ]


def evidence_field(writer: Writer, needles: list[Needle]) -> Maker:
    """Draws questions of the field."""
    names = {
        needle.characters: of_equal_length(needle.characters, CANDIDATES, writer) for needle in needles
    }

    tokens = {needle.needle: len(writer.encode(needle.needle)) for needle in needles}

    def make(draw: random.Random) -> Question:
        needle = draw.choice(needles)
        others = _others(needle, needles)
        as_long = [other for other in others if tokens[other.needle] == tokens[needle.needle]]
        distractor = draw.choice(as_long or others)  # as long: the prompts share all that stands before
        chosen = draw.sample(names[needle.characters], CANDIDATES)
        words = [f" {name}" for name in chosen]
        return Question(
            evidence=f" {needle.needle.replace('{CHAR}', chosen[0])}",
            counterfactual=f" {distractor.needle.replace('{CHAR}', chosen[0])}",
            cloze=f" Question: {needle.question} Answer:",
            gold=words[0],
            candidates=tuple(draw.sample(words, CANDIDATES)),
            competitor=words[1],
        )

    return make
