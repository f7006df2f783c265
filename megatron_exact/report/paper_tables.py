"""Tables 1 to 3 of the paper in its layout, its numbers beside those of your own comparisons.

What was not run is marked so; a row is never left out because a number is missing. Beside results of your
own the rows that have none are folded, so that yours can be found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_exact.report.compared import (
    EXACT,
    NOT_RUN,
    REGIMES,
    RULE_NAMES,
    SIDES,
    STANDARD,
    Compared,
    Coverage,
    coverage_of,
    difference_cell,
    estimate_of,
    examples_notes,
    find_aggregate,
    quantity_notes,
    side_cells,
    side_names,
    suite_name,
)
from megatron_exact.report.page import Block, Details, Faint, Heading, Note, Paragraph, Table, Text
from megatron_exact.report.paper_numbers import (
    CONTROL_MODEL,
    CONTROL_RULES,
    LONG_SUITES,
    QA_MODELS,
    QA_SUITE,
    SOURCE,
    Estimate,
    MainResult,
    controls,
    main_results,
    paper_windows,
    standard_qa,
)


def main_blocks(comparisons: Sequence[Compared]) -> list[Block]:
    """Table 1: long-context results, then those of models that the paper does not have."""
    exact = [compared for compared in comparisons if compared.is_exact]
    found = [(row, [one for one in exact if _has(one, row)]) for row in main_results()]
    here: list[list[Text]] = []
    rest: list[list[Text]] = []
    models = {one.paper_model for one in exact}
    for row, ours in found:
        rows = [_main_row(row, compared) for compared in ours] or [_main_row(row, None)]
        (here if row.model in models else rest).extend(rows)
    num_run = sum(bool(ours) for _, ours in found)
    blocks: list[Block] = [
        Heading(text="Table 1: long-context generation"),
        Paragraph(
            text="Macro averages over task x window in points, 0 to 100. EXACT against standard continued "
            f"pretraining, the paper's numbers ({SOURCE}) beside those of the comparisons given here. "
            f"{num_run} of the {len(found)} rows were run. An interval that includes 0 is marked: two of "
            "the paper's do."
        ),
        *split_table(
            ["Model", "CPT window", "Evaluation", *side_names("paper"), *side_names("here")],
            here,
            rest,
            caption="Table 1, paper and here",
            left_columns=3,
            is_folded=bool(comparisons),
        ),
        *_coverage_blocks([one for one in found if one[1] or not comparisons]),
    ]
    unknown = [one.label for one in exact if one.treatment_rule is None and one.aggregates]
    if unknown:
        blocks.append(
            Note(
                text=f"{', '.join(unknown)}: no file says with which token weighting its sides were "
                "trained; that the treatment is EXACT is the word of whoever gave the comparison."
            )
        )
    without = [one.label for one in exact if one.paper_model and one.aggregates and not _regimes(one)]
    if without:
        blocks.append(
            Note(
                text=f"{', '.join(without)}: compared without trained and extrapolated windows, so no row "
                "of table 1 is filled; give megatron-exact compare --trained-lengths and "
                "--extrapolated-lengths."
            )
        )
    return blocks + _other_models(exact)


def split_table(
    head: Sequence[str],
    here: Sequence[Sequence[Text]],
    rest: Sequence[Sequence[Text]],
    *,
    caption: str,
    left_columns: int = 1,
    is_folded: bool = True,
) -> list[Block]:
    """Return the rows of models that were run as a table, and the paper's others folded below it.

    Args:
        head: names of the columns.
        here: rows of models that were run.
        rest: rows of the others.
        caption: what the table shows.
        left_columns: left-aligned ones.
        is_folded: False puts all rows into one table.
    """

    def table(body: Sequence[Sequence[Text]]) -> Table:
        return Table(head=head, body=body, caption=caption, left_columns=left_columns)

    if not is_folded:
        return [table([*here, *rest])]
    blocks: list[Block] = [table(here)] if here else []
    if rest:
        which = "the other models" if here else "all models; none of them was run"
        blocks.append(Details(summary=f"The paper's rows of {which}", blocks=[table(rest)]))
    return blocks


def _main_row(row: MainResult, compared: Compared | None) -> list[Text]:
    here: list[Text] = [NOT_RUN] * 3
    if compared is not None:
        here = side_cells(find_aggregate(compared, row.suite, row.regime))
    return [
        row.model,
        row.window,
        f"{suite_name(row.suite)} {row.regime}",
        *side_cells(row.estimate),
        *here,
    ]


def _has(compared: Compared, row: MainResult) -> bool:
    if compared.paper_model != row.model:
        return False
    return find_aggregate(compared, row.suite, row.regime) is not None


def _regimes(compared: Compared) -> bool:
    return any(entry["regime"] in REGIMES for entry in compared.aggregates)


def _coverage_blocks(found: Sequence[tuple[MainResult, Sequence[Compared]]]) -> list[Block]:
    """Windows, tasks and examples of the averages, and a warning where they are not the paper's."""
    body: list[list[Text]] = []
    coverages = []
    for row, ours in found:
        names: list[Text] = [row.model, f"{suite_name(row.suite)} {row.regime}", ", ".join(row.windows)]
        for compared in ours:
            one = coverage_of(
                compared, row.suite, row.regime, paper_windows=row.windows, who=compared.label
            )
            coverages.append(one)
            windows = one.windows_text if one.has_other_windows else "the same"
            body.append([*names, windows, one.tasks_text, one.examples_text])
        if not ours:
            body.append([*names, *[NOT_RUN] * 3])
    if not body:
        return []
    head = ["Model", "Evaluation", "windows: paper", "windows: here", "tasks here", "examples a cell here"]
    table = Table(head=head, body=body, caption="Windows, tasks and examples of table 1", left_columns=4)
    details = Details(summary="Windows, tasks and examples of table 1", blocks=[table])
    return [*quantity_notes(coverages), *examples_notes(coverages), details]


