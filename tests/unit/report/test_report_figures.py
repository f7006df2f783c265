"""Figures of lines and fields: told apart without colour, readable numbers, equal bytes for equal data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps, image
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from megatron_exact.report.figures import (
    COLOUR_MAP,
    DARK,
    LOOKS,
    Axis,
    Field,
    Line,
    Panel,
    _luminance,
    digits_for,
    figure_text,
    plot_fields,
    plot_lines,
    save_figure,
    signed_text,
)

AXIS = Axis(label="distance", places=[64, 128, 256], names=["64", "128", "256"])


def line(name: str, shift: float = 0.0) -> Line:
    values = [1.0 + shift, 2.0, float("nan")]
    return Line(name=name, at=AXIS.places, values=values, low=[0.5, 1.5, 0.0], high=[1.5, 2.5, 0.0])


def field(values: np.ndarray, texts: str = "") -> Field:
    rows, columns = values.shape
    names = [str(row) for row in range(rows)]
    return Field(
        title="standard", row_names=names, values=values, texts=[[texts] * columns] * rows, scale=1.0
    )


def draw_fields(path: Path, *fields: Field) -> np.ndarray:
    names = [str(column) for column in range(np.asarray(fields[0].values).shape[1])]
    plot_fields(
        path, fields, column_names=names, column_label="context", row_label="distance", colour_label="nats"
    )
    return np.asarray(image.imread(path))


def test_lines_are_drawn_and_equal_data_give_equal_bytes(tmp_path: Path) -> None:
    panels = [Panel(label="margin", lines=[line("a"), line("b", 0.5)], has_zero=True)]
    for name, chosen in (("a.png", panels), ("b.png", panels), ("c.png", panels[:1] * 2)):
        plot_lines(tmp_path / name, chosen, AXIS)
    first, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == again
    assert first != other
    assert image.imread(tmp_path / "c.png").shape[0] > image.imread(tmp_path / "a.png").shape[0]


def test_lines_differ_without_colour() -> None:
    looks = {(str(look["linestyle"]), look["marker"]) for look in LOOKS}
    assert len(looks) == len(LOOKS)
    assert len({look["marker"] for look in LOOKS}) == len(LOOKS)
    for look in LOOKS:
        assert 1.05 / (_luminance(to_rgb(look["color"])) + 0.05) >= 3, look  # WCAG, graphics on white


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["standard", "EXACT", "uniform"], 3),
        (["a", "b", "c", "d", "a name of forty characters, no less of it", "f"], 3),
        (  # the widest name of a column is not among the first three
            [
                "standard",
                *(
                    f"{rule}, alpha 1"
                    for rule in (
                        "EXACT",
                        "random same-mass",
                        "packed position",
                        "uniform tail",
                        "normalized EXACT",
                    )
                ),
            ],
            2,
        ),
        (["w" * 60, "w" * 59], 1),
    ],
)
def test_the_legend_lies_inside_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], columns: int
) -> None:
    drawn: list[Figure] = []

    def keep(figure: Figure, path: Path) -> None:
        save_figure(figure, path)
        drawn.append(figure)

    monkeypatch.setattr("megatron_exact.report.figures.save_figure", keep)
    plot_lines(tmp_path / "a.png", [Panel(label="", lines=list(map(line, names)))], AXIS)
    (figure,) = drawn
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    assert len({text.get_window_extent().x0 for text in legend.get_texts()}) == columns


def test_points_stand_aside_only_for_intervals_and_may_be_unjoined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(
        "megatron_exact.report.figures.save_figure", lambda figure, path: drawn.append(figure)
    )
    bare = [replace(line(name), low=None, high=None) for name in "ab"]
    apart = [replace(line(name), is_joined=False) for name in "ab"]
    plot_lines(tmp_path / "a.png", [Panel(label="", lines=lines) for lines in (bare, apart)], AXIS)
    upper, lower = ([plot.containers[number].lines[0] for number in (0, 1)] for plot in drawn[0].axes)
    assert [list(one.get_xdata()) for one in upper] == [[0, 1, 2]] * 2
    assert all(one < other for one, other in zip(lower[0].get_xdata(), lower[1].get_xdata(), strict=True))
    assert [one.get_linestyle() for one in lower] == ["None", "None"]
    assert upper[0].get_linestyle() == "-"


def test_more_lines_than_looks_are_refused(tmp_path: Path) -> None:
    lines = [line(str(number)) for number in range(len(LOOKS) + 1)]
    with pytest.raises(ValueError, match="at most 8 can be distinguished"):
        plot_lines(tmp_path / "a.png", [Panel(label="", lines=lines)], AXIS)
    assert list(tmp_path.iterdir()) == []


def test_numbers_in_cells_have_contrast_in_every_colour() -> None:
    contrasts = []
    for colour in colormaps[COLOUR_MAP](np.linspace(0, 1, 201)):
        luminance = _luminance(colour)
        contrasts.append(1.05 / (luminance + 0.05) if luminance < DARK else (luminance + 0.05) / 0.05)
    assert min(contrasts) >= 4.5


def test_luminance() -> None:
    assert _luminance((1, 1, 1)) == pytest.approx(1)
    assert _luminance((0, 0, 0)) == 0
    assert _luminance((1, 0, 0)) == pytest.approx(0.2126)


def test_what_was_not_run_is_hatched(tmp_path: Path) -> None:
    full = draw_fields(tmp_path / "full.png", field(np.zeros((2, 2))))
    gap = draw_fields(tmp_path / "gap.png", field(np.array([[0.0, 0.0], [0.0, np.nan]])))
    changed = np.argwhere(np.any(full != gap, axis=2))
    assert len(changed) > 1000
    assert changed[:, 0].min() > full.shape[0] * 0.4  # in the cell of row 1, column 1
    assert changed[:, 1].min() > full.shape[1] * 0.4


def test_a_step_and_two_scales_can_be_drawn(tmp_path: Path) -> None:
    plain = field(np.full((2, 3), 0.5), "+0.5")
    other = Field(**{**vars(plain), "steps": [1, None], "scale": 0.1})
    same = draw_fields(tmp_path / "a.png", plain, plain)
    assert not np.array_equal(same, draw_fields(tmp_path / "b.png", plain, other))


def test_maps_of_one_scale_share_a_bar_that_says_where_it_is_clipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(
        "megatron_exact.report.figures.save_figure", lambda figure, path: drawn.append(figure)
    )
    inside, beyond = (field(np.array([[0.5, value]]), "x") for value in (1.0, 1.3))
    small = replace(inside, scale=0.1)
    names = ["0", "1"]
    about = {"column_names": names, "column_label": "", "row_label": "", "colour_label": "nats"}
    for fields in ([inside, inside, small], [inside, beyond]):
        plot_fields(tmp_path / "a.png", fields, **about)
    bars = [[axis for axis in figure.axes if axis.get_label() == "<colorbar>"] for figure in drawn]
    assert [len(found) for found in bars] == [2, 1]
    assert [axis.get_ylabel() for axis in bars[0]] == ["nats\nscale: ±1", "nats\nscale: ±0.1"]
    weights = [[text.get_fontweight() for text in axis.texts] for axis in drawn[1].axes[:2]]
    assert weights == [["normal", "normal"], ["normal", "bold"]]
    ends = [axis._colorbar.extend for found in bars for axis in found]
    assert ends == ["neither", "both", "both"]  # 0.5 and 1 lie beyond 0.1


def test_places_of_a_logarithmic_axis_stand_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(
        "megatron_exact.report.figures.save_figure", lambda figure, path: drawn.append(figure)
    )
    axis = Axis(label="", places=[64, 128, 1024], names=["64", "128", "1K"], is_log=True)
    one = Line(name="a", at=axis.places, values=[1.0, 2.0, 3.0])
    plot_lines(tmp_path / "a.png", [Panel(label="", lines=[one])], axis)
    (plot,) = drawn[0].axes
    assert list(plot.containers[0].lines[0].get_xdata()) == [6, 7, 10]
    assert list(plot.get_xticks()) == [6, 7, 10]
    assert plot.get_xlim() == (5.5, 10.5)


@pytest.mark.parametrize(
    ("scale", "digits"),
    [(131, 0), (30, 0), (29, 1), (3, 1), (2.9, 2), (0.3, 2), (0.09, 3), (0.01, 4), (1e-9, 4), (0, 0)],
)
def test_digits_follow_from_the_scale(scale: float, digits: int) -> None:
    assert digits_for(scale) == digits


def test_what_rounds_to_zero_has_no_sign() -> None:
    assert [signed_text(value, 2) for value in (-0.003, 0.0, 0.004, 0.005001, -0.02)] == [
        *["0.00"] * 3, "+0.01", "-0.02"
    ]  # fmt: skip


def test_names_from_files_stay_text(tmp_path: Path) -> None:
    assert figure_text("a\x1b\n$x$" + "y" * 99) == "a\ufffd \\$x\\$" + "y" * 51 + "..."
    named = Field(**{**vars(field(np.zeros((1, 1)))), "title": r"$\frac{$", "row_names": [r"$^$"]})
    draw_fields(tmp_path / "a.png", named)  # as mathematics neither could be drawn
    plot_lines(tmp_path / "b.png", [Panel(label="", lines=[line(r"$\frac{$")])], AXIS, title=r"$^$")
