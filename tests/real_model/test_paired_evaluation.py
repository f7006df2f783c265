"""A trained model through both arms: tuning with ChatML, generation, RULER, probe, comparison, report.

One chain of fixtures: every step is made once, by the tools, and the tests look at what it left.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from examples.evaluate_demo import qa_records, write_rows
from megatron_exact.data.dataset import PackedDataset
from tests.distributed.ranks import read_jsonl
from tests.real_model.chain import tool
from tests.real_model.conftest import Prepared

pytestmark = [pytest.mark.real, pytest.mark.timeout(4000)]

ARMS = {"standard": "none", "exact": "exact"}
"""Name of each arm and its token weighting."""
PRETRAINING_ROW, QA_ROW = 512, 256
RECORDS = 24
RULER = {"niah_single_1": (512, 1024), "vt": (1280,)}
"""Windows of each task; the worked example of vt takes half of 1K by itself."""
SAMPLES = 3
DISTANCES, ITEMS = (64, 512), 12
JOB = (
    *("--cpu", "--nproc-per-node", 1, "--global-batch-size", 2, "--micro-batch-size", 1, "--lr", "1e-5"),
    *("--train-iters", 2, "--save-interval", 2, "--eval-iters", 0, "--seed", 7),
)
QUESTION = "What is the capital of France?"
CHATML = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
END = "<|im_end|>"


def for_both_arms(*calls: list[Any]) -> None:
    """Run one tool for each arm, both at a time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(lambda words: tool(*words), calls))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paired")


@pytest.fixture(scope="module")
def pack(prepared: Prepared, folder: Path) -> Path:
    tool(
        *("pack_corpus", "--source", prepared.pack.parent / "corpus", "--row-tokens", PRETRAINING_ROW),
        *("--policy", "concat", "--validation-fraction", 0, "--seed", 1, "--output", folder / "pack"),
    )
    return folder / "pack"


@pytest.fixture(scope="module")
def pretrained(prepared: Prepared, pack: Path, folder: Path) -> Path:
    """The runs of both arms."""
    start = ("--start", prepared.checkpoint, "--output", folder / "runs", "--arms", *ARMS.values())
    tool("run_stages", "--pack", pack, *start, *JOB, "--lr-decay-style", "constant")
    return folder / "runs"


@pytest.fixture(scope="module")
def records(prepared: Prepared, folder: Path) -> Path:
    """The pack of answers, with the template of the model's tokenizer."""
    write_rows(folder / "invented.jsonl", qa_records(RECORDS, seed=7))
    tool(
        *(
            "pack_qa",
            "--input",
            folder / "invented.jsonl",
            "--tokenizer",
            prepared.hf,
            "--template",
            "model",
        ),
        *("--row-tokens", QA_ROW, "--validation-fraction", 0, "--seed", 7, "--output", folder / "records"),
    )
    return folder / "records"


@pytest.fixture(scope="module")
def tuned(pretrained: Path, records: Path, folder: Path) -> Path:
    arms = [("--arm", f"{arm}={pretrained / rule / str(PRETRAINING_ROW)}") for arm, rule in ARMS.items()]
    tool("fine_tune_qa", "--pack", records, *sum(arms, ()), "--output", folder / "tuned", *JOB)
    return folder / "tuned"


@pytest.fixture(scope="module")
def models(tuned: Path, folder: Path) -> dict[str, Path]:
    """The exported models of both arms."""
    made = {arm: folder / "models" / arm for arm in ARMS}
    for arm, output in made.items():
        tool("export_hf", "--checkpoint", tuned / arm, "--output", output)
    return made


