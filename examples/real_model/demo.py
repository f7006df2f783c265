"""`make demo-real`: both arms of the paper on a trained model and real text, from import to one report.

The model is SmolLM2-135M-Instruct (`make real-model`), the text that of this machine or of a folder. Every
step is a tool of this checkout. Ten steps of two rows show that the chain works on a real model and what
its pages look like. They are far too few to show an effect of the weights, and the report says so.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from examples.demo_text import SEED, corpus_step, documents_of, exposure_step, read_summary
from examples.miniature.pipeline import (
    CONVERSION_CODE,
    DATA_CODE,
    EVALUATION_CODE,
    PROBE_CODE,
    TRAINING_CODE,
    Pipeline,
    StageSettings,
    Step,
    say,
    time_since,
    unless_set,
)
from examples.real_model.make import DEFAULT_OUTPUT, RECORD, is_made
from megatron_exact.command_line import command_parser, run_tool
from megatron_exact.data.manifest import read_manifest
from megatron_exact.files import write_json
from megatron_exact.json_input import parse_corpus_line, read_json_object
from megatron_exact.report.results import read_run
from megatron_exact.report.training_pair import PairedReport, write_paired_report

ARMS = {"standard": "none", "exact": "exact"}
"""Name of each arm and its token weighting."""
BASE = "base"
"""The imported model, whose text is shown beside that of the arms."""
PROCESSES = 2
"""Data-parallel: each process has the whole model and a row of its own."""
SHOWN_DOCUMENTS = 2
PROMPT_TOKENS, GENERATED_TOKENS = 96, 48
EXPOSURE_FIGURE = "exposure.png"
STEPS = 9
REMEDY = "remove the demo's folder"


@dataclass(frozen=True, kw_only=True)
class RealSettings:
    """Sizes of the demo."""

    takes: str
    """For people: how long all steps take on two quiet cores."""
    stage: StageSettings
    """Continued pretraining, run once an arm."""
    validation_fraction: float
    """Share of the documents that is held out."""
    distances: str
    """Of the evidence probe, in tokens."""
    items: int
    """Of the evidence probe, a kind and distance."""
    tasks: str
    """Of RULER."""
    lengths: str
    """Windows of RULER."""
    samples: int
    """Of RULER, a task and window."""


FULL = RealSettings(
    takes="About 25 minutes",
    stage=StageSettings(
        row_tokens=2048,
        rows_per_iteration=2,
        rows_per_micro_batch=1,
        iterations=10,
        warmup_iterations=2,
        learning_rate=2e-5,
        evaluation_batches=4,
        evaluations=2,
    ),
    validation_fraction=0.02,
    distances="64,256,1K",
    items=12,
    tasks="niah_single_1,vt",
    lengths="1K",
    samples=4,
)
QUICK = replace(
    FULL,
    takes="About ten minutes",
    stage=replace(FULL.stage.of_length(2), row_tokens=512, evaluation_batches=1, evaluations=1),
    distances="64",
    items=2,
    tasks="niah_single_1",
    samples=1,
)

EXAMPLES = """examples:
  %(prog)s --output demo-real
  %(prog)s --output demo-real --text ~/my_texts     # a folder of texts, or one file
  %(prog)s --output demo-real --quick               # the same steps, as small as they can be
