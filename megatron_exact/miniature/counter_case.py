"""Section of `docs/miniature.md` about the corpus in which long contexts need no distant evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from megatron_exact.miniature.readings import (
    CAUTION,
    arms_of,
    cells,
    direction,
    far,
    marked,
    nearby,
    row_title,
    thousandths,
)
from megatron_exact.miniature.settings import NEAR, NEARBY
from megatron_exact.report.page import Block, Heading, Paragraph, Table

Entry = dict[str, Any]
AT_CHANCE = 6.0
"""Right answers (%) that are taken for chance, which is 3."""


def counter_case(results: Entry) -> list[Block]:
    """The corpus in which long contexts need no distant evidence."""
    arms = arms_of(results, NEAR)
    head = ["arm", "far margin", "far effect", "far right answers", "near margin", "loss", "tail loss"]
    body = [[*cells(arm), marked(thousandths(arm["losses"]["tail"]), 1)] for arm in arms.values()]
    return [
        Heading(text="The counter-case: long contexts that need no distant evidence"),
        Paragraph(
            text="Lengths are drawn alike, so exposure and weights are nearly the same, but at most 24 "
            "words stand between a fact and its question. Effective context is long; what the answers "
            "need is near. (A trace of distant evidence is left in both corpora: no key and no value "
            "comes twice among the facts of a document.) The probe is the same as above: its prompts are "
            "documents of the main design, which no arm of this section is trained on."
        ),
        _before_and_after(results, next(iter(arms.values()))),
        Paragraph(text=_counter_words(results, next(iter(arms.values())))),
        Table(
            head=head,
            body=body,
            caption=f"difference from standard [95 % interval], units as above; {CAUTION}",
        ),
        Paragraph(text=_what_moved(arms)),
    ]


def _before_and_after(results: Entry, arm: Entry) -> Table:
    """The probe of the base model and of standard itself."""
    base = {entry["distance"]: entry for entry in results["base"]}
    body = [
        [
            str(entry["distance"]),
            f"{base[entry['distance']]['margin']:.2f}",
            f"{entry['margin']['baseline']:.2f}",
            f"{base[entry['distance']]['correct']:.0f}",
            f"{entry['correct']['baseline']:.0f}",
        ]
        for entry in arm["probe"]["distances"]
    ]
    return Table(
        head=["distance", "margin, base", "margin, standard", "right (%), base", "right (%), standard"],
        body=body,
        caption="before and after standard training on this corpus",
    )


def _counter_words(results: Entry, standard: Entry) -> str:
    """What standard itself does, so what the probe could show.

    Args:
        results: of everything.
        standard: an arm, whose baseline is standard.
    """
    margins, answers = (
        [span(standard)[measure]["baseline"] for span in (nearby, far)] for measure in ("margin", "correct")
    )
    before = float(
        np.mean([one["correct"] for one in results["base"] if NEARBY[0] <= one["distance"] <= NEARBY[1]])
    )
    found = (
        f"Standard itself: near margin {margins[0]:.2f} and {answers[0]:.1f} % right (the base model: "
        f"{before:.1f} %), far margin {margins[1]:.2f} and {answers[1]:.1f} % right."
    )
    if answers[1] > AT_CHANCE:
        return found
    lost = ", and nearby it loses part of what the base model had" if answers[0] < before else ""
    return (
        f"{found} Far away that is chance: this training teaches no recall at these distances{lost}. "
        "At chance there is nothing left to lose, and a gain would have to be recall that the corpus does "
        "not teach. So a far margin or far answers that cannot be told from standard's do not show that "
        "weights are harmless or useless in such a corpus. What can be read here are the near margin and "
        "the losses."
    )


def _what_moved(arms: dict[str, Entry]) -> str:
    """The arms of the counter-case that are told apart from standard, by measure."""
    measures: dict[str, Callable[[Entry], Entry]] = {
        "far margin": lambda arm: far(arm)["margin"],
        "far effect": lambda arm: far(arm)["effect"],
        "far right answers": lambda arm: far(arm)["correct"],
        "near margin": lambda arm: nearby(arm)["margin"],
        "validation loss": lambda arm: arm["losses"]["all"],
        "tail loss": lambda arm: arm["losses"]["tail"],
    }
    moved = [
        f"the {name} of {row_title(arm)} lies {'above' if direction(read(arm)) > 0 else 'below'} it"
        for name, read in measures.items()
        for arm in arms.values()
        if direction(read(arm))
    ]
    if not moved:
        return (
            "No arm can be told from standard in any of these. That is not proof that there is no "
            "difference: the intervals say how large it may be."
        )
    return (
        f"Told apart from standard: {'; '.join(moved)}. Everything else here is not. That is not proof "
        "that there is no difference: the intervals say how large it may be."
    )
