"""The memory formulas of the preflight against the peaks of real jobs on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.model.shapes import ModelShape
from megatron_exact.training.layout import Layout
from megatron_exact.training.memory_forecast import MemoryForecast, Numerics
from tests.distributed import memory_peak

BOUND = 0.15


@dataclass(frozen=True, kw_only=True)
class Small:
    """A model small enough to train here and large enough to be seen."""

    layers: int = 4
    hidden: int = 256
    feed_forward: int = 704
    heads: int = 4
    vocabulary: int = 2048
    row_tokens: int = 2048
    micro_batch_rows: int = 1
    half: bool = False
    recompute: str = "none"
    loss_head: str = "tiled"
    qk_norm: bool = False

    def shape(self) -> ModelShape:
        return ModelShape(
            architecture="qwen3" if self.qk_norm else "llama",
            num_layers=self.layers,
            hidden_size=self.hidden,
            ffn_hidden_size=self.feed_forward,
            num_attention_heads=self.heads,
            num_query_groups=2,
            head_dim=self.hidden // self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.row_tokens,
            norm_epsilon=1e-5,
            rope_theta=10_000.0,
            rope_scaling=None,
            tied_embeddings=True,
            qkv_bias=False,
            qk_norm=self.qk_norm,
        )

    def forecast(self) -> int:
        numerics = Numerics(
            weight_bytes=2 if self.half else 4,
            optimizer_bytes=12 if self.half else 8,
            flash_attention=False,
            fused_weight_gradient=False,
            loss_head=self.loss_head,
        )
        layout = Layout(
            recompute=self.recompute,  # type: ignore[arg-type]
            distributed_optimizer=False,
            micro_batch_rows=self.micro_batch_rows,
        )
        found = MemoryForecast(
            shape=self.shape(),
            layout=layout,
            row_tokens=self.row_tokens,
            data_parallel=1,
            micro_batches=2,
            numerics=numerics,
        )
        return found.largest().total

    def arguments(self, pack: Path) -> list[Any]:
        words: list[Any] = [
            *("--pack", pack, "--num-layers", self.layers, "--hidden-size", self.hidden),
            *("--ffn-hidden-size", self.feed_forward, "--num-attention-heads", self.heads),
            *("--group-query-attention", "--num-query-groups", 2, "--swiglu", "--disable-bias-linear"),
            *("--normalization", "RMSNorm", "--position-embedding-type", "rope"),
            *("--vocab-size", self.vocabulary, "--loss-head", self.loss_head),
            *(
                "--micro-batch-size",
                self.micro_batch_rows,
                "--global-batch-size",
                2 * self.micro_batch_rows,
            ),
            *("--train-iters", 3, "--lr", "1e-4", "--lr-decay-style", "constant", "--eval-iters", 0),
        ]
        words += ["--bf16"] if self.half else []
        words += ["--qk-layernorm"] if self.qk_norm else []
        if self.recompute == "full":
            words += ["--recompute-granularity", "full", "--recompute-method", "uniform"]
            words += ["--recompute-num-layers", 1]
        return words


EMPTY = {"layers": 1, "hidden": 16, "feed_forward": 32, "vocabulary": 96, "row_tokens": 64}
CASES = {
    "few layers": Small(layers=2),
    "many layers": Small(layers=6),
    "long rows": Small(layers=2, row_tokens=4096),
    "wide": Small(hidden=512, feed_forward=1408, heads=8),
    "mostly state": Small(hidden=768, feed_forward=2048, heads=12, row_tokens=512),
    "two rows": Small(layers=2, micro_batch_rows=2),
    "full recomputation": Small(layers=6, recompute="full"),
    "stock loss head": Small(layers=1, hidden=64, feed_forward=128, vocabulary=32_768, loss_head="stock"),
}


@pytest.fixture(scope="module")
def peak(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Small], int]:
    """Measured peak of a job above what the same job holds between steps with next to no model."""
    packs: dict[tuple[int, int], Path] = {}
    empty: dict[bool, int] = {}

    def measure(small: Small) -> memory_peak.Resident:
        key = (small.row_tokens, small.vocabulary)
        if key not in packs:
            folder = tmp_path_factory.mktemp("pack")
            packs[key] = memory_peak.make_pack(
                folder, row_tokens=small.row_tokens, vocabulary=small.vocabulary, rows=8
            )
        return memory_peak.measure_job(small.arguments(packs[key]), tmp_path_factory.mktemp("job"))

    def above_empty(small: Small) -> int:
        if small.half not in empty:
            empty[small.half] = measure(Small(**EMPTY, half=small.half)).between_steps
        return measure(small).peak - empty[small.half]

    return above_empty


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_forecast_is_within_15_percent_of_the_measured_peak(
    name: str, peak: Callable[[Small], int]
) -> None:
    measured, forecast = peak(CASES[name]), CASES[name].forecast()
    print(f"{name}: measured {measured / 2**20:.0f} MiB, forecast {forecast / 2**20:.0f} MiB")
    assert forecast == pytest.approx(measured, rel=BOUND)


@pytest.mark.slow
def test_layers_in_bf16_cost_what_the_forecast_says(peak: Callable[[Small], int]) -> None:
    # The CPU's products in bf16 keep buffers of their own, some tens of MB; a difference is free of them
    few, many = (Small(layers=layers, half=True) for layers in (2, 8))
    measured, forecast = peak(many) - peak(few), many.forecast() - few.forecast()
    print(f"bf16: measured {measured / 2**20:.0f} MiB, forecast {forecast / 2**20:.0f} MiB")
    assert forecast == pytest.approx(measured, rel=BOUND)


@pytest.mark.slow
def test_norms_of_heads_cost_what_the_forecast_says(peak: Callable[[Small], int]) -> None:
    plain, normed = (Small(layers=6, feed_forward=256, heads=16, qk_norm=norm) for norm in (False, True))
    measured, forecast = peak(normed) - peak(plain), normed.forecast() - plain.forecast()
    print(f"norms of heads: measured {measured / 2**20:.1f} MiB, forecast {forecast / 2**20:.1f} MiB")
    assert forecast == pytest.approx(measured, rel=BOUND)


@pytest.mark.slow
def test_a_forecast_without_activations_would_be_seen(peak: Callable[[Small], int]) -> None:
    wide = CASES["wide"]
    state = 16 * sum((4 * (2 * 512 + 512 * (512 + 256) + 512 * 512 + 3 * 512 * 1408), 512, 2048 * 512))
    assert state < (1 - BOUND) * peak(wide)