def _other_models(exact: Sequence[Compared]) -> list[Block]:
    body: list[list[Text]] = []
    for compared in exact:
        if compared.paper_model is not None:
            continue
        for entry in compared.aggregates:
            if entry["suite"] in LONG_SUITES:
                one = coverage_of(
                    compared, entry["suite"], entry["regime"], paper_windows=None, who=compared.label
                )
                numbers = side_cells(estimate_of(entry))
                examples = f"{entry['examples']:,}"
                body.append([one.who, one.what, *numbers, examples, one.windows_text, one.tasks_text])
    if not body:
        return []
    head = ["Model", "Evaluation", *SIDES, "examples", "windows", "tasks"]
    return [
        Heading(text="Models that the paper does not have", level=3),
        Table(head=head, body=body, caption="As table 1, for other models", left_columns=2),
    ]


def other_suite_blocks(comparisons: Sequence[Compared]) -> list[Block]:
    """Averages of the suites that the paper does not have, of all models and rules; empty for none."""
    body: list[list[Text]] = []
    for compared in comparisons:
        for entry in compared.aggregates:
            if entry["suite"] in (*LONG_SUITES, QA_SUITE):
                continue
            who = compared.label
            one = coverage_of(compared, entry["suite"], entry["regime"], paper_windows=None, who=who)
            windows = one.windows_text if one.windows else "none"
            numbers = side_cells(estimate_of(entry))
            body.append(
                [who, compared.treatment_name, one.what, *numbers, f"{entry['examples']:,}", windows]
            )
    if not body:
        return []
    head = ["Model", "Method", "Evaluation", "baseline", "treatment", SIDES[-1], "examples", "windows"]
    return [
        Heading(text="Suites that the paper does not have"),
        Table(head=head, body=body, caption="Macro averages of other suites", left_columns=3),
    ]


QA_TASKS = {
    "ARC-C": "arc_challenge",
    "GSM8K": "gsm8k",
    "HellaSwag": "hellaswag",
    "MMLU": "mmlu",
    "PIQA": "piqa",
    "WinoGrande": "winogrande",
    "Macro": None,
}
"""Benchmark of table 2 -> task here; None: the mean of all six, not run unless all of them were."""


def qa_blocks(comparisons: Sequence[Compared]) -> list[Block]:
    """Table 2: standard QA."""
    found = [
        one for one in comparisons if one.is_exact and find_aggregate(one, QA_SUITE, "all") is not None
    ]
    three = [one for model in QA_MODELS for one in found if one.paper_model == model]
    head = ["Benchmark", "paper: standard", "paper: EXACT", "paper: delta"]
    for compared in found:
        head += side_names(compared.label)
    if not found:
        head += side_names("here")
    if len(three) == len(QA_MODELS):
        head += ["mean of three: standard", "mean of three: EXACT", "mean of three: delta"]
    body: list[list[Text]] = []
    for benchmark, paper in standard_qa().items():
        task = QA_TASKS[benchmark]
        cells: list[Text] = [benchmark, *side_cells(paper)]
        for compared in found:
            cells += side_cells(_qa(compared, task))
        if not found:
            cells += [NOT_RUN] * 3
        if len(three) == len(QA_MODELS):
            cells += side_cells(_mean([_qa(one, task) for one in three]))
        body.append(cells)
    return [
        Heading(text="Table 2: standard QA and reasoning"),
        Paragraph(
            text=f"Points after the same instruction tuning. The paper's numbers ({SOURCE}) are the mean "
            f"of {', '.join(QA_MODELS[:-1])} and {QA_MODELS[-1]}, without intervals; the standard side of "
            "its macro average recomputes to 51.86 from the rows, the paper prints 51.85. "
            "Macro is the mean of all six, and not run where one of them was not."
        ),
        *split_table(
            head,
            body if found else [],
            [] if found else body,
            caption="Table 2, paper and here",
            is_folded=bool(comparisons),
        ),
        *_examples_blocks(found),
    ]


