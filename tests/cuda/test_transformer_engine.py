"""Transformer Engine's layers on the null device: its own Python and C++ with values of CPU versions.

Skipped where it is not installed; `make te-setup` installs it without a GPU, `make test-te` runs this.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_exact.rehearsal.rehearse import make_example_pack
from tests.cuda.conftest import SMALL, Device
from tests.distributed import jobs, ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="needs Transformer Engine (make test-te)",
)
TRANSFORMER_ENGINE = ("--transformer-impl", "transformer_engine")
LOCAL = ("--transformer-impl", "local", "--no-persist-layer-norm")
TP2_SP = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
IN_BFLOAT16 = 2e-3
"""Relative: norms and products are rounded in other places than by the local layers."""
GRADIENTS_IN_BFLOAT16 = 3e-2
"""The same for a gradient, of its length."""
SAME_NAME = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def command(pack: Path, checkpoint: Path, iterations: int, *extra: Any) -> list[Any]:
    return jobs.command(pack, "exact", iterations, *SMALL, "--pretrained-checkpoint", checkpoint, *extra)


def losses(run: Path) -> list[dict[str, Any]]:
    return ranks.read_jsonl(run / "losses.jsonl")


def gradients(path: Path) -> dict[str, np.ndarray]:
    """Name in Transformer Engine's layers -> gradient."""
    found = {}
    with np.load(path / "gradients.npz") as file:
        for name in file.files:
            ours = name
            for local, theirs in SAME_NAME.items():
                ours = ours.replace(local, theirs)
            found[ours] = file[name]
    return found


def distances(here: dict[str, np.ndarray], there: dict[str, np.ndarray]) -> dict[str, float]:
    """Length of each gradient's difference, relative to the gradient's."""
    assert set(here) == set(there)
    return {
        name: float(np.linalg.norm(here[name] - value) / np.linalg.norm(value))
        for name, value in there.items()
    }


