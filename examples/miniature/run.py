"""Run the whole experiment (`make reproduce`), or one seed of it as a demo (`make demo`)."""

from __future__ import annotations

import json
import time
from pathlib import Path

from examples.miniature.experiment import (
    ENVIRONMENT,
    QUICK_DEMO,
    SHIPPED_BASE,
    MiniatureSettings,
    run_trials,
)
from examples.miniature.page import DEMO_FIGURES, write_demo_page
from examples.miniature.pipeline import Pipeline, output_of, say, shown, time_since, words_of
from examples.miniature.results import collect_results
from megatron_exact.files import write_json, write_text
from megatron_exact.json_input import parse_json_object


def run_miniature(
    output: Path, settings: MiniatureSettings, *, jobs: int, base: Path = SHIPPED_BASE
) -> Path:
    """Run what is not done yet, compare, write `results.json` and return its path.

    Args:
        output: folder of everything; `work/` in it contains the steps.
        settings: of the experiment.
        jobs: training runs at a time, each with one thread.
        base: Hugging Face folder of the base model.

    Raises:
        ValueError: a step failed.
    """
    clock, output = time.monotonic(), output.resolve()
    path = output / "results.json"
    pipeline = Pipeline(folder=output / "work", shows_commands=False, environment=ENVIRONMENT)
    say(f"All arms over five seeds: 40 minutes on two quiet cores; {path} at the end")
    with pipeline.held():
        experiment = run_trials(pipeline, settings, base, jobs)
        say("Comparing the arms")
        write_json(path, collect_results(experiment))
    say(f"{path} ({time_since(clock)})")
    return path


def run_demo(output: Path, settings: MiniatureSettings, *, jobs: int = 2) -> Path:
    """Run one seed, every command being printed, write `report.md` and `report.html`, return the former.

    It shows the machinery and how far runs of one seed move apart; what an effect is only several seeds can
    tell (docs/miniature.md).

    Args:
        output: folder of the report; `work/` in it contains the steps.
        settings: `DEMO` or `QUICK_DEMO`.
        jobs: runs at a time.

    Raises:
        ValueError: a step failed.
    """
    clock, output = time.monotonic(), output.expanduser().resolve()
    takes = "About a minute" if settings == QUICK_DEMO else "About three minutes"
    say(f"{takes} on two quiet cores; {output / 'report.md'} at the end")
    pipeline = Pipeline(folder=output / "work", environment=ENVIRONMENT)
    with pipeline.held():
        for name in ("report.md", "report.html", *DEMO_FIGURES):  # none may pass for that of this run
            (output / name).unlink(missing_ok=True)
        experiment = run_trials(pipeline, settings, SHIPPED_BASE, jobs)
        results = collect_results(experiment)
        write_json(output / "results.json", results)
        pack = experiment.trials[0].corpus.folder / "pack"
        figure = output / "exposure.png"
        inspect = words_of(
            "python tools/inspect_pack.py {pack} --plot {figure} --json", {"pack": pack, "figure": figure}
        )
        say(f"$ {shown(inspect)}")
        exposure = parse_json_object(output_of(inspect), "its output", "run it by hand")
        write_text(output / "exposure.json", json.dumps(exposure, indent=2))
        report, html = write_demo_page(
            output, results, exposure, experiment, is_quick=settings == QUICK_DEMO
        )
    say(f"The report is {report}, the same with figures inside is {html} ({time_since(clock)}).")
    return report
