"""`docs/miniature.md`: the experiment told from `results.json`, whatever came out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_exact.files import write_json, write_text
from megatron_exact.miniature import method_sections as method
from megatron_exact.miniature import outcome_sections as outcomes
from megatron_exact.miniature.figures import plot_distances, plot_doses, plot_losses
from megatron_exact.miniature.readings import arms_of
from megatron_exact.miniature.results import read_results_file
from megatron_exact.miniature.settings import DISTANT, FULL, LONGER, NEAR
from megatron_exact.report.markdown import markdown_page
from megatron_exact.report.page import Block, Page

Entry = dict[str, Any]
FIGURES = "miniature"
RESULTS = "results.json"
TITLE = "The paper's experiment in miniature"


def write_miniature_page(results_path: Path, folder: Path) -> Path:
    """Write FOLDER/miniature.md, and into FOLDER/miniature its figures and a copy of the results.

    Args:
        results_path: `results.json` of tools/run_miniature.py, with all arms of both designs.
        folder: exists.

    Returns:
        Path of the page.

    Raises:
        ValueError: results without an arm that the page needs.
    """
    results = read_results_file(results_path)
    require_whole(results)
    figures = folder / FIGURES
    figures.mkdir(exist_ok=True)
    draw_figures(results, figures)
    write_json(figures / RESULTS, results)
    write_text(folder / "miniature.md", page_text(results))
    return folder / "miniature.md"


def page_text(results: Entry) -> str:
    """The Markdown of the page."""
    return markdown_page(Page(title=TITLE, blocks=blocks(results)))


def require_whole(results: Entry) -> None:
    """Raise ValueError unless the arms that the page compares are there, over several seeds."""
    found = results["designs"]
    missing = [name for name in (DISTANT, NEAR) if name not in found]
    wanted = {*outcomes.dose_names(), *outcomes.control_names(), LONGER.name}
    missing += sorted(wanted - set(arms_of(results, DISTANT))) if DISTANT in found else []
    if missing or results["settings"]["seeds"] < 2:
        raise ValueError(
            f"the page needs every arm over several seeds; missing: {', '.join(missing) or 'seeds'}: run "
            "tools/run_miniature.py without --arms and --designs"
        )
    chosen = asdict(FULL.long)
    changed = [
        f"{name} {found}"
        for name, found in results["settings"]["training"].items()
        if found != chosen[name]
    ]
    if changed:
        raise ValueError(
            f"the page tells how its settings were chosen, but these were changed: {', '.join(changed)}; "
            "run tools/run_miniature.py without --learning-rate and --iterations"
        )


def draw_figures(results: Entry, folder: Path) -> None:
    """Every figure of the page."""
    arms = arms_of(results, DISTANT)
    doses = [arms[name] for name in outcomes.dose_names()]
    controls = [arms[name] for name in (outcomes.EXAGGERATED, *outcomes.control_names())]
    plot_doses(folder / "doses.png", results, [DISTANT, NEAR])
    plot_distances(folder / "margin.png", doses, measure="margin", unit="nats")
    plot_distances(folder / "accuracy.png", doses, measure="correct", unit="points")
    plot_distances(folder / "controls.png", controls, measure="margin", unit="nats")
    plot_losses(
        folder / "losses.png",
        results,
        DISTANT,
        [*outcomes.dose_names(), "random-same-mass", "uniform-tail"],
    )


def blocks(results: Entry) -> list[Block]:
    """The page from top to bottom."""
    return [
        *method.introduction(results),
        *outcomes.outcome(results),
        *outcomes.doses(results, FIGURES),
        *outcomes.distances(results, FIGURES),
        *outcomes.controls(results, FIGURES),
        *outcomes.costs(results, FIGURES),
        *outcomes.longer_training(results),
        *outcomes.counter_case(results),
        *method.exposure(results),
        *method.limits(results),
        *method.reproduction(results),
    ]