def _examples_blocks(found: Sequence[Compared]) -> list[Block]:
    """On how many examples each number here rests; the paper does not say."""
    if not found:
        return []
    tasks = [(benchmark, task) for benchmark, task in QA_TASKS.items() if task is not None]
    body: list[list[Text]] = []
    for benchmark, task in tasks:
        cells = [_cell(compared, task) for compared in found]
        body.append([benchmark, *(NOT_RUN if cell is None else f"{cell['examples']:,}" for cell in cells)])
    head = ["Benchmark", *(compared.label for compared in found)]
    table = Table(head=head, body=body, caption="Examples of table 2")
    return [Details(summary="Examples of table 2", blocks=[table])]


def _qa(compared: Compared, task: str | None) -> Estimate | None:
    if task is None:
        is_whole = all(_cell(compared, one) is not None for one in QA_TASKS.values() if one is not None)
        return find_aggregate(compared, QA_SUITE, "all") if is_whole else None
    cell = _cell(compared, task)
    return None if cell is None else estimate_of(cell)


def _cell(compared: Compared, task: str) -> dict[str, Any] | None:
    for entry in compared.content.get("cells") or []:
        if (entry["suite"], entry["task"]) == (QA_SUITE, task):
            return dict(entry)
    return None


def _mean(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """Mean of several models; no interval, as they were resampled apart from each other."""
    known = [one for one in estimates if one is not None]
    if len(known) < len(estimates):
        return None
    sums = [(one.baseline or 0.0, one.treatment or 0.0, one.delta) for one in known]
    baseline, treatment, delta = (sum(column) / len(known) for column in zip(*sums, strict=True))
    return Estimate(baseline=baseline, treatment=treatment, delta=delta, ci95=None)


def control_blocks(comparisons: Sequence[Compared]) -> list[Block]:
    """Table 3: which weighting signal helps, one table a model with comparisons of rules."""
    usable = [
        one for one in comparisons if one.baseline_rule == STANDARD and one.treatment_rule is not None
    ]
    labels = [
        label
        for label in dict.fromkeys(one.label for one in usable)
        if label == CONTROL_MODEL or _has_controls(usable, label)
    ]
    blocks: list[Block] = [
        Heading(text="Table 3: which weighting signal"),
        Paragraph(
            text="Difference from standard continued pretraining in points. The paper's numbers "
            f"({SOURCE}) are those of {CONTROL_MODEL} at 16K with the intervals of its appendix C, three "
            "of which include 0; here a row is a comparison whose treatment was trained with that rule."
        ),
    ]
    for label in labels or [""]:
        rows = [one for one in usable if one.label == label]
        caption = (
            f"Table 3, paper ({CONTROL_MODEL}) and here ({label})" if label else "Table 3, paper and here"
        )
        coverages = [coverage for one in rows for coverage in _coverages(one)]
        table = _control_table(rows, caption)
        is_folded = bool(comparisons) and not any(one.aggregates for one in rows)
        summary = "The paper's rows; no comparison here has these averages"
        blocks.append(Details(summary=summary, blocks=[table]) if is_folded else table)
        blocks += quantity_notes(coverages)
    return blocks


def _coverages(compared: Compared) -> list[Coverage]:
    """What the averages of one row are over; the paper's columns are those of its control model."""
    return [
        coverage_of(
            compared,
            suite,
            regime,
            paper_windows=paper_windows(CONTROL_MODEL, suite, regime),
            who=compared.treatment_name,
        )
        for suite in LONG_SUITES
        for regime in REGIMES
        if find_aggregate(compared, suite, regime) is not None
    ]


def _has_controls(usable: Sequence[Compared], label: str) -> bool:
    rules = {one.treatment_name for one in usable if one.label == label}
    return bool(rules - {RULE_NAMES[EXACT]})


def _control_table(rows: Sequence[Compared], caption: str) -> Table:
    columns = [(suite, regime) for suite in LONG_SUITES for regime in REGIMES]
    head = ["Method"]
    for suite, regime in columns:
        head += [f"{suite_name(suite)} {regime}: paper", "here"]
    body: list[list[Text]] = [[RULE_NAMES[STANDARD], *["0.00"] * (2 * len(columns))]]
    for rule in CONTROL_RULES.values():
        ours = [one for one in rows if one.treatment_name == RULE_NAMES[rule]]
        body += [_control_row(RULE_NAMES[rule], rule, one, columns) for one in ours] or [
            _control_row(RULE_NAMES[rule], rule, None, columns)
        ]
    known = {RULE_NAMES[rule] for rule in CONTROL_RULES.values()}
    body += [
        _control_row(one.treatment_name, None, one, columns)
        for one in rows
        if one.treatment_name not in known
    ]
    return Table(head=head, body=body, caption=caption)


def _control_row(
    name: str, rule: str | None, compared: Compared | None, columns: Sequence[tuple[str, str]]
) -> list[Text]:
    cells: list[Text] = [name]
    for suite, regime in columns:
        cells.append(
            Faint("not in the paper") if rule is None else difference_cell(controls()[rule, suite, regime])
        )
        found = None if compared is None else find_aggregate(compared, suite, regime)
        cells.append(NOT_RUN if found is None else difference_cell(found))
    return cells
