"""The demo from text to report, one function a step, in the order in which they run."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_exact.data.manifest import read_manifest
from megatron_exact.demo.settings import DemoSettings
from megatron_exact.demo.steps import (
    EXPOSURE_FIGURE,
    Demo,
    corpus_step,
    describe_corpus,
    exposure_step,
    pack_step,
    read_summary,
    require_held_out,
    say,
    tokenizer_step,
    tokens_step,
    training_step,
)
from megatron_exact.demo.workspace import Step, Workspace
from megatron_exact.json_input import read_json_object
from megatron_exact.report.results import read_run
from megatron_exact.report.training_pair import PairedReport, write_paired_report

ARMS = {"standard": "none", "exact": "exact"}


def run_demo(output: Path, *, text: Path | None, settings: DemoSettings) -> Path:
    """Run all steps that are not done yet and write the report.

    Args:
        output: folder of the report.
        text: a file or a folder of text files; None takes the standard library's sources.
        settings: sizes.

    Returns:
        Path of the report.

    Raises:
        ValueError: text that is missing or too little, or a step that failed.
    """
    started = time.monotonic()
    output = output.expanduser().resolve()
    text = None if text is None else text.expanduser()
    say(f"{settings.takes} on two quiet cores; {output / 'report.md'} at the end")
    workspace = Workspace(output / "work", say)
    demo = Demo(output=output, text=text, settings=settings, workspace=workspace)
    with workspace.held():
        remove_old_report(output)
        corpus = corpus_step(demo)
        tokenizer = tokenizer_step(demo, corpus)
        tokens = tokens_step(demo, corpus, tokenizer)
        short = pack_step(demo, "pack_short", tokens, tokenizer, settings.short)
        long = pack_step(demo, "pack_long", tokens, tokenizer, settings.long)
        require_held_out(short.folder / "pack", long.folder / "pack")
        exposure = exposure_step(demo, long)
        base = training_step(demo, "base", short, settings.short, rule="none", base=None)
        arms = {
            arm: training_step(demo, arm, long, settings.long, rule=rule, base=base)
            for arm, rule in ARMS.items()
        }
        report = report_step(demo, corpus=corpus, long=long, exposure=exposure, base=base, arms=arms)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    say(f"\n{report.read_text(encoding='utf-8')}")
    say(f"The report is {report} ({minutes} min {seconds} s); its figures lie beside it.")
    return report


def remove_old_report(output: Path) -> None:
    """An interrupted demo must not leave the report of an earlier one as if it were its own."""
    for path in (output / "report.md", *output.glob("*.png")):
        path.unlink(missing_ok=True)


def report_step(
    demo: Demo, *, corpus: Step, long: Step, exposure: Step, base: Step, arms: dict[str, Step]
) -> Path:
    """Write the report from the result files."""
    say("\n== Report")
    settings = demo.settings
    manifest = read_manifest(long.folder / "pack")
    table = read_json_object(exposure.folder / "exposure.json", "remove the demo's folder")
    figure = (exposure.folder / EXPOSURE_FIGURE).read_bytes()
    (demo.output / EXPOSURE_FIGURE).write_bytes(figure)
    train_split = manifest.splits["train"]
    seen = settings.long.iterations * settings.long.rows_per_iteration
    return write_paired_report(
        demo.output,
        PairedReport(
            title="Standard continued pretraining against EXACT, one pair of runs",
            introduction=(
                f"A Llama-style model of {settings.layers} layers and width {settings.hidden} was trained "
                f"from scratch on rows of {settings.short.row_tokens:,} tokens, then continued on rows of "
                f"{settings.long.row_tokens:,} tokens twice from that one checkpoint: once with all token "
                "weights 1 (standard), once with EXACT weights. Everything else is the same. Two processes "
                "of one machine, tensor parallel, NVIDIA's `megatron.training.pretrain`."
            ),
            base=read_run(base.folder / "run"),
            baseline=read_run(arms["standard"].folder / "run"),
            treatment=read_run(arms["exact"].folder / "run"),
            exposure=table,
            exposure_figure=EXPOSURE_FIGURE,
            facts=[
                ("text", describe_corpus(read_summary(corpus))),
                ("tokens", f"{train_split.tokens:,} for training, in {train_split.rows:,} rows"),
                ("rows trained on", f"{seen:,} an arm, {seen / train_split.rows:.2f} epochs"),
            ],
            seconds=demo.timings,
            commands=demo.commands,
        ),
    )
