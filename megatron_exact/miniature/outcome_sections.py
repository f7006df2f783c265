"""Sections of `docs/miniature.md` about outcomes. What they say follows from the intervals."""

from __future__ import annotations

from typing import Any

from megatron_exact.miniature.readings import (
    CAUTION,
    DOUBT,
    arms_of,
    between_arms,
    cells,
    direction,
    far,
    marked,
    over_seeds,
    row_title,
    signed,
    thousandths,
    verdict,
)
from megatron_exact.miniature.settings import (
    CONTROLS,
    DISTANT,
    DOSES,
    EXAGGERATED_ALPHA,
    FAR,
    LONGER,
    NEARBY,
    PAPER_ALPHA,
    exact_arm,
)
from megatron_exact.report.page import Block, Bullets, Code, Figure, Heading, Paragraph, Table

Entry = dict[str, Any]
PAPER = exact_arm(PAPER_ALPHA).name
EXAGGERATED = exact_arm(EXAGGERATED_ALPHA).name
FAR_WORDS = f"{FAR[0]} to {FAR[1]} tokens"


def dose_names() -> list[str]:
    """Arms with rule `exact`, by alpha."""
    return [arm.name for arm in DOSES]


def control_names() -> list[str]:
    """The paper's controls."""
    return [arm.name for arm in CONTROLS]


def outcome(results: Entry) -> list[Block]:
    """One table with all arms of the main design."""
    arms = arms_of(results, DISTANT)
    standard = far(next(iter(arms.values())))
    body = [cells(arm) for arm in arms.values()]
    head = ["arm", "far margin", "far effect", "far right answers", "near margin", "validation loss"]
    return [
        Heading(text="All arms against standard"),
        Paragraph(
            text=f"Differences from standard training. Far: {FAR_WORDS}; near: {NEARBY[0]} to {NEARBY[1]} "
            "tokens. Margins and effects in nats, right answers in points, loss over all targets in "
            "thousandths of a nat. Standard itself: far margin "
            f"{standard['margin']['baseline']:.2f}, far right answers "
            f"{standard['correct']['baseline']:.1f} %."
        ),
        Table(head=head, body=body, caption=f"difference from standard [95 % interval]; {CAUTION}"),
        _seed_table(arms),
    ]


def _seed_table(arms: dict[str, Entry]) -> Table:
    """The primary measure, one column a seed."""
    deltas = {row_title(arm): far(arm)["margin"]["pair_deltas"] for arm in arms.values()}
    seeds = len(next(iter(deltas.values())))
    return Table(
        head=["arm", *(f"seed {number + 1}" for number in range(seeds)), "mean"],
        body=[
            [title, *(f"{delta:+.2f}" for delta in values), signed(over_seeds(values))]
            for title, values in deltas.items()
        ],
        caption="far margin minus standard (nats), seed by seed; mean [95 % interval, Student's t]",
    )


def doses(results: Entry, folder: str) -> list[Block]:
    """The dose-response in alpha."""
    arms = arms_of(results, DISTANT)
    lines = [
        f"Alpha {arms[name]['alpha']:g}: far margin {signed(far(arms[name])['margin'])}, "
        f"{verdict(far(arms[name])['margin'])}; far right answers "
        f"{signed(far(arms[name])['correct'], 1)}, {verdict(far(arms[name])['correct'])}."
        for name in dose_names()
    ]
    return [
        Heading(text="The dose-response in alpha"),
        Bullets(items=lines),
        Figure(
            file=f"{folder}/doses.png",
            alt="far margin and far right answers minus standard, by alpha, for both corpora",
            caption="Both corpora. The second one, near evidence, is the counter-case below. Where "
            "standard itself is no better than chance, points at 0 say nothing about weights.",
        ),
    ]


def distances(results: Entry, folder: str) -> list[Block]:
    """The probe by distance."""
    arms = arms_of(results, DISTANT)
    names = dose_names()
    body = [
        [
            str(entry["distance"]),
            f"{entry['margin']['baseline']:.2f}",
            *(marked(arms[name]["probe"]["distances"][row]["margin"]) for name in names),
        ]
        for row, entry in enumerate(arms[names[0]]["probe"]["distances"])
    ]
    head = ["distance", "standard", *(row_title(arms[name]) for name in names)]
    return [
        Heading(text="By distance of the evidence"),
        Figure(
            file=f"{folder}/margin.png",
            alt="margin by distance of standard and of EXACT at three alphas, and differences below",
        ),
        Figure(
            file=f"{folder}/accuracy.png",
            alt="right answers by distance of standard and of EXACT at three alphas, and differences below",
        ),
        Table(
            head=head,
            body=body,
            caption=f"margin of standard, and differences from it [95 % interval] (nats); {CAUTION}",
        ),
    ]


