"""The pages: `docs/miniature.md` of the whole experiment and the report of the demo, with their figures.

Both are written from results alone, and their words follow the intervals, whatever came out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from examples.miniature.experiment import (
    CONTROLS,
    DISTANT,
    DOSES,
    EXAGGERATED_ALPHA,
    FAR,
    FULL,
    LONGER,
    NEAR,
    NEARBY,
    PAPER_ALPHA,
    RATES_TRIED,
    SHIPPED_BASE,
    Experiment,
    MiniatureSettings,
    base_hashes,
    exact_arm,
)
from examples.miniature.results import (
    DOUBT,
    Entry,
    arms_of,
    between_arms,
    direction,
    far,
    hull,
    marked,
    nearby,
    over_seeds,
    read_results_file,
    row_title,
    signed,
    thousandths,
    verdict,
    weighted_shares,
)
from megatron_exact.files import write_json, write_text
from megatron_exact.report.figures import Axis, Line, Panel, plot_lines
from megatron_exact.report.page import (
    Block,
    Bullets,
    Code,
    CodeBlock,
    Figure,
    Heading,
    Inline,
    Note,
    Page,
    Paragraph,
    Table,
    Text,
    markdown_page,
    write_page,
)

TEMPLATES = Path(__file__).parent
FIGURES = "miniature"
RESULTS = "results.json"
DEMO_FIGURES = ("exposure.png", "exposure-lengths.png", "margin.png", "accuracy.png", "losses.png")
EXAGGERATED = exact_arm(EXAGGERATED_ALPHA).name
DOSE_NAMES = [arm.name for arm in DOSES]
CONTROL_NAMES = [arm.name for arm in CONTROLS]
CHANCE = 6.0
"""Right answers (%) that are taken for chance, which is 3."""
AT_CHANCE = (
    " Far away that is chance: this training teaches no recall at these distances{lost}. At chance there "
    "is nothing left to lose, and a gain would have to be recall that the corpus does not teach. So a far "
    "margin or far answers that do not differ significantly from standard's do not show that weights are "
    "harmless or useless in such a corpus. The near margin and the losses are informative here."
)
QUICK = "This is the quick demo: a few steps, a smoke test. Its numbers mean nothing."
CAUTION = f'"{DOUBT}": not significant, the bootstrap or Student\'s t includes 0'
"""Below tables of differences."""
MEASURES = {"margin": 2, "effect": 2, "correct": 1}
"""Decimals of each in tables."""
RANGES = {"near": f"{NEARBY[0]} to {NEARBY[1]}", "far": f"{FAR[0]} to {FAR[1]}"}
MEASURE_NAMES = {"margin": "margin", "effect": "effect of the evidence", "correct": "right answers"}


def fill_in(template: Path, values: Mapping[str, Any]) -> list[Block]:
    """Return the blocks of a page written as Markdown, with blank lines between them.

    `## ` begins a heading, `* ` an item of a list, `> ` a note and three backticks code;
    `![what it shows](file)` is a figure; `| head |` a table, whose second line is a row for each entry of
    the list that it names; captions may follow both. Code stands in backticks. A name in braces is a value,
    or blocks where it stands alone; no value is read as markup.
    """

    def inline(text: str) -> Text:
        parts = " ".join(text.split()).split("`")
        words: list[Inline] = [part.format_map(values) for part in parts]
        words[1::2] = [Code(str(word)) for word in words[1::2]]
        return tuple(word for word in words if word)

    blocks: list[Block] = []
    for part in re.split(r"\n\s*\n", template.read_text(encoding="utf-8").strip()):
        if figure := re.fullmatch(r"!\[(.*?)\]\((.*?)\)(.*)", part, flags=re.DOTALL):
            alt, file, caption = figure.groups()
            blocks.append(Figure(file=file, alt=" ".join(alt.split()), caption=inline(caption) or ""))
        elif part.startswith("## "):
            blocks.append(Heading(text=inline(part[3:])))
        elif part.startswith("> "):
            blocks.append(Note(text=inline(part[2:])))
        elif part.startswith("* "):
            blocks.append(Bullets(items=[inline(item) for item in re.split(r"\n\* ", part[2:])]))
        elif part.startswith("| "):
            first, second, *caption = part.split("\n")
            name, _, second = second.removeprefix("| ").partition(": ")
            head, row = (line.strip("| ").split(" | ") for line in (first, second))
            body = [[cell.format_map({**values, **entry}) for cell in row] for entry in values[name]]
            blocks.append(Table(head=head, body=body, caption=inline(" ".join(caption)) or ""))
        elif part.startswith("```"):
            blocks.append(CodeBlock(text=part.strip("`\n")))
        elif re.fullmatch(r"\{\w+\}", part):
            blocks += values[part[1:-1]]
        else:
            blocks.append(Paragraph(text=inline(part)))
    return blocks


def write_miniature_page(results_path: Path, folder: Path) -> Path:
    """Write FOLDER/miniature.md, and into FOLDER/miniature its figures and a copy of the results.

    Raises:
        ValueError: results that the page cannot be written from.
    """
    results = read_results_file(results_path)
    _require(
        seeds=results["settings"]["seeds"],
        arms={design: set(arms_of(results, design)) for design in results["designs"]},
        training=results["settings"]["training"],
        base=results.get("base_sha256"),
    )
    figures = folder / FIGURES
    figures.mkdir(parents=True, exist_ok=True)
    draw_figures(results, figures)
    write_json(figures / RESULTS, results)
    write_text(folder / "miniature.md", page_text(results))
    return folder / "miniature.md"


def require_settings_of_page(settings: MiniatureSettings, base: Path) -> None:
    """Raise ValueError where no page could be written of the results of these settings and base model."""
    _require(
        seeds=settings.seeds,
        arms={design: {arm.name for arm in arms} for design, arms in settings.arms.items()},
        training=asdict(settings.long),
        base=base_hashes(base),
    )


def _require(*, seeds: int, arms: dict[str, set[str]], training: Entry, base: Entry | None) -> None:
    """Raise ValueError unless these are all that the page compares and tells."""
    wanted = {design: {arm.name for arm in others} for design, (_, *others) in FULL.arms.items()}
    missing = [design for design in wanted if design not in arms]
    missing += sorted(
        {name for design in wanted for name in wanted[design] - arms.get(design, wanted[design])}
    )
    if missing or seeds < 2:
        raise ValueError(
            f"the page needs every arm over several seeds; missing: {', '.join(missing) or 'seeds'}: run "
            "tools/run_miniature.py without --arms and --designs, with --seeds 2 or more"
        )
    chosen = asdict(FULL.long)
    changed = [f"{name} {found}" for name, found in training.items() if found != chosen.get(name)]
    if changed:
        raise ValueError(
            f"the page tells how its settings were chosen, but these were changed: {', '.join(changed)}; "
            "run tools/run_miniature.py without --learning-rate and --iterations"
        )
    if base != base_hashes(SHIPPED_BASE):
        raise ValueError(
            "the page tells of the base model examples/miniature/base, but these results are of another "
            "one: run tools/run_miniature.py without --base"
        )


def page_text(results: Entry) -> str:
    """Return the Markdown of the page."""
    settings, design = results["settings"], results["designs"][DISTANT]
    arms = arms_of(results, DISTANT)
    longer = far(arms[LONGER.name])["margin"]
    versions = [f"{name} {value}" for name, value in sorted(results["versions"].items()) if value]
    values = {
        **results,
        **RANGES,
        **_training(results),
        **_tables(arms),
        **_controls(arms),
        **_counter_case(results),
        **_exposure(design["exposure"], arms),
        "asked": design["questions"],
        "longest": settings["training"]["row_tokens"] - 1,
        "tau": design["exposure"]["tau"],
        "share": _training(results)["read"] / design["exposure"]["targets"],
        "alpha": PAPER_ALPHA,
        "doubt": DOUBT,
        "caution": CAUTION,
        "change": signed(longer),
        "verdict": verdict(longer),
        "longer": [Bullets(items=[_against(arms, name, LONGER.name) for name in DOSE_NAMES])],
        "rates": ", ".join(f"{rate:g}" for rate in RATES_TRIED),
        "model": settings["model"],
        "versions": ", ".join(versions),
        "minutes": results["seconds"]["seconds"] / 60,
    }
    blocks = fill_in(TEMPLATES / "page.md", values)
    return markdown_page(Page(title="The paper's experiment in miniature", blocks=blocks))


def _training(results: Entry) -> Entry:
    """What both pages say of the training and of the base model."""
    training = results["settings"]["training"]
    batch = training["rows_per_iteration"] * training["row_tokens"]
    reach = ", ".join(f"{entry['correct']:.0f} at {entry['distance']}" for entry in results["base"])
    return {"training": training, "batch": batch, "read": training["iterations"] * batch, "reach": reach}


def _cells(arm: Entry, show: Callable[[Entry, int], str]) -> dict[str, str]:
    """What tables show of an arm against standard; losses in thousandths of a nat."""
    shown = {
        **{f"far_{name}": (far(arm)[name], decimals) for name, decimals in MEASURES.items()},
        **{f"near_{name}": (nearby(arm)[name], decimals) for name, decimals in MEASURES.items()},
        **{f"loss_{part}": (thousandths(arm["losses"][part]), 1) for part in ("below", "tail", "all")},
    }
    return {"title": row_title(arm), **{name: show(*measure) for name, measure in shown.items()}}


def _tables(arms: dict[str, Entry]) -> Entry:
    """All arms of the main design against standard: together, by seed, by alpha, by distance, in losses."""
    standard, doses = far(next(iter(arms.values()))), [arms[name] for name in DOSE_NAMES]
    deltas = {row_title(arm): far(arm)["margin"]["pair_deltas"] for arm in arms.values()}
    seeds = [f"seed {number + 1}" for number in range(len(standard["margin"]["pair_deltas"]))]
    by_seed = Table(
        head=["arm", *seeds, "mean"],
        body=[
            [title, *(f"{delta:+.2f}" for delta in values), signed(over_seeds(values))]
            for title, values in deltas.items()
        ],
        caption="far margin minus standard (nats), seed by seed; mean [95 % interval, Student's t]",
    )
    by_alpha = [
        f"Alpha {arm['alpha']:g}: far margin {signed(far(arm)['margin'])}, {verdict(far(arm)['margin'])}; "
        f"far right answers {signed(far(arm)['correct'], 1)}, {verdict(far(arm)['correct'])}."
        for arm in doses
    ]
    places = [entry["distance"] for entry in doses[0]["probe"]["distances"]]
    margins = [[entry["margin"] for entry in arm["probe"]["distances"]] for arm in doses]
    by_distance = Table(
        head=["distance", "standard", *map(row_title, doses)],
        body=[
            [str(place), f"{row[0]['baseline']:.2f}", *map(marked, row)]
            for place, *row in zip(places, *margins, strict=True)
        ],
        caption=f"margin of standard, and differences from it [95 % interval] (nats); {CAUTION}",
    )
    return {
        "standard": standard,
        "arms": [_cells(arm, marked) for arm in arms.values()],
        "by_seed": [by_seed],
        "doses": [Bullets(items=by_alpha)],
        "by_distance": [by_distance],
    }


def _against(arms: dict[str, Entry], one: str, other: str) -> str:
    """The far margin of arm `other` minus that of arm `one`, and what may be said of it."""
    found = between_arms(far(arms[one])["margin"], far(arms[other])["margin"])
    words = {1: "above it", -1: "below it", 0: "not significant"}[direction(found)]
    return f"{arms[other]['title']} minus {arms[one]['title']}: {signed(found)}, {words}."


def _controls(arms: dict[str, Entry]) -> Entry:
    """The paper's controls at the exaggerated alpha."""
    ordered = sorted([EXAGGERATED, *CONTROL_NAMES], key=lambda name: -far(arms[name])["margin"]["delta"])
    order = [f"{arms[name]['title']} {signed(far(arms[name])['margin'])}" for name in ordered]
    exact, packed = (arms[name]["mean_weight"] for name in (EXAGGERATED, "packed-position"))
    return {
        "exact": exact,
        "packed": packed,
        "times": (packed - 1) / (exact - 1),
        "order": ", ".join(order),
        "controls": [Bullets(items=[_against(arms, EXAGGERATED, name) for name in CONTROL_NAMES])],
    }


