"""Figures 3 and 5: what distant evidence does to the answer, from the `probe` of a comparison.

Effect of the evidence = margin with it minus margin without it; margin = log p(gold) - log p(competitor),
in nats. A kind of items that has several contexts at one distance is a field (figure 3), any other a line
by distance (figure 5).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exact.report.compared import Compared, Lines, signed, token_label
from megatron_exact.report.fields import Field, plot_fields
from megatron_exact.report.lines import Axis, Line, Panel, plot_lines
from megatron_exact.report.page import Block, Details, Figure, Heading, Note, Paragraph, Table, Text
from megatron_exact.report.paper_numbers import PROBE_LIFTS, PROBE_MODEL, PROBE_RANGE, SOURCE

EFFECT, ANSWERS = "effect", "correct"
NOT_RUN_NOTE = (
    "Not run: no comparison has a probe (probe_evidence.py on both models, then compare_runs.py)."
)


def field_blocks(folder: Path, comparisons: Sequence[Compared]) -> list[Block]:
    """Figure 3, one figure a comparison with a field; written into `folder`."""
    blocks: list[Block] = [
        Heading(text="Figure 3: evidence by distance and context"),
        Paragraph(
            text="Effect of the evidence on the answer's margin in nats, against the same prompt with a "
            "distractor of the same type in its place, by distance of the evidence and length of the "
            f"context. The paper ({SOURCE}) shows its field as a picture without numbers."
        ),
    ]
    found = [(one, kind) for one in comparisons for kind in _kinds(one, is_field=True)]
    for number, (compared, kind) in enumerate(found, 1):
        file = f"field-{number}-{_slug(compared, kind)}.png"
        blocks += _field_figure(folder / file, compared, kind)
    return blocks if found else [*blocks, Note(text=NOT_RUN_NOTE)]


def probe_blocks(folder: Path, comparisons: Sequence[Compared]) -> list[Block]:
    """Figure 5, one figure a comparison and kind; written into `folder`."""
    low, high = map(token_label, PROBE_RANGE)
    paper = ", ".join(
        f"{kind}: {signed(margin, 3)} in the margin, {signed(answers, 2)} points of answers"
        for kind, (margin, answers) in PROBE_LIFTS.items()
    )
    blocks: list[Block] = [
        Heading(text="Figure 5: evidence by distance"),
        Paragraph(
            text="Effect of the evidence on the answer's margin in nats by distance, and the difference "
            "with its 95 % interval. An answer is right if the gold one scores highest with the evidence. "
            f"The paper's gains at distances of {low} to {high} with {PROBE_MODEL}, without intervals "
            f"({SOURCE}): {paper}."
        ),
    ]
    found = [(one, kind) for one in comparisons for kind in _kinds(one, is_field=False)]
    for number, (compared, kind) in enumerate(found, 1):
        file = f"probe-{number}-{_slug(compared, kind)}.png"
        blocks += _probe_figure(folder / file, compared, kind)
    return blocks if found else [*blocks, Note(text=NOT_RUN_NOTE)]


def _field_figure(path: Path, compared: Compared, kind: str) -> list[Block]:
    cells = _entries(compared, "cells", kind)
    distances = sorted({cell["distance"] for cell in cells}, reverse=True)
    contexts = sorted({cell["context"] for cell in cells})
    sides = {"baseline": compared.baseline_name, "treatment": compared.treatment_name}
    names = {**sides, "delta": "difference"}
    grids = {side: np.full((len(distances), len(contexts)), np.nan) for side in names}
    texts = {side: [[""] * len(contexts) for _ in distances] for side in names}
    for cell in cells:
        row, column = distances.index(cell["distance"]), contexts.index(cell["context"])
        measured = cell["measures"][EFFECT]
        for side in names:
            grids[side][row, column] = measured[side]
            text = signed(measured[side], 2)
            holds_zero = side == "delta" and measured["ci95"][0] <= 0 <= measured["ci95"][1]
            texts[side][row][column] = f"({text})" if holds_zero else text
    scale = _scale(grids["baseline"], grids["treatment"])
    plot_fields(
        path,
        [
            Field(
                title=name,
                row_names=list(map(token_label, distances)),
                values=grids[side],
                texts=texts[side],
                scale=scale if side in sides else _scale(grids[side]),
            )
            for side, name in names.items()
        ],
        column_names=list(map(token_label, contexts)),
        column_label="context (tokens)",
        row_label="distance (tokens)",
        colour_label="effect of the evidence (nats)",
    )
    title = _title(compared, kind)
    caption = (
        f"{title}. Far evidence is at the top, long contexts at the right; both sides have one scale. In "
        "brackets: the 95 % interval of the difference holds 0. Hatched: not run."
    )
    alt = f"Three heat maps of the effect of the evidence: {title}. The numbers are in the table below."
    return [
        Figure(file=path.name, alt=alt, caption=caption),
        _numbers(cells, ("distance", "context"), title),
    ]


def _probe_figure(path: Path, compared: Compared, kind: str) -> list[Block]:
    entries = _entries(compared, "distances", kind)
    at = [entry["distance"] for entry in entries]
    measured = [entry["measures"][EFFECT] for entry in entries]
    names = {"baseline": f"baseline: {compared.baseline_name}", "treatment": compared.treatment_name}
    sides = [Line(name=name, at=at, values=[one[side] for one in measured]) for side, name in names.items()]
    difference = Line(
        name="difference, 95 % interval",
        at=at,
        values=[one["delta"] for one in measured],
        low=[one["ci95"][0] for one in measured],
        high=[one["ci95"][1] for one in measured],
    )
    title = _title(compared, kind)
    plot_lines(
        path,
        [
            Panel(label="effect of the\nevidence (nats)", lines=sides, has_zero=True),
            Panel(label="difference\n(nats)", lines=[difference], has_zero=True),
        ],
        Axis(
            label="distance of the evidence (tokens)", places=at, names=[token_label(place) for place in at]
        ),
        title=f"{compared.label}, {kind}",
    )
    alt = f"Lines by distance: {title}. The numbers are in the table below."
    blocks: list[Block] = [Figure(file=path.name, alt=alt, caption=f"{title}: effect of the evidence.")]
    ranges = _ranges_table(compared, kind, title)
    return [*blocks, *([ranges] if ranges else []), _numbers(entries, ("distance",), title)]


def _title(compared: Compared, kind: str) -> str:
    return f"{compared.label}, {kind}, {compared.treatment_name} against {compared.baseline_name}"


def _ranges_table(compared: Compared, kind: str, title: str) -> Table | None:
    """Means over ranges of distance, the paper's beside the range that it has."""
    entries = _entries(compared, "kinds", kind)
    if not entries:
        return None
    body: list[list[Text]] = []
    for entry in entries:
        low, high = entry["distances"]
        is_paper = kind in PROBE_LIFTS and (low, high) == PROBE_RANGE
        paper = PROBE_LIFTS[kind] if is_paper else None
        margin, answers = entry["measures"][EFFECT], entry["measures"][ANSWERS]
        body.append(
            [
                f"{token_label(low)} to {token_label(high)}",
                _difference(margin, 3),
                "-" if paper is None else signed(paper[0], 3),
                _difference(answers, 2),
                "-" if paper is None else signed(paper[1], 2),
                f"{entry['items']:,}",
            ]
        )
    paper_name = f"paper, {PROBE_MODEL}"
    head = ["distances", "effect, nats", paper_name, "right answers, points", paper_name, "items"]
    return Table(head=head, body=body, caption=f"{title}: difference over ranges of distance")


