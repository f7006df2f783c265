"""Entry points: the whole experiment, and the base model."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from megatron_exact.files import require_free_folder
from megatron_exact.miniature.base import train_base
from megatron_exact.miniature.chain import Chain, available_jobs
from megatron_exact.miniature.experiment import SHIPPED_BASE, open_workspace, run_trials
from megatron_exact.miniature.results import collect_results, write_results
from megatron_exact.miniature.settings import MiniatureSettings


def say(text: str) -> None:
    """Print one line at once."""
    print(text, flush=True)


def run_miniature(
    output: Path, settings: MiniatureSettings, *, jobs: int, base: Path = SHIPPED_BASE
) -> Path:
    """Run what is not done yet, compare, and write `results.json`.

    Args:
        output: folder of everything; `work/` in it holds the steps.
        settings: of the experiment.
        jobs: training runs at a time, each with one thread.
        base: Hugging Face folder of the base model.

    Returns:
        Path of the results.

    Raises:
        ValueError: a step that failed.
    """
    started = time.monotonic()
    output = output.resolve()
    workspace = open_workspace(output, say)
    chain = Chain(workspace=workspace, stop=threading.Event(), say=say)
    say(f"All arms over five seeds: 40 minutes on two quiet cores; {output / 'results.json'} at the end")
    with workspace.held():
        finished, begun = run_trials(chain, settings, base=base, jobs=available_jobs(jobs))
        say("Comparing the arms")
        results = collect_results(settings, finished, begun)
    path = write_results(output / "results.json", results)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    say(f"{path} ({minutes} min {seconds} s)")
    return path


def make_base(output: Path, work: Path) -> None:
    """Train the base model and write its Hugging Face folder.

    Raises:
        ValueError: the output exists, or a step failed.
    """
    require_free_folder(output)
    workspace = open_workspace(work.resolve(), say)
    with workspace.held():
        train_base(Chain(workspace=workspace, stop=threading.Event(), say=say), output.resolve())
    say(f"{output}: made")
