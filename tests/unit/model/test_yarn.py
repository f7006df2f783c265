"""YaRN's frequencies and factor of attention against transformers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_exact.model.shapes import YarnScaling
from megatron_exact.model.yarn import softmax_scale, use_yarn, yarn_frequencies


def of_transformers(scaling: YarnScaling, base: float, head_dim: int) -> tuple[torch.Tensor, float]:
    from transformers import Qwen2Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = Qwen2Config(
        hidden_size=head_dim,
        num_attention_heads=1,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": base,
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
        },
    )
    found: tuple[torch.Tensor, float] = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    return found


def ours(scaling: YarnScaling, base: float, head_dim: int) -> torch.Tensor:
    plain = 1 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return yarn_frequencies(plain, scaling, base)


@settings(max_examples=60, deadline=None)
@given(
    factor=st.floats(1.01, 64),
    window=st.sampled_from([64, 2048, 8192, 32_768, 131_072]),
    base=st.sampled_from([1e4, 5e5, 1e6, 8e6]),
    head_dim=st.sampled_from([16, 64, 128]),
    bounds=st.sampled_from([(32.0, 1.0), (16.0, 2.0), (2.0, 1.9)]),
)
def test_frequencies_and_factor(
    factor: float, window: int, base: float, head_dim: int, bounds: tuple[float, float]
) -> None:
    scaling = YarnScaling(
        factor=factor, original_max_position_embeddings=window, beta_fast=bounds[0], beta_slow=bounds[1]
    )
    expected, attention = of_transformers(scaling, base, head_dim)
    torch.testing.assert_close(ours(scaling, base, head_dim), expected, rtol=2e-6, atol=0)
    assert scaling.attention_factor == pytest.approx(attention, rel=1e-12)
    assert softmax_scale(scaling, head_dim) == pytest.approx(attention**2 / math.sqrt(head_dim), rel=1e-12)


@pytest.mark.parametrize(
    "other",
    [
        {"factor": 4.01},
        {"original_max_position_embeddings": 16_384},
        {"beta_fast": 16.0},
        {"beta_slow": 4.0},
    ],
)
def test_each_number_shows(other: dict[str, Any]) -> None:
    """The negative control of the comparison."""
    numbers: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 32_768}
    expected, _ = of_transformers(YarnScaling(**numbers), 1e6, 128)
    found = ours(YarnScaling(**{**numbers, **other}), 1e6, 128)
    assert ((found - expected) / expected).abs().max() > 1e-3


def test_the_next_model_of_a_process_has_its_own_frequencies_again() -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    def frequencies(config: SimpleNamespace) -> torch.Tensor:
        return RotaryEmbedding(
            16,
            1.0,
            rope_scaling=config.rope_scaling,
            rope_scaling_factor=config.rope_scaling_factor,
            use_cpu_initialization=True,
        ).inv_freq

    def config(is_scaled: bool) -> SimpleNamespace:
        inner = SimpleNamespace(kv_channels=16, softmax_scale=None)
        return SimpleNamespace(rope_scaling=is_scaled, rope_scaling_factor=8.0, transformer=inner)

    llama, plain, yarn = frequencies(config(True)), frequencies(config(False)), config(False)
    for window in (256, 512):  # one YaRN after another
        scaling = YarnScaling(factor=4.0, original_max_position_embeddings=window)
        use_yarn(yarn, scaling, 10_000)
        torch.testing.assert_close(frequencies(yarn), ours(scaling, 1e4, 16))
        assert not torch.equal(frequencies(yarn), plain)
        assert yarn.transformer.softmax_scale == softmax_scale(scaling, 16)
    after = config(True)
    use_yarn(after, None, 10_000)
    assert torch.equal(frequencies(after), llama)
    assert after.transformer.softmax_scale is None


@pytest.mark.parametrize(
    "text",
    ["4", "4,x", "x,4096", "1,4096", "nan,4096", "inf,4096", "4,0", "4,4096,1", "4,4_096", "4, 4096", ""],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"FACTOR,ORIGINAL|not above 1"):
        YarnScaling.parse(text)


@pytest.mark.parametrize("text", ["4,32768", "2.3456789,4096", "1.0000001,8192", "1000000,16"])
def test_the_text_has_every_digit(text: str) -> None:
    scaling = YarnScaling.parse(text)
    assert scaling.factor == float(text.partition(",")[0])
    assert scaling.text == text
    assert YarnScaling.parse(scaling.text) == scaling