def _counter_case(results: Entry) -> Entry:
    """The corpus in which long contexts need no distant evidence."""
    arms = arms_of(results, NEAR)
    first = next(iter(arms.values()))
    base = {entry["distance"]: entry for entry in results["base"]}
    before = float(
        np.mean([one["correct"] for place, one in base.items() if NEARBY[0] <= place <= NEARBY[1]])
    )
    lost = nearby(first)["correct"]["baseline"] < before
    chance = AT_CHANCE.format(lost=", and nearby it loses part of what the base model had" if lost else "")
    return {
        "counter_near": nearby(first),
        "counter_far": far(first),
        "before": before,
        "distances": [{**entry, "base": base[entry["distance"]]} for entry in first["probe"]["distances"]],
        "at_chance": chance if far(first)["correct"]["baseline"] <= CHANCE else "",
        "counter_arms": [_cells(arm, marked) for arm in arms.values()],
        "moved": _what_moved(arms),
    }


def _what_moved(arms: dict[str, Entry]) -> str:
    """The arms of the counter-case that differ significantly from standard, by measure."""
    measures: dict[str, Callable[[Entry], Entry]] = {
        "far margin": lambda arm: far(arm)["margin"],
        "far effect": lambda arm: far(arm)["effect"],
        "far right answers": lambda arm: far(arm)["correct"],
        "near margin": lambda arm: nearby(arm)["margin"],
        "validation loss": lambda arm: arm["losses"]["all"],
        "tail loss": lambda arm: arm["losses"]["tail"],
    }
    moved = [
        f"the {name} of {row_title(arm)} lies {'above' if direction(read(arm)) > 0 else 'below'} standard's"
        for name, read in measures.items()
        for arm in arms.values()
        if direction(read(arm))
    ]
    if not moved:
        return "No arm differs significantly from standard in any of these."
    return f"Significant: {'; '.join(moved)}. No other difference here is significant."


