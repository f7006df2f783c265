"""The steps of the evaluation demo: each calls tools of ours, in a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_exact.demo.corpus import collect_corpus
from megatron_exact.demo.evaluate_inputs import (
    demo_sources,
    qa_records,
    write_model,
    write_qa_data,
    write_rows,
)
from megatron_exact.demo.evaluate_settings import EvaluateSettings
from megatron_exact.demo.evaluate_tools import Command, EvaluateDemo, tool
from megatron_exact.demo.steps import DATA_CODE, PACKAGE, TRAINING_CODE, say
from megatron_exact.demo.workspace import Step, hash_of_code
from megatron_exact.evaluation.suites.qa import mmlu_subjects

ARMS = {"standard": "none", "exact": "exact"}
"""Name of each arm and its token weighting."""
LABEL = "demo"
"""What the report calls the model."""
NEEDLES = PACKAGE.parent / "examples" / "needles"
BOOK = NEEDLES / "haystack" / "rand_shuffle" / "rand_book_1.txt"
CONVERSION_CODE = ("conversion", "model", "trainings.py", "files.py")
EVALUATION_CODE = ("evaluation", "lineage.py", "trainings.py", "files.py")
TRAINING_FLAGS = (
    *("--cpu", "--nproc-per-node", "1", "--global-batch-size", "2", "--micro-batch-size", "1"),
    *("--lr", "3e-3", "--clip-grad", "1.0", "--weight-decay", "0.1", "--eval-iters", "0"),
)


def inputs_step(demo: EvaluateDemo) -> Step:
    """Text, model and tokenizer, records, QA data sets."""
    say("\n== inputs: text of this machine, a model of random weights, invented records and data sets")
    settings, sources = demo.settings, demo_sources()

    def build(folder: Path) -> None:
        collect_corpus(sources, folder / "corpus.jsonl")
        write_model(folder / "model", folder / "corpus.jsonl", BOOK, settings)
        write_rows(folder / "invented-qa.jsonl", qa_records(settings.records, settings.seed))
        write_qa_data(folder / "qa_data", settings.qa_samples, settings.seed, mmlu_subjects())

    depends_on = {
        "sources": sources.identity(),
        "settings": asdict(settings),
        "code": hash_of_code(PACKAGE, ("demo/evaluate_inputs.py", "demo/corpus.py")),
    }
    return demo.add(demo.workspace.step("inputs", depends_on, build))


def base_step(demo: EvaluateDemo, inputs: Step) -> Step:
    """The model of random weights as a checkpoint."""
    return demo.tool_step(
        "base",
        [inputs],
        CONVERSION_CODE,
        lambda folder: [
            tool("import_hf", "--hf", inputs.folder / "model", "--output", folder / "checkpoint")
        ],
    )


def tokens_step(demo: EvaluateDemo, inputs: Step) -> Step:
    """Text to token files."""
    return demo.tool_step(
        "tokens",
        [inputs],
        DATA_CODE,
        lambda folder: [
            tool(
                "tokenize_corpus",
                *("--input", inputs.folder / "corpus.jsonl", "--tokenizer", inputs.folder / "model"),
                *("--output-prefix", folder / "library", "--workers", 2, "--licence", "PSF-2.0"),
            )
        ],
    )


def pack_step(demo: EvaluateDemo, tokens: Step) -> Step:
    """Token files to rows."""
    settings = demo.settings
    return demo.tool_step(
        "pack",
        [tokens],
        DATA_CODE,
        lambda folder: [
            tool(
                "pack_corpus",
                *("--source", tokens.folder / "library", "--row-tokens", settings.row_tokens),
                *("--policy", "concat", "--validation-fraction", 0, "--seed", settings.seed),
                *("--output", folder / "rows"),
            )
        ],
    )


def pretraining_step(demo: EvaluateDemo, base: Step, pack: Step) -> Step:
    """Continued pretraining of both arms from one start."""
    settings = demo.settings
    return demo.tool_step(
        "pretraining",
        [base, pack],
        TRAINING_CODE,
        lambda folder: [
            tool(
                "run_stages",
                *("--pack", pack.folder / "rows", "--start", base.folder / "checkpoint"),
                *("--output", folder / "runs", "--arms", *ARMS.values(), *TRAINING_FLAGS),
                *("--seed", settings.seed, "--train-iters", settings.iterations),
                *("--lr-decay-style", "constant", "--save-interval", settings.iterations),
            )
        ],
        resumable=True,
    )


def records_step(demo: EvaluateDemo, inputs: Step) -> Step:
    """Question-answer records to rows that supervise answers."""
    settings = demo.settings
    return demo.tool_step(
        "records",
        [inputs],
        DATA_CODE,
        lambda folder: [
            tool(
                "pack_qa",
                *("--input", inputs.folder / "invented-qa.jsonl", "--licence", "CC0-1.0"),
                *("--tokenizer", inputs.folder / "model", "--row-tokens", settings.qa_row_tokens),
                *("--seed", settings.seed, "--output", folder / "rows"),
            )
        ],
    )


def fine_tuning_step(demo: EvaluateDemo, pretraining: Step, records: Step) -> Step:
    """QA-SFT of both arms."""
    settings = demo.settings

    def commands(folder: Path) -> list[Command]:
        starts = {arm: stage_folder(pretraining, rule, settings) for arm, rule in ARMS.items()}
        arms = [word for arm, start in starts.items() for word in ("--arm", f"{arm}={start}")]
        return [
            tool(
                "fine_tune_qa",
                *("--pack", records.folder / "rows", *arms, "--output", folder / "runs"),
                *(*TRAINING_FLAGS, "--seed", settings.seed, "--train-iters", settings.qa_iterations),
                *("--save-interval", settings.qa_iterations),
            )
        ]

    return demo.tool_step("fine_tuning", [pretraining, records], TRAINING_CODE, commands, resumable=True)


def stage_folder(pretraining: Step, rule: str, settings: EvaluateSettings) -> Path:
    """Where `run_stages.py` puts a run."""
    rows, rest = divmod(settings.row_tokens, 1024)
    return pretraining.folder / "runs" / rule / (str(settings.row_tokens) if rest else f"{rows}k")


def export_step(demo: EvaluateDemo, fine_tuning: Step) -> Step:
    """Both tuned models as Hugging Face folders."""
    return demo.tool_step(
        "models",
        [fine_tuning],
        CONVERSION_CODE,
        lambda folder: [
            tool(
                "export_hf",
                *("--checkpoint", fine_tuning.folder / "runs" / arm, "--output", folder / arm),
            )
            for arm in ARMS
        ],
    )


def results_step(demo: EvaluateDemo, arm: str, inputs: Step, models: Step) -> Step:
    """All suites and the probe on one model."""
    settings = demo.settings

    def commands(folder: Path) -> list[Command]:
        model, results = models.folder / arm, folder / "results"
        common = ("--model", model, "--output", results, "--seed", settings.seed, "--device", "cpu")
        cache = demo.workspace.folder / "examples"
        evaluate = (*common, "--template", "model", "--example-cache", cache)
        lengths = joined(settings.trained_lengths + settings.extrapolated_lengths)
        generated = (*evaluate, "--lengths", lengths, "--samples", settings.samples)
        return [
            tool("evaluate_model", "--suite", "ruler", *generated, "--essays", BOOK),
            tool("evaluate_model", "--suite", "nolima", *generated, "--nolima-data", NEEDLES),
            tool("evaluate_model", "--suite", "qa", *evaluate, "--qa-data", inputs.folder / "qa_data"),
            tool(
                "probe_evidence",
                *(*common, "--distances", joined(settings.probe_distances)),
                *("--contexts", joined(settings.probe_contexts)),
                *("--items-per-cell", settings.probe_items),
            ),
        ]

    return demo.tool_step(f"results_{arm}", [inputs, models], EVALUATION_CODE, commands, resumable=True)


def comparison_step(demo: EvaluateDemo, results: dict[str, Step]) -> Step:
    """Both result folders in pairs, with intervals."""
    settings = demo.settings
    return demo.tool_step(
        "comparison",
        list(results.values()),
        (*EVALUATION_CODE, "report"),
        lambda folder: [
            tool(
                "compare_runs",
                *("--baseline", results["standard"].folder / "results"),
                *("--treatment", results["exact"].folder / "results"),
                *("--trained-lengths", joined(settings.trained_lengths)),
                *("--extrapolated-lengths", joined(settings.extrapolated_lengths)),
                *("--output", folder / "comparison"),
            )
        ],
    )


def report_step(demo: EvaluateDemo, comparison: Step, pack: Step) -> Step:
    """The report of the experiment."""
    return demo.tool_step(
        "report",
        [comparison, pack],
        ("report", "exposure", "files.py"),
        lambda folder: [
            tool(
                "write_report",
                *("--comparison", f"{LABEL}={comparison.folder / 'comparison'}"),
                *("--pack", pack.folder / "rows", "--output", folder / "report"),
            )
        ],
    )


def joined(lengths: Sequence[int]) -> str:
    """For a list on a command line."""
    return ",".join(map(str, lengths))
