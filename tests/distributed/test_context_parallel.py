"""Context-parallel attention against plain attention over the whole stream, on real ranks."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import ranks

HEADS, GROUPS, DIM = 4, 2, 8
BASE, FACTOR = 500_000, 32.0
STREAMS = [(40,), (9, 1, 23, 7), (10, 10, 10, 10), (3, 36, 1)]


def frequencies(*, is_scaled: bool) -> Tensor:
    """[D / 2], from the formulas of Llama 3 (low 1, high 4, original length 8192)."""
    values = []
    for pair in range(DIM // 2):
        frequency = BASE ** (-2 * pair / DIM)
        wavelength = 2 * math.pi / frequency
        if is_scaled:
            smooth = min(1.0, max(0.0, (8192 / wavelength - 1) / (4 - 1)))
            frequency = (1 - smooth) * frequency / FACTOR + smooth * frequency
        values.append(frequency)
    return torch.tensor(values, dtype=torch.float64)


def rotated(states: Tensor, positions: Tensor, *, is_scaled: bool) -> Tensor:
    """[tokens, heads, D] turned pair by pair, the pairs being halves of the head."""
    angles = torch.outer(positions.double(), frequencies(is_scaled=is_scaled))[:, None]
    first, second = states.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def plain(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], *, is_scaled: bool
) -> Tensor:
    """Dense attention over the stream with an explicit mask."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    query, key = (rotated(part, positions, is_scaled=is_scaled) for part in (query, key))
    key, value = (part.repeat_interleave(HEADS // GROUPS, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(DIM)
    order = torch.arange(sum(lengths))
    visible = (segment[:, None] == segment) & (order[:, None] >= order)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def inputs(tokens: int) -> tuple[list[Tensor], Tensor]:
    """Query, key and value of the whole stream, and a gradient of the output, float64."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    *states, gradient = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in [*shapes, (tokens, HEADS * DIM)]
    )
    return states, gradient


def attention(*, is_scaled: bool) -> Any:
    """The module as the layer spec builds it."""
    from megatron.core import parallel_state

    from megatron_exact.model.context_parallel import context_parallel_attention

    transformer = types.SimpleNamespace(
        kv_channels=DIM,
        rotary_interleaved=False,
        use_cpu_initialization=True,
        apply_rope_fusion=False,
        multi_latent_attention=False,
        no_rope_freq=None,
    )
    config = types.SimpleNamespace(
        transformer=transformer,
        rotary_percent=1.0,
        rotary_base=BASE,
        seq_len_interpolation_factor=None,
        rope_scaling=is_scaled,
        rope_scaling_factor=FACTOR,
    )
    groups = types.SimpleNamespace(cp=parallel_state.get_context_parallel_group())
    return context_parallel_attention(config)(
        config=transformer, layer_number=1, attn_mask_type=None, attention_type="self", pg_collection=groups
    )


def measure(lengths: tuple[int, ...], *, is_scaled: bool, expect_scaled: bool) -> dict[str, float]:
    """Largest absolute difference of output and gradients on this rank."""
    from megatron_exact.training.batch import packed_seq_params, tokens_of_this_rank

    def own(part: Tensor) -> Tensor:
        sliced: Tensor = tokens_of_this_rank({"part": part.detach()[None]})["part"][0]
        return sliced

    states, gradient = inputs(sum(lengths))
    boundaries = torch.tensor([[0, *torch.tensor(lengths).cumsum(0).tolist()]], dtype=torch.int32)
    packing = packed_seq_params(boundaries, max(lengths), sum(lengths))
    ours = [own(part).requires_grad_() for part in states]
    output = attention(is_scaled=is_scaled)(*ours, packed_seq_params=packing)
    output.backward(own(gradient))
    theirs = [part.requires_grad_() for part in states]
    expected = plain(*theirs, lengths, is_scaled=expect_scaled)
    expected.backward(gradient)
    pairs = {"output": (output, own(expected))}
    for name, a, b in zip(("query", "key", "value"), ours, theirs, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        pairs[name] = (a.grad, own(b.grad))
    return {name: float((a - b).detach().abs().max()) for name, (a, b) in pairs.items()}


def job(work: Callable[[], None], size: int) -> Callable[[], None]:
    """`work` on ranks that are one context-parallel group."""

    def start() -> None:
        from megatron.core import parallel_state

        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(context_parallel_size=size)
        work()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    return start


# upstream makes its angles in float32: positions below 40, angles to 1e-6
@pytest.mark.parametrize("size", [2, 4])
def test_values_and_gradients_against_plain_attention(size: int, tmp_path: Path) -> None:
    def work() -> None:
        from megatron_exact.model import context_parallel

        context_parallel.QUERY_BLOCK = 3
        for lengths in STREAMS:
            for is_scaled in (False, True):
                found = measure(lengths, is_scaled=is_scaled, expect_scaled=is_scaled)
                assert max(found.values()) < 2e-5, (lengths, is_scaled, found)
        control = measure(STREAMS[1], is_scaled=True, expect_scaled=False)
        assert min(control["query"], control["key"]) > 2e-4, control

    ranks.run_ranks(size, job(work, size), tmp_path).check()
