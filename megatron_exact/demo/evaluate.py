"""The evaluation demo in the order of its steps: from random weights to the report of the experiment."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from megatron_exact.demo.evaluate_settings import EvaluateSettings
from megatron_exact.demo.evaluate_steps import (
    ARMS,
    base_step,
    comparison_step,
    export_step,
    fine_tuning_step,
    inputs_step,
    pack_step,
    pretraining_step,
    records_step,
    report_step,
    results_step,
    tokens_step,
)
from megatron_exact.demo.evaluate_tools import EvaluateDemo
from megatron_exact.demo.steps import say
from megatron_exact.demo.workspace import Workspace
from megatron_exact.files import write_text

NOTE = """\
# What this is

Two arms of a model of random weights, trained for a few steps, tuned, exported, evaluated on every suite
with a few examples, probed and compared, by the same tools and commands as a real experiment. It shows that
they work together. The model knows nothing: the scores mean nothing.

`report.html` and `report.md` are the report; `comparison/` is what they were made from.
"""


def run_evaluate_demo(output: Path, settings: EvaluateSettings) -> Path:
    """Run all steps that are not done yet, and put the report into `output`.

    Args:
        output: folder; `work/` in it holds the steps.
        settings: sizes.

    Returns:
        Path of the report.

    Raises:
        ValueError: a step that failed.
    """
    started = time.monotonic()
    output = output.expanduser().resolve()
    say(f"About ten minutes on two quiet cores; {output / 'report.md'} at the end")
    demo = EvaluateDemo(settings=settings, workspace=Workspace(output / "work", say))
    with demo.workspace.held():
        for old in (*output.glob("report.*"), *output.glob("*.png")):
            old.unlink()
        inputs = inputs_step(demo)
        base = base_step(demo, inputs)
        pack = pack_step(demo, tokens_step(demo, inputs))
        pretraining = pretraining_step(demo, base, pack)
        tuned = fine_tuning_step(demo, pretraining, records_step(demo, inputs))
        models = export_step(demo, tuned)
        results = {arm: results_step(demo, arm, inputs, models) for arm in ARMS}
        comparison = comparison_step(demo, results)
        report = report_step(demo, comparison, pack)
        shutil.copytree(report.folder / "report", output, dirs_exist_ok=True)
        shutil.copytree(comparison.folder / "comparison", output / "comparison", dirs_exist_ok=True)
        write_text(output / "README.md", NOTE + steps_table(demo))
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    say(f"\nThe report is {output / 'report.md'} ({minutes} min {seconds} s); README.md says what it is.")
    return output / "report.md"


def steps_table(demo: EvaluateDemo) -> str:
    """Seconds of each step, and the commands."""
    lines = ["", "| step | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.0f} |" for name, seconds, _ in demo.timings]
    return "\n".join([*lines, "", "```bash", *demo.commands, "```", ""])