def _exposure(table: Entry, arms: dict[str, Entry]) -> Entry:
    """Shares by bucket before and after weighting."""
    doses = [arms[name] for name in DOSE_NAMES if arms[name]["weights"]]
    columns = [table["share"], *(weighted_shares(table["share"], arm["weights"]) for arm in doses)]
    tail = [row for row, lower in enumerate(table["lower"]) if lower >= table["tau"]]
    body = [
        [label, *(f"{column[row]:.1%}" for column in columns)] for row, label in enumerate(table["labels"])
    ]
    body.append(["tail", *(f"{sum(column[row] for row in tail):.1%}" for column in columns)])
    shares = Table(head=["effective context", "standard", *map(row_title, doses)], body=body)
    return {"targets": table["targets"], "shares": [shares]}


def write_demo_page(
    output: Path, results: Entry, exposure: Entry, experiment: Experiment, *, is_quick: bool
) -> tuple[Path, Path]:
    """Write `report.md`, `report.html` and the figures beside `exposure.png`; return the paths of both.

    Args:
        output: folder.
        results: of one seed of the main design.
        exposure: what `tools/inspect_pack.py --json` prints of its rows.
        experiment: the runs.
        is_quick: a smoke test, which the page says.
    """
    design = results["designs"][DISTANT]
    arms, labels = design["arms"], design["exposure"]["labels"]
    plot_distances(output / "margin.png", arms, measure="margin", unit="nats")
    plot_distances(output / "accuracy.png", arms, measure="correct", unit="points")
    plot_losses(output / "losses.png", results, DISTANT, [arm["name"] for arm in arms])
    rows = {label: [arm["losses"]["buckets"][row] for arm in arms] for row, label in enumerate(labels)}
    for label, part in {"below the tail": "below", "tail": "tail", "all": "all"}.items():
        rows[label] = [arm["losses"][part] for arm in arms]
    losses = Table(
        head=["effective context", "standard", *map(row_title, arms)],
        body=[
            [label, f"{row[0]['baseline']:.4f}", *(f"{loss['delta']:+.4f}" for loss in row)]
            for label, row in rows.items()
        ],
    )
    values = {
        **RANGES,
        **_training(results),
        **_demo_facts(results, experiment),
        "quick": [Note(text=QUICK)] if is_quick else [],
        "paper": "" if is_quick else f"EXACT weights at the paper's alpha of {PAPER_ALPHA}, and with ",
        "tau": exposure["tail"]["tau"],
        "standard": far(arms[0]),
        "buckets": exposure["buckets"],
        "arms": [_cells(arm, signed) for arm in arms],
        "losses": [losses],
    }
    title = "Standard continued pretraining against EXACT, one seed of the miniature"
    return write_page(output, Page(title=title, blocks=fill_in(TEMPLATES / "demo.md", values)))


