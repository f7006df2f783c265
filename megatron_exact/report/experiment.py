"""The report of an experiment: the paper's tables and figures beside your own, from result files.

Besides the tables (`paper_tables`) it has figure 4, the relative lift over standard continued pretraining
by window and in the mean of models, and figures 3 and 5, the effect of distant evidence on the answer.
Effect of the evidence = margin with it minus margin without it; margin = log p(gold) - log p(competitor) in
nats. A kind of items with several contexts at one distance is drawn as a field (figure 3), any other as a
line by distance (figure 5). It begins with everything in one minute (`summary`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exact.report.compared import (
    NOT_RUN,
    REGIMES,
    UNKNOWN,
    Compared,
    Coverage,
    Lines,
    coverage_of,
    estimate_of,
    find_aggregate,
    includes_zero,
    interval_text,
    quantity_notes,
    read_compared,
    signed,
    suite_name,
    token_label,
    training_of,
)
from megatron_exact.report.exposure_figure import (
    PackExposure,
    as_trained,
    exposure_blocks,
    read_exposure,
    read_pack,
)
from megatron_exact.report.figures import (
    Axis,
    Field,
    Line,
    Panel,
    digits_for,
    is_beyond,
    plot_fields,
    plot_lines,
    signed_text,
)
from megatron_exact.report.page import (
    Block,
    Bullets,
    Code,
    Details,
    Figure,
    Heading,
    Note,
    Page,
    Paragraph,
    Table,
    Text,
    write_page,
)
from megatron_exact.report.paper_numbers import (
    LONG_SUITES,
    MEAN_LIFTS,
    PROBE_LIFTS,
    PROBE_MODEL,
    PROBE_RANGE,
    SOURCE,
    corpora,
    main_results,
    paper_models,
    paper_windows,
)
from megatron_exact.report.paper_tables import (
    control_blocks,
    main_blocks,
    other_suite_blocks,
    qa_blocks,
    split_table,
)
from megatron_exact.report.summary import (
    ArmLosses,
    cost_blocks,
    loss_blocks,
    read_ledger,
    read_losses,
    summary_blocks,
)

TITLE = "EXACT: the paper's results and ours"
FIGURE = "lift-by-window.png"
SCALE_LIMITS = (10.0, 100.0)
"""Percent that the darkest colour stands for, at least and at most."""
EFFECT, ANSWERS = "effect", "correct"
NO_LIFT = "base 0"
"""In the place of a lift where the baseline scores 0."""
NOT_RUN_NOTE = (
    "Not run: no comparison has a probe (megatron-exact probe on both models, then megatron-exact compare)."
)


@dataclass(frozen=True, kw_only=True)
class ExperimentFiles:
    """Input of a report."""

    comparisons: Sequence[Compared]
    """From `read_compared`."""
    packs: Sequence[PackExposure]
    """From `read_pack` and `as_trained`, and from `read_exposure`."""
    losses: Sequence[ArmLosses] = ()
    """From `read_losses`."""
    ledger: dict[str, Any] | None = None
    """`ledger.json` of an experiment; None without one."""


def read_experiment(
    comparisons: Sequence[str],
    packs: Sequence[str],
    exposures: Sequence[str],
    *,
    losses: Sequence[Sequence[str]] = (),
    ledger: str | Path | None = None,
) -> ExperimentFiles:
    """Read all input, before anything is written.

    Args:
        comparisons: `DIR` or `LABEL=DIR`, folders of compare_runs.py.
        packs: folders of pack_corpus.py.
        exposures: files with the output of inspect_pack.py --json.
        losses: `ARM`, folder of the baseline's training run and of the arm's, for every arm and seed.
        ledger: ledger.json of run_experiment.py.

    Raises:
        ValueError: something is missing or damaged; it names the file.
    """
    compared = read_compared(comparisons)
    weighted = [shown for folder in packs for shown in as_trained(read_pack(folder), compared)]
    return ExperimentFiles(
        comparisons=compared,
        packs=[*weighted, *map(read_exposure, exposures)],
        losses=read_losses(losses),
        ledger=None if ledger is None else read_ledger(ledger),
    )


def write_experiment_report(output: str | Path, files: ExperimentFiles) -> tuple[Path, Path]:
    """Write `report.md`, `report.html` and the figures into a folder, which is made if missing.

    Returns:
        Paths of the Markdown and of the HTML file.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(title=TITLE, blocks=experiment_blocks(folder, files))
    return write_page(folder, page)


