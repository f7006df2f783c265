"""Boundaries of packed rows as they are handed to the model."""

from __future__ import annotations

import pytest
import torch

from megatron_exact.training.batch import packed_seq_params, rounded


@pytest.mark.parametrize(
    ("lengths", "rows", "segments", "longest"),
    [
        ([64], 1, 16, 64),
        ([30, 34], 1, 16, 64),
        ([5] * 16, 1, 16, 8),
        ([5] * 17, 1, 32, 8),
        ([96, 96], 2, 16, 96),  # no segment is longer than a row, so nothing is rounded beyond one
    ],
)
def test_rounded_boundaries_describe_the_same_segments(
    lengths: list[int], rows: int, segments: int, longest: int
) -> None:
    tokens = sum(lengths)
    exact = torch.tensor([[0, *torch.tensor(lengths).cumsum(0).tolist()]], dtype=torch.int32)
    packing = rounded(packed_seq_params(exact, max(lengths), tokens // rows), tokens)
    assert packing.cu_seqlens_q is packing.cu_seqlens_kv
    assert packing.cu_seqlens_q.dtype == torch.int32
    found = packing.cu_seqlens_q.diff()
    assert found.numel() == segments
    assert found[found > 0].tolist() == lengths
    assert found[len(lengths) :].tolist() == [0] * (segments - len(lengths))
    assert packing.max_seqlen_q == packing.max_seqlen_kv == longest >= max(lengths)