"""


def run_demo(output: Path, *, model: Path, text: Path | None, settings: RealSettings) -> Path:
    """Run all steps that are not done yet, write the report and return its path.

    Args:
        output: folder of the report; `work/` in it contains the steps.
        model: Hugging Face folder of `make real-model`.
        text: a file or a folder of text files; None takes the standard library's sources.
        settings: sizes.

    Raises:
        ValueError: the model is missing, text is missing or too little, or a step failed.
    """
    if not is_made(model):
        raise ValueError(f"{model} is not the model of `make real-model`: run that first")
    clock, output = time.monotonic(), output.expanduser().resolve()
    say(f"{settings.takes} on two quiet cores; {output / 'report.md'} at the end")
    environment = unless_set(
        OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
    )
    pipeline = Pipeline(folder=output / "work", environment=environment)
    with pipeline.held():
        for path in (output / "report.md", *output.glob("*.png")):  # must not pass for those of this run
            path.unlink(missing_ok=True)
        corpus = corpus_step(pipeline, None if text is None else text.expanduser(), f"1/{STEPS}")
        content = experiment(pipeline, corpus, model, settings)
        say("\n== Report")
        for figure in (pipeline.folder / "exposure" / EXPOSURE_FIGURE, *comparison_figures(pipeline)):
            shutil.copyfile(figure, output / figure.name)
        report = write_paired_report(output, content)
    say(f"The report is {report} ({time_since(clock)}); its figures lie beside it.")
    return report


def experiment(pipeline: Pipeline, corpus: Step, model: Path, settings: RealSettings) -> PairedReport:
    """Run everything from the text to the comparison, and return what the report is made from."""
    identity = read_json_object(model / RECORD, "run make real-model again")
    tokens = pipeline.step(
        "tokens",
        "python tools/tokenize_corpus.py --input {corpus}/corpus.jsonl --tokenizer {model} "
        "--output-prefix {here}/corpus --workers 2",
        depends_on=identity,
        code=DATA_CODE,
        heading=f"2/{STEPS}  Tokenize with the model's tokenizer: tools/tokenize_corpus.py",
        log=None,
        values={"corpus": corpus, "model": model},
    )
    pack = pipeline.step(
        "pack",
        "python tools/pack_corpus.py --source {tokens}/corpus --row-tokens {row_tokens} --policy concat "
        f"--seed {SEED} --validation-fraction {settings.validation_fraction} --output {{here}}/pack",
        code=DATA_CODE,
        heading=f"3/{STEPS}  Pack rows of {settings.stage.row_tokens:,} tokens: tools/pack_corpus.py",
        log=None,
        values={"tokens": tokens, "row_tokens": settings.stage.row_tokens},
    )
    exposure = exposure_step(pipeline, pack, f"4/{STEPS}")
    base = pipeline.step(
        BASE,
        "python tools/import_hf.py --hf {model} --output {here}/checkpoint",
        "python tools/verify_checkpoint.py --checkpoint {here}/checkpoint --hf {model}",
        depends_on=identity,
        code=CONVERSION_CODE,
        heading=f"5/{STEPS}  Import the model and verify it: tools/import_hf.py, verify_checkpoint.py",
        shown_lines=2,
        values={"model": model},
    )
    arms = {arm: train(pipeline, arm, rule, settings, pack, base) for arm, rule in ARMS.items()}
    models = {arm: export(pipeline, arm, run) for arm, run in arms.items()}
    texts = generate(
        pipeline, corpus, pack, {BASE: model, **{arm: models[arm].folder / "hf" for arm in ARMS}}
    )
    results = {arm: evaluate(pipeline, arm, exported, settings) for arm, exported in models.items()}
    comparison = pipeline.step(
        "comparison",
        "python tools/compare_runs.py --baseline {standard}/results --treatment {exact}/results "
        "--output {here}/page",
        code=(*EVALUATION_CODE, "megatron_exact/report"),
        heading=f"9/{STEPS}  Compare: tools/compare_runs.py",
        shown_lines=1,
        values=results,
    )
    train_split = read_manifest(pack.folder / "pack").splits["train"]
    seen = settings.stage.iterations * settings.stage.rows_per_iteration
    steps = pipeline.finished
    return PairedReport(
        title="A trained model, continued in two arms: one pair of short runs",
        introduction=(
            "SmolLM2-135M-Instruct (Apache-2.0; its four-bit GGUF file, dequantized) was continued twice "
            f"from one checkpoint on rows of {settings.stage.row_tokens:,} tokens: once with all token "
            "weights 1 (standard), once with EXACT weights. Everything else is the same. "
            f"{settings.stage.iterations} steps of {settings.stage.rows_per_iteration} rows hardly move a "
            "trained model: this page shows what each step of the chain gives, not what EXACT does."
        ),
        base=None,
        baseline=read_run(arms["standard"].folder / "run"),
        treatment=read_run(arms["exact"].folder / "run"),
        exposure=read_json_object(exposure.folder / "exposure.json", REMEDY),
        exposure_figure=EXPOSURE_FIGURE,
        facts=[
            ("text", str(read_summary(corpus))),
            ("tokens", f"{train_split.tokens:,} for training, in {train_split.rows:,} rows"),
            ("rows trained on", f"{seen:,} an arm, {seen / train_split.rows:.2f} epochs"),
        ],
        seconds=[(s.name, f"{s.seconds:.1f}" + (" (earlier run)" if s.reused else "")) for s in steps],
        commands=[line for step in steps for line in step.commands],
        measurements=[texts_section(texts), comparison_section(comparison, settings)],
    )


def train(pipeline: Pipeline, arm: str, rule: str, settings: RealSettings, pack: Step, base: Step) -> Step:
    """Continue the pretraining of one arm, on two data-parallel processes."""
    stage = settings.stage
    rows = read_manifest(pack.folder / "pack").splits["validation"].rows
    return pipeline.step(
        arm,
        f"torchrun --standalone --nproc-per-node {PROCESSES} --max-restarts 0 --shutdown-timeout 5 "
        "-m megatron_exact.training.pretrain --pack {pack}/pack --token-weighting {rule} "
        "--pretrained-checkpoint {base}/checkpoint {schedule} --eval-iters {evaluations} "
        f"--weight-decay 0.1 --seed {SEED} "
        "--save {here}/run --load {here}/run --save-interval {iterations}",
        code=TRAINING_CODE,
        resumable=False,
        heading=f"6/{STEPS}  Train {arm}: rule {rule}, {stage.iterations} iterations",
        log="run/log.txt",
        iterations=stage.iterations,
        values={
            "pack": pack,
            "base": base,
            "rule": rule,
            "schedule": stage.schedule_flags(),
            "iterations": stage.iterations,
            "evaluations": min(stage.evaluation_batches, rows // stage.rows_per_iteration),
        },
    )


def export(pipeline: Pipeline, arm: str, run: Step) -> Step:
    """Export an arm as a Hugging Face folder."""
    return pipeline.step(
        f"export-{arm}",
        "python tools/export_hf.py --checkpoint {run}/run --output {here}/hf",
        code=CONVERSION_CODE,
        heading=f"7/{STEPS}  Export {arm}: tools/export_hf.py",
        values={"run": run},
    )


def evaluate(pipeline: Pipeline, arm: str, exported: Step, settings: RealSettings) -> Step:
    """Run the evidence probe and a few cells of RULER on one arm."""
    return pipeline.step(
        f"results-{arm}",
        "python tools/probe_evidence.py --model {exported}/hf --kinds answer-position "
        f"--distances {settings.distances} --items-per-cell {settings.items} --output {{here}}/results",
        "python tools/evaluate_model.py --model {exported}/hf --suite ruler --template model "
        f"--tasks {settings.tasks} --lengths {settings.lengths} --samples {settings.samples} "
        "--output {here}/results",
        code=(*EVALUATION_CODE, *PROBE_CODE),
        heading=f"8/{STEPS}  Measure {arm}: tools/probe_evidence.py, tools/evaluate_model.py",
        values={"exported": exported},
    )


def generate(pipeline: Pipeline, corpus: Step, pack: Step, models: dict[str, Path]) -> Step:
    """Let every model continue the beginning of a few documents that no arm was trained on."""
    held_out = sorted(documents_of(pack.folder / "pack", "validation"))

    def write_texts(here: Path) -> None:
        prompts = [text for text in texts_of(corpus, held_out) if len(text) > 8 * PROMPT_TOKENS]
        write_json(here / "texts.json", {"texts": continuations(models, prompts[:SHOWN_DOCUMENTS])})

    return pipeline.step(
        "texts",
        write_texts,
        depends_on=[pack.key, {name: str(folder) for name, folder in models.items()}],
        code=("examples/real_model/demo.py",),
        heading=f"7/{STEPS}  Text of the three models",
    )


def texts_of(corpus: Step, numbers: Sequence[int]) -> list[str]:
    """Return the texts of some documents of the corpus, by their numbers."""
    wanted = set(numbers)
    with open(corpus.folder / "corpus.jsonl", encoding="utf-8") as lines:
        return [
            parse_corpus_line(line, "text")["text"] for number, line in enumerate(lines) if number in wanted
        ]


def continuations(models: dict[str, Path], texts: Sequence[str]) -> list[dict[str, str]]:
    """Return, for each text, its beginning and what each model writes after it, without sampling."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shown: list[dict[str, str]] = [{} for _ in texts]
    for name, folder in models.items():
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        ).eval()
        for entry, text in zip(shown, texts, strict=True):
            prompt = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids[:PROMPT_TOKENS]])
            with torch.no_grad():
                tokens = model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=GENERATED_TOKENS,
                    do_sample=False,
                )[0]
            entry["prompt"] = tokenizer.decode(tokens[: prompt.shape[1]])
            entry[name] = tokenizer.decode(tokens[prompt.shape[1] :])
    return shown


