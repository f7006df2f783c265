"""The tiled loss head of one rank against cross-entropy written out in float64."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_exact import low_precision
from megatron_exact.model import loss_head
from megatron_exact.model.loss_head import (
    UNSUPPORTED_BY_TILED_HEAD,
    TiledLossHead,
    check_tiled_head_supports,
    tiled_token_losses,
)
from megatron_exact.model.shapes import Tiles

VOCABULARY, PADDED, HIDDEN, ROW, BATCH = 97, 104, 16, 24, 2
SINGLE_BOUND, HALF_BOUND = 1e-6, 2e-2
TILES = [(5, 10), (1, 97), (48, 1), (16, 32), (10_000, 10_000)]


@pytest.fixture(params=[8, 2**18], ids=["rows one by one", "rows at once"], autouse=True)
def cached_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU takes a tile in pieces; these ones are smaller than the pieces."""
    monkeypatch.setattr(loss_head, "CACHED_ELEMENTS", request.param)


class Case:
    """Inputs, and by `reference` what should come out, in float64 from the same rounded values."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        row: int = ROW,
        batch: int = BATCH,
        hidden: int = HIDDEN,
        vocabulary: int = VOCABULARY,
        padded: int = PADDED,
        scale: float = 0.5,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.vocabulary = vocabulary
        self.hidden = torch.randn(row, batch, hidden, generator=generator).to(dtype).requires_grad_()
        weight = scale * torch.randn(padded, hidden, generator=generator)
        weight[vocabulary:] = 50.0  # padding that would rule the softmax
        self.weight = weight.to(dtype).requires_grad_()
        self.labels = torch.randint(0, vocabulary, (batch, row), generator=generator)
        # Strongly unequal, and some targets do not count at all
        self.token_weights = 10 ** (4 * torch.rand(batch, row, generator=generator) - 3)
        self.token_weights[0, : row // 3] = 0.0

    def run(
        self, tiles: tuple[int, int], vocabulary: int | None = None, expected_factors: Tensor | None = None
    ) -> Tensor:
        return tiled_token_losses(
            self.hidden,
            self.weight,
            self.labels,
            vocabulary=vocabulary or self.vocabulary,
            tiles=Tiles(tokens=tiles[0], columns=tiles[1]),
            expected_factors=expected_factors,
        )

    def reference(self, token_weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [b, S], gradient of the hidden states and of the weight."""
        hidden = self.hidden.detach().double().requires_grad_()
        weight = self.weight.detach().double().requires_grad_()
        logits = torch.einsum("sbh,vh->bsv", hidden, weight[: self.vocabulary])
        log_sums = logits.exp().sum(-1).log()
        losses = log_sums - logits.gather(2, self.labels[:, :, None])[:, :, 0]
        factors = self.token_weights if token_weights is None else token_weights
        gradients = torch.autograd.grad((losses * factors).sum(), (hidden, weight))
        return losses.detach(), *gradients


