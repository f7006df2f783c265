"""What was compared with what, how, and under which licences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_exact.report.compared import UNKNOWN, Compared, training_of
from megatron_exact.report.exposure_section import PackExposure
from megatron_exact.report.page import Block, Bullets, Code, Details, Heading, Note, Paragraph, Table, Text
from megatron_exact.report.paper_numbers import SOURCE, corpora


def comparison_blocks(comparisons: Sequence[Compared]) -> list[Block]:
    """Every comparison: its trainings, whether they are a pair, and what it says about itself."""
    if not comparisons:
        return [Heading(text="What was compared"), Note(text="Nothing: no comparison was given.")]
    body: list[list[Text]] = [
        [
            one.label,
            one.treatment_name,
            _trainings(one, "baseline"),
            _trainings(one, "treatment"),
            str(len(one.content["runs"])),
            "yes" if one.content["pairing"].get("verified") else "no",
        ]
        for one in comparisons
    ]
    head = ["Model", "Rule", "baseline trained with", "treatment trained with", "pairs", "pairing verified"]
    blocks: list[Block] = [
        Heading(text="What was compared"),
        Table(head=head, body=body, caption="The comparisons of this report", left_columns=4),
    ]
    details: list[Block] = []
    for one in comparisons:
        notes = [one.content["pairing"]["statement"], *one.content.get("notes", [])]
        described = {**(one.content.get("methods") or {}), **((one.probe or {}).get("methods") or {})}
        methods = [(Code(str(name)), f": {text}") for name, text in described.items()]
        details.append(Heading(text=f"{one.label}, {one.treatment_name}", level=3))
        details.append(Bullets(items=[*map(str, notes), *methods]))
    return [*blocks, Details(summary="Notes and methods of each comparison", blocks=details)]


def _trainings(compared: Compared, side: str) -> str:
    """Rules of the first pair's stages, such as `none at 4,096, exact at 8,192`."""
    stages = training_of(compared.content["runs"][0][side])
    words = []
    for stage in stages:
        rows = stage.get("row_tokens")
        words.append(str(stage["rule"]) + (f" at {rows:,}" if isinstance(rows, int) else ""))
    return ", then ".join(words) or UNKNOWN


def licence_blocks(comparisons: Sequence[Compared], packs: Sequence[PackExposure]) -> list[Block]:
    """Licences of corpora and models as far as manifests and exports name them."""
    rows: dict[tuple[str, str], str] = {}
    for pack in packs:
        for name, licence in pack.sources:
            _enter(rows, "corpus", name, licence)
    for compared in comparisons:
        for run in compared.content["runs"]:
            for side in ("baseline", "treatment"):
                _enter_run(rows, compared.label, run[side])
    body: list[list[Text]] = [[name, what, licence] for (what, name), licence in rows.items()]
    paper: list[list[Text]] = [list(row) for row in corpora()]
    empty = Note(text="No corpus and no model is named in the files that were given.")
    table = Table(head=["Name", "what", "licence"], body=body, caption="Licences", left_columns=3)
    return [
        Heading(text="Corpora, models and their licences"),
        Paragraph(
            text="As recorded when a corpus was tokenised or a model was imported, and unknown where "
            "nothing was. Whoever passes on a model should look them up."
        ),
        table if body else empty,
        Table(
            head=["Stages", "models", "sources"],
            body=paper,
            caption=f"The paper's corpora (table 4 of {SOURCE})",
            left_columns=3,
        ),
    ]


def _enter_run(rows: dict[tuple[str, str], str], label: str, run: dict[str, Any]) -> None:
    licences = run.get("licences") or {}
    _enter(rows, "model that training started from", label, licences.get("model"))
    for corpus in licences.get("corpora") or []:
        _enter(rows, "corpus", str(corpus.get("name")), corpus.get("licence"))


def _enter(rows: dict[tuple[str, str], str], what: str, name: str, licence: Any) -> None:
    """A known licence replaces an unknown one; two that differ are both shown."""
    before = rows.get((what, name))
    now = UNKNOWN if licence is None else str(licence)
    if before in (None, UNKNOWN):
        rows[what, name] = now
    elif now not in (UNKNOWN, *before.split("; ")):
        rows[what, name] = f"{before}; {now}"