def _demo_facts(results: Entry, experiment: Experiment) -> Entry:
    """Pairing, machine, times and commands."""
    finished, machine = experiment.trials, results["machine"]
    pairs = {str(arm["probe"]["pairing"]["statement"]) for arm in results["designs"][DISTANT]["arms"]}
    facts = [
        f"Pairing: {'; '.join(sorted(pairs))}",
        f"Machine: {machine['cores']} cores of {machine['cpu']}; commit {results['git_commit']}",
        *(f"{done.trial.arm.title}: {done.step.seconds:.0f} s with export and probe" for done in finished),
    ]
    steps = [experiment.started, finished[0].corpus, *(done.step for done in finished)]
    lines = [line for step in steps for line in step.commands]
    return {"facts": [Bullets(items=facts)], "commands": [CodeBlock(text="\n".join(lines))]}


def draw_figures(results: Entry, folder: Path) -> None:
    """Draw every figure of `docs/miniature.md`."""
    arms = arms_of(results, DISTANT)
    doses = [arms[name] for name in DOSE_NAMES]
    controls = [arms[name] for name in (EXAGGERATED, *CONTROL_NAMES)]
    plot_doses(folder / "doses.png", results, [DISTANT, NEAR])
    plot_distances(folder / "margin.png", doses, measure="margin", unit="nats")
    plot_distances(folder / "accuracy.png", doses, measure="correct", unit="points")
    plot_distances(folder / "controls.png", controls, measure="margin", unit="nats")
    plot_losses(folder / "losses.png", results, DISTANT, [*DOSE_NAMES, "random-same-mass", "uniform-tail"])


