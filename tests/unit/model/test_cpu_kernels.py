"""Each CPU kernel against autograd's own derivative of the plain formula, in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_exact.model import cpu_kernels

BOUNDARIES = [0, 7, 8, 8, 40]


@pytest.fixture(autouse=True, params=[80, 2**17])
def small_and_large_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not divide into blocks, and all rows in one."""
    monkeypatch.setattr(cpu_kernels, "CACHED_ELEMENTS", request.param)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()


def compare(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and gradients of all inputs, at the precision of the kernel's float32 statistics."""
    output, expected = ours(*inputs), plain(*inputs)
    upstream = drawn(*expected.shape, seed=9).detach()
    torch.testing.assert_close(output, expected, rtol=2e-6, atol=2e-6)
    gradients, wanted = (torch.autograd.grad(value, inputs, upstream) for value in (output, expected))
    for gradient, reference in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=2e-6, atol=2e-5)


def plain_swiglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def test_swiglu() -> None:
    compare(lambda values: cpu_kernels.bias_swiglu(values, None), plain_swiglu, drawn(19, 1, 12))
    compare(cpu_kernels.bias_swiglu, lambda v, b: plain_swiglu(v + b), drawn(19, 1, 12), drawn(12, seed=1))


def test_rms_norm() -> None:
    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return hidden / torch.sqrt((hidden * hidden).mean(-1, keepdim=True) + 1e-5) * weight

    compare(
        lambda hidden, weight: cpu_kernels.rms_norm(hidden, weight, 1e-5),
        plain,
        drawn(19, 2, 16),
        drawn(16),
    )


def test_rms_norm_of_half_precision_rounds_where_llama_does() -> None:
    hidden, weight = drawn(33, 16).detach().bfloat16(), drawn(16, seed=1).detach().bfloat16()
    expected = F.rms_norm(hidden.float(), (16,), eps=1e-6).bfloat16() * weight
    torch.testing.assert_close(cpu_kernels.rms_norm(hidden, weight, 1e-6), expected, rtol=0, atol=0)


def plain_rotation(values: Tensor, angles: Tensor) -> Tensor:
    """values [T, H, D], angles [T, R]: pairs (i, i + R / 2) turn, the rest stays."""
    half = angles.shape[1] // 2
    cos, sin = (function(angles[:, None, :half]) for function in (torch.cos, torch.sin))
    first, second, rest = values.split([half, half, values.shape[2] - 2 * half], 2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], 2)


@pytest.mark.parametrize("turning", [6, 8])
def test_rotation_starts_anew_in_every_segment(turning: int) -> None:
    angles = drawn(40, turning // 2, seed=2).detach()
    freqs = torch.cat([angles, angles], 1)
    cu_seqlens = torch.tensor(BOUNDARIES, dtype=torch.int32)
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(BOUNDARIES)])
    values = drawn(40, 3, 8)
    in_rows = freqs[:, None, None]
    compare(
        lambda values: cpu_kernels.rotate_segments(values, cu_seqlens, in_rows),
        lambda values: plain_rotation(values, freqs[positions]),
        values,
    )
    compare(
        lambda values: cpu_kernels.rotate_row(values[:, None], in_rows)[:, 0],
        lambda values: plain_rotation(values, freqs),
        values,
    )
    # negative control: without boundaries the later segments turn by other angles
    whole = cpu_kernels.rotate_segments(values, torch.tensor([0, 40]), in_rows)
    parted = cpu_kernels.rotate_segments(values, cu_seqlens, in_rows)
    torch.testing.assert_close(whole[:7], parted[:7])
    assert (whole[7:] - parted[7:]).abs().max() > 0.1


def test_new_angles_are_not_taken_for_the_ones_before() -> None:
    values, cu_seqlens = drawn(4, 1, 4).detach(), torch.tensor([0, 4])
    for seed in range(3):
        angles = drawn(4, 2, seed=seed).detach()
        freqs = torch.cat([angles, angles], 1)
        rotated = cpu_kernels.rotate_segments(values, cu_seqlens, freqs[:, None, None])
        torch.testing.assert_close(rotated, plain_rotation(values, freqs), rtol=2e-6, atol=2e-6)


def test_interleaved_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="no-rope-fusion"):
        cpu_kernels.rotate_segments(
            drawn(4, 1, 4), torch.tensor([0, 4]), drawn(4, 1, 1, 4), interleaved=True
        )


@pytest.mark.parametrize("rows", [1, 100, 20_000])
def test_the_norm_of_large_tensors_is_that_of_float64(rows: int) -> None:
    """Rows of very different size, as in the gradient of an embedding."""
    generator = torch.Generator().manual_seed(rows)
    sizes = torch.exp(2 * torch.randn(rows, 1, generator=generator))
    one = torch.randn(rows, 577, generator=generator) * sizes
    other = torch.randn(3, 5, generator=generator)
    expected = torch.cat([one.double().reshape(-1), other.double().reshape(-1)]).norm()
    norm, nothing = cpu_kernels.l2_norm_of_tensors(0, torch.zeros(1), [[one, other]], False)
    assert (norm.shape, norm.dtype, nothing) == ((1,), torch.float32, None)
    torch.testing.assert_close(norm[0].double(), expected, rtol=1e-6, atol=0)
    if rows == 20_000:  # the control: what it is there for
        assert abs(torch.norm(one).double() / one.double().norm() - 1) > 1e-5


def test_no_tensors_have_no_norm() -> None:
    assert cpu_kernels.l2_norm_of_tensors(0, torch.zeros(1), [[]], False)[0].tolist() == [0.0]


def test_scaled_tensors_are_products_in_the_dtype_of_their_destination() -> None:
    values = drawn(5, 7).detach().float()
    half = torch.empty((5, 7), dtype=torch.bfloat16)
    cpu_kernels.scale_tensors(0, torch.zeros(1), [[values.clone()], [half]], 0.3)
    assert torch.equal(half, (values * 0.3).bfloat16())
    in_place = values.clone()
    cpu_kernels.scale_tensors(0, torch.zeros(1), [[in_place], [in_place]], 0.3)
    assert torch.equal(in_place, values * 0.3)


def adam_steps(weight: Tensor, gradients: list[Tensor], decay: float) -> Tensor:
    """AdamW of Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2, in float64."""
    rate, first_beta, second_beta = 1e-2, 0.9, 0.999
    weight = weight.double()
    mean = square = torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        mean = first_beta * mean + (1 - first_beta) * gradient.double()
        square = second_beta * square + (1 - second_beta) * gradient.double() ** 2
        corrected = mean / (1 - first_beta**step), square / (1 - second_beta**step)
        weight = weight - rate * (corrected[0] / (corrected[1].sqrt() + 1e-8) + decay * weight)
    return weight


def test_fused_adam_takes_the_steps_of_float64_and_leaves_the_groups_alone() -> None:
    start = drawn(33, 5).detach().float()
    gradients = [drawn(33, 5, seed=seed).detach().float() for seed in range(4)]
    weight = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1)
    groups = [{**group, "params": None} for group in optimizer.param_groups]
    cpu_kernels.fuse_adam(optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for gradient in gradients:
            weight.grad = gradient
            optimizer.step()
    assert "aten::_fused_adamw_" in {event.name for event in profile.events()}
    assert [{**group, "params": None} for group in optimizer.param_groups] == groups
    expected = adam_steps(start, gradients, 0.1)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=1e-6)
    # negative control: the comparison sees the weight decay
    assert (adam_steps(start, gradients, 0.0) - expected).abs().max() > 1e-3
