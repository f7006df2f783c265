"""Figures of the miniature, from `results.json` alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_exact.miniature.readings import arms_of, far, hull, row_title
from megatron_exact.miniature.settings import FAR
from megatron_exact.report.figures import Axis, Line, Panel, plot_lines

Entry = dict[str, Any]
SHADE = f"shaded: {FAR[0]} tokens and more, beyond the base model's rows"


def legend_title(arm: Entry) -> str:
    """The title; EXACT at an alpha that is not the paper's is called exaggerated, controls have no room."""
    return row_title(arm) if arm["rule"] == "exact" else str(arm["title"])


def bars(measure: Entry) -> str:
    """What the bars of a figure are."""
    seeds = len(measure["pair_deltas"])
    if seeds < 2:
        return "bars: 95 % by the bootstrap over the questions, of one seed"
    return f"bars: 95 %, the wider of bootstrap and Student's t, {seeds} seeds"


def plot_distances(path: Path, arms: Sequence[Entry], *, measure: str, unit: str) -> None:
    """A measure by distance: standard and the arms above, the differences with intervals below."""
    places = [entry["distance"] for entry in arms[0]["probe"]["distances"]]

    def values(arm: Entry, name: str) -> list[float]:
        return [entry[measure][name] for entry in arm["probe"]["distances"]]

    def end(arm: Entry, which: int) -> list[float]:
        return [hull(entry[measure])[which] for entry in arm["probe"]["distances"]]

    upper = [Line(name="standard", at=places, values=values(arms[0], "baseline"))]
    upper += [Line(name=legend_title(arm), at=places, values=values(arm, "treatment")) for arm in arms]
    lower = [
        Line(
            name=legend_title(arm),
            at=places,
            values=values(arm, "delta"),
            low=end(arm, 0),
            high=end(arm, 1),
        )
        for arm in arms
    ]
    plot_lines(
        path,
        [
            Panel(label=f"{measure_name(measure)}\n({unit})", lines=upper),
            Panel(label=f"minus standard\n({unit})", lines=lower, has_zero=True),
        ],
        Axis(
            label="distance from the evidence to the answer (tokens)\n"
            + bars(arms[0]["probe"]["distances"][0][measure]),
            places=places,
            names=[str(place) for place in places],
            shaded_from=FAR[0],
            shaded_name=SHADE,
        ),
    )


def measure_name(measure: str) -> str:
    """In words."""
    return {"margin": "margin", "effect": "effect of the evidence", "correct": "right answers"}[measure]


def plot_doses(path: Path, results: Entry, designs: Sequence[str]) -> None:
    """Far margin and far accuracy against standard, by alpha, one kind of points a design."""
    panels = []
    alphas: set[float] = {0.0}
    for measure, unit in (("margin", "nats"), ("correct", "points")):
        lines = []
        for design in designs:
            doses = [arm for arm in arms_of(results, design).values() if arm["rule"] == "exact"]
            points = [far(arm)[measure] for arm in doses]
            at = [0.0, *(arm["alpha"] for arm in doses)]
            standard = far(doses[0])["correct"]["baseline"]
            alphas |= set(at)
            lines.append(
                Line(
                    name=f"{design} evidence: standard has {standard:.0f} % right",
                    at=at,
                    values=[0.0, *(point["delta"] for point in points)],
                    low=[0.0, *(hull(point)[0] for point in points)],
                    high=[0.0, *(hull(point)[1] for point in points)],
                    is_joined=False,
                )
            )
        panels.append(
            Panel(label=f"{measure_name(measure)}\nminus standard ({unit})", lines=lines, has_zero=True)
        )
    places = sorted(alphas)
    axis = Axis(
        label="alpha: mean extra weight of the tail (0: standard), not to scale\n" + bars(points[0]),
        places=places,
        names=[f"{place:g}" for place in places],
    )
    plot_lines(path, panels, axis, title=f"evidence {FAR[0]} to {FAR[1]} tokens away")


def plot_losses(path: Path, results: Entry, design: str, names: Sequence[str]) -> None:
    """Difference of the validation loss from standard by bucket, one line an arm."""
    exposure = results["designs"][design]["exposure"]
    places, seeds = list(range(len(exposure["labels"]))), results["settings"]["seeds"]
    lines = [Line(name="standard", at=places, values=[0.0] * len(places))]
    for name in names:
        arm = arms_of(results, design)[name]
        buckets = arm["losses"]["buckets"]
        has_intervals = all(bucket["interval"] for bucket in buckets)
        lines.append(
            Line(
                name=legend_title(arm),
                at=places,
                values=[1000 * bucket["delta"] for bucket in buckets],
                low=[1000 * bucket["interval"][0] for bucket in buckets] if has_intervals else None,
                high=[1000 * bucket["interval"][1] for bucket in buckets] if has_intervals else None,
            )
        )
    first_tail = next(place for place in places if exposure["lower"][place] >= exposure["tau"])
    axis = Axis(
        label="effective left context of the target (tokens)"
        + (f"\nbars: 95 % by Student's t over {seeds} seeds" if seeds > 1 else ""),
        places=places,
        names=exposure["labels"],
        shaded_from=first_tail,
        shaded_name="shaded: the tail",
    )
    label = "validation loss minus standard\n(thousandths of a nat a target)"
    plot_lines(path, [Panel(label=label, lines=lines, has_zero=True)], axis)
