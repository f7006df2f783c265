"""Figure 4: relative lift over standard continued pretraining, by window and in the mean of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_exact.report.cells import LONG_SUITES, NOT_RUN, REGIMES, find_aggregate, suite_name
from megatron_exact.report.compared import Compared, estimate_of, signed, token_label
from megatron_exact.report.coverage import Coverage, coverage_of, quantity_notes
from megatron_exact.report.fields import Field, plot_fields
from megatron_exact.report.page import Block, Figure, Heading, Note, Paragraph, Table, Text
from megatron_exact.report.paper_numbers import (
    MEAN_LIFTS,
    SOURCE,
    main_results,
    paper_models,
    paper_windows,
)

FIGURE = "lift-by-window.png"
SCALE_LIMITS = (10.0, 100.0)
"""Percent that the darkest colour stands for, at least and at most."""


def lift_blocks(folder: Path, comparisons: Sequence[Compared]) -> list[Block]:
    """The section; its figure is written into `folder` if there is anything to draw."""
    exact = [one for one in comparisons if one.is_exact]
    blocks: list[Block] = [
        Heading(text="Figure 4: relative lift"),
        Paragraph(
            text="Difference in percent of standard continued pretraining. The paper's are recomputed from "
            f"its table 1 ({SOURCE}); its text gives the same means over seven models (+39, +58, +9 and "
            "+8 %). By single windows the paper has a figure and no numbers."
        ),
        _means_table(exact),
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
        f"{field.title}, {name}: " + ", ".join(f"{token_label(tokens)} {text}" for tokens, text in cells)
        for field in fields
        for name, cells in _spoken(field, columns)
    )
    caption = (
        "Relative lift of EXACT over standard continued pretraining by window, in percent. In brackets: "
        "the 95 % interval of the difference holds 0. Hatched: not run. A thick line: longer windows are "
        "extrapolated."
    )
    return [*blocks, Figure(file=FIGURE, alt=f"Heat map of relative lift. {alt}", caption=caption)]


def lift_fields(comparisons: Sequence[Compared]) -> tuple[list[Field], list[int]]:
    """One heat map a suite, models as rows, and the windows (tokens) that are their columns."""
    columns = sorted(
        {tokens for one in comparisons for suite in LONG_SUITES for tokens in one.windows(suite)}
    )
    fields = []
    for suite in LONG_SUITES:
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
                values[number, column] = 0.0 if lift is None else lift
                text = "of 0" if lift is None else signed(lift, 0)
                texts[number][column] = f"({text})" if estimate.holds_zero and lift is not None else text
        largest = float(np.nanmax(np.abs(values)))
        fields.append(
            Field(
                title=suite_name(suite),
                row_names=[one.label for one in rows],
                values=values,
                texts=texts,
                scale=min(max(largest, SCALE_LIMITS[0]), SCALE_LIMITS[1]),
                steps=[_first_extrapolated(one, suite, columns) for one in rows],
            )
        )
    return fields, columns


def _first_extrapolated(compared: Compared, suite: str, columns: Sequence[int]) -> int | None:
    beyond = compared.regime_windows(suite, "extrapolated")
    return next((number for number, tokens in enumerate(columns) if beyond and tokens >= beyond[0]), None)


def _spoken(field: Field, columns: Sequence[int]) -> list[tuple[str, list[tuple[int, str]]]]:
    return [
        (name, [(tokens, text) for tokens, text in zip(columns, texts, strict=True) if text])
        for name, texts in zip(field.row_names, field.texts, strict=True)
    ]


def _means_table(exact: Sequence[Compared]) -> Table:
    """Lift of the averages of table 1, one row a model and their mean."""
    head = ["Model"]
    for suite, regime in MEAN_LIFTS:
        head += [f"{suite_name(suite)} {regime}: paper", "here"]
    others = [one.label for one in exact if one.paper_model is None]
    body: list[list[Text]] = []
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
        body.append(cells)
    mean: list[Text] = [f"mean of the paper's {len(paper_models())}"]
    for key in MEAN_LIFTS:
        mean += [_percent(float(np.mean(papers[key]))), "-"]
    return Table(head=head, body=[*body, mean], caption="Relative lift of the averages of table 1, percent")


def _coverages(compared: Compared) -> list[Coverage]:
    """What the averages of a comparison are over; the one over all windows where it has no other."""
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
            return "of 0" if estimate.lift_percent is None else _percent(estimate.lift_percent)
    return NOT_RUN


def _percent(value: float | None) -> str:
    return "-" if value is None else signed(value, 1)