@pytest.fixture(scope="module")
def evaluated(models: dict[str, Path], folder: Path) -> dict[str, Path]:
    """RULER and the probe of both arms."""
    results = {arm: folder / "results" / arm for arm in ARMS}
    for task, lengths in RULER.items():
        ruler = ("--suite", "ruler", "--tasks", task, "--lengths", ",".join(map(str, lengths)))
        for_both_arms(
            *(
                [
                    *("evaluate_model", "--model", models[arm], *ruler, "--samples", SAMPLES),
                    *("--device", "cpu", "--template", "model", "--output", results[arm]),
                    *("--example-cache", folder / f"examples-{arm}"),
                ]
                for arm in ARMS
            )
        )
    grid = ("--distances", ",".join(map(str, DISTANCES)), "--contexts", "256,768")
    for_both_arms(
        *(
            [
                *("probe_evidence", "--model", models[arm], *grid, "--items-per-cell", ITEMS),
                *("--device", "cpu", "--output", results[arm]),
            ]
            for arm in ARMS
        )
    )
    return results


@pytest.fixture(scope="module")
def comparison(evaluated: dict[str, Path], folder: Path) -> Path:
    tool(
        *("compare_runs", "--baseline", evaluated["standard"], "--treatment", evaluated["exact"]),
        *("--trained-lengths", "512", "--extrapolated-lengths", "1024,1280"),
        *("--output", folder / "comparison"),
    )
    return folder / "comparison"


def test_records_have_the_tokens_of_the_chat_template_and_supervise_the_answers(
    prepared: Prepared, records: Path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(prepared.hf, local_files_only=True)
    expected = []
    for record in qa_records(RECORDS, seed=7):
        question = "\n\n".join(filter(None, (record["context"], record["instruction"])))
        prompt = tokenizer.encode(CHATML.format(question), add_special_tokens=False)
        assert tokenizer.decode(prompt) == CHATML.format(question), "the template's tokens are not text"
        answer = tokenizer.encode(record["response"], add_special_tokens=False)
        whole = [*prompt, *answer, tokenizer.convert_tokens_to_ids(END)]
        # The target of position j is token j + 1; the EOD predicts nothing.
        mask = [len(prompt) <= j + 1 < len(whole) for j in range(len(whole))]
        expected.append((whole, mask))
    found = []
    for sample in PackedDataset(records, "train", shuffle=False):
        tokens, mask = sample["tokens"].tolist(), sample["loss_mask"].bool().tolist()
        for start, end in pairwise(sample["cu_seqlens"].unique_consecutive().tolist()):
            if any(mask[start:end]):  # else padding
                found.append((tokens[start:end], mask[start:end]))
    assert sorted(found) == sorted(expected)


def test_both_arms_are_tuned_alike_from_different_weights(tuned: Path) -> None:
    runs = [json.loads((tuned / arm / "run.json").read_text()) for arm in ARMS]
    lines = [read_jsonl(tuned / arm / "losses.jsonl") for arm in ARMS]
    assert runs[0]["fingerprint"] == runs[1]["fingerprint"]
    assert runs[0]["start_checkpoint"]["sha256"] != runs[1]["start_checkpoint"]["sha256"]
    assert [line["targets"] for line in lines[0]] == [line["targets"] for line in lines[1]]
    for one, other in zip(*lines, strict=True):
        # Two steps at 1e-5 with 15 % more weight on a tail move a loss a little, and not to the last bit.
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)
        assert one["loss"] != other["loss"]


@pytest.mark.parametrize("arm", ARMS)
def test_an_exported_model_answers_in_its_template(arm: str, models: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[arm], local_files_only=True)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    assert text == CHATML.format(QUESTION)
    model = load(models[arm])
    prompt = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt.input_ids.shape[1] :])
    assert "Paris" in answer
    assert answer.endswith(END), "the answer does not end"


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()


