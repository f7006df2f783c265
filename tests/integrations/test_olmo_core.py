"""OLMo-core's own model and train module against a step on Megatron.

Its attention masks documents in flash attention alone, which needs a GPU: here a masked softmax takes the
place of that kernel. Everything else is OLMo-core's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_exact.integrations.target_weights import TargetWeights
from tests.distributed import hf_models, jobs, ranks
from tests.integrations.conftest import BOUND, GROUPS, HEADS, Reference, make_llama

pytestmark = pytest.mark.integrations

NAMES = {
    "embeddings.weight": "model.embed_tokens.weight",
    "lm_head.norm.weight": "model.norm.weight",
    "lm_head.w_out.weight": "lm_head.weight",
    "blocks.{}.attention.w_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.{}.attention.w_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.{}.attention.w_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.{}.attention.w_out.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blocks.{}.feed_forward_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "blocks.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
}
LAYERS = range(hf_models.SIZES["num_hidden_layers"])
TO_HF = {ours.format(layer): theirs.format(layer) for ours, theirs in NAMES.items() for layer in LAYERS}


@pytest.fixture(autouse=True)
def documents_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    from olmo_core.nn.attention.backend import TorchAttentionBackend

    stock = TorchAttentionBackend.forward

    def forward(self: Any, qkv: Any, cu_doc_lens: Tensor | None = None, **kwargs: Any) -> Tensor:
        kwargs.pop("max_doc_len", None)
        if cu_doc_lens is None:
            return stock(self, qkv, **kwargs)
        rows, size = qkv[0].shape[:2]
        document = torch.repeat_interleave(
            torch.arange(cu_doc_lens.numel() - 1), cu_doc_lens.diff().long()
        ).view(rows, size)
        mask = (document[:, :, None] == document[:, None]) & torch.ones(size, size).tril().bool()
        q, k, v = (part.transpose(1, 2) for part in qkv)
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        return out.transpose(1, 2).contiguous()

    monkeypatch.setattr(TorchAttentionBackend, "forward", forward)


def make_model() -> Any:
    """OLMo-core's Llama; the train module initializes its weights."""
    from olmo_core.nn.feed_forward import FeedForwardConfig
    from olmo_core.nn.transformer import TransformerConfig

    return TransformerConfig.llama_like(
        d_model=hf_models.SIZES["hidden_size"],
        vocab_size=hf_models.SIZES["vocab_size"],
        n_layers=len(LAYERS),
        n_heads=HEADS,
        n_kv_heads=GROUPS,
        rope_theta=10_000,
        layer_norm_eps=1e-5,
        feed_forward=FeedForwardConfig(hidden_size=hf_models.SIZES["intermediate_size"], bias=False),
    ).build(init_device="cpu")


