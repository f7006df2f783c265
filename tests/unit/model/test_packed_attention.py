from __future__ import annotations

import math
import types

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_exact.model.layer_specs import RMSNorm
from megatron_exact.model.packed_attention import PackedAttention, attend_by_segment

HEADS, GROUPS, DIM = 6, 2, 8
LENGTHS = [(5,), (1, 1, 1), (7, 1, 19, 5), (3, 0, 4)]


def packing(lengths: tuple[int, ...]) -> PackedSeqParams:
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def plain(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Attention position by position, float64."""
    rows = []
    start = 0
    for length in lengths:
        for i in range(start, start + length):
            heads = []
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = key[start : i + 1, group] @ query[i, head] / math.sqrt(DIM)
                heads.append(torch.softmax(scores, 0) @ value[start : i + 1, group])
            rows.append(torch.stack(heads))
        start += length
    return torch.stack(rows)


def inputs(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(tokens, n, DIM, dtype=torch.float64, generator=generator).requires_grad_()
        for n in (HEADS, GROUPS, GROUPS)
    ]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_values_and_gradients_against_plain_attention(lengths: tuple[int, ...]) -> None:
    ours, theirs = inputs(sum(lengths)), inputs(sum(lengths))
    output = attend_by_segment(*ours, packing(lengths), 1 / math.sqrt(DIM))
    expected = plain(*theirs, lengths)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    output.backward(upstream)
    expected.backward(upstream)
    for name, a, b in zip(("query", "key", "value"), ours, theirs, strict=True):
        torch.testing.assert_close(
            a.grad, b.grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_boundaries_matter() -> None:
    """Negative control for the test above."""
    query, key, value = inputs(8)
    parted = attend_by_segment(query, key, value, packing((3, 5)), 1.0)
    whole = attend_by_segment(query, key, value, packing((8,)), 1.0)
    torch.testing.assert_close(parted[:3], whole[:3], rtol=1e-12, atol=1e-12)
    assert (parted[3:] - whole[3:]).abs().max() > 0.1


def core_attention() -> PackedAttention:
    return PackedAttention(types.SimpleNamespace(kv_channels=DIM), 1, None, "self")


def test_module_flattens_heads_and_refuses_dense_masks() -> None:
    attention = core_attention()
    query, key, value = inputs(8)
    assert attention(query, key, value, packed_seq_params=packing((3, 5))).shape == (8, HEADS * DIM)
    with pytest.raises(ValueError, match="without packed_seq_params"):
        attention(query, key, value)
    with pytest.raises(ValueError, match="dense attention mask"):
        attention(query, key, value, torch.ones(1), packed_seq_params=packing((3, 5)))


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_rms_norm(sequence_parallel: bool) -> None:
    config = types.SimpleNamespace(params_dtype=torch.float32, sequence_parallel=sequence_parallel)
    norm = RMSNorm(config, 16, eps=1e-6)
    assert norm.weight.sequence_parallel is sequence_parallel
    with torch.no_grad():
        norm.weight.normal_()
    hidden = torch.randn(3, 2, 16) * 5
    x = hidden.double()
    expected = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * norm.weight.double()
    torch.testing.assert_close(norm(hidden).double(), expected, rtol=1e-6, atol=1e-6)
    assert norm(hidden.bfloat16()).dtype == torch.float32  # the weight's dtype decides, as in Llama