def _legend_title(arm: Entry) -> str:
    """The title; EXACT at an alpha that is not the paper's is called exaggerated, controls have no room."""
    return row_title(arm) if arm["rule"] == "exact" else str(arm["title"])


def _bars(measure: Entry) -> str:
    """What the bars of a figure are."""
    seeds = len(measure["pair_deltas"])
    if seeds < 2:
        return "bars: 95 % by the bootstrap over the questions, of one seed"
    return f"bars: 95 %, the wider of bootstrap and Student's t, {seeds} seeds"


def plot_distances(path: Path, arms: Sequence[Entry], *, measure: str, unit: str) -> None:
    """Plot a measure by distance: standard and the arms above, the differences with intervals below."""
    found = [[entry[measure] for entry in arm["probe"]["distances"]] for arm in arms]
    places = [entry["distance"] for entry in arms[0]["probe"]["distances"]]
    upper = [Line(name="standard", at=places, values=[entry["baseline"] for entry in found[0]])]
    lower = []
    for arm, entries in zip(arms, found, strict=True):
        name = _legend_title(arm)
        upper.append(Line(name=name, at=places, values=[entry["treatment"] for entry in entries]))
        low, high = zip(*map(hull, entries), strict=True)
        deltas = [entry["delta"] for entry in entries]
        lower.append(Line(name=name, at=places, values=deltas, low=low, high=high))
    axis = Axis(
        label=f"distance from the evidence to the answer (tokens)\n{_bars(found[0][0])}",
        places=places,
        names=list(map(str, places)),
        shaded_from=FAR[0],
        shaded_name=f"shaded: {FAR[0]} tokens and more, beyond the base model's rows",
    )
    panels = [
        Panel(label=f"{MEASURE_NAMES[measure]}\n({unit})", lines=upper),
        Panel(label=f"minus standard\n({unit})", lines=lower, has_zero=True),
    ]
    plot_lines(path, panels, axis)


