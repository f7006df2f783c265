"""A trained model through both arms: continued, tuned with its ChatML template, exported, asked.

One chain of fixtures: every step is made once, by the tools, and the tests look at what it left.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

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
        *("pack_qa", "--input", folder / "invented.jsonl", "--tokenizer", prepared.hf),
        *("--template", "model"),
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
