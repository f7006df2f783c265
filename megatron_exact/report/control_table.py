"""Table 3 of the paper: which weighting signal helps, its numbers beside one's own comparisons of rules."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_exact.report.cells import (
    LONG_SUITES,
    NOT_RUN,
    REGIMES,
    difference_cell,
    find_aggregate,
    suite_name,
)
from megatron_exact.report.compared import EXACT, RULE_NAMES, STANDARD, Compared
from megatron_exact.report.coverage import Coverage, coverage_of, quantity_notes
from megatron_exact.report.page import Block, Faint, Heading, Paragraph, Table, Text
from megatron_exact.report.paper_numbers import (
    CONTROL_MODEL,
    CONTROL_RULES,
    SOURCE,
    controls,
    paper_windows,
)


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
            "of which hold 0; here a row is a comparison whose treatment was trained with that rule."
        ),
    ]
    for label in labels or [""]:
        rows = [one for one in usable if one.label == label]
        caption = (
            f"Table 3, paper ({CONTROL_MODEL}) and here ({label})" if label else "Table 3, paper and here"
        )
        coverages = [coverage for one in rows for coverage in _coverages(one)]
        blocks += [_control_table(rows, caption), *quantity_notes(coverages)]
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
