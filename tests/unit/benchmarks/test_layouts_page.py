"""The page of the layout matrix, from numbers made up here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from layouts_page import OF_LAYOUTS, Measured, page

from megatron_exact.training.flag_classes import megatron_flags_by_spelling
from tests.distributed import layout_matrix as matrix

GOOD = {key: bound / 2 for key, bound in matrix.BOUNDS.items()}
FAR = {key: 2 * matrix.CONTROL_FACTOR * bound for key, bound in matrix.BOUNDS.items()}


@pytest.fixture
def measured() -> Measured:
    return Measured(
        float32={"TP2": dict.fromkeys(matrix.RULES, GOOD)},
        bfloat16={"CP2": dict.fromkeys(matrix.BF16_BOUNDS, 0.0001)},
        faults={"no positions": FAR},
        rules={"exact against none": FAR},
    )


def test_every_number_is_on_the_page(measured: Measured) -> None:
    text = page(measured)
    assert "| TP2    |         2 |    1.0e-06 |         5.0e-06 |" in text
    assert "| CP2    | 1.0e-04 |   1.0e-04 |" in text
    assert "| no positions       | 4.0e-03 |   2.0e-02 |" in text
    assert "2e-06 of the loss" in text
    assert "{" not in text


def test_what_is_outside_the_bounds_is_told(measured: Measured) -> None:
    assert measured.outside_bounds() == []
    rules = {**measured.float32["TP2"], "exact": FAR}
    lines = replace(measured, float32={"TP2": rules}, faults={"no positions": GOOD}).outside_bounds()
    assert len(lines) == 6
    assert lines[0] == "TP2, exact: loss differs by 4.0e-03, bound 2e-06"
    assert lines[-1] == "control no positions: grad_norm differs by 5.0e-06 only"


def test_refusals_named_on_the_page_exist() -> None:
    table = megatron_flags_by_spelling()
    assert all(table[name].kind == "refused" for name in OF_LAYOUTS)