def test_forward_and_backward_are_those_of_the_local_layers(
    device: Device, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    kinds: dict[str, tuple[tuple[str, ...], dict[str, bool]]] = {
        "local": (LOCAL, {}),
        "te": (TRANSFORMER_ENGINE, {}),
        "one document": (TRANSFORMER_ENGINE, {"forgets_boundaries": True}),
    }
    seen = {}
    for name, (flags, damage) in kinds.items():
        argv = command(pack, checkpoint, 1, "--run-dir", tmp_path / name / "run", *flags)
        seen[name] = device.see(tmp_path / name, "train", argv=argv, keeps_gradients=True, **damage)
    assert seen["te"]["mixed_devices"] == seen["te"]["refused"] == seen["te"]["not_computed"] == {}
    for kernel in ("generic_gemm", "rmsnorm_fwd", "rmsnorm_bwd", "fused_rope_backward", "fused_attn_bwd"):
        assert seen["te"]["calls"][f"te::{kernel}"]
        assert f"te::{kernel}" not in seen["local"]["calls"] or kernel == "fused_rope_backward"
    (local,), (te,), (wrong,) = (losses(tmp_path / name / "run") for name in kinds)
    assert te["loss"] == pytest.approx(local["loss"], rel=IN_BFLOAT16)
    assert wrong["loss"] != pytest.approx(local["loss"], rel=IN_BFLOAT16)
    expected = gradients(tmp_path / "local")
    right = distances(gradients(tmp_path / "te"), expected)
    assert max(right.values()) < GRADIENTS_IN_BFLOAT16, right
    # the negative control: what attention turns into without boundaries reaches every weight
    without = distances(gradients(tmp_path / "one document"), expected)
    assert min(without.values()) > 2 * GRADIENTS_IN_BFLOAT16, without


def test_three_iterations_have_the_losses_of_the_cpu(
    device: Device, on_cpu: Callable[..., Any], pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / "cpu", tmp_path / "cuda"
    on_cpu(command(pack, checkpoint, 3, "--run-dir", here), tmp_path / "o1")
    argv = command(pack, checkpoint, 3, "--run-dir", there, *TRANSFORMER_ENGINE)
    seen = device.see(tmp_path / "o2", "train", argv=argv)
    assert seen["mixed_devices"] == seen["refused"] == seen["not_computed"] == {}
    for ours, theirs in zip(losses(there), losses(here), strict=True):
        for name in ("loss", "weighted_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=IN_BFLOAT16), name
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)
        assert ours["bucket_targets"] == theirs["bucket_targets"]


def test_attention_has_the_frequencies_and_the_scale_of_yarn(
    device: Device, on_cpu: Callable[..., Any], pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    yarn = ("--change-rope-yarn", "64,16")
    for name, flags in (("plain", ()), ("yarn", yarn)):
        argv = command(pack, checkpoint, 1, "--run-dir", tmp_path / name, *flags)
        on_cpu(argv, tmp_path / f"o {name}")
    argv = command(pack, checkpoint, 1, "--run-dir", tmp_path / "te", *TRANSFORMER_ENGINE, *yarn)
    seen = device.see(tmp_path / "o te", "train", argv=argv)
    assert seen["mixed_devices"] == seen["not_computed"] == {}
    plain, right, found = (losses(tmp_path / name)[0]["loss"] for name in ("plain", "yarn", "te"))
    assert found == pytest.approx(right, rel=IN_BFLOAT16)
    assert plain != pytest.approx(right, rel=2 * IN_BFLOAT16)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--tensor-model-parallel-size", 2, "--sequence-parallel"), id="tp2-sp"),
        pytest.param(("--use-distributed-optimizer", "--overlap-grad-reduce"), id="dp2"),
        pytest.param(("--pipeline-model-parallel-size", 2), id="pp2"),
        pytest.param(("--context-parallel-size", 2), id="cp2"),
    ],
)
def test_two_ranks_have_the_losses_of_one(
    flags: tuple[Any, ...], device: Device, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "one", tmp_path / "two"
    for run, number, layout in zip(runs, (1, 2), ((), flags), strict=True):
        argv = command(pack, checkpoint, 2, "--run-dir", run, *TRANSFORMER_ENGINE, *layout)
        seen = device.see(tmp_path / f"o{number}", "train", on=number, argv=argv)
        assert seen["mixed_devices"] == seen["not_computed"] == {}
    for one, two in zip(*map(losses, runs), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=IN_BFLOAT16)
        assert two["bucket_targets"] == one["bucket_targets"]
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-2)


def test_a_checkpoint_of_either_kind_of_layers_continues_with_the_other(
    device: Device, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "te"
    argv = command(pack, checkpoint, 2, *TRANSFORMER_ENGINE, "--save", saved, "--save-interval", 2)
    device.see(tmp_path / "o", "train", argv=argv)
    runs = []
    for name, flags in (("te", TRANSFORMER_ENGINE), ("local", LOCAL)):
        run = tmp_path / f"from-te-{name}"
        argv = jobs.command(pack, "exact", 2, *SMALL, "--pretrained-checkpoint", saved, "--run-dir", run)
        device.see(tmp_path / f"o-{name}", "train", argv=[*argv, *flags])
        runs.append(losses(run))
    for te, local in zip(*runs, strict=True):
        assert te["loss"] == pytest.approx(local["loss"], rel=IN_BFLOAT16)


@pytest.mark.parametrize("flags", [("--separate-qkv",), ("--qk-timing",)], ids=["separate", "timing"])
def test_separate_projections_load_a_fused_checkpoint(
    flags: tuple[Any, ...], device: Device, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "fused", tmp_path / "separate"
    for run, extra in zip(runs, ((), flags), strict=True):
        argv = command(pack, checkpoint, 2, "--run-dir", run, *TRANSFORMER_ENGINE, *extra)
        device.see(tmp_path / f"o-{run.name}", "train", argv=argv)
    fused, separate = map(losses, runs)
    assert separate[0]["loss"] == pytest.approx(fused[0]["loss"], rel=IN_BFLOAT16)
    if flags == ("--separate-qkv",):
        assert separate[1]["loss"] == pytest.approx(fused[1]["loss"], rel=IN_BFLOAT16)


def test_cudnn_plans_its_attention_for_few_shapes(
    device: Device, pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    argv = command(pack, checkpoint, 4, *TRANSFORMER_ENGINE)
    seen = device.see(tmp_path, "train", argv=argv)
    plans = seen["attention_plans"]
    assert sum(calls for *_, calls in plans) == 2 * 4 * 4  # layers, rows of a step, steps
    for segments, longest, _ in plans:
        for number in (segments, longest):
            assert number & (number - 1) == 0
        assert segments >= 16
        assert longest <= jobs.ROW_TOKENS
    assert len(plans) <= 4


@pytest.mark.parametrize(
    ("layout", "world_size"), [pytest.param((), 1, id="one"), pytest.param(TP2_SP, 2, id="tp2-sp")]
)
def test_memory_in_8_bits(layout: tuple[Any, ...], world_size: int, device: Device, tmp_path: Path) -> None:
    """The quantizing kernels of a step are launched, and the formula knows what they keep.

    Nothing is said about values: 8-bit products have no CPU version.
    """
    example = make_example_pack(tmp_path / "pack", row_tokens=2048, vocabulary=8192, rows=32)
    model = (
        *("--num-layers", 4, "--hidden-size", 1024, "--ffn-hidden-size", 4096, "--num-attention-heads", 8),
        *("--group-query-attention", "--num-query-groups", 4, "--swiglu", "--disable-bias-linear"),
        *("--normalization", "RMSNorm", "--position-embedding-type", "rope", "--bf16"),
        *("--vocab-size", 8192, "--token-weighting", "exact", "--global-batch-size", 2 * world_size),
        *("--train-iters", 2, "--lr", "1e-4", "--lr-decay-style", "constant", "--eval-iters", 0),
        *("--rank-timeout-seconds", 0, "--save-interval", 9),
    )
    seen = {}
    for name, extra in (("bf16", ()), ("fp8", ("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"))):
        argv = (*model, *layout, *extra, "--pack", example, "--save", tmp_path / name)
        seen[name] = device.see(
            tmp_path / f"o-{name}", "rehearse", argv=argv, rank=0, world_size=world_size
        )
    half, eight = seen["bf16"], seen["fp8"]
    print({name: (found["peak_allocated_gib"], found["forecast_gib"]) for name, found in seen.items()})
    for found in seen.values():
        assert found["forecast_gib"] == pytest.approx(found["peak_allocated_gib"], rel=0.03)
    # the negative control: what is kept between the steps is more than in bf16, by the copies of weights
    kept = eight["phase_peaks_gib"]["save"] - half["phase_peaks_gib"]["save"]
    copies = eight["forecast_parts_gib"]["weights"] - half["forecast_parts_gib"]["weights"]
    assert kept == pytest.approx(copies, rel=0.05)
    assert copies > 0.03
    assert "te::quantize" not in half["launches_by_operation"]
    assert eight["launches_by_operation"]["te::quantize"] >= 4 * 4 * 3  # layers, products, operands
