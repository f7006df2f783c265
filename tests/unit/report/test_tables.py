"""Markdown tables."""

from __future__ import annotations

import pytest

from megatron_exact.report.page import markdown_table


def test_columns_are_aligned_and_ruled() -> None:
    text = markdown_table(["name", "n"], [["a", "1"], ["longer", "1,000"]])
    assert text.splitlines() == [
        "| name   |     n |",
        "| ------ | ----: |",
        "| a      |     1 |",
        "| longer | 1,000 |",
    ]


def test_a_table_without_lines_still_has_a_head() -> None:
    assert markdown_table(["a"], []).splitlines() == ["| a   |", "| --- |"]


def test_a_short_line_is_refused() -> None:
    with pytest.raises(ValueError, match="1 cells in a table of 2"):
        markdown_table(["a", "b"], [["1"]])
