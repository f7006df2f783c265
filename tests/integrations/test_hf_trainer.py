"""transformers' own Trainer with the mix-in against a step on Megatron: loss, gradients, ranks, errors."""

from __future__ import annotations

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
from tests.distributed import jobs, ranks
from tests.integrations.conftest import BOUND, SEED, Reference, make_llama

Step = tuple[float, dict[str, Tensor]]


def first_step(folder: Path, rows: Any, *, ranks: int = 1, **options: Any) -> Step:
    """Loss and gradients of the first step of a Trainer over four rows, two micro-batches a rank."""
    import transformers

    class ExactTrainer(ExactLossMixin, transformers.Trainer):  # type: ignore[misc]
        pass

    class Keep(transformers.TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            named = ((n.removeprefix("module."), p) for n, p in model.named_parameters())
            self.gradients = {name: p.grad.clone() for name, p in named}

    keep = Keep()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=jobs.GLOBAL_BATCH // (2 * ranks),
        gradient_accumulation_steps=2,
        max_grad_norm=0,
        logging_steps=1,  # the loss of all ranks; without a log it is that of one
        learning_rate=1e-3,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options.pop("arguments", {}),
    )
    options.setdefault("data_collator", PaddingFreeCollator())
    trainer = ExactTrainer(make_llama(), arguments, train_dataset=rows, callbacks=[keep], **options)
    return trainer.train().training_loss, keep.gradients