def test_ruler_finds_needles_and_scores_what_transformers_generates(
    models: dict[str, Path], evaluated: dict[str, Path], folder: Path
) -> None:
    for arm in ARMS:
        for task, lengths in RULER.items():
            for length in lengths:
                lines = read_jsonl(evaluated[arm] / "ruler" / task / f"{length}.jsonl")
                assert len(lines) == SAMPLES
                assert all(0.4 * length < line["prompt_tokens"] < length for line in lines)
                assert all(line["prediction"].strip() for line in lines)
                if task == "niah_single_1":
                    # A trained model copies a number out of its context, and not one of another prompt.
                    assert sum(line["score"] for line in lines) >= SAMPLES - 1
                    for line in lines:
                        others = [other["references"][0] for other in lines if other["id"] != line["id"]]
                        assert not any(reference in line["prediction"] for reference in others)
    sent = folder / "prompts.jsonl"
    tool(
        *("evaluate_model", "--model", models["exact"], "--suite", "ruler", "--tasks", "niah_single_1"),
        *("--lengths", 512, "--samples", SAMPLES, "--template", "model", "--prompts-only", sent),
        *("--example-cache", folder / "examples-exact"),
    )
    prompt = read_jsonl(sent)[0]
    line = read_jsonl(evaluated["exact"] / "ruler" / "niah_single_1" / "512.jsonl")[0]
    assert prompt["references"] == line["references"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["exact"], local_files_only=True)
    generated = tokenizer(CHATML.format(prompt["prompt"]), return_tensors="pt", add_special_tokens=False)
    model, width = load(models["exact"]), generated.input_ids.shape[1]
    with torch.no_grad():
        tokens = model.generate(**generated, max_new_tokens=40, do_sample=False)[0, width:]
    assert line["references"][0] in tokenizer.decode(tokens)


def test_the_probe_sees_evidence_and_nothing_without_it(evaluated: dict[str, Path]) -> None:
    """At 64 tokens a trained model repeats an answer that it has read, and guesses one that it has not."""
    for arm in ARMS:
        near = [
            line
            for line in read_jsonl(evaluated[arm] / "probe" / "answer-position.jsonl")
            if line["distance"] == DISTANCES[0]
        ]
        assert len(near) == ITEMS
        assert np.mean([line["correct"] for line in near]) >= 0.75
        assert np.mean([line["correct_ablated"] for line in near]) <= 0.6
        assert np.mean([line["effect"] for line in near]) > 1


def test_the_comparison_is_paired_and_its_differences_are_those_of_the_results(
    evaluated: dict[str, Path], comparison: Path
) -> None:
    content = json.loads((comparison / "comparison.json").read_text())
    assert content["pairing"]["verified"], content["pairing"]["statement"]
    for cell in content["cells"]:
        means = [
            100 * np.mean([line["score"] for line in read_jsonl(evaluated[arm] / "ruler" / place)])
            for arm in ARMS
            for place in [f"{cell['task']}/{cell['length']}.jsonl"]
        ]
        assert cell["delta"] == pytest.approx(means[1] - means[0], abs=1e-9)
    assert {(cell["task"], cell["length"]) for cell in content["cells"]} == {
        (task, length) for task, lengths in RULER.items() for length in lengths
    }
    for cell in content["probe"]["cells"]:
        effects = [
            np.mean(
                [
                    line["effect"]
                    for line in read_jsonl(evaluated[arm] / "probe" / f"{cell['kind']}.jsonl")
                    if (line["distance"], line["context"]) == (cell["distance"], cell["context"])
                ]
            )
            for arm in ARMS
        ]
        assert cell["measures"]["effect"]["delta"] == pytest.approx(effects[1] - effects[0], abs=1e-9)


def test_the_report_has_the_figures_of_the_paper(pack: Path, comparison: Path, tmp_path: Path) -> None:
    tool("write_report", "--comparison", f"SmolLM2={comparison}", "--pack", pack, "--output", tmp_path)
    report = (tmp_path / "report.md").read_text()
    for heading in ("Figure 1", "Figure 3", "Figure 5"):
        section = report.split(f"## {heading}")[1].split("\n## ")[0]
        assert "![" in section, f"{heading} is not drawn"
    names = {path.name for path in tmp_path.glob("*.png")}
    assert any(name.startswith("field-") for name in names)
    assert sum(name.startswith("probe-") for name in names) == 2
    assert "SmolLM2" in report
    assert "data:image/png;base64" in (tmp_path / "report.html").read_text()