def controls(results: Entry, folder: str) -> list[Block]:
    """The paper's controls at the exaggerated alpha."""
    arms = arms_of(results, DISTANT)
    names = [EXAGGERATED, *control_names()]
    ordered = sorted(names, key=lambda name: -far(arms[name])["margin"]["delta"])
    order = ", ".join(f"{arms[name]['title']} {signed(far(arms[name])['margin'])}" for name in ordered)
    return [
        Heading(text="The order of the controls"),
        Paragraph(
            text="All at the exaggerated alpha of 1. Random same-mass gives the same weights to targets "
            "chosen at random; packed position weighs by the place in the row instead of the document; "
            "uniform tail has the same mass without the inverse frequency; normalized divides by the mass "
            "of the weights."
        ),
        Paragraph(text=(_mass_words(arms), " (", Code("docs/weighting.md"), ").")),
        Paragraph(
            text=f"By far margin minus standard: {order}. This order is that of the means. Of the controls "
            "against EXACT at the same alpha, seed by seed, with Student's 95 % interval:"
        ),
        Bullets(items=[_against(arms, EXAGGERATED, name) for name in control_names()]),
        Figure(
            file=f"{folder}/controls.png",
            alt="margin by distance of standard, EXACT at alpha 1 and its four controls, differences below",
        ),
    ]


def _mass_words(arms: dict[str, Entry]) -> str:
    """What one alpha means for the mass of EXACT and of packed position."""
    exact, packed = (arms[name]["mean_weight"] for name in (EXAGGERATED, "packed-position"))
    return (
        f"One alpha is not one mass: the mean weight of a target is {exact:.2f} for EXACT and {packed:.2f} "
        "for packed position, most of whose targets lie in its tail. So packed position has "
        f"{(packed - 1) / (exact - 1):.1f} times EXACT's extra mass here"
    )


def _against(arms: dict[str, Entry], one: str, other: str) -> str:
    """The far margin of arm `other` minus that of arm `one`, and what may be said of it."""
    found = between_arms(far(arms[one])["margin"], far(arms[other])["margin"])
    words = {1: "above it", -1: "below it", 0: "not told apart"}[direction(found)]
    return f"{arms[other]['title']} minus {arms[one]['title']}: {signed(found)}, {words}."


def costs(results: Entry, folder: str) -> list[Block]:
    """The loss by bucket."""
    arms = arms_of(results, DISTANT)
    body = [
        [
            row_title(arm),
            *(marked(thousandths(arm["losses"][part]), 1) for part in ("below", "tail", "all")),
        ]
        for arm in arms.values()
    ]
    return [
        Heading(text="What it costs in short buckets"),
        Paragraph(
            text="Unweighted validation loss on held-out documents of the same seed, minus standard's."
        ),
        Figure(
            file=f"{folder}/losses.png",
            alt="validation loss minus standard by bucket of effective context",
        ),
        Table(
            head=["arm", "below the tail", "tail", "all"],
            body=body,
            caption="validation loss minus standard [95 % interval, Student's t], thousandths of a nat a "
            f'target; "{DOUBT}": not told apart from standard',
        ),
    ]


def longer_training(results: Entry) -> list[Block]:
    """Standard at twice the steps."""
    arms = arms_of(results, DISTANT)
    longer = far(arms[LONGER.name])["margin"]
    return [
        Heading(text="Standard training at twice the steps"),
        Paragraph(
            text="Weights need no further steps, but more training is what one would do without them. "
            "Twice the steps on twice the rows, with the schedule stretched, change the far margin by "
            f"{signed(longer)} nats, {verdict(longer)} at the single number of steps. These pairs differ "
            "in their schedule, on purpose. Against EXACT at the single number of steps, seed by seed, "
            "with Student's 95 % interval:"
        ),
        Bullets(items=[_against(arms, name, LONGER.name) for name in dose_names()]),
    ]
