"""Tables and figure of a what-if."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_exact.exposure import bucket_lower_bounds, exact_weights
from megatron_exact.report import pack_tables
from megatron_exact.report.pack_tables import (
    MAX_SERIES,
    Threshold,
    forecast_cells,
    format_forecast,
    plot_forecast,
)


def pack(row_tokens: int, policy: str = "concat", mix: list[float] | None = None) -> dict[str, Any]:
    buckets = len(bucket_lower_bounds(row_tokens))
    return {
        "row_tokens": row_tokens,
        "policy": policy,
        "mix": mix,
        "exact": policy == "concat",
        "rows": 10,
        "segments": 40,
        "padding_share": 0.001,
        "left_out_tokens": 7,
        "cut_documents_share": 0.2,
        "tokens_after_cut_share": 0.4,
        "counts": [100 * (bucket + 1) for bucket in range(buckets)],
    }


PACKS = [pack(rows, policy) for rows in (64, 2048) for policy in ("concat", "best-fit")]
ONE = {"taus": [Threshold(divisor=4)], "alphas": [0.15], "gammas": [0.5]}


@pytest.mark.parametrize(
    ("text", "row_tokens", "expected"),
    [
        ("2048", 4096, 2048),
        ("2K", 4096, 2048),
        ("1.5k", 4096, 1536),
        ("row/4", 4096, 1024),
        ("row/1", 64, 64),
        ("row/100", 64, 1),
    ],
)
def test_thresholds(text: str, row_tokens: int, expected: float) -> None:
    assert Threshold.parse(text).of(row_tokens) == expected


@pytest.mark.parametrize("text", ["", "x", "row/0", "row/x", "row/-4", "row", "4/row", "2KK"])
def test_bad_thresholds(text: str) -> None:
    with pytest.raises(ValueError, match="neither tokens"):
        Threshold.parse(text)


def test_cells_are_every_combination() -> None:
    taus = [Threshold(divisor=4), Threshold(tokens=32)]
    cells = forecast_cells(PACKS, taus=taus, alphas=[0.1, 0.2], gammas=[0, 0.5, 1])
    assert len(cells) == 4 * 2 * 2 * 3
    assert len({(c["row_tokens"], c["policy"], c["tau"], c["alpha"], c["gamma"]) for c in cells}) == 48
    cell = cells[-1]
    lower = bucket_lower_bounds(2048)
    weights = exact_weights(PACKS[-1]["counts"], lower, alpha=0.2, gamma=1, tau=32)
    assert [bucket["weight"] for bucket in cell["buckets"]] == weights.tolist()
    assert [bucket["targets"] for bucket in cell["buckets"]] == PACKS[-1]["counts"]
    assert cell["tail"]["mean_extra_weight"] == pytest.approx(0.2)
    assert "counts" not in cell
    assert cell["rows"] == 10


def test_an_empty_tail_is_noted_and_others_go_on() -> None:
    empty = {**pack(64), "counts": [100, 50, 0, 0]}
    cells = forecast_cells([empty, pack(128)], **ONE)
    assert [cell["note"] is None for cell in cells] == [False, True]
    assert [bucket["weight"] for bucket in cells[0]["buckets"]] == [1, 1, 1, 1]
    text = format_forecast(cells)
    assert "64, concat: note: every weight is shown as 1" in text


def test_parameters_that_a_pack_refuses_name_its_row_length() -> None:
    taus = [Threshold(tokens=100)]
    with pytest.raises(ValueError, match=r"rows of 64: tau 100 is above the row length 64"):
        forecast_cells(PACKS, taus=taus, alphas=[0.15], gammas=[0.5])
    with pytest.raises(ValueError, match=r"rows of 64: alpha is -1"):
        forecast_cells(PACKS, taus=[Threshold()], alphas=[-1], gammas=[0.5])


def test_text() -> None:
    text = format_forecast(forecast_cells([*PACKS, pack(64, "concat", [6, 24, 0.5])], **ONE))
    packs, exposure, weighting = text.split("\n\n")[1::2]
    assert packs.splitlines()[2].split() == [
        "64", "concat", "all", "=", "10", "40", "0.1000%", "7", "20.00%", "40.00%",
    ]  # fmt: skip
    assert [line.split()[3] for line in packs.splitlines()[2:]] == ["=", "~", "=", "~", "="]
    assert exposure.splitlines()[0].split()[-2:] == ["512", "1K"]
    assert exposure.splitlines()[2].split()[3:] == ["10.00", "20.00", "30.00", "40.00"]
    assert weighting.splitlines()[-1].split()[:6] == ["64", "concat", "6:24:0.5", "16", "0.15", "0.5"]
    assert weighting.splitlines()[2].split()[6:8] == ["70.00%", "72.85%"]
    for table in (packs, exposure, weighting):
        assert len({len(line) for line in table.splitlines()}) == 1


def test_figure(tmp_path: Path) -> None:
    mixes = [[1.0, 2.0], [3.0, 1.0], [1.0, 1.0]]
    many = [pack(r, p, m) for r in (64, 128, 256) for p in ("best-fit", "concat") for m in mixes]
    paths = [tmp_path / name for name in ("a.png", "b.png")]
    for path in paths:
        plot_forecast(path, forecast_cells(many, **{**ONE, "alphas": [0.15, 0.3]}))
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    plot_forecast(paths[1], forecast_cells([pack(64)], **ONE))
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_axes_of_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares begin at 0 in every panel, no line leaves its panel, and every bucket is named."""
    figures: list[Any] = []
    monkeypatch.setattr(pack_tables, "save_figure", lambda figure, path: figures.append(figure))
    last = {**pack(2048, "best-fit"), "counts": [1] * 8 + [500]}  # the highest share in the last panel
    plot_forecast(tmp_path / "a.png", forecast_cells([*PACKS[:3], last], **ONE))
    (figure,) = figures
    axes = figure.get_axes()
    assert len(axes) == 4
    for axis in axes:
        bottom, top = axis.get_ylim()
        assert bottom == 0
        assert max(max(line.get_ydata()) for line in axis.get_lines()) <= top
    for axis in axes[:2]:
        names = [label.get_text() for label in axis.get_xticklabels()]
        assert names == ["0", "8", "16", "32", "64", "128", "256", "512", "1K"]


def test_too_many_series_for_a_figure(tmp_path: Path) -> None:
    packs = [pack(64, "concat", [1, weight]) for weight in range(1, MAX_SERIES + 2)]
    with pytest.raises(ValueError, match="too many for one figure"):
        plot_forecast(tmp_path / "a.png", forecast_cells(packs, **ONE))
