"""TRL's SFTTrainer with the mix-in: rows of a pack against a step on Megatron, and TRL's own packing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_exact.integrations.exposure_table import ExposureCounter
from megatron_exact.integrations.hf_trainer import ExactLossMixin, PaddingFreeCollator
from megatron_exact.integrations.packed_rows import PackedRows, hf_dataset
from megatron_exact.integrations.target_weights import TargetWeights
from tests.distributed import jobs
from tests.integrations.conftest import BOUND, SEED, Reference, make_llama

pytestmark = pytest.mark.integrations

CPU = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_steps": 1,
    "max_grad_norm": 0,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


def make_tokenizer(folder: Path | None = None) -> Any:
    """A word-level tokenizer of the vocabulary of the tests, saved if a folder is given."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(jobs.VOCABULARY)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="w95", pad_token="w94")
    if folder is not None:
        made.save_pretrained(folder)
    return made


class Kept:
    """Gradients before the optimizer's step; made a callback where transformers is imported."""

    gradients: dict[str, Tensor]

    def callback(self) -> Any:
        import transformers

        kept = self

        class Keep(transformers.TrainerCallback):  # type: ignore[misc]
            def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
                kept.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

        return Keep()


def test_rows_of_a_pack(step_on_megatron: Callable[[str, str], Reference], tmp_path: Path) -> None:
    import trl

    class ExactSFTTrainer(ExactLossMixin, trl.SFTTrainer):  # type: ignore[misc]
        pass

    reference = step_on_megatron("concat", "exact")

    def step(name: str, **options: Any) -> tuple[float, dict[str, Tensor]]:
        rows = PackedRows(reference.pack, order_seed=SEED, rule=options.pop("rule", None))
        kept = Kept()
        trainer = ExactSFTTrainer(
            make_llama(),
            trl.SFTConfig(
                str(tmp_path / name),
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                remove_unused_columns=False,
                dataset_kwargs={"skip_prepare_dataset": True},
                **CPU,
            ),
            train_dataset=hf_dataset(rows, cache_dir=tmp_path).select(range(jobs.GLOBAL_BATCH)),
            processing_class=make_tokenizer(),
            data_collator=PaddingFreeCollator(),
            callbacks=[kept.callback()],
            **options,
        )
        return trainer.train().training_loss, kept.gradients

    loss, gradients = step("exact", rule="exact")
    reference.check(loss, gradients)
    _, unweighted = step("none", rule="none")
    assert max(reference.difference(unweighted).values()) > 1000 * BOUND

    best_fit = step_on_megatron("best-fit", "exact")
    reference = best_fit  # positions alone: no target at a row's end belongs to another document
    loss, gradients = step("positions", target_weights=TargetWeights(best_fit.table))
    best_fit.check(loss, gradients)


def test_the_example_on_its_own_packing(start: Path, tmp_path: Path) -> None:
    """Real packing, tokenizer and collator of TRL, against losses of one document at a time."""
    from examples.integrations import trl_sft

    make_tokenizer(tmp_path / "model")
    make_llama().float().save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(2)
    documents = [
        torch.randint(0, 90, (length,), generator=generator).tolist() for length in (60, 17, 33, 9, 50, 12)
    ]
    lines = [json.dumps({"text": " ".join(f"w{token}" for token in tokens)}) for tokens in documents]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines) + "\n")
    kept = Kept()
    trained: list[Any] = []
    stock = trl_sft.ExactSFTTrainer.__init__

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, callbacks=[kept.callback()], **kwargs)
        trained.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl_sft.ExactSFTTrainer, "__init__", remember)
        result = trl_sft.main(
            *(str(tmp_path / name) for name in ("model", "documents.jsonl", "output")),
            window=64,
            per_device_train_batch_size=8,
            **CPU,
        )
    assert len(trained[0].train_dataset) < len(documents), "nothing was packed"
    counter = ExposureCounter(64)
    counter.add_lengths(len(tokens) for tokens in documents)
    by_context = TargetWeights(counter.table(), padding_free=True).weighting.row_weights.of_context  # type: ignore[attr-defined]
    model, total, targets = make_llama(), torch.zeros(()), 0
    for tokens in map(torch.tensor, documents):
        logits = model(tokens[None], use_cache=False).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        total = total + (losses * torch.from_numpy(by_context[1 : len(tokens)])).sum()
        targets += len(tokens) - 1
    (total / targets).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    plain = Reference(pack=tmp_path, table=tmp_path, loss=float(total / targets), gradients=wanted)
    plain.check(result.training_loss, kept.gradients)


def test_another_loss(tmp_path: Path) -> None:
    import trl

    class ExactSFTTrainer(ExactLossMixin, trl.SFTTrainer):  # type: ignore[misc]
        pass

    with pytest.raises(ValueError, match="loss_type"):
        ExactSFTTrainer(
            make_llama(),
            trl.SFTConfig(str(tmp_path), loss_type="dft", **CPU),
            train_dataset=hf_dataset_of_one(),
            processing_class=make_tokenizer(),
        )


def hf_dataset_of_one() -> Any:
    import datasets

    return datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]]})