def batch_of(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Rows as OLMo-core's collator gives them."""
    lengths = [row["cu_seqlens"].unique_consecutive().diff() for row in rows]
    return {
        "input_ids": torch.stack([row["tokens"] for row in rows]),
        "labels": torch.stack([row["labels"] for row in rows]),
        "doc_lens": torch.nn.utils.rnn.pad_sequence(lengths, batch_first=True),
        "max_doc_lens": [int(each.max()) for each in lengths],
    }


def step(
    weigh: TargetWeights | None, rows: list[dict[str, Tensor]], *, change: Any = None, **options: Any
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of `train_batch`, two micro-batches a rank."""
    from olmo_core.optim import AdamWConfig
    from olmo_core.train.train_module import TransformerTrainModule

    from megatron_exact.integrations.olmo_train_module import ExactTransformerTrainModule

    settings = {
        "rank_microbatch_size": jobs.ROW_TOKENS * len(rows) // 2,
        "max_sequence_length": jobs.ROW_TOKENS,
        "device": torch.device("cpu"),
        **options,
    }
    optimizer = AdamWConfig(lr=1e-3)
    if weigh is None:
        module = TransformerTrainModule(make_model(), optimizer, **settings)
    else:
        module = ExactTransformerTrainModule(make_model(), optimizer, target_weights=weigh, **settings)
    named = {TO_HF[name.removeprefix("module.")]: p for name, p in module.model.named_parameters()}
    with torch.no_grad():
        for name, value in make_llama().named_parameters():
            named[name].copy_(value)
    found: dict[str, Any] = {}
    module.record_metric = lambda name, value, *_, **__: found.update(
        {name: value}
    )  # no trainer is attached
    module.record_ce_loss = lambda value, *_: found.update(loss=value)
    batch = batch_of(rows)
    if change is not None:
        change(batch)
    module.train_batch(batch)
    return float(found["loss"]), {name: parameter.grad for name, parameter in named.items()}


def test_rows_of_a_pack(step_on_megatron: Callable[[str, str], Reference]) -> None:
    reference = step_on_megatron("best-fit", "exact")
    rows, weigh = reference.rows(), TargetWeights(reference.table)
    loss, gradients = step(weigh, rows)
    reference.check(loss, gradients)
    for wrong in (None, TargetWeights(reference.table, "none")):
        _, unweighted = step(wrong, rows)
        assert max(reference.difference(unweighted).values()) > 1000 * BOUND


def test_z_loss_has_no_weights(step_on_megatron: Callable[[str, str], Reference]) -> None:
    reference = step_on_megatron("best-fit", "exact")
    rows = reference.rows()
    ones = TargetWeights(reference.table, "none")
    _, ours = step(ones, rows, z_loss_multiplier=0.1)
    _, theirs = step(None, rows, z_loss_multiplier=0.1)
    _, without = step(None, rows)
    for name, wanted in theirs.items():
        assert (ours[name] - wanted).norm() <= BOUND * wanted.norm(), name
        assert (without[name] - wanted).norm() > 1000 * BOUND * wanted.norm(), name
    # the part of z-loss is the same under weights
    weigh = TargetWeights(reference.table)
    _, weighted = step(weigh, rows, z_loss_multiplier=0.1)
    for name, wanted in reference.gradients.items():
        part = weighted[name] - wanted
        expected = theirs[name] - without[name]
        assert (part - expected).norm() <= 10 * BOUND * wanted.norm() + 10 * BOUND * expected.norm(), name


def test_two_ranks(step_on_megatron: Callable[[str, str], Reference], tmp_path: Path) -> None:
    """Ranks with different numbers of targets: OLMo-core's own mean of means would differ."""
    reference = step_on_megatron("best-fit", "exact")
    rows = sorted(reference.rows(), key=lambda row: int(row["loss_mask"].sum()))
    assert rows[0]["loss_mask"].sum() + rows[1]["loss_mask"].sum() < rows[3]["loss_mask"].sum() * 2

    def step_of_ranks(weigh: TargetWeights | None) -> tuple[float, dict[str, Tensor]]:
        def work() -> None:
            from olmo_core.distributed.parallel import DataParallelType
            from olmo_core.train.train_module import TransformerDataParallelConfig

            torch.distributed.init_process_group("gloo")
            rank = torch.distributed.get_rank()
            torch.cuda.device_count = lambda: 0  # type: ignore[assignment]
            data_parallel = TransformerDataParallelConfig(name=DataParallelType.ddp)
            loss, gradients = step(weigh, rows[2 * rank : 2 * rank + 2], dp_config=data_parallel)
            total = torch.tensor(loss)
            torch.distributed.all_reduce(total)
            if rank == 0:
                torch.save((float(total) / 2, gradients), tmp_path / "step.pt")

        ranks.run_ranks(2, work, tmp_path).check()
        return torch.load(tmp_path / "step.pt", weights_only=True)  # type: ignore[no-any-return]

    reference.check(*step_of_ranks(TargetWeights(reference.table)))
    _, stock = step_of_ranks(None)
    assert max(reference.difference(stock).values()) > 1000 * BOUND


def test_the_loader_and_the_example(tmp_path: Path) -> None:
    """OLMo-core's own packing of instances gives the lengths that the example's module takes."""
    import numpy as np
    from olmo_core.data import NumpyPackedFSLDatasetConfig, TokenizerConfig
    from olmo_core.data.collator import DataCollator
    from olmo_core.data.utils import get_labels

    from examples.integrations.olmo_core_module import train_module
    from megatron_exact.integrations.exposure_table import ExposureCounter, write_table
    from megatron_exact.integrations.target_weights import positions_of_lengths

    generator = np.random.default_rng(1)
    documents = [generator.integers(0, 90, length) for length in (60, 20, 31, 9, 45, 50, 12, 64)]
    tokens = np.concatenate([np.append(document[:-1], 95) for document in documents]).astype(np.uint16)
    tokens.tofile(tmp_path / "tokens.npy")
    dataset = NumpyPackedFSLDatasetConfig(
        paths=[str(tmp_path / "tokens.npy")],
        sequence_length=64,
        tokenizer=TokenizerConfig(vocab_size=100, eos_token_id=95, pad_token_id=94),
        generate_doc_lengths=True,
        work_dir=str(tmp_path / "work"),
    ).build()
    dataset.prepare()
    batch = DataCollator(pad_token_id=94)([dataset[index] for index in range(len(dataset))])
    labels = get_labels(batch)
    counter = ExposureCounter(64)
    counter.add(positions_of_lengths(batch["doc_lens"].flatten()).view_as(labels), labels != -100)
    write_table(counter.table(), tmp_path / "table.json")
    module = train_module(make_model(), 64, str(tmp_path / "table.json"), device=torch.device("cpu"))
    weights = module.target_weights.of_lengths(batch["doc_lens"])
    assert weights.shape == labels.shape
    assert float(weights[labels != -100].mean()) == pytest.approx(
        module.target_weights.weighting.table.mean_weight, rel=1e-6
    )


def test_a_batch_without_lengths(step_on_megatron: Callable[[str, str], Reference]) -> None:
    reference = step_on_megatron("best-fit", "exact")

    def forget(batch: dict[str, Any]) -> None:
        del batch["doc_lens"], batch["max_doc_lens"]

    with pytest.raises(ValueError, match="generate_doc_lengths=True"):
        step(TargetWeights(reference.table), reference.rows(), change=forget)
