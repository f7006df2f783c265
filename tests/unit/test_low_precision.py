"""Widened products against float64 and against torch's own, and where they are used."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_exact import low_precision
from megatron_exact.low_precision import FEWEST_ROWS, TILE_NUMBERS, widen_products, widened_linear

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests run the same way on processors that multiply bfloat16 themselves."""
    monkeypatch.setattr(low_precision, "is_slow", lambda: True)


def operands(dtype: torch.dtype, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, 5, 96), (outputs, 96), (outputs,))
    inputs, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return inputs, weight, bias


def wrong_by(result: Tensor, exact: Tensor) -> float:
    """Share of numbers that are not the float64 product rounded once."""
    return float((result != exact.to(result.dtype)).double().mean())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_is_rounded_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_precision, "TILE_NUMBERS", 96 * 7)  # seven tiles, the last one smaller
    inputs, weight, bias = operands(dtype, 45)
    exact = F.linear(inputs.double(), weight.double(), bias.double())
    result = widened_linear(inputs, weight, bias)
    assert result.dtype == dtype
    assert result.shape == (2, 5, 45)
    own = F.linear(inputs, weight, bias)
    assert wrong_by(result, exact) <= wrong_by(own, exact) + 0.01
    # negative control: one more rounding, before the bias, is seen
    twice = widened_linear(inputs, weight) + bias
    assert wrong_by(twice, exact) > 0.1
    assert wrong_by(result, exact) < 0.01


def test_only_linear_layers_of_low_precision_change() -> None:
    layers = nn.Sequential(nn.Linear(96, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    assert widen_products(layers) == 0  # float32
    layers = layers.to(torch.bfloat16)
    before = [name for name, _ in layers.named_parameters()]
    assert widen_products(layers) == 2
    assert [name for name, _ in layers.named_parameters()] == before
    assert widen_products(layers.to("meta")) == 0


def test_few_rows_and_gradients_take_torchs_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []

    def counted(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows.append(inputs.shape[0])
        return widened_linear(inputs, weight, bias)

    monkeypatch.setattr(low_precision, "widened_linear", counted)
    layer = nn.Linear(96, 8).to(torch.bfloat16)
    assert widen_products(layer) == 1
    inputs = torch.randn(FEWEST_ROWS, 96).to(torch.bfloat16)
    layer(inputs).sum().backward()
    assert layer.weight.grad is not None
    assert rows == []
    with torch.inference_mode():
        layer(inputs[:-1])
        assert rows == []
        layer(inputs)
    assert rows == [FEWEST_ROWS]


def test_processors_with_bfloat16_products_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    layer = nn.Linear(4, 4).to(torch.bfloat16)
    assert widen_products(layer) == 0
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(low_precision.platform, "machine", lambda: "aarch64")
    assert widen_products(layer) == 0
    monkeypatch.setattr(low_precision.platform, "machine", lambda: "x86_64")
    assert widen_products(layer) == 1
    assert TILE_NUMBERS >= 4
