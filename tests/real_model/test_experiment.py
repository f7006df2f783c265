"""Both arms of a trained model to the report: continued pretraining, tuning, RULER, probe, comparison."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from tests.distributed import ranks
from tests.real_model.chain import job, tool
from tests.real_model.conftest import Prepared

pytestmark = [pytest.mark.real, pytest.mark.timeout(4000)]

ARMS = {"standard": "none", "exact": "exact"}
QA_ROW_TOKENS = 512
PASSAGE_CHARACTERS = 600


def records() -> list[dict[str, str]]:
    """Questions about the pages of the language reference, whose answers stand in the context."""
    return [
        {
            "instruction": "Which page of the reference is this?",
            "context": topics[name][:PASSAGE_CHARACTERS],
            "response": f"It is the page {name}.",
        }
        for name in sorted(topics)
        if len(topics[name]) >= PASSAGE_CHARACTERS
    ]


@dataclass(frozen=True)
class Experiment:
    """What both arms leave."""

    tuned: dict[str, Path]
    """Tuned models as Hugging Face folders."""
    records: Path
    """Pack of the questions."""


@pytest.fixture(scope="module")
def experiment(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("experiment")
    for arm, rule in ARMS.items():
        words = ("--save", folder / arm, "--save-interval", 1)
        ranks.train(
            1, job(prepared.pack, prepared.checkpoint, 1, *words, rule=rule), folder / f"{arm}.out"
        ).check()
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(record) + "\n" for record in records()))
    tool(
        *("pack_qa", "--input", questions, "--tokenizer", prepared.hf, "--template", "model"),
        *("--row-tokens", QA_ROW_TOKENS, "--validation-fraction", 0.1, "--output", folder / "qa"),
    )
    tool(
        *("fine_tune_qa", "--pack", folder / "qa", "--output", folder / "tuned", "--nproc-per-node", 1),
        *(word for arm in ARMS for word in ("--arm", f"{arm}={folder / arm}")),
        *("--train-iters", 2, "--global-batch-size", 1, "--micro-batch-size", 1, "--save-interval", 2),
        *("--eval-iters", 1, "--eval-interval", 2),
    )
    tuned = {}
    for arm in ARMS:
        tuned[arm] = folder / "models" / arm
        tool("export_hf", "--checkpoint", folder / "tuned" / arm, "--output", tuned[arm])
    return Experiment(tuned=tuned, records=folder / "qa")


def test_the_loss_of_tuning_is_on_the_answers_of_the_models_own_template(experiment: Experiment) -> None:
    manifest = json.loads((experiment.records / "manifest.json").read_text())
    template = manifest["answers"]["template"]
    assert "<|im_start|>" in template
    train = manifest["splits"]["train"]
    assert 0 < train["supervised_targets"] < train["tokens"] / 10, "answers are short, contexts are long"
    for folder in experiment.tuned.values():
        assert (folder / "chat_template.jinja").read_text() == template


def test_both_arms_to_the_report(prepared: Prepared, experiment: Experiment, tmp_path: Path) -> None:
    results = {}
    for arm, folder in experiment.tuned.items():
        results[arm] = tmp_path / "results" / arm
        tool(
            *("evaluate_model", "--model", folder, "--suite", "ruler", "--tasks", "niah_single_1,vt"),
            *("--lengths", "1K", "--samples", 2, "--template", "model", "--output", results[arm]),
        )
        tool(
            *("probe_evidence", "--model", folder, "--kinds", "answer-position", "--distances", "64,256"),
            *("--items-per-cell", 4, "--output", results[arm]),
        )
        (cell,) = (results[arm] / "ruler" / "niah_single_1").glob("*.jsonl")
        examples = [json.loads(line) for line in cell.read_text().splitlines()]
        assert len(examples) == 2
        assert all(0 <= example["score"] <= 1 for example in examples)
        assert all(example["prediction"] for example in examples), "a trained model answers something"
    tool(
        *("compare_runs", "--baseline", results["standard"], "--treatment", results["exact"]),
        *("--resamples", 200, "--output", tmp_path / "comparison"),
    )
    comparison = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert {aggregate["suite"] for aggregate in comparison["aggregates"]} >= {"ruler"}
    assert comparison["probe"]
    tool(
        *("write_report", "--comparison", tmp_path / "comparison", "--pack", prepared.pack),
        *("--output", tmp_path / "report"),
    )
    report = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "EXACT" in report
    assert "not run" in report, "what was not run is said"