def experiment_blocks(folder: Path, files: ExperimentFiles) -> list[Block]:
    """Return all sections; their figures are written into `folder`."""
    comparisons = files.comparisons
    introduction = Paragraph(
        text="EXACT weights the targets of continued pretraining by their effective context "
        f"({SOURCE}). This page shows the paper's tables and figures with its numbers beside those of the "
        "comparisons that it was made from. Missing results are marked as not run. Points are 0 to 100; "
        "intervals are 95 % and paired, each for itself."
    )
    return [
        introduction,
        *summary_blocks(comparisons, files.losses, files.ledger),
        *comparison_blocks(comparisons),
        *main_blocks(comparisons),
        *qa_blocks(comparisons),
        *other_suite_blocks(comparisons),
        *control_blocks(comparisons),
        *exposure_blocks(folder, files.packs),
        *field_blocks(folder, comparisons),
        *lift_blocks(folder, comparisons),
        *probe_blocks(folder, comparisons),
        *loss_blocks(files.losses),
        *cost_blocks(files.ledger),
        *licence_blocks(comparisons, files.packs),
    ]


def lift_blocks(folder: Path, comparisons: Sequence[Compared]) -> list[Block]:
    """Return the section of figure 4, which is written into `folder` if there is anything to draw."""
    exact = [one for one in comparisons if one.is_exact]
    blocks: list[Block] = [
        Heading(text="Figure 4: relative lift"),
        Paragraph(
            text="Difference in percent of standard continued pretraining. The paper's are recomputed from "
            f"its table 1 ({SOURCE}); its text gives the same means over seven models (+39, +58, +9 and "
            f"+8 %). {NO_LIFT!r}: standard continued pretraining scores 0. By single windows the paper has "
            "a figure and no numbers."
        ),
        *_means_table(exact, is_folded=bool(comparisons)),
        *quantity_notes([coverage for one in exact for coverage in _coverages(one)]),
    ]
    fields, columns = lift_fields(exact)
    if not fields:
        return [*blocks, Note(text="By window: not run.")]
    plot_fields(
        folder / FIGURE,
        fields,
        column_names=[token_label(tokens) for tokens in columns],
        column_label="window of evaluation (tokens)",
        row_label="",
        colour_label="relative lift of EXACT (%)",
    )
    alt = "; ".join(
        f"{field.title}; {name}: " + ", ".join(f"{token_label(tokens)} {text}" for tokens, text in cells)
        for field in fields
        for name, cells in _spoken(field, columns)
    )
    words = [
        "Relative lift of EXACT over standard continued pretraining by window, in percent; all maps have "
        f"one colour scale, {_percent_range(fields[0].scale)}.",
        "In brackets: the 95 % interval of the difference includes 0, or there is none.",
    ]
    if any(is_beyond(field.values, field.scale).any() for field in fields):
        words.append("Bold: beyond the colour scale.")
    if any(NO_LIFT in row for field in fields for row in field.texts):
        words.append(f"{NO_LIFT}: standard continued pretraining scores 0, so that there is no lift.")
    if any(not np.isfinite(field.values).all() for field in fields):
        words.append("Hatched: not run.")
    if any(step is not None for field in fields for step in field.steps):
        words.append("Right of a thick line: extrapolated windows.")
    caption = " ".join(words)
    return [*blocks, Figure(file=FIGURE, alt=f"Heat map of relative lift. {alt}", caption=caption)]


