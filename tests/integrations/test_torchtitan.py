"""torchtitan's own Llama 3, losses, whole and chunked, and text loader against a step on Megatron.

Flex attention has no backward pass on CPUs: here a masked softmax takes the place of that kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_exact.integrations.exposure_table import ExposureCounter, make_table, write_table
from tests.distributed import hf_models, jobs
from tests.integrations.conftest import BOUND, GROUPS, HEADS, LLAMA, Reference, make_llama

pytestmark = pytest.mark.integrations
HIDDEN, VOCABULARY = hf_models.SIZES["hidden_size"], hf_models.SIZES["vocab_size"]


@pytest.fixture(autouse=True)
def attention_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import create_mask
    from torchtitan.models.common.attention import FlexAttention

    def masked(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, scale: Any, **_: Any) -> Any:
        mask = create_mask(block_mask.mask_mod, q.shape[0], 1, q.shape[2], k.shape[2], device="cpu")
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return out, SimpleNamespace(lse=None)

    monkeypatch.setattr(FlexAttention, "_compiled_flex_attn", staticmethod(masked))


def make_model() -> tuple[Any, Any]:
    """torchtitan's model with the weights of the tests, and its adapter of names."""
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.llama3 import Llama3Model, Llama3StateDictAdapter, _build_llama3_layers

    rope = ComplexRoPE.Config(
        dim=LLAMA["head_dim"], max_seq_len=jobs.ROW_TOKENS, theta=10000.0, scaling="none"
    )
    config = Llama3Model.Config(
        dim=HIDDEN,
        vocab_size=VOCABULARY,
        tok_embeddings=Embedding.Config(
            num_embeddings=VOCABULARY, embedding_dim=HIDDEN, param_init=llama3._EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=HIDDEN, param_init=llama3._NORM_INIT),
        lm_head=Linear.Config(
            in_features=HIDDEN, out_features=VOCABULARY, param_init=llama3._output_linear_init(HIDDEN)
        ),
        layers=_build_llama3_layers(
            n_layers=hf_models.SIZES["num_hidden_layers"],
            dim=HIDDEN,
            n_heads=HEADS,
            n_kv_heads=GROUPS,
            hidden_dim=hf_models.SIZES["intermediate_size"],
            rope=rope,
            fuse_qkv=False,
            attn_backend="flex",
        ),
    )
    model = config.build().double()
    adapter = Llama3StateDictAdapter(config, None)
    weights = {name: value.detach() for name, value in make_llama().named_parameters()}
    missing = model.load_state_dict(adapter.from_hf(weights), strict=False)
    assert not missing.unexpected_keys
    assert not [name for name in missing.missing_keys if name.endswith("weight")]
    return model, adapter


def step(loss_fn: Any, rows: list[dict[str, Tensor]], *, chunked: bool = False, **change: Any) -> Any:
    """Loss and gradients of two micro-batches of two rows, as torchtitan's Trainer computes them."""
    model, adapter = make_model()
    if chunked:
        loss_fn.set_lm_head(model.lm_head)  # as torchtitan's Trainer does
        model._skip_lm_head = True
    valid = sum((row["labels"] != -100).sum() for row in rows)
    total = 0.0
    for first in range(0, len(rows), 2):
        batch = torch.utils.data.default_collate(rows[first : first + 2])
        positions = batch["position_ids"]
        masks = model.get_attention_masks(positions=positions)
        pred = model(batch["tokens"], positions=positions, attention_masks=masks)
        kwargs = {"positions": positions, **change}
        loss, _ = loss_fn(pred, batch["labels"], valid, **kwargs)
        loss.backward()
        total += loss.item()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return total, adapter.to_hf(gradients)


def config_of(table: Path, **options: Any) -> Any:
    from megatron_exact.integrations.torchtitan_loss import ExactCrossEntropyLoss

    return ExactCrossEntropyLoss.Config(exposure_table=str(table), labels="row", **options)


