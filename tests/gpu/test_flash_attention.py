"""The GPU path of the packed attention. Not run where it was written: there was no GPU."""

from __future__ import annotations

import math
import types

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    # not torch.cuda.is_available(), which the CPU runtime of other tests answers with yes
    pytest.mark.skipif(torch._C._cuda_getDeviceCount() == 0, reason="needs a CUDA device"),
]


@pytest.mark.parametrize("lengths", [(128,), (7, 1, 300, 90)])
def test_flash_agrees_with_segments_in_bfloat16(lengths: tuple[int, ...]) -> None:
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_exact.model.packed_attention import attend_by_segment, attend_with_flash

    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32).cuda()
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    query, key, value = (
        torch.randn(sum(lengths), n, 64, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2)
    )
    flash = attend_with_flash(query, key, value, packing, 1 / math.sqrt(64))
    exact = attend_by_segment(query.float(), key.float(), value.float(), packing, 1 / math.sqrt(64))
    torch.testing.assert_close(flash.float(), exact, rtol=2e-2, atol=2e-2)
    query_changed = query.clone()
    query_changed[0] += 1
    if len(lengths) > 1:  # nothing of the first document reaches the others
        changed = attend_with_flash(query_changed, key, value, packing, 1 / math.sqrt(64))
        assert torch.equal(changed[lengths[0] :], flash[lengths[0] :])


@pytest.mark.parametrize("lengths", [(512,), (5, 200, 1, 250, 56)])
def test_flash_aligns_cut_segments_at_their_end(lengths: tuple[int, ...]) -> None:
    """The spans of a context-parallel rank: fewer queries than keys in the first segment of each."""
    from megatron_exact.model.context_parallel import local_tokens
    from megatron_exact.model.packed_attention import attend_by_segment, attend_with_flash

    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32).cuda()
    query, key, value = (
        torch.randn(sum(lengths), n, 64, device="cuda", dtype=torch.bfloat16) for n in (8, 2, 2)
    )
    scale = 1 / math.sqrt(64)
    whole = types.SimpleNamespace(cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries)
    exact = attend_by_segment(query.float(), key.float(), value.float(), whole, scale)
    for rank in range(2):
        for span in local_tokens(boundaries, 2, rank).spans:
            seen = slice(span.key_start, span.end)
            flash = attend_with_flash(
                query[span.start : span.end], key[seen], value[seen], span.packing, scale
            )
            torch.testing.assert_close(flash.float(), exact[span.start : span.end], rtol=2e-2, atol=2e-2)
