"""Table 1 of the paper in its layout, its numbers beside those of one's own comparisons.

What was not run says so; no row is left out because there is no number for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_exact.report.cells import (
    LONG_SUITES,
    NOT_RUN,
    REGIMES,
    SIDES,
    find_aggregate,
    side_cells,
    side_names,
    suite_name,
)
from megatron_exact.report.compared import Compared, estimate_of
from megatron_exact.report.coverage import coverage_of, examples_notes, quantity_notes
from megatron_exact.report.page import Block, Details, Heading, Note, Paragraph, Table, Text
from megatron_exact.report.paper_numbers import SOURCE, MainResult, main_results


def main_blocks(comparisons: Sequence[Compared]) -> list[Block]:
    """Table 1: long-context results, then those of models that the paper does not have."""
    exact = [compared for compared in comparisons if compared.is_exact]
    found = [(row, [one for one in exact if _has(one, row)]) for row in main_results()]
    body: list[list[Text]] = []
    for row, ours in found:
        body += [_main_row(row, compared) for compared in ours] or [_main_row(row, None)]
    num_run = sum(bool(ours) for _, ours in found)
    blocks: list[Block] = [
        Heading(text="Table 1: long-context generation"),
        Paragraph(
            text="Macro averages over task x window in points, 0 to 100. EXACT against standard continued "
            f"pretraining, the paper's numbers ({SOURCE}) beside those of the comparisons given here. "
            f"{num_run} of the {len(found)} rows were run. An interval that holds 0 is marked: two of the "
            "paper's do."
        ),
        Table(
            head=["Model", "CPT window", "Evaluation", *side_names("paper"), *side_names("here")],
            body=body,
            caption="Table 1, paper and here",
            left_columns=3,
        ),
        *_coverage_blocks(found),
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
                "of table 1 is filled; give compare_runs.py --trained-lengths and --extrapolated-lengths."
            )
        )
    return blocks + _other_models(exact)


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