def test_positions_of_rows(step_on_megatron: Callable[[str, str], Reference], tmp_path: Path) -> None:
    reference = step_on_megatron("best-fit", "exact")
    rows = reference.rows()
    loss, gradients = first_step(tmp_path, rows, target_weights=TargetWeights(reference.table))
    reference.check(loss, gradients)

    _, unweighted = first_step(tmp_path, rows, target_weights=TargetWeights(reference.table, "none"))
    assert max(reference.difference(unweighted).values()) > 1000 * BOUND

    class OfRows(TargetWeights):  # a table counted over documents, positions of the row
        def __call__(self, position_ids: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
            return super().__call__(torch.arange(position_ids.shape[-1])[None] % self.row_tokens)

    _, of_rows = first_step(tmp_path, rows, target_weights=OfRows(reference.table))
    assert max(reference.difference(of_rows).values()) > 1000 * BOUND


def test_weights_of_a_pack_divided_by_their_mass(
    step_on_megatron: Callable[[str, str], Reference], tmp_path: Path
) -> None:
    """Row ends and the mass of two micro-batches; the rows come from a Hugging Face dataset."""
    reference = step_on_megatron("concat", "exact-normalized")
    packed = PackedRows(reference.pack, rule="exact-normalized", order_seed=SEED)
    assert packed.divides_by_mass
    stored = hf_dataset(packed, cache_dir=tmp_path / "cache").select(range(jobs.GLOBAL_BATCH))
    streamed = next(iter(hf_dataset(packed, streaming=True)))
    assert streamed == stored[0]
    reference.check(*first_step(tmp_path, stored, divides_by_mass=True))
    _, gradients = first_step(tmp_path, stored)
    assert max(reference.difference(gradients).values()) > 1000 * BOUND, "the mass changes nothing"


def test_two_ranks(step_on_megatron: Callable[[str, str], Reference], tmp_path: Path) -> None:
    reference = step_on_megatron("best-fit", "exact")
    rows = reference.rows()
    targets = [int(row["loss_mask"].sum()) for row in rows]
    assert len(set(targets)) > 1, "ranks with equally many targets cannot be told apart"

    def work() -> None:
        weights = TargetWeights(reference.table)
        loss, gradients = first_step(tmp_path / "run", rows, ranks=2, target_weights=weights)
        if torch.distributed.get_rank() == 0:
            torch.save((loss, gradients), tmp_path / "step.pt")

    ranks.run_ranks(2, work, tmp_path).check()
    loss, gradients = torch.load(tmp_path / "step.pt", weights_only=True)
    reference.check(loss, gradients)


def test_the_example(
    start: Path, step_on_megatron: Callable[[str, str], Reference], tmp_path: Path
) -> None:
    from examples.integrations import transformers_trainer

    pack = step_on_megatron("best-fit", "exact").pack
    result = transformers_trainer.main(
        *(str(path) for path in (start / "hf", pack, tmp_path)),
        use_cpu=True,
        max_steps=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    assert result.global_step == 2
    assert result.training_loss == pytest.approx(torch.log(torch.tensor(100.0)).item() * 1.1, rel=0.15)
    for path in Path(transformers_trainer.__file__).parent.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path


def test_documents_without_a_pack(tmp_path: Path) -> None:
    """Documents, weights from their lengths, against transformers' losses one document at a time."""
    generator = torch.Generator().manual_seed(5)
    documents = [
        {"input_ids": torch.randint(0, 96, (length,), generator=generator).tolist()}
        for length in (60, 17, 33, 9)
    ]
    counter = ExposureCounter(64)
    counter.add_lengths(len(document["input_ids"]) for document in documents)
    weigh = TargetWeights(counter.table(), padding_free=True, alpha=0.5)
    by_context = weigh.weighting.row_weights.of_context  # type: ignore[attr-defined]
    loss, gradients = first_step(tmp_path, documents, target_weights=weigh)

    model = make_llama()
    total, targets = torch.zeros(()), 0
    for document in documents:
        tokens = torch.tensor(document["input_ids"])
        logits = model(tokens[None], use_cache=False).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
        total = total + (losses * torch.from_numpy(by_context[1 : len(tokens)])).sum()
        targets += len(tokens) - 1
    (total / targets).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    plain = Reference(pack=tmp_path, table=tmp_path, loss=float(total / targets), gradients=wanted)
    plain.check(loss, gradients)
    ones = TargetWeights(counter.table(), "none", padding_free=True)
    _, unweighted = first_step(tmp_path, documents, target_weights=ones)
    assert max(plain.difference(unweighted).values()) > 1000 * BOUND


def test_the_collator_is_that_of_transformers() -> None:
    from transformers import DataCollatorWithFlattening

    documents = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9], "labels": [8, -100]},
    ]
    ours = PaddingFreeCollator(flash_attention=True)(documents)
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(documents)
    assert set(ours) - set(theirs) == {"shift_labels"}
    for name, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(value)), name
    assert ours["shift_labels"].tolist() == [[6, 7, -100, -100, -100]]


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"labels": [1]}, "no input_ids.*remove_unused_columns=False"),
        ({"input_ids": [1], "position_ids": [0]}, "no shift_labels.*remove_unused_columns=False"),
    ],
)
def test_columns_that_the_trainer_removed(feature: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PaddingFreeCollator()([feature])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
    ],
)
def test_losses_that_are_not_supported(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    weigh = TargetWeights(_table())
    with pytest.raises((ValueError, ImportError), match=message):
        first_step(tmp_path, [], target_weights=weigh, arguments=arguments)


def test_batches_without_weights_or_positions(tmp_path: Path) -> None:
    documents = [{"input_ids": list(range(20)), "labels": list(range(20))}] * 4
    with pytest.raises(ValueError, match="no target_weights"):
        first_step(tmp_path, documents)

    def without_positions(features: Any) -> Any:
        batch = PaddingFreeCollator()(features)
        del batch["position_ids"]
        return batch

    weigh = TargetWeights(_table(), padding_free=True)
    with pytest.raises(ValueError, match="position of each token inside its document"):
        first_step(tmp_path, documents, target_weights=weigh, data_collator=without_positions)


def test_evaluation_is_not_weighted(tmp_path: Path) -> None:
    import transformers

    class ExactTrainer(ExactLossMixin, transformers.Trainer):  # type: ignore[misc]
        pass

    documents = [{"input_ids": list(range(4, 60))}] * 2
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, remove_unused_columns=False, report_to=[], disable_tqdm=True
    )

    def evaluated(**weights: Any) -> float:
        trainer = ExactTrainer(make_llama(), arguments, data_collator=PaddingFreeCollator(), **weights)
        return float(trainer.evaluate(documents)["eval_loss"])

    weigh = TargetWeights(_table(), padding_free=True, alpha=4.0)
    assert evaluated(target_weights=weigh) == evaluated()


def _table() -> Any:
    counter = ExposureCounter(64)
    counter.add_lengths([60, 20])
    return counter.table()