def plot_doses(path: Path, results: Entry, designs: Sequence[str]) -> None:
    """Plot far margin and far answers against standard by alpha, one kind of points a design."""
    panels = []
    alphas: set[float] = set()
    for measure, unit in (("margin", "nats"), ("correct", "points")):
        lines = []
        for design in designs:
            doses = [arm for arm in arms_of(results, design).values() if arm["rule"] == "exact"]
            points = [far(arm)[measure] for arm in doses]
            low, high = zip((0.0, 0.0), *map(hull, points), strict=True)
            at = [0.0, *(arm["alpha"] for arm in doses)]
            alphas.update(at)
            standard = far(doses[0])["correct"]["baseline"]
            lines.append(
                Line(
                    name=f"{design} evidence: standard has {standard:.0f} % right",
                    at=at,
                    values=[0.0, *(point["delta"] for point in points)],
                    low=low,
                    high=high,
                    is_joined=False,
                )
            )
        label = f"{MEASURE_NAMES[measure]}\nminus standard ({unit})"
        panels.append(Panel(label=label, lines=lines, has_zero=True))
    places = sorted(alphas)
    axis = Axis(
        label=f"alpha: mean extra weight of the tail (0: standard), not to scale\n{_bars(points[0])}",
        places=places,
        names=[f"{place:g}" for place in places],
    )
    plot_lines(path, panels, axis, title=f"evidence {RANGES['far']} tokens away")


def plot_losses(path: Path, results: Entry, design: str, names: Sequence[str]) -> None:
    """Plot the difference of the validation loss from standard by bucket, one line an arm."""
    exposure = results["designs"][design]["exposure"]
    places, seeds = list(range(len(exposure["labels"]))), results["settings"]["seeds"]
    lines = [Line(name="standard", at=places, values=[0.0] * len(places))]
    for name in names:
        arm = arms_of(results, design)[name]
        losses = [thousandths(bucket) for bucket in arm["losses"]["buckets"]]
        intervals = [loss["interval"] for loss in losses]
        low, high = zip(*intervals, strict=True) if all(intervals) else (None, None)
        deltas = [loss["delta"] for loss in losses]
        lines.append(Line(name=_legend_title(arm), at=places, values=deltas, low=low, high=high))
    axis = Axis(
        label="effective left context of the target (tokens)"
        + (f"\nbars: 95 % by Student's t over {seeds} seeds" if seeds > 1 else ""),
        places=places,
        names=exposure["labels"],
        shaded_from=next(place for place in places if exposure["lower"][place] >= exposure["tau"]),
        shaded_name="shaded: the tail",
    )
    label = "validation loss minus standard\n(thousandths of a nat a target)"
    plot_lines(path, [Panel(label=label, lines=lines, has_zero=True)], axis)
