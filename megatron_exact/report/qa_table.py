"""Table 2 of the paper: standard QA and reasoning, its numbers beside one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_exact.report.cells import NOT_RUN, find_aggregate, side_cells, side_names
from megatron_exact.report.compared import Compared, estimate_of
from megatron_exact.report.page import Block, Details, Heading, Paragraph, Table, Text
from megatron_exact.report.paper_numbers import QA_MODELS, SOURCE, Estimate, standard_qa

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
    found = [one for one in comparisons if one.is_exact and find_aggregate(one, "qa", "all") is not None]
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
        Table(head=head, body=body, caption="Table 2, paper and here"),
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
        return find_aggregate(compared, "qa", "all") if is_whole else None
    cell = _cell(compared, task)
    return None if cell is None else estimate_of(cell)


def _cell(compared: Compared, task: str) -> dict[str, Any] | None:
    for entry in compared.content.get("cells") or []:
        if (entry["suite"], entry["task"]) == ("qa", task):
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
