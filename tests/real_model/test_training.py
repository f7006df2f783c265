"""A trained model through import, training and export: logits, losses, layouts, resume, generated text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
import transformers

from tests.distributed import hf_models, ranks
from tests.distributed.logits import logits_of
from tests.real_model.chain import job, tool
from tests.real_model.conftest import Prepared

pytestmark = [pytest.mark.real, pytest.mark.timeout(4000)]

LENGTHS = (200, 2000, 6000)
LOGITS_BOUND = 2e-4
LOSS_BOUND = 5e-5
LAYOUT_LOSS_BOUND = 2e-6
LAYOUT_NORM_BOUND = 1e-5
QUESTION = "What is the capital of France?"


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).eval()


def real_text(hf: Path) -> torch.Tensor:
    """The first tokens of the longest page of the reference, 6,000 of them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(hf, local_files_only=True)
    page = max(topics.values(), key=len)
    return torch.tensor(tokenizer(page).input_ids[: max(LENGTHS)])


def keep_logits(hf: Path, folder: Path) -> Callable[[], None]:
    """Return a patch that saves the logits of each length before the first step."""
    tokens = real_text(hf)

    def patch() -> None:
        from megatron_exact.training.run import TrainingRun

        stock = TrainingRun.finalize_grads

        def finalize(self: Any, model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
            stock(self, model, num_tokens, **kwargs)
            if (folder / f"{LENGTHS[-1]}.pt").exists():
                return  # the weights have changed since
            for length in LENGTHS:
                logits = logits_of(model[0].module, tokens[:length], (length,))
                torch.save(logits.clone(), folder / f"{length}.pt")

        TrainingRun.finalize_grads = finalize  # type: ignore[method-assign]

    return patch


@pytest.fixture(scope="module")
def one_rank(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two iterations on one rank, each saved, and the logits of the start."""
    folder = tmp_path_factory.mktemp("one-rank")
    argv = job(prepared.pack, prepared.checkpoint, 2, "--save", folder / "run", "--save-interval", 1)
    ranks.train(1, argv, folder, keep_logits(prepared.hf, folder)).check()
    return folder


@pytest.mark.parametrize("length", LENGTHS)
def test_the_logits_are_those_of_transformers(length: int, prepared: Prepared, one_rank: Path) -> None:
    tokens = real_text(prepared.hf)[:length]
    assert tokens.numel() == length
    with torch.no_grad():
        expected = hf_models.document_logits(load(prepared.hf), tokens)
    ours = torch.load(one_rank / f"{length}.pt", weights_only=True)
    difference = (ours - expected).abs()
    assert difference.max() <= LOGITS_BOUND, f"max {difference.max():.1e}, mean {difference.mean():.1e}"
    # The control: positions that are one off, as after a wrong rotation, are far outside the bound.
    assert (ours[1:] - expected[:-1]).abs().max() > 1


def test_the_first_loss_is_that_of_transformers_document_by_document(
    prepared: Prepared, one_rank: Path
) -> None:
    line = ranks.read_jsonl(one_rank / "run" / "losses.jsonl")[0]
    rows = ranks.read_jsonl(one_rank / "run" / "rows.jsonl")[0]["rows"]
    model = load(prepared.hf)
    with torch.no_grad():
        expected = float(hf_models.mean_loss(model, prepared.pack, "train", rows))
    assert line["loss"] == pytest.approx(expected, rel=LOSS_BOUND)
    assert 1 < line["loss"] < 4, "a trained model reads its language"


@pytest.mark.parametrize(
    ("world", "flags"),
    [(2, ("--pipeline-model-parallel-size", 2)), (3, ("--tensor-model-parallel-size", 3))],
    ids=["PP2", "TP3"],
)
def test_a_layout_trains_what_one_rank_trains(
    world: int, flags: tuple[Any, ...], prepared: Prepared, one_rank: Path, tmp_path: Path
) -> None:
    argv = job(prepared.pack, prepared.checkpoint, 2, "--run-dir", tmp_path / "run", *flags)
    ranks.train(world, argv, tmp_path).check()
    expected = ranks.read_jsonl(one_rank / "run" / "losses.jsonl")
    ours = ranks.read_jsonl(tmp_path / "run" / "losses.jsonl")
    for theirs, line in zip(expected, ours, strict=True):
        assert line["loss"] == pytest.approx(theirs["loss"], rel=LAYOUT_LOSS_BOUND)
        assert line["weighted_loss"] == pytest.approx(theirs["weighted_loss"], rel=LAYOUT_LOSS_BOUND)
        assert line["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=LAYOUT_NORM_BOUND)
        assert line["bucket_targets"] == theirs["bucket_targets"]


def test_a_resumed_run_is_bit_identical(prepared: Prepared, one_rank: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ("--save", run, "--load", run, "--save-interval", 1)
    first = job(
        prepared.pack, prepared.checkpoint, 2, "--save", run, "--save-interval", 1, "--exit-interval", 1
    )
    ranks.train(1, first, tmp_path / "first").check()
    assert len(ranks.read_jsonl(run / "losses.jsonl")) == 1
    ranks.train(1, job(prepared.pack, prepared.checkpoint, 2, *words), tmp_path / "second").check()
    for name in ("losses.jsonl", "rows.jsonl"):
        assert (run / name).read_bytes() == (one_rank / "run" / name).read_bytes()


def test_the_export_says_what_the_model_says(prepared: Prepared, one_rank: Path, tmp_path: Path) -> None:
    """Two steps at a rate of 1e-5 change the weights and not what the model knows."""
    tool("export_hf", "--checkpoint", one_rank / "run", "--output", tmp_path / "exported")
    answers = {}
    for name, folder in (("before", prepared.hf), ("after", tmp_path / "exported")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
        )
        prompt = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            tokens = load(folder).generate(**prompt, max_new_tokens=20, do_sample=False)
        answers[name] = tokenizer.decode(tokens[0, prompt.input_ids.shape[1] :])
    assert "Paris" in answers["before"]
    assert "Paris" in answers["after"]
    before, after = load(prepared.hf).state_dict(), load(tmp_path / "exported").state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before), "nothing was trained"
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["max_position_embeddings"] == 8192
