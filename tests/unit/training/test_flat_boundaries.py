from __future__ import annotations

import pytest
import torch
from megatron.core.utils import flatten_batch_for_packed_sequences

from megatron_exact.training.batch import flat_boundaries

ROWS = {
    "one row": [[0, 3, 5, 8, 8, 8]],
    "one document": [[0, 8, 8, 8, 8, 8]],
    "two rows": [[0, 3, 5, 8, 8, 8], [0, 1, 8, 8, 8, 8]],
}


@pytest.mark.parametrize("name", ROWS)
def test_boundaries_on_the_host_are_those_that_megatron_makes_on_the_device(name: str) -> None:
    rows = torch.tensor(ROWS[name], dtype=torch.int32)
    tokens = torch.zeros(len(rows), 8, dtype=torch.int64)
    batch = {"tokens": tokens, "cu_seqlens": rows, "max_seqlen": torch.tensor([8] * len(rows))}
    theirs = flatten_batch_for_packed_sequences(batch)["cu_seqlens"][0].tolist()
    assert flat_boundaries(rows) == theirs


def test_boundaries_that_have_not_arrived_are_not_known() -> None:
    assert flat_boundaries(torch.zeros(1, 6, dtype=torch.int32)) is None
