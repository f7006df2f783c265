"""Text and figure of the lengths of a pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_exact.report.pack_tables import format_lengths, plot_lengths

LENGTHS: dict[str, Any] = {
    "documents": {
        "documents": 4,
        "tokens": 111,
        "mean": 27.75,
        "quantiles": {"p10": 4, "p50": 5, "p90": 98, "p99": 98, "max": 98},
        "bins": [
            {"lower": 1, "documents": 0, "tokens": 0},
            {"lower": 2, "documents": 0, "tokens": 0},
            {"lower": 4, "documents": 3, "tokens": 13},
            {"lower": 8, "documents": 0, "tokens": 0},
            {"lower": 16, "documents": 0, "tokens": 0},
            {"lower": 32, "documents": 0, "tokens": 0},
            {"lower": 64, "documents": 1, "tokens": 98},
        ],
    },
    "segments": {
        "documents": 5,
        "tokens": 111,
        "mean": 22.2,
        "quantiles": {"p10": 4, "p50": 5, "p90": 64, "p99": 64, "max": 64},
        "bins": [
            {"lower": 1, "documents": 0, "tokens": 0},
            {"lower": 2, "documents": 0, "tokens": 0},
            {"lower": 4, "documents": 3, "tokens": 13},
            {"lower": 8, "documents": 0, "tokens": 0},
            {"lower": 16, "documents": 0, "tokens": 0},
            {"lower": 32, "documents": 1, "tokens": 34},
            {"lower": 64, "documents": 1, "tokens": 64},
        ],
    },
    "truncation": {
        "cut_documents": 1,
        "cut_documents_share": 0.25,
        "rows_inside_document": 1,
        "rows_inside_document_share": 0.5,
        "tokens_after_cut": 34,
        "tokens_after_cut_share": 34 / 111,
    },
    "padding": {"tokens": 17, "share": 17 / 128},
    "left_out_tokens": 0,
}
EMPTY = {
    "documents": 0,
    "tokens": 0,
    "mean": None,
    "quantiles": dict.fromkeys(("p10", "p50", "p90", "p99", "max")),
    "bins": [],
}


def test_text() -> None:
    lines = format_lengths(LENGTHS).splitlines()
    assert lines[2].split() == ["documents", "4", "27.8", "4", "5", "98", "98", "98"]
    table = [line.split() for line in lines if line.startswith(("4-7", "32-63", "64-127"))]
    assert table == [
        ["4-7", "3", "75.00%", "11.71%", "3", "60.00%", "11.71%"],
        ["32-63", "0", "0.00%", "0.00%", "1", "20.00%", "30.63%"],
        ["64-127", "1", "25.00%", "88.29%", "1", "20.00%", "57.66%"],
    ]
    assert not any(line.startswith("2-3") for line in lines)
    assert "cut: 1 documents (25.00% of them); 30.63% of the tokens stand after a cut" in lines[-2]
    assert "50.00% of the rows begin inside a document" in lines[-2]
    assert lines[-1] == "padding: 17 inputs (13.2812%); left out: 0 tokens"


def test_text_without_documents() -> None:
    text = format_lengths({**LENGTHS, "documents": None})
    assert "documents  share" not in text
    assert "60.00%" in text


def test_text_of_an_empty_split() -> None:
    text = format_lengths({**LENGTHS, "documents": EMPTY, "segments": EMPTY})
    assert text.splitlines()[2].split() == ["documents", "0", "-", "-", "-", "-", "-", "-"]


@pytest.mark.parametrize("change", [{}, {"documents": None}, {"documents": EMPTY, "segments": EMPTY}])
def test_figure(tmp_path: Path, change: dict[str, Any]) -> None:
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path in paths:
        plot_lengths(path, {**LENGTHS, **change}, row_tokens=64, title="a pack")
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[0].read_bytes() == paths[1].read_bytes()
