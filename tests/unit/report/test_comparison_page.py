"""The tables of a comparison, from its file alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_exact.report.compared import check_comparison
from megatron_exact.report.comparison_page import aggregates_table, comparison_page, write_comparison_page
from megatron_exact.report.figures import Axis, Line, Panel, _error_lengths, plot_lines

ESTIMATE: dict[str, Any] = {
    "cells": 55,
    "examples": 27_500,
    "baseline": 46.79,
    "treatment": 57.4651,
    "delta": 10.6751,
    "ci95": [9.12, 12.04],
    "relative_lift_percent": 22.8149,
    "example_signs": {"wins": 4000, "losses": 1200, "ties": 22_300},
}
TESTS: dict[str, Any] = {
    "cell_signs": {"wins": 50, "losses": 3, "ties": 2},
    "pair_deltas": [10.6751],
    "p_value": 0.0001,
    "pair_level_p_value": None,
    "p_holm": 0.0002,
}
RUN = {"results": "results/standard", "token_weighting": "none", "seed": 1, "iteration": 500}
CONTENT: dict[str, Any] = {
    "format_version": 1,
    "pairing": {"verified": True, "statement": "training verified as paired: all agree"},
    "runs": [{"baseline": RUN, "treatment": {**RUN, "token_weighting": None}}],
    "methods": {"ci95": "percentiles"},
    "notes": ["one pair of runs"],
    "aggregates": [{"suite": "ruler", "regime": "trained", **ESTIMATE, **TESTS}],
    "lengths": [{"suite": "qa", "length": 0, **ESTIMATE, "relative_lift_percent": None}],
    "cells": [],
}


def rows(table: str) -> list[list[str]]:
    """Cells of the lines below the head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_a_rule_that_returns_is_named_again() -> None:
    training = [{"rule": rule} for rule in ("exact", "exact", "none", "exact")]
    runs = [{"baseline": RUN, "treatment": {**RUN, "training": training}}]
    assert "| exact, then none, then exact " in comparison_page({**CONTENT, "runs": runs})


def test_the_page_says_what_the_file_says() -> None:
    page = comparison_page(CONTENT)
    assert page.startswith(
        "# Comparison\n\nTraining verified as paired: all agree.\n\n* one pair of runs\n"
    )
    assert "| treatment | results/standard | unknown " in page
    assert "50 / 3 / 2 | 4,000 / 1,200 / 22,300 | 0.0001 |   0.0002 |" in page
    assert "| qa    |   none |    55 |" in page
    assert "* **ci95**: percentiles\n" in page
    assert "p (pairs)" not in page


def test_an_interval_that_holds_0_is_marked() -> None:
    crossing = {**CONTENT["aggregates"][0], "ci95": [-0.02, 1.76]}
    first, second = rows(aggregates_table([CONTENT["aggregates"][0], crossing]))
    assert first[4:] == ["46.79", "57.47", "+10.68", "[+9.12, +12.04]", "+22.8 %"]
    assert second[7] == "[-0.02, +1.76] includes 0"


def test_several_pairs_are_shown_one_by_one() -> None:
    seeds = {
        **CONTENT["aggregates"][0],
        **{"pair_deltas": [1.0, -0.5], "pair_level_p_value": 0.5, "p_value_these_seeds": 0.001},
        **{"ci95": None, "ci95_reason": "only 2 pairs of runs", "ci95_these_seeds": [0.5, 1.5]},
    }
    page = comparison_page({**CONTENT, "aggregates": [seeds]})
    (row,) = [line for line in page.splitlines() if "+1.00, -0.50" in line]
    assert [cell.strip() for cell in row.split("|")][-5:-1] == [
        *("0.5", "0.001", "[+0.50, +1.50]", "+1.00, -0.50"),
    ]
    assert "| - (only 2 pairs of runs) |" in page


def test_a_missing_interval_says_why() -> None:
    entry = {**CONTENT["aggregates"][0], "ci95": None, "ci95_reason": "only 3 of 200 differ"}
    content = {**CONTENT, "aggregates": [entry]}
    check_comparison(Path("comparison.json"), content)
    assert rows(aggregates_table([entry]))[0][7] == "- (only 3 of 200 differ)"
    for wrong, message in (
        ({"ci95_reason": None}, "does not say why"),
        ({"ci95": [float("nan"), 1.0]}, "not a finite number"),
        ({"ci95_these_seeds": [2.0, 1.0]}, "ci95_these_seeds begins at 2.0 and ends at 1.0"),
        ({"p_value_these_seeds": 1.5}, "outside of 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            check_comparison(Path("comparison.json"), {**content, "aggregates": [{**entry, **wrong}]})


def test_a_point_without_an_interval_has_no_bar(tmp_path: Path) -> None:
    line = Line(name="difference", at=[1, 2], values=[0.5, 1.0], low=[math.nan, 0.8], high=[math.nan, 1.3])
    lengths = _error_lengths(line)
    assert lengths is not None
    np.testing.assert_allclose(lengths, [[math.nan, 0.2], [math.nan, 0.3]])
    axis = Axis(label="distance", places=[1, 2], names=["1", "2"])
    plot_lines(tmp_path / "a.png", [Panel(label="nats", lines=[line])], axis, title="a")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_the_page_stands_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(CONTENT))
    assert write_comparison_page(tmp_path).read_text() == comparison_page(CONTENT)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"aggregates": []}'])
def test_a_file_that_is_no_comparison(tmp_path: Path, text: str) -> None:
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(
        ValueError,
        match=r"comparison\.json (is not a comparison|is not JSON|contains a list).*exact compare again",
    ):
        write_comparison_page(tmp_path)