def lift_fields(comparisons: Sequence[Compared]) -> tuple[list[Field], list[int]]:
    """Return a heat map for each suite with models as rows, and the windows in tokens as columns."""
    evaluated = sorted({entry["suite"] for one in comparisons for entry in one.lengths})
    suites = [*LONG_SUITES, *(suite for suite in evaluated if suite not in LONG_SUITES)]
    columns = sorted({tokens for one in comparisons for suite in suites for tokens in one.windows(suite)})
    fields: list[Field] = []
    largest = 0.0
    for suite in suites:
        rows = [one for one in comparisons if one.windows(suite)]
        if not rows:
            continue
        values = np.full((len(rows), len(columns)), np.nan)
        texts = [[""] * len(columns) for _ in rows]
        for number, compared in enumerate(rows):
            for entry in compared.lengths:
                if entry["suite"] != suite or not entry["length"]:
                    continue
                column, estimate = columns.index(entry["length"]), estimate_of(entry)
                lift = estimate.lift_percent
                values[number, column] = 0.0 if lift is None else round(lift)
                text = NO_LIFT if lift is None else signed_text(lift, 0)
                texts[number][column] = f"({text})" if includes_zero(entry) and lift is not None else text
        largest = max(largest, float(np.nanmax(np.abs(values))))
        fields.append(
            Field(
                title=f"{suite_name(suite)}, {_examples_of(rows, suite)}",
                row_names=[one.label for one in rows],
                values=values,
                texts=texts,
                scale=1.0,
                steps=[_first_extrapolated(one, suite, columns) for one in rows],
            )
        )
    scale = min(max(largest, SCALE_LIMITS[0]), SCALE_LIMITS[1])
    return [replace(field, scale=scale) for field in fields], columns


def _examples_of(comparisons: Sequence[Compared], suite: str) -> str:
    """Return `500 examples a cell`, or from the fewest to the most where cells or comparisons differ."""
    counts = [
        int(entry["examples"])
        for one in comparisons
        for entry in one.content.get("cells") or []
        if entry["suite"] == suite
    ]
    return f"{_range_text(counts)} examples a cell" if counts else "examples a cell unknown"


