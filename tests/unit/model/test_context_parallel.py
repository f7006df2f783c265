from __future__ import annotations

import math
import types

import pytest
import torch
from torch import Tensor

from megatron_exact.model import context_parallel
from megatron_exact.model.context_parallel import (
    attend_cut_segment,
    in_stream_order,
    local_tokens,
    move_rope_into_attention,
)

HEADS, GROUPS, DIM = 6, 2, 8
# lengths of segments that add up to 24: cut at 6, 12 and 18 by two ranks, at 3, 6, ... by four
STREAMS = [(24,), (6, 6, 6, 6), (5, 1, 11, 7), (1, 22, 1), (12, 0, 12), (1,) * 24, (2, 4, 13, 5)]


def boundaries(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("lengths", STREAMS)
def test_ranks_hold_each_token_once_and_every_key_it_sees(lengths: tuple[int, ...], size: int) -> None:
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.cat([torch.arange(length) for length in lengths])
    held: list[int] = []
    for rank in range(size):
        own = local_tokens(boundaries(lengths), size, rank)
        tokens = [token for span in own.spans for token in range(span.start, span.end)]
        assert own.positions.tolist() == place[tokens].tolist()
        held += tokens
        for span in own.spans:
            queries, keys = span.packing.cu_seqlens_q.tolist(), span.packing.cu_seqlens_kv.tolist()
            assert (queries[-1], keys[-1]) == (span.end - span.start, span.end - span.key_start)
            assert (span.packing.max_seqlen_q, span.packing.max_seqlen_kv) == tuple(
                int(torch.tensor(part).diff().max()) for part in (queries, keys)
            )
            for index in range(len(queries) - 1):
                pieces = range(queries[index], queries[index + 1]), range(keys[index], keys[index + 1])
                ours, theirs = (
                    [origin + i for i in piece]
                    for origin, piece in zip((span.start, span.key_start), pieces, strict=True)
                )
                if ours:  # all of the segment up to the last query, and nothing else
                    assert theirs == [i for i in range(ours[-1] + 1) if segment[i] == segment[ours[-1]]]
            cut = span.cut_queries
            assert cut == sum(1 for i in range(span.start, span.end) if place[i] > i - span.start)
    assert sorted(held) == list(range(24))


def test_gathered_spans_return_to_the_order_of_the_stream() -> None:
    size = 4
    stream = torch.arange(24).reshape(24, 1)
    spans = stream.chunk(2 * size)
    gathered = torch.cat([torch.cat([spans[rank], spans[2 * size - 1 - rank]]) for rank in range(size)])
    assert not torch.equal(gathered, stream)
    assert torch.equal(in_stream_order(gathered, size), stream)


def test_a_stream_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"25 tokens do not divide by 2 \* 2"):
        local_tokens(boundaries((25,)), 2, 0)


def inputs(queries: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(keys)
    shapes = ((queries, HEADS), (keys, GROUPS), (keys, GROUPS))
    return [
        torch.randn(*shape, DIM, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (7, 7), (7, 19), (8, 9)])
def test_cut_segment_against_plain_attention(
    queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_parallel, "QUERY_BLOCK", 3)
    ours, theirs = inputs(queries, keys), inputs(queries, keys)
    scale = 1 / math.sqrt(DIM)
    output = attend_cut_segment(*ours, scale)
    query, key, value = theirs
    key, value = (part.repeat_interleave(HEADS // GROUPS, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    hidden = torch.arange(keys) > torch.arange(queries)[:, None] + keys - queries
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), value)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    output.backward(upstream)
    expected.backward(upstream)
    for name, a, b in zip(("query", "key", "value"), ours, theirs, strict=True):
        torch.testing.assert_close(
            a.grad, b.grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_only_rope_moves_into_the_attention() -> None:
    config = types.SimpleNamespace(position_embedding_type="rope")
    move_rope_into_attention(config)
    assert config.position_embedding_type == "none"
    with pytest.raises(ValueError, match="position-embedding-type none is not supported"):
        move_rope_into_attention(config)
