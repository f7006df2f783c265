"""QA-SFT, really trained: the loss of the answers is what transformers computes, record by record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.data.dataset import PackedDataset
from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.pack import PackOptions, pack_corpora
from megatron_exact.data.qa_pack import DEFAULT_TEMPLATE, QaOptions, pack_qa, qa_files
from megatron_exact.data.tokenize import tokenize_corpus
from megatron_exact.lineage import first_difference
from megatron_exact.training.fine_tuning import plan_fine_tuning
from megatron_exact.training.stages import check_pairs, run_chain
from tests.distributed import hf_models, ranks
from tests.unit.data.qa_examples import PlainRecord, encode_plainly, make_records, write_records
from tests.unit.data.tiny_tokenizers import SENTENCES, write_huggingface

ROW_TOKENS = 256
SCHEDULE = ("--global-batch-size", 1, "--lr", "1e-3", "--log-interval", 1)


@dataclass(frozen=True)
class Prepared:
    """A model with a tokenizer, imported, and records packed with it."""

    hf: Path
    checkpoint: Path
    pack: Path
    records: list[PlainRecord]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("qa")
    hf = write_huggingface(folder / "model")
    hf_models.make_model("qwen2 tied, 2 groups", vocab_size=404).save_pretrained(hf)
    import_hf(hf, folder / "checkpoint")
    rows = make_records()
    options = QaOptions(row_tokens=ROW_TOKENS, seed=3, validation_fraction=0.2)
    pack_qa(qa_files([write_records(folder / "records.jsonl", rows)]), hf, folder / "pack", options)
    records = [encode_plainly(hf, row) for row in rows]
    return Prepared(hf, folder / "checkpoint", folder / "pack", records)


def validation_loss(prepared: Prepared, model_folder: Path, *, shift: int = 0) -> tuple[float, int]:
    """Mean cross-entropy of the answers of the held-out records, each record alone, and their number.

    Args:
        prepared: see there.
        model_folder: a Hugging Face folder.
        shift: moves every mask, for the negative control.
    """
    import transformers

    by_ids = {tuple(record.ids): record for record in prepared.records}
    held_out = []
    for sample in PackedDataset(prepared.pack, "validation", shuffle=False):
        tokens = sample["tokens"].tolist()
        segments = pairwise(sample["cu_seqlens"].unique_consecutive().tolist())
        held_out += [by_ids[ids] for a, b in segments if (ids := tuple(tokens[a:b])) in by_ids]
    assert len(held_out) == read_manifest(prepared.pack).splits["validation"].segments
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float64, attn_implementation="eager", local_files_only=True
    )
    total, count = 0.0, 0
    with torch.no_grad():
        for record in held_out:
            ids = torch.tensor(record.ids)
            logits = hf_models.document_logits(model, ids)
            losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
            mask = torch.tensor(record.is_target).roll(shift)[1:]
            total += float(losses[mask].sum())
            count += int(mask.sum())
    return total / count, count


def test_one_epoch_counts_the_answers_and_its_model_has_the_reported_loss(
    prepared: Prepared, tmp_path: Path
) -> None:
    manifest = read_manifest(prepared.pack)
    train, validation = manifest.splits["train"], manifest.splits["validation"]
    assert min(train.segments - train.rows, validation.segments - validation.rows) > 0
    run = tmp_path / "run"
    argv = [
        *("--pack", prepared.pack, "--token-weighting", "none", "--pretrained-checkpoint"),
        *(prepared.checkpoint, "--load", run, "--save", run, "--train-iters", train.rows, *SCHEDULE),
        *("--save-interval", train.rows, "--eval-interval", train.rows, "--eval-iters", validation.rows),
    ]
    ranks.train(1, argv, tmp_path / "output").check()
    lines = ranks.read_jsonl(run / "losses.jsonl")
    counts = [sum(column) for column in zip(*(line["bucket_targets"] for line in lines), strict=True)]
    assert counts == list(train.exposure.counts)

    (line,) = ranks.read_jsonl(run / "evaluations.jsonl")
    exported = tmp_path / "exported"
    export_hf(run, exported)
    loss, count = validation_loss(prepared, exported)
    assert line["targets"] == count == validation.supervised_targets
    assert line["bucket_targets"] == list(validation.exposure.counts)
    assert line["loss"] == pytest.approx(loss, rel=2e-6)
    for shift in (-1, 1):
        assert validation_loss(prepared, exported, shift=shift)[0] != pytest.approx(loss, rel=1e-3)
    before = validation_loss(prepared, prepared.hf)[0]
    assert before - loss > 0.1, "nothing was learnt: an export of the start would not be seen"

    # The template goes along, and evaluation finds it
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.chat_template == DEFAULT_TEMPLATE.read_text()
    assert not (prepared.checkpoint / "hf" / "chat_template.jinja").exists()


@pytest.mark.slow
def test_both_arms_from_continued_pretraining_to_tuned_pairs(prepared: Prepared, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": " ".join(SENTENCES[i : i + 9])}) + "\n" for i in range(100))
    )
    tokenize_corpus([text], prepared.hf, tmp_path / "corpus")
    options = PackOptions(row_tokens=64, policy="concat", seed=1)
    pack_corpora([str(tmp_path / "corpus")], tmp_path / "text_pack", options)
    for rule in ("none", "exact"):
        run = tmp_path / "cpt" / rule
        argv = ["--pack", tmp_path / "text_pack", "--token-weighting", rule, "--load", run, "--save", run]
        argv += ["--pretrained-checkpoint", prepared.checkpoint, "--train-iters", 4, "--save-interval", 4]
        alpha = ("--exact-alpha", 1) if rule == "exact" else ()
        ranks.train(1, [*argv, *SCHEDULE, *alpha], tmp_path / f"output_{rule}").check()

    arms = [("standard", tmp_path / "cpt" / "none"), ("exact", tmp_path / "cpt" / "exact")]
    arguments = [str(word) for word in (*SCHEDULE, "--train-iters", 4, "--save-interval", 2)]

    def plan() -> Any:
        return plan_fine_tuning(str(prepared.pack), arms, tmp_path / "tuned", arguments=arguments)

    started: list[Sequence[str]] = []

    def train(command: Sequence[str], *extra: str) -> int:
        argv = command[list(command).index("--") + 1 :]
        started.append(argv)
        ended = ranks.train(1, [*argv, *extra], tmp_path / f"output{len(started)}")
        return max(map(abs, ended.codes))

    with pytest.raises(ValueError, match="qa standard ended at iteration 2 of 4"):
        run_chain(plan(), 1, call=lambda command: train(command, "--exit-interval", "2"))
    run_chain(plan(), 1, call=train)
    runs = plan()
    assert [run.is_finished() for run in runs] == [True, True]
    check_pairs(runs)
    assert len(started) == 3
    records = [json.loads((run.folder / "run.json").read_text()) for run in runs]
    assert [record["weighting"]["rule"] for record in records] == ["none", "none"]
    earlier = [record["start_checkpoint"]["run"]["weighting"]["rule"] for record in records]
    assert earlier == ["none", "exact"]
    assert first_difference(*records) is None
    first = [ranks.read_jsonl(run.folder / "losses.jsonl")[0] for run in runs]
    assert first[0]["targets"] == first[1]["targets"]
    assert first[0]["loss"] != first[1]["loss"]
    for run in runs:
        assert (run.folder / "hf" / "chat_template.jinja").read_text() == DEFAULT_TEMPLATE.read_text()

    whole = ranks.read_jsonl(runs[1].folder / "losses.jsonl")
    for flag in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--data-parallel"):
        folder = tmp_path / flag.strip("-")
        words = [] if flag == "--data-parallel" else [flag, 2]
        batch = ["--global-batch-size", 2] if flag == "--data-parallel" else []
        argv = [*started[-1], "--save", folder, "--load", folder, *words, *batch]
        ranks.train(2, argv, tmp_path / f"output_{folder.name}").check()
        lines = ranks.read_jsonl(folder / "losses.jsonl")
        if batch:
            assert lines[0]["targets"] == whole[0]["targets"] + whole[1]["targets"]
        else:
            assert [line["loss"] for line in lines] == pytest.approx(
                [line["loss"] for line in whole], rel=2e-6
            )

    ended = ranks.train(1, [*started[0], "--token-weighting", "exact"], tmp_path / "refused")
    assert ended.codes == [1]
    assert "is not supported on a pack of question-answer records" in ended.outputs[0]