def test_rows_of_a_pack(step_on_megatron: Callable[[str, str], Reference]) -> None:
    from torchtitan.components.loss import CrossEntropyLoss

    from megatron_exact.integrations.torchtitan_loss import ExactChunkedLoss

    reference = step_on_megatron("best-fit", "exact")
    rows = reference.rows()
    loss, gradients = step(config_of(reference.table).build(), rows)
    reference.check(loss, gradients)
    chunks = ExactChunkedLoss.Config(num_chunks=4, loss_fn=config_of(reference.table))
    loss, gradients = step(chunks.build(), rows, chunked=True)
    reference.check(loss, gradients)

    _, stock = step(CrossEntropyLoss.Config().build(), rows)
    assert max(reference.difference(stock).values()) > 1000 * BOUND
    of_rows = torch.arange(jobs.ROW_TOKENS).expand(2, -1)
    _, wrong = step(config_of(reference.table).build(), rows, positions=of_rows)
    assert max(reference.difference(wrong).values()) > 1000 * BOUND


def test_validation_is_torchtitans(tmp_path: Path) -> None:
    from torchtitan.components.loss import CrossEntropyLoss

    write_table(make_table(64, [5, 6, 7, 8]), tmp_path / "table.json")
    logits, labels = torch.randn(2, 64, 9), torch.randint(0, 9, (2, 64))
    labels[0, :5] = -100
    with torch.no_grad():
        ours, _ = config_of(tmp_path / "table.json", alpha=4.0).build()(logits, labels)
        theirs, _ = CrossEntropyLoss.Config().build()(logits, labels)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_its_text_loader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torchtitan's own loader with labels="document": every target lies in the document of its input."""
    import datasets
    from torchtitan.hf_datasets import DatasetConfig, text_datasets

    from megatron_exact.integrations.torchtitan_loss import ExactCrossEntropyLoss

    class Tokenizer:
        def encode(self, text: str, **_: Any) -> list[int]:
            number, length = map(int, text.split())
            return [number] * length  # every token names its document

    texts = [f"{number} {length}" for number, length in enumerate((90, 20, 41, 9, 45, 50, 12, 64, 70))]
    local = DatasetConfig(
        path="",
        loader=lambda _: datasets.Dataset.from_dict({"text": texts}),
        sample_processor=lambda sample: sample["text"],
    )
    monkeypatch.setitem(text_datasets.DATASETS, "local", local)
    counter = ExposureCounter(64, labels="document")
    rows = list(text_datasets.HuggingFaceTextDataset("local", None, Tokenizer(), seq_len=64))
    context: list[list[int]] = []
    for batch, labels in rows:
        assert torch.equal(batch["input"], labels), "a target of another document"
        tokens = batch["input"].tolist()
        context.append([tokens[: place + 1].count(token) for place, token in enumerate(tokens)])
        counter.add(batch["positions"], labels != -100)
    write_table(counter.table(), tmp_path / "table.json")
    assert counter.table().counts == tuple(
        sum(low <= each < high for row in context for each in row)
        for low, high in ((0, 8), (8, 16), (16, 32), (32, 65))
    )
    loss = ExactCrossEntropyLoss.Config(exposure_table=str(tmp_path / "table.json")).build()
    weigh = loss.target_weights
    positions = torch.stack([batch["positions"] for batch, _ in rows])
    expected = torch.from_numpy(weigh.weighting.row_weights.of_context)[torch.tensor(context)]
    assert torch.equal(weigh(positions), expected)
    as_row = config_of(tmp_path / "table.json").build().target_weights(positions)
    assert not torch.equal(as_row, expected), "document ends have their context"


def test_the_example_and_its_errors(tmp_path: Path) -> None:
    from examples.integrations.torchtitan_llama3 import llama3_8b_exact

    path = tmp_path / "table.json"
    write_table(make_table(64, [5, 6, 7, 8]), path)
    loss = llama3_8b_exact(str(path)).loss.build()
    assert loss.loss_fn.target_weights.labels == "document"
    with pytest.raises(ValueError, match=r"no positions.*pipeline"):
        loss(torch.zeros(1, 64, 8, requires_grad=True), torch.zeros(1, 64, dtype=torch.long))
    with pytest.raises(ValueError, match="sum of weights"):
        config_of(path, rule="exact-normalized").build()
