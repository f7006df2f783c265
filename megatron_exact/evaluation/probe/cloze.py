"""The cloze kinds of the evidence-ablation probe: *answer position* and *field lookup*.

The paper names the two kinds and no more; the sentences, the answers and their number are ours.

* answer position: one sentence holds the answer, and the cloze repeats its beginning. The competing answers
  stand nowhere in the prompt. What counts is whether the position of the answer is still reached.
* field lookup: a record of four fields, all filled with names; the cloze asks for one field. The competing
  answers are the other names of the record, so that finding the record is not enough.

Without evidence, filler of the same length stands in its place.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from megatron_exact.evaluation.probe.placement import Question, Writer, of_equal_length

ANSWER_POSITION = "answer-position"
FIELD_LOOKUP = "field-lookup"
CANDIDATES = 4
"""Answers to choose from: chance is 25 %."""
HEAD_TOKENS = 96
"""Context of a cloze item beyond its distance: BOS, a little filler and the evidence."""

FIELDS = ("owner", "keeper", "buyer", "witness")
PEOPLE = (
    "John", "Mary", "Peter", "Anna", "Paul", "Sarah", "David", "Laura", "Mark", "Emma", "Thomas",
    "Julia", "James", "Alice", "Robert", "Helen", "Daniel", "Grace", "Simon", "Jane", "Martin",
    "Lucy", "Henry", "Maria", "George", "Kate", "Oliver", "Susan", "Adam", "Nancy", "Frank",
    "Diana", "Jack", "Linda", "Victor", "Rose",
)  # fmt: skip
THINGS = (
    "apple", "hammer", "mirror", "candle", "violin", "basket", "carpet", "camera", "pencil",
    "ladder", "guitar", "bottle", "needle", "ribbon", "saddle", "blanket", "button", "compass",
    "diamond", "feather", "helmet", "jacket", "kettle", "lemon", "magnet", "necklace", "orange",
    "pillow", "rocket", "scissors", "table", "wagon",
)  # fmt: skip
PLACES = (
    "north", "south", "east", "west", "upper", "lower", "inner", "outer", "left", "right", "front",
    "back", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth",
)  # fmt: skip
Maker = Callable[[random.Random], Question]


def answer_position(writer: Writer) -> Maker:
    """Draws questions of the first kind."""
    things = of_equal_length(THINGS, CANDIDATES, writer)

    def make(draw: random.Random) -> Question:
        place, chosen = draw.choice(PLACES), draw.sample(things, CANDIDATES)
        beginning = f" The object hidden behind the {place} door is the"
        return _question(f"{beginning} {chosen[0]}.", beginning, chosen, 0, draw)

    return make


def field_lookup(writer: Writer) -> Maker:
    """Draws questions of the second kind."""
    people = of_equal_length(PEOPLE, len(FIELDS), writer)

    def make(draw: random.Random) -> Question:
        number, chosen = draw.randrange(100, 1000), draw.sample(people, len(FIELDS))
        order = draw.sample(FIELDS, len(FIELDS))
        pairs = ", ".join(f"the {field} is {name}" for field, name in zip(order, chosen, strict=True))
        asked = draw.randrange(len(FIELDS))
        cloze = f" In record {number}, the {order[asked]} is"
        return _question(f" In record {number}, {pairs}.", cloze, chosen, asked, draw)

    return make


def _question(evidence: str, cloze: str, answers: list[str], gold: int, draw: random.Random) -> Question:
    """The order of the candidates is drawn, and one of the wrong ones as the competitor."""
    words = [f" {answer}" for answer in answers]
    return Question(
        evidence=evidence,
        counterfactual=None,
        cloze=cloze,
        gold=words[gold],
        candidates=tuple(draw.sample(words, len(words))),
        competitor=draw.choice([word for place, word in enumerate(words) if place != gold]),
    )
