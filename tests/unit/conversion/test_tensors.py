from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_exact.conversion.checkpoint_layout import names_of
from megatron_exact.conversion.tensors import row_runs, runs_of_part, runs_of_rows
from megatron_exact.model.family import TensorName
from megatron_exact.model.shapes import ModelShape
from tests.unit.conversion.small_models import QWEN

UNTIED = dataclasses.replace(QWEN, tied_embeddings=False)
PHI3 = {"architecture": "phi3", "qkv_bias": False}  # query, key and value are one tensor


def fuse(name: TensorName, parts: Sequence[Tensor], shape: ModelShape) -> Tensor:
    """Fuse the parts of one layer, in memory."""
    return torch.cat(
        [parts[run.part][run.part_row : run.part_row + run.rows] for run in row_runs(name, shape)]
    )


def split(name: TensorName, fused: Tensor, shape: ModelShape) -> list[Tensor]:
    """Undo `fuse`."""
    parts = [fused.new_empty(part.lengths) for part in name.parts]
    for run in row_runs(name, shape):
        parts[run.part][run.part_row : run.part_row + run.rows] = fused[run.row : run.row + run.rows]
    return parts


def shape_of(groups: int, heads_a_group: int, head_dim: int, ffn: int) -> ModelShape:
    return dataclasses.replace(
        UNTIED,
        num_query_groups=groups,
        num_attention_heads=groups * heads_a_group,
        head_dim=2 * head_dim,
        ffn_hidden_size=ffn,
        hidden_size=5,
    )


shapes = st.builds(shape_of, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 9))


def numbered_parts(name: TensorName) -> list[Tensor]:
    """Parts in which no two elements are equal."""
    parts, start = [], 0
    for part in name.parts:
        lengths = part.lengths
        size = int(torch.tensor(lengths).prod())
        parts.append(torch.arange(start, start + size).view(lengths))
        start += size
    return parts


def plain(name: TensorName, parts: list[Tensor], shape: ModelShape) -> Tensor:
    """The definition, head by head: each key/value head with its query heads before it."""
    if name.fusion == "stacked":
        return torch.cat(parts)
    query, key, value = parts if len(parts) == 3 else parts[0].split(name.parts[0].sections)
    rows = []
    for group in range(shape.num_query_groups):
        heads = shape.num_attention_heads // shape.num_query_groups
        for head in range(group * heads, (group + 1) * heads):
            rows.append(query[head * shape.head_dim : (head + 1) * shape.head_dim])
        for part in (key, value):
            rows.append(part[group * shape.head_dim : (group + 1) * shape.head_dim])
    return torch.cat(rows)


KEYS = [
    *(name.megatron for name in names_of(UNTIED)),
    *(
        f"phi3 {name.megatron}"
        for name in names_of(dataclasses.replace(UNTIED, **PHI3))
        if "linear" in name.megatron
    ),
]


def name_of(key: str, shape: ModelShape) -> TensorName:
    if key.startswith("phi3 "):
        key, shape = key.removeprefix("phi3 "), dataclasses.replace(shape, **PHI3)
    (name,) = (name for name in names_of(shape) if name.megatron == key)
    return name


@pytest.mark.parametrize("key", KEYS)
@given(shape=shapes)
@settings(deadline=None, max_examples=25)
def test_fuse_is_the_definition_and_split_its_inverse(key: str, shape: ModelShape) -> None:
    name = name_of(key, shape)
    parts = numbered_parts(name)
    fused = fuse(name, parts, shape)
    assert torch.equal(fused, plain(name, parts, shape))
    assert all(map(torch.equal, split(name, fused, shape), parts))


@pytest.mark.parametrize("key", KEYS)
@given(shape=shapes, data=st.data())
@settings(deadline=None, max_examples=25)
def test_any_rows_come_from_the_runs(key: str, shape: ModelShape, data: st.DataObject) -> None:
    name = name_of(key, shape)
    parts = numbered_parts(name)
    fused = plain(name, parts, shape)
    runs = row_runs(name, shape)

    def window(rows: int) -> tuple[int, int]:
        low, high = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
        return low, high

    start, stop = window(len(fused))
    taken = [parts[r.part][r.part_row : r.part_row + r.rows] for r in runs_of_rows(runs, start, stop)]
    assert torch.equal(torch.cat([fused[:0], *taken]), fused[start:stop])

    number = data.draw(st.integers(0, len(parts) - 1))
    start, stop = window(len(parts[number]))
    taken = torch.full_like(parts[number][start:stop], -1)
    for r in runs_of_part(runs, number, start, stop):
        taken[r.part_row - start : r.part_row - start + r.rows] = fused[r.row : r.row + r.rows]
    assert torch.equal(taken, parts[number][start:stop])


def test_the_order_of_parts_matters() -> None:
    """Negative control: exchanged parts of equal shape give another tensor."""
    shape = shape_of(2, 1, 2, 4)  # one query head a group: q, k and v have the same shape
    for name in names_of(shape):
        if len(name.parts) == 1:
            continue
        parts = numbered_parts(name)
        assert not torch.equal(fuse(name, parts[::-1], shape), plain(name, parts, shape))