def _range_text(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _percent_range(scale: float) -> str:
    return f"{-scale:.3g} to {scale:+.3g} %"


def _first_extrapolated(compared: Compared, suite: str, columns: Sequence[int]) -> int | None:
    beyond = compared.regime_windows(suite, "extrapolated")
    return next((number for number, tokens in enumerate(columns) if beyond and tokens >= beyond[0]), None)


def _spoken(field: Field, columns: Sequence[int]) -> list[tuple[str, list[tuple[int, str]]]]:
    return [
        (name, [(tokens, text) for tokens, text in zip(columns, texts, strict=True) if text])
        for name, texts in zip(field.row_names, field.texts, strict=True)
    ]


def _means_table(exact: Sequence[Compared], *, is_folded: bool) -> list[Block]:
    """Return the lift of the averages of table 1: one row for each model, and the mean of the paper's."""
    head = ["Model"]
    for suite, regime in MEAN_LIFTS:
        head += [f"{suite_name(suite)} {regime}: paper", "here"]
    others = [one.label for one in exact if one.paper_model is None]
    here: list[list[Text]] = []
    rest: list[list[Text]] = []
    papers: dict[tuple[str, str], list[float]] = {key: [] for key in MEAN_LIFTS}
    for model in [*paper_models(), *dict.fromkeys(others)]:
        cells: list[Text] = [model]
        for suite, regime in MEAN_LIFTS:
            paper = _paper_lift(model, suite, regime)
            if paper is not None:
                papers[suite, regime].append(paper)
            cells += [
                _percent(paper),
                _lift_here([one for one in exact if one.label == model], suite, regime),
            ]
        (here if any(one.label == model for one in exact) else rest).append(cells)
    mean: list[Text] = [f"mean of the paper's {len(paper_models())}"]
    for key in MEAN_LIFTS:
        mean += [_percent(float(np.mean(papers[key]))), "-"]
    caption = "Relative lift of the averages of table 1, percent"
    if here:
        return split_table(head, [*here, mean], rest, caption=caption, is_folded=is_folded)
    return split_table(head, [], [*rest, mean], caption=caption, is_folded=is_folded)


def _coverages(compared: Compared) -> list[Coverage]:
    """Return what the averages of a comparison are over; without other averages that over all windows."""
    found = []
    for suite in LONG_SUITES:
        regimes = [regime for regime in REGIMES if find_aggregate(compared, suite, regime) is not None]
        for regime in regimes or (["all"] if compared.windows(suite) else []):
            windows = paper_windows(compared.paper_model, suite, regime)
            found.append(coverage_of(compared, suite, regime, paper_windows=windows, who=compared.label))
    return found


def _paper_lift(model: str, suite: str, regime: str) -> float | None:
    for row in main_results():
        if (row.model, row.suite, row.regime) == (model, suite, regime):
            return row.estimate.lift_percent
    return None


def _lift_here(candidates: Sequence[Compared], suite: str, regime: str) -> Text:
    for compared in candidates:
        estimate = find_aggregate(compared, suite, regime)
        if estimate is not None:
            return NO_LIFT if estimate.lift_percent is None else _percent(estimate.lift_percent)
    return NOT_RUN


def _percent(value: float | None) -> str:
    return "-" if value is None else signed(value, 1)


def field_blocks(folder: Path, comparisons: Sequence[Compared]) -> list[Block]:
    """Return figure 3, one for each comparison with a field, written into `folder`."""
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
    """Return figure 5, one for each comparison and kind, written into `folder`."""
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
    measured = [cell["measures"][EFFECT] for cell in cells]
    both = _scale([one[side] for one in measured for side in sides])
    scales = dict.fromkeys(sides, both) | {"delta": _scale([one["delta"] for one in measured])}
    for cell, one in zip(cells, measured, strict=True):
        row, column = distances.index(cell["distance"]), contexts.index(cell["context"])
        for side in names:
            digits = digits_for(scales[side])
            grids[side][row, column] = round(one[side], digits)  # a colour has the sign of its number
            text = signed_text(one[side], digits)
            is_in_doubt = side == "delta" and includes_zero(one)
            texts[side][row][column] = f"({text})" if is_in_doubt else text
    items = f"{_range_text([cell['items'] for cell in cells])} items a cell"
    plot_fields(
        path,
        [
            Field(
                title=f"{name}, {items}",
                row_names=list(map(token_label, distances)),
                values=grids[side],
                texts=texts[side],
                scale=scales[side],
            )
            for side, name in names.items()
        ],
        column_names=list(map(token_label, contexts)),
        column_label="context (tokens)",
        row_label="distance (tokens)",
        colour_label="effect (nats)",
    )
    title = _title(compared, kind)
    caption = (
        f"{title}: effect of the evidence in nats, {items}. Far evidence is at the top, long contexts at "
        f"the right. Colours: {-both:.3g} to {both:+.3g} for both sides, {-scales['delta']:.3g} to "
        f"{scales['delta']:+.3g} for their difference. In brackets: the 95 % interval of the difference "
        "includes 0, or there is none. Hatched: not run."
    )
    alt = f"Three heat maps of the effect of the evidence: {title}. The numbers are in the table below."
    return [
        Figure(file=path.name, alt=alt, caption=caption),
        _probe_numbers(cells, ("distance", "context"), title),
    ]


def _probe_figure(path: Path, compared: Compared, kind: str) -> list[Block]:
    entries = _entries(compared, "distances", kind)
    at = [entry["distance"] for entry in entries]
    measured = [entry["measures"][EFFECT] for entry in entries]
    names = {"baseline": f"baseline: {compared.baseline_name}", "treatment": compared.treatment_name}
    sides = [Line(name=name, at=at, values=[one[side] for one in measured]) for side, name in names.items()]
    is_known = [one["ci95"] is not None for one in measured]
    about = "95 % interval" if any(is_known) else "no interval"
    difference = Line(
        name=f"difference, {about}",
        at=at,
        values=[one["delta"] for one in measured],
        low=[math.nan if one["ci95"] is None else one["ci95"][0] for one in measured],
        high=[math.nan if one["ci95"] is None else one["ci95"][1] for one in measured],
    )
    title = _title(compared, kind)
    plot_lines(
        path,
        [
            Panel(label="effect of the\nevidence (nats)", lines=sides, has_zero=True),
            Panel(label="difference\n(nats)", lines=[difference], has_zero=True),
        ],
        Axis(
            label="distance of the evidence (tokens, logarithmic), n = items",
            places=at,
            names=[f"{token_label(entry['distance'])}\nn={entry['items']}" for entry in entries],
            is_log=min(at, default=0) > 0,
        ),
        title=f"{compared.label}, {kind}",
    )
    alt = f"Lines by distance: {title}. The numbers are in the table below."
    caption = f"{title}: effect of the evidence in nats, n items a point. {_about_bars(measured)}"
    blocks: list[Block] = [Figure(file=path.name, alt=alt, caption=caption)]
    ranges = _ranges_table(compared, kind, title)
    return [*blocks, *([ranges] if ranges else []), _probe_numbers(entries, ("distance",), title)]


def _about_bars(measured: Sequence[dict[str, Any]]) -> str:
    """Return what the bars of figure 5 are, and which points have none and why."""
    words = "Both sides answer the same items, so the bars below are those of the paired difference"
    reasons = [str(one.get("ci95_reason") or "no interval") for one in measured if one["ci95"] is None]
    if len(reasons) == len(measured):
        return f"There are no 95 % intervals: {'; '.join(dict.fromkeys(reasons))}."
    if reasons:
        return f"{words} (95 %); a point without one: {'; '.join(dict.fromkeys(reasons))}."
    return f"{words} (95 %)."


def _title(compared: Compared, kind: str) -> str:
    return f"{compared.label}, {kind}, {compared.treatment_name} against {compared.baseline_name}"


def _ranges_table(compared: Compared, kind: str, title: str) -> Table | None:
    """Return means over ranges of distance, with the paper's number beside its range."""
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


def _probe_numbers(entries: Lines, keys: Sequence[str], title: str) -> Details:
    """Return every number of a figure as a table."""
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
    return f"{signed(measure['delta'], digits)} {interval_text(measure, digits)}"


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


def _scale(values: Sequence[float]) -> float:
    """Return the largest absolute value, at least a hundredth of a nat."""
    return max(0.01, *map(abs, values))


def _slug(compared: Compared, kind: str) -> str:
    """Return a file name of plain letters."""
    words = f"{compared.label}-{compared.treatment_name}-{kind}".lower()
    return re.sub(r"[^a-z0-9.]+", "-", words).strip("-.")[:60]


def comparison_blocks(comparisons: Sequence[Compared]) -> list[Block]:
    """Return the section about the comparisons: trainings, whether they are pairs, notes and methods."""
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
    """Return the rules of the first pair's stages, such as `none at 4,096, exact at 8,192`."""
    stages = training_of(compared.content["runs"][0][side])
    words = []
    for stage in stages:
        rows = stage.get("row_tokens")
        words.append(str(stage["rule"]) + (f" at {rows:,}" if isinstance(rows, int) else ""))
    return ", then ".join(words) or UNKNOWN


def licence_blocks(comparisons: Sequence[Compared], packs: Sequence[PackExposure]) -> list[Block]:
    """Return the section about licences of corpora and models, as manifests and exports name them."""
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
            text="As recorded when a corpus was tokenized or a model was imported, and unknown where "
            "nothing was. Check them before you publish a model."
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
    """Enter a licence: a known one replaces an unknown one, and two different ones are both shown."""
    before = rows.get((what, name))
    now = UNKNOWN if licence is None else str(licence)
    if before in (None, UNKNOWN):
        rows[what, name] = now
    elif now not in (UNKNOWN, *before.split("; ")):
        rows[what, name] = f"{before}; {now}"
