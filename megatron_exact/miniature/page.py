"""`docs/miniature.md`: the experiment told from `results.json`, whatever came out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_exact.files import write_json, write_text
from megatron_exact.miniature import method_sections as method
from megatron_exact.miniature import outcome_sections as outcomes
from megatron_exact.miniature.counter_case import counter_case
from megatron_exact.miniature.experiment import SHIPPED_BASE, base_hashes
from megatron_exact.miniature.figures import plot_distances, plot_doses, plot_losses
from megatron_exact.miniature.readings import arms_of
from megatron_exact.miniature.results import read_results_file
from megatron_exact.miniature.settings import DISTANT, FULL, LONGER, NEAR, MiniatureSettings
from megatron_exact.report.page import Block, Page, markdown_page

Entry = dict[str, Any]
FIGURES = "miniature"
RESULTS = "results.json"
TITLE = "The paper's experiment in miniature"


def write_miniature_page(results_path: Path, folder: Path) -> Path:
    """Write FOLDER/miniature.md, and into FOLDER/miniature its figures and a copy of the results.

    Args:
        results_path: `results.json` of tools/run_miniature.py, with all arms of both designs.
        folder: made if it is missing.

    Returns:
        Path of the page.

    Raises:
        ValueError: results that the page cannot be written from.
    """
    results = read_results_file(results_path)
    require_whole(results)
    figures = folder / FIGURES
    figures.mkdir(parents=True, exist_ok=True)
    draw_figures(results, figures)
    write_json(figures / RESULTS, results)
    write_text(folder / "miniature.md", page_text(results))
    return folder / "miniature.md"


def page_text(results: Entry) -> str:
    """The Markdown of the page."""
    return markdown_page(Page(title=TITLE, blocks=blocks(results)))


def require_whole(results: Entry) -> None:
    """Raise ValueError unless these results are of all that the page compares and tells."""
    _require(
        seeds=results["settings"]["seeds"],
        arms={design: set(arms_of(results, design)) for design in results["designs"]},
        training=results["settings"]["training"],
        base=results.get("base_sha256"),
    )


def require_settings_of_page(settings: MiniatureSettings, base: Path) -> None:
    """Raise ValueError where the results of an experiment would be refused, before it is run.

    Args:
        settings: of the experiment.
        base: its base model.
    """
    _require(
        seeds=settings.seeds,
        arms={design: {arm.name for arm in arms} for design, arms in settings.arms.items()},
        training=asdict(settings.long),
        base=base_hashes(base),
    )


def _require(*, seeds: int, arms: dict[str, set[str]], training: Entry, base: Entry | None) -> None:
    wanted = {
        DISTANT: {*outcomes.dose_names(), *outcomes.control_names(), LONGER.name},
        NEAR: {arm.name for arm in FULL.arms[NEAR][1:]},
    }
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
        *counter_case(results),
        *method.exposure(results),
        *method.limits(results),
        *method.reproduction(results),
    ]
