"""Cells that the tables of the paper share: two sides, their difference, what was not run."""

from __future__ import annotations

from megatron_exact.report.compared import Compared, estimate_of, signed
from megatron_exact.report.page import Faint, Strong, Text
from megatron_exact.report.paper_numbers import Estimate

NOT_RUN = Faint("not run")
SUITE_NAMES = {"nolima": "NoLiMa", "ruler": "RULER", "qa": "standard QA"}
LONG_SUITES = ("nolima", "ruler")
REGIMES = ("trained", "extrapolated")
SIDES = ("standard", "EXACT", "delta [95 %]")


def suite_name(suite: str) -> str:
    """A suite as tables name it."""
    return SUITE_NAMES.get(suite, suite)


def difference_cell(estimate: Estimate) -> Text:
    """`+1.25 [+0.20, +2.30]`; an interval that holds 0 is marked in words."""
    text = signed(estimate.delta, 2)
    if estimate.ci95 is None:
        return text
    text += f" [{signed(estimate.ci95[0], 2)}, {signed(estimate.ci95[1], 2)}]"
    return (text + " ", Strong("holds 0")) if estimate.holds_zero else text


def find_aggregate(compared: Compared, suite: str, regime: str) -> Estimate | None:
    """The macro average of a suite and regime; None if it was not run."""
    for entry in compared.aggregates:
        if (entry["suite"], entry["regime"]) == (suite, regime):
            return estimate_of(entry)
    return None


def side_names(side: str) -> list[str]:
    """Heads of three columns: both sides and their difference."""
    return [f"{side}: {name}" for name in SIDES]


def side_cells(estimate: Estimate | None) -> list[Text]:
    """Their cells; None: not run."""
    if estimate is None:
        return [NOT_RUN] * 3
    return [f"{estimate.baseline:.2f}", f"{estimate.treatment:.2f}", difference_cell(estimate)]