def _numbers(entries: Lines, keys: Sequence[str], title: str) -> Details:
    """Every number of a figure as a table."""
    head = [*(f"{key}" for key in keys), "items", "baseline", "treatment", "difference [95 %], nats"]
    head += ["right: baseline", "right: treatment"]
    body: list[list[Text]] = []
    for entry in entries:
        effect, answers = entry["measures"][EFFECT], entry["measures"][ANSWERS]
        body.append(
            [
                *(f"{entry[key]:,}" for key in keys),
                f"{entry['items']:,}",
                signed(effect["baseline"], 3),
                signed(effect["treatment"], 3),
                _difference(effect, 3),
                f"{answers['baseline']:.1f} %",
                f"{answers['treatment']:.1f} %",
            ]
        )
    table = Table(head=head, body=body, caption=title, left_columns=0)
    return Details(summary="The numbers of this figure", blocks=[table])


def _difference(measure: dict[str, Any], digits: int) -> str:
    low, high = (signed(end, digits) for end in measure["ci95"])
    return f"{signed(measure['delta'], digits)} [{low}, {high}]"


def _kinds(compared: Compared, *, is_field: bool) -> list[str]:
    cells = _entries(compared, "cells", None)
    found = []
    for kind in dict.fromkeys(cell["kind"] for cell in cells):
        places = [cell["distance"] for cell in cells if cell["kind"] == kind]
        if (len(set(places)) < len(places)) == is_field:
            found.append(kind)
    return found


def _entries(compared: Compared, name: str, kind: str | None) -> Lines:
    probe: dict[str, Any] = compared.probe or {}
    return [entry for entry in probe.get(name) or [] if kind is None or entry["kind"] == kind]


def _scale(*grids: Any) -> float:
    """Largest value of the grids without sign, at least a hundredth of a nat."""
    return max(0.01, *(float(np.nanmax(np.abs(grid))) for grid in grids))


def _slug(compared: Compared, kind: str) -> str:
    """A file name of plain letters."""
    words = f"{compared.label}-{compared.treatment_name}-{kind}".lower()
    return re.sub(r"[^a-z0-9.]+", "-", words).strip("-.")[:60]