def texts_section(texts: Step) -> str:
    """Return the section of the report with the texts that the models wrote."""
    entries = read_json_object(texts.folder / "texts.json", REMEDY)["texts"]
    parts = [
        "## Text\n\nThe beginning of a held-out document, and the "
        f"{GENERATED_TOKENS} most likely tokens that each model puts after it, one at a time.\n"
    ]
    for entry in entries:
        parts += [f"**{name}**\n\n{quoted(text)}\n" for name, text in entry.items()]
    return "\n".join(parts)


def quoted(text: str) -> str:
    """Return any text as an indented block, in which nothing is markup."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


def comparison_figures(pipeline: Pipeline) -> list[Path]:
    """Return the figures of the comparison page."""
    return sorted((pipeline.folder / "comparison" / "page").glob("*.png"))


def comparison_section(comparison: Step, settings: RealSettings) -> str:
    """Return the section of the report with the page that compare_runs.py wrote, one level down."""
    page = (comparison.folder / "page" / "comparison.md").read_text(encoding="utf-8")
    below = re.sub(r"^(#+) ", r"##\1 ", page, flags=re.MULTILINE)
    return (
        f"## RULER and the evidence probe\n\nWith {settings.samples} examples a cell of RULER and "
        f"{settings.items} items a cell of the probe the intervals are wide; where none is valid, none is "
        "given.\n\n"
        f"{below}\n"
    )


def main() -> None:
    """Continue a trained model on real text in both arms, measure both and write one report."""
    parser = command_parser(main, None, EXAMPLES)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the report")
    parser.add_argument(
        "--text", type=Path, metavar="PATH", help="a folder of texts or a file (the standard library)"
    )
    parser.add_argument(
        "--model", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help="folder of make real-model"
    )
    parser.add_argument("--quick", action="store_true", help="the same steps, as small as they can be")
    options: argparse.Namespace = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run_demo(
        options.output,
        model=options.model.resolve(),
        text=options.text,
        settings=QUICK if options.quick else FULL,
    )


if __name__ == "__main__":
    run_tool(main)