def difference(found: Tensor | None, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert found is not None
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("is_slow", [False, True], ids=["own products", "widened products"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiles", TILES)
def test_losses_and_gradients_agree_with_float64(
    tiles: tuple[int, int], dtype: torch.dtype, is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_precision, "is_slow", lambda: is_slow)
    monkeypatch.setattr(loss_head, "WIDENED_ROWS", 7)
    case = Case(dtype)
    losses = case.run(tiles)
    assert losses.dtype == torch.float32
    assert losses.is_contiguous()
    (losses * case.token_weights).sum().backward()
    bound = SINGLE_BOUND if dtype == torch.float32 else HALF_BOUND
    expected, of_hidden, of_weight = case.reference()
    assert difference(losses.detach(), expected) <= bound
    assert difference(case.hidden.grad, of_hidden) <= bound
    assert difference(case.weight.grad, of_weight) <= bound
    assert case.hidden.grad is not None
    assert case.weight.grad is not None
    assert {case.hidden.grad.dtype, case.weight.grad.dtype} == {dtype}
    assert not case.hidden.grad[: ROW // 3, 0].any(), "a target of weight 0 has no gradient"
    assert not case.weight.grad[VOCABULARY:].any(), "padding has no gradient"
    # Negative control: the same comparison sees what the token weights do
    unweighted = case.reference(torch.ones_like(case.token_weights))
    for gradient, wrong in zip((case.hidden.grad, case.weight.grad), unweighted[1:], strict=True):
        assert difference(gradient, wrong) > 10 * bound


WHOLE_ROWS = (80, 97)
"""A tile with room for all columns of all 48 tokens."""


@pytest.mark.parametrize("tile", [WHOLE_ROWS, (20, 97), (7, 32)])
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_gradients_in_forward_agree_with_float64(
    tile: tuple[int, int], factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_head, "FORWARD_TOKENS", 11)
    case = Case()
    losses = case.run(tile, expected_factors=case.token_weights)
    monkeypatch.setattr(loss_head, "accumulate_gradients", None)  # nothing is computed twice
    (losses * case.token_weights * factor).sum().backward()
    expected, of_hidden, of_weight = case.reference()
    assert difference(losses.detach(), expected) <= SINGLE_BOUND
    assert difference(case.hidden.grad, factor * of_hidden) <= SINGLE_BOUND
    assert difference(case.weight.grad, factor * of_weight) <= SINGLE_BOUND
    assert not case.hidden.grad[: ROW // 3, 0].any()  # type: ignore[index]
    assert not case.weight.grad[VOCABULARY:].any()  # type: ignore[index]


@pytest.mark.parametrize("place", [0, 30])  # of expected weight 0, and above
def test_a_wrong_guess_of_the_gradient_has_no_effect(place: int) -> None:
    guessed, plain = Case(), Case()
    weights = plain.token_weights.clone()
    weights.view(-1)[place] += 1e-3
    (plain.run(WHOLE_ROWS) * weights).sum().backward()
    losses = guessed.run(WHOLE_ROWS, expected_factors=guessed.token_weights)
    (losses * weights).sum().backward()
    for found, expected in zip(
        (guessed.hidden.grad, guessed.weight.grad), (plain.hidden.grad, plain.weight.grad), strict=True
    ):
        assert expected is not None
        assert difference(found, expected.double()) <= SINGLE_BOUND


@pytest.mark.parametrize("weight", [0.0, torch.nan])
def test_gradients_in_forward_are_not_used_without_a_sound_gradient(weight: float) -> None:
    case = Case()
    losses = case.run(WHOLE_ROWS, expected_factors=case.token_weights)
    (losses * weight).sum().backward()
    for gradient in (case.hidden.grad, case.weight.grad[:VOCABULARY]):  # type: ignore[index]
        assert gradient is not None
        assert bool(gradient.isnan().all()) if weight else not gradient.any()


def test_a_second_backward_gives_the_same_gradient() -> None:
    case = Case()
    losses = case.run(WHOLE_ROWS, expected_factors=case.token_weights)
    total = (losses * case.token_weights).sum()
    first, second = (
        torch.autograd.grad(total, (case.hidden, case.weight), retain_graph=True) for _ in range(2)
    )
    for found, expected in zip(second, first, strict=True):
        assert difference(found, expected.double()) <= SINGLE_BOUND


@pytest.mark.parametrize(
    ("dtype", "tokens", "columns", "hidden", "is_used"),
    [
        (torch.float32, 4096, 8192, 384, True),
        (torch.bfloat16, 4096, 8192, 384, False),
        (torch.float32, 4096, 49_152, 576, True),  # SmolLM2: its gradient is smaller than the logits
        (torch.float32, 575, 49_152, 576, False),
        (torch.float32, 64, 16_384, 256, True),  # more than the logits, not more than a tile
        (torch.float32, 64, 16_385, 256, False),
    ],
)
def test_gradients_in_forward_keep_no_more_than_the_logits(
    dtype: torch.dtype, tokens: int, columns: int, hidden: int, is_used: bool
) -> None:
    states = torch.empty((tokens, hidden), dtype=dtype)
    assert loss_head.has_gradients_in_forward(states, columns, Tiles()) == is_used


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_tile_agree_with_float64(data: st.DataObject) -> None:
    size = st.integers(1, 12)
    vocabulary = data.draw(st.integers(1, 20))
    case = Case(
        row=data.draw(size),
        batch=data.draw(st.integers(1, 3)),
        hidden=data.draw(size),
        vocabulary=vocabulary,
        padded=vocabulary + data.draw(st.integers(0, 5)),
    )
    losses = case.run((data.draw(st.integers(1, 40)), data.draw(st.integers(1, 25))))
    (losses * case.token_weights).sum().backward()
    outcome = losses.detach(), case.hidden.grad, case.weight.grad
    for found, expected in zip(outcome, case.reference(), strict=True):
        assert found is not None
        scale = max(1.0, float(expected.abs().max()))
        assert float((found.double() - expected).abs().max()) <= 5 * SINGLE_BOUND * scale


def test_padding_does_not_change_a_bit() -> None:
    padded, exact = Case(), Case(padded=VOCABULARY)
    exact.weight.data.copy_(padded.weight.data[:VOCABULARY])
    exact.hidden.data.copy_(padded.hidden.data)
    exact.labels, exact.token_weights = padded.labels, padded.token_weights
    for case in (padded, exact):
        (case.run((16, 32)) * case.token_weights).sum().backward()
    assert torch.equal(padded.run((16, 32)), exact.run((16, 32)))
    assert torch.equal(padded.hidden.grad, exact.hidden.grad)  # type: ignore[arg-type]
    assert torch.equal(padded.weight.grad[:VOCABULARY], exact.weight.grad)  # type: ignore[index,arg-type]
    # Negative control: padding that counts rules the loss
    assert float((padded.run((16, 32), PADDED) - exact.run((16, 32))).detach().mean()) > 1.0


def test_logits_of_any_size_do_not_overflow() -> None:
    case = Case(scale=3e3)
    losses = case.run((5, 10))
    (losses * case.token_weights).sum().backward()
    logits = torch.einsum("sbh,vh->bsv", case.hidden.double(), case.weight.double()[:VOCABULARY])
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), case.labels, reduction="none")
    assert float(logits.abs().max()) > 1e4
    assert difference(losses.detach(), expected.detach()) < SINGLE_BOUND
    assert bool(torch.isfinite(case.hidden.grad).all())  # type: ignore[arg-type]


def test_a_label_outside_the_vocabulary_is_no_number() -> None:
    case = Case()
    clean = case.run((16, 32))
    case.labels[0, 3], case.labels[1, 5] = VOCABULARY, -1  # the first is a padded row of the weight
    losses = case.run((16, 32))
    assert losses.isnan().nonzero().tolist() == [[0, 3], [1, 5]]
    assert torch.equal(losses.nan_to_num(0), clean.masked_fill(losses.isnan(), 0))


def test_what_needs_no_gradient_gets_none() -> None:
    case = Case()
    case.weight.requires_grad_(False)
    case.run((16, 32)).sum().backward()
    assert case.weight.grad is None
    frozen, case.hidden.grad = case.hidden.grad, None
    case.weight.requires_grad_()
    case.run((16, 32)).sum().backward()
    assert torch.equal(case.hidden.grad, frozen)  # type: ignore[arg-type]
    with torch.no_grad():
        assert not case.run((16, 32)).requires_grad


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("is_expected", [False, True])
def test_micro_batches_add_up_in_main_grad(
    is_expected: bool, is_tied: bool, dtype: torch.dtype, main_dtype: torch.dtype
) -> None:
    case = Case(dtype)
    before = torch.randn(PADDED, HIDDEN).to(main_dtype)
    case.weight.main_grad = before.clone()  # type: ignore[attr-defined]
    case.weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    if is_tied:
        case.weight.zero_out_wgrad = True  # type: ignore[attr-defined]
    for _ in range(2):
        case.weight.grad = None
        losses = case.run((16, 32), expected_factors=case.token_weights if is_expected else None)
        (losses * case.token_weights).sum().backward()
        assert case.weight.grad is not None, "upstream's hook asserts a gradient"
        assert case.weight.grad_added_to_main_grad  # type: ignore[attr-defined]
        if is_tied:
            assert not case.weight.grad.any(), "upstream's hook adds it once more"
    expected = before.double() + 2 * case.reference()[2]
    bound = SINGLE_BOUND if dtype == main_dtype == torch.float32 else HALF_BOUND
    assert difference(case.weight.main_grad, expected) <= bound  # type: ignore[attr-defined]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_no_tensor_of_all_logits_exists() -> None:
    case = Case(torch.bfloat16, row=200)
    with LargestTensor() as seen:
        case.run((8, 16)).sum().backward()
    assert seen.elements <= max(case.hidden.numel(), case.weight.numel())
    with LargestTensor() as seen:  # negative control
        (case.hidden @ case.weight.t()).sum().backward()
    assert seen.elements == 200 * BATCH * PADDED


def output_layer(case: Case, **attributes: Any) -> Any:
    """Stand-in for upstream's ColumnParallelLinear."""
    layer = {"weight": case.weight, "bias": None, "tp_group": None, "sequence_parallel": False}
    return types.SimpleNamespace(**{**layer, **attributes})


def supported(**fields: Any) -> Any:
    """Stand-in for a TransformerConfig with upstream's defaults."""
    defaults = {"mtp_num_layers": None, "mup_output_mult": 1.0, "defer_embedding_wgrad_compute": False}
    return types.SimpleNamespace(**{**defaults, **fields})


def call(case: Case, layer: Any, *, config: Any = None, **arguments: Any) -> Tensor:
    passed = {"output_weight": None, "labels": case.labels, "position_ids": None, "scale_logits": None}
    head = TiledLossHead(vocabulary=VOCABULARY, tiles=Tiles(tokens=16, columns=32))
    return head(
        hidden_states=case.hidden,
        output_layer=layer,
        config=config or supported(),
        **{**passed, **arguments},
    )


def test_the_processor_takes_the_tied_weight_where_it_is_given() -> None:
    case = Case()
    expected = case.run((16, 32))
    assert torch.equal(call(case, output_layer(case)), expected)
    tied = call(case, output_layer(case, weight=None), output_weight=case.weight)
    assert torch.equal(tied, expected)
    assert not torch.equal(call(case, output_layer(case), output_weight=2 * case.weight), expected)


UNSUPPORTED = {
    **{"mtp_num_layers": 1, "mup_output_mult": 0.5, "label_smoothing": 0.1},
    **{"defer_embedding_wgrad_compute": True, "fp8_output_proj": True},
}


@pytest.mark.parametrize(("field", "value"), UNSUPPORTED.items())
def test_what_it_does_not_support_is_refused(field: str, value: Any) -> None:
    config = supported(**{field: value})
    with pytest.raises(ValueError, match=rf"^{field} = {value} is not supported .*--loss-head stock$"):
        check_tiled_head_supports(config)
    case = Case()
    with pytest.raises(ValueError, match=field):
        call(case, output_layer(case), config=config)
    check_tiled_head_supports(supported(mtp_num_layers=0))


def test_bad_calls_are_refused() -> None:
    case = Case()
    with pytest.raises(ValueError, match="without labels"):
        call(case, output_layer(case), labels=None)
    with pytest.raises(ValueError, match="bias is not supported"):
        call(case, output_layer(case, bias=torch.zeros(PADDED)))
    with pytest.raises(ValueError, match=r"hidden states \[24, 2, 16\]"):
        call(case, output_layer(case), labels=case.labels.t())
    with pytest.raises(ValueError, match="a vocabulary of 105"):
        case.run((16, 32), PADDED + 1)
    with pytest.raises(ValueError, match="a tile of the loss head has 0 columns"):
        Tiles(columns=0)


def test_the_refused_fields_are_upstreams() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = TransformerConfig.__dataclass_fields__
    assert {name for name, _, _ in UNSUPPORTED_BY_TILED_HEAD} == set(UNSUPPORTED)
    # 0.19.2 has no label smoothing in its configuration; the row waits for it
    for name in UNSUPPORTED.keys() - {"label_smoothing"}:
        check_tiled_head_supports(supported(**{name: fields[name].default}))
