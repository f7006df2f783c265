"""The table of `benchmarks/row_balance.py` is the one on its page, and its plan is the packer's."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from row_balance import page_table, planned_arrays

from megatron_exact.data.attention_work import row_pairs

PAGE = Path(__file__).resolve().parents[3] / "docs" / "sharing_attention.md"


def test_the_page_has_the_table() -> None:
    assert page_table() in PAGE.read_text()


def test_planned_rows_contain_every_token_once() -> None:
    lengths = np.array([5000, 300, 20, 1024, 700, 1], dtype=np.int32)
    arrays = planned_arrays(lengths, 1024, seed=1)
    offsets, tokens = arrays["row_offsets"], arrays["segment_tokens"]
    rows = [tokens[first:last].tolist() for first, last in pairwise(offsets)]
    assert sum(map(sum, rows)) == int(lengths.sum())
    assert max(map(sum, rows)) == 1024
    assert row_pairs(arrays, row_tokens=1024).max() == 1024 * 1025 // 2  # a row of one document
