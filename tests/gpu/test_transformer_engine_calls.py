"""What upstream hands to Transformer Engine's attention for our packed rows.

Needs Transformer Engine, not a GPU: the attention layer of a model that was built from its spec runs on the
CPU, with plain matrices for the projections, and plain attention in the place of Transformer Engine's
kernel, given what the kernel would have been given. So the arguments are shown to fit its signature, and to
mean what our own attention means; that the kernel then computes it, only a GPU can show
(`test_layouts_on_gpus.py`).
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_exact.model.families import PRESETS
from tests.distributed import ranks, sharded_keys

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)

LENGTHS = (9, 1, 23, 14, 17)
SHAPE = sharded_keys.reduced(PRESETS["qwen2.5-0.5b"])


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    ranks.import_megatron_once()


class Projection(torch.nn.Module):
    """Megatron's linear layers return output and bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs))
        self.weight = torch.nn.Parameter(weight / math.sqrt(inputs))

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return hidden @ self.weight.T, None


def packing(lengths: tuple[int, ...]) -> Any:
    """As `next_packed_batch` makes it."""
    from megatron_exact.training.batch import packed_seq_params

    boundaries = torch.tensor([[0, *torch.tensor(lengths).cumsum(0).tolist()]], dtype=torch.int32)
    return packed_seq_params(boundaries, max(lengths), sum(lengths))


def attention_output(layers: str, lengths: tuple[int, ...]) -> Tensor:
    """Output of the first layer's self-attention on random hidden states, [T, 1, hidden]."""
    model = sharded_keys.build_model(SHAPE, layers, None)
    attention = model.decoder.layers[0].self_attention
    heads = SHAPE.num_attention_heads + 2 * SHAPE.num_query_groups
    attention.linear_qkv = Projection(SHAPE.hidden_size, heads * SHAPE.head_dim)
    width = SHAPE.num_attention_heads * SHAPE.head_dim
    attention.linear_proj = Projection(width, SHAPE.hidden_size)
    hidden = torch.randn(sum(lengths), 1, SHAPE.hidden_size, generator=torch.Generator().manual_seed(1))
    output, _ = attention(
        hidden,
        attention_mask=None,
        rotary_pos_emb=model.rotary_pos_emb(max(lengths), packed_seq=True),
        packed_seq_params=packing(lengths),
    )
    return output.detach()  # type: ignore[no-any-return]


def spy_on_kernel() -> list[dict[str, Any]]:
    """Replace the kernel by plain attention that believes its arguments; they are collected."""
    import transformer_engine.pytorch as te
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_exact.model.packed_attention import attend_by_segment

    signature = inspect.signature(te.DotProductAttention.forward)
    calls: list[dict[str, Any]] = []

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs).arguments  # TypeError for a name it does not know
        calls.append(given)
        told = PackedSeqParams(cu_seqlens_q=given["cu_seqlens_q"], cu_seqlens_kv=given["cu_seqlens_kv"])
        states = [given[name] for name in ("query_layer", "key_layer", "value_layer")]
        return attend_by_segment(*states, told, 1 / math.sqrt(SHAPE.head_dim)).flatten(1)

    te.DotProductAttention.forward = forward
    return calls


def in_rank(work: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    def job() -> None:
        (folder / "found.json").write_text(json.dumps(work()))

    ranks.run_ranks(1, job, folder).check()
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def described(value: Any) -> Any:
    """What can be compared: name of the type, and shape and dtype of a tensor."""
    if isinstance(value, Tensor):
        return ["Tensor", list(value.shape), str(value.dtype)]
    return [type(value).__name__, value]


def test_what_the_kernel_is_given(tmp_path: Path) -> None:
    def work() -> dict[str, Any]:
        calls = spy_on_kernel()
        attention_output("transformer_engine", LENGTHS)
        (call,) = calls
        del call["self"]
        found = {name: described(value) for name, value in call.items()}
        found["boundaries"] = [call[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_kv")]
        return found

    found = in_rank(work, tmp_path)
    tokens, dim = sum(LENGTHS), SHAPE.head_dim
    boundaries = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    assert found.pop("boundaries") == [boundaries, boundaries]
    states = {
        "query_layer": ["Tensor", [tokens, SHAPE.num_attention_heads, dim], "torch.float32"],
        "key_layer": ["Tensor", [tokens, SHAPE.num_query_groups, dim], "torch.float32"],
        "value_layer": ["Tensor", [tokens, SHAPE.num_query_groups, dim], "torch.float32"],
    }
    packed = {
        "qkv_format": ["str", "thd"],
        "attn_mask_type": ["str", "padding_causal"],
        "cu_seqlens_q": ["Tensor", [len(boundaries)], "torch.int32"],
        "cu_seqlens_kv": ["Tensor", [len(boundaries)], "torch.int32"],
        "max_seqlen_q": ["int", max(LENGTHS)],
        "max_seqlen_kv": ["int", max(LENGTHS)],
    }
    absent = ("attention_mask", "cu_seqlens_q_padded", "cu_seqlens_kv_padded", "pad_between_seqs")
    assert found == states | packed | {name: ["NoneType", None] for name in absent}


def test_it_means_what_our_own_attention_means(tmp_path: Path) -> None:
    def work() -> dict[str, Any]:
        spy_on_kernel()
        theirs = attention_output("transformer_engine", LENGTHS)
        other = attention_output("transformer_engine", (sum(LENGTHS),))
        ours = attention_output("local", LENGTHS)
        return {name: float((part - ours).abs().max()) for name, part in (("same", theirs), ("row", other))}

    found = in_rank(work, tmp_path)
    assert found["same"] < 1e-6
    assert found["row"] > 0.1, "negative control: boundaries that are not told"
