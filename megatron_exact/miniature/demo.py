"""`make demo`: one seed of the miniature, standard against EXACT, from the shipped base model to a page.

Every command is printed. It shows the machinery and how far three runs of one seed move apart; what an
effect is only several seeds can tell (docs/miniature.md).
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_exact.demo.steps import shown
from megatron_exact.files import write_text
from megatron_exact.json_input import parse_json_object
from megatron_exact.miniature.chain import Chain, available_jobs, tool
from megatron_exact.miniature.demo_page import demo_page
from megatron_exact.miniature.experiment import SHIPPED_BASE, FinishedTrial, open_workspace, run_trials
from megatron_exact.miniature.figures import plot_distances, plot_losses
from megatron_exact.miniature.readings import arms_of
from megatron_exact.miniature.results import collect_results, write_results
from megatron_exact.miniature.run import say
from megatron_exact.miniature.settings import (
    DISTANT,
    EXAGGERATED_ALPHA,
    FULL,
    PAPER_ALPHA,
    STANDARD,
    MiniatureSettings,
    exact_arm,
)
from megatron_exact.report.page import write_page

DEMO = replace(
    FULL, seeds=1, arms={DISTANT: (STANDARD, exact_arm(PAPER_ALPHA), exact_arm(EXAGGERATED_ALPHA))}
)
QUICK_DEMO = replace(
    DEMO,
    arms={DISTANT: (STANDARD, exact_arm(EXAGGERATED_ALPHA))},  # on two cores both train at the same time
    long=replace(DEMO.long.of_length(12), evaluation_batches=4),
    corpus_tokens=120_000,
    distances=(16, 64, 96, 192, 384),
    items_per_distance=8,
    resamples=1_000,
)
FULL_TIME = "About three minutes"
QUICK_TIME = "About a minute"
FIGURES = ("exposure.png", "exposure-lengths.png", "margin.png", "accuracy.png", "losses.png")


def run_demo(output: Path, settings: MiniatureSettings, *, jobs: int = 2) -> Path:
    """Run what is not done yet and write `report.md`, `report.html` and their figures.

    Args:
        output: folder of the report; `work/` in it holds the steps.
        settings: `DEMO` or `QUICK_DEMO`.
        jobs: runs at a time.

    Returns:
        Path of the report.

    Raises:
        ValueError: a step that failed.
    """
    started = time.monotonic()
    output = output.expanduser().resolve()
    takes = QUICK_TIME if settings == QUICK_DEMO else FULL_TIME
    say(f"{takes} on two quiet cores; {output / 'report.md'} at the end")
    workspace = open_workspace(output, say)
    chain = Chain(workspace=workspace, stop=threading.Event(), say=say, shows_commands=True)
    with workspace.held():
        for name in ("report.md", "report.html", *FIGURES):  # an old report must not pass for a new one
            (output / name).unlink(missing_ok=True)
        finished, begun = run_trials(chain, settings, base=SHIPPED_BASE, jobs=available_jobs(jobs))
        results = collect_results(settings, finished, begun)
        write_results(output / "results.json", results)
        exposure = draw_exposure(finished[0], output / "exposure.png")
        arms = list(arms_of(results, DISTANT).values())
        plot_distances(output / "margin.png", arms, measure="margin", unit="nats")
        plot_distances(output / "accuracy.png", arms, measure="correct", unit="points")
        plot_losses(output / "losses.png", results, DISTANT, [arm["name"] for arm in arms])
        page = demo_page(results, exposure, finished, begun, is_quick=settings == QUICK_DEMO)
        report, html = write_page(output, page)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    say(f"The report is {report}, the same with figures inside is {html} ({minutes} min {seconds} s).")
    return report


def draw_exposure(done: FinishedTrial, figure: Path) -> dict[str, Any]:
    """The figure of tools/inspect_pack.py at the paper's alpha, and its numbers."""
    command = tool("inspect_pack", done.pack, "--plot", figure, "--json")
    say(f"$ {shown(command)}")
    table: dict[str, Any] = parse_json_object(
        subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout,
        "the output of inspect_pack.py",
        "run it by hand",
    )
    write_text(figure.with_suffix(".json"), json.dumps(table, indent=2))
    return table
