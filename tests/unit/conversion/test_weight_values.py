"""Weights that are not finite or not plausible are named by import, export and verification."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.conversion.tensors import WeightValues
from megatron_exact.conversion.verify_checkpoint import verify_checkpoint
from megatron_exact.model.hf_folder import hf_folder_of
from megatron_exact.model.shapes import ModelShape
from tests.unit.conversion.small_models import (
    LLAMA,
    QWEN,
    changed_checkpoint,
    random_weights,
    read_checkpoint,
    write_checkpoint,
    write_model,
)

UP_PROJ = "model.layers.1.mlp.up_proj.weight"
SMALL = replace(LLAMA, rope_scaling=None)


def spoiled(
    folder: Path,
    places: dict[str, dict[int, float]],
    shape: ModelShape = SMALL,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A folder whose tensors have these values at these places."""
    weights = random_weights(shape, dtype)
    for name, values in places.items():
        for place, value in values.items():
            weights[name].view(-1)[place] = value
    return write_model(folder, shape, weights, dtype=dtype)


@settings(deadline=None, max_examples=150)
@given(
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    wrong=st.lists(
        st.tuples(st.integers(0, 10**6), st.sampled_from((torch.nan, torch.inf, -torch.inf))), max_size=4
    ),
    seed=st.integers(0, 99),
)
def test_every_value_that_is_not_finite_is_counted(
    dtype: torch.dtype, sizes: list[int], wrong: list[tuple[int, float]], seed: int
) -> None:
    values = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed)).to(dtype)
    for place, value in wrong:
        values[place % len(values)] = value
    found = WeightValues()
    for part in values.split(sizes):
        found.look("x", part)
    nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
    text = found.not_finite()
    if nan + infinite == 0:
        assert text is None
        assert list(found.implausible()) == []
    else:
        assert text is not None
        assert (f"{nan} NaN" in text) == (nan > 0)
        assert (f"{infinite} infinite" in text) == (infinite > 0)
        assert text.endswith(f" of {len(values):,} values")


NAMES = {
    SMALL: (
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        UP_PROJ,
        "model.layers.0.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ),
    QWEN: ("model.layers.1.self_attn.v_proj.bias", "model.embed_tokens.weight"),
}


@pytest.mark.parametrize(("shape", "name"), [(shape, name) for shape in NAMES for name in NAMES[shape]])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_an_import_names_the_tensor_and_the_count(
    tmp_path: Path, shape: ModelShape, name: str, value: float
) -> None:
    hf = spoiled(tmp_path / "hf", {name: {2: value, -1: value}}, shape, torch.bfloat16)
    kind = "NaN" if value != value else "infinite"
    message = rf"hf: {name} contains 2 {kind} of [\d,]+ values: training"
    with pytest.raises(ValueError, match=message) as error:
        import_hf(hf, tmp_path / "c")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["hf"]


def test_a_nan_in_both_of_two_tied_tensors_is_a_nan(tmp_path: Path) -> None:
    weights = random_weights(QWEN)
    weights["model.embed_tokens.weight"][3, 4] = torch.nan
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight contains 1 NaN of 3,360 values"):
        import_hf(write_model(tmp_path / "hf", QWEN, weights), tmp_path / "c")


def test_several_tensors_are_counted_over_all_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_exact.conversion.checkpoint_layout.BLOCK_BYTES", 1000)
    names = NAMES[SMALL]
    places = {name: {0: torch.nan, 1: torch.inf, 5: torch.nan, -1: torch.nan} for name in names}
    hf = spoiled(tmp_path / "hf", places)
    message = r"embed_tokens.weight contains 3 NaN and 1 infinite of 3,360 values; .* and 7 more tensors: "
    with pytest.raises(ValueError, match=message):
        import_hf(hf, tmp_path / "c")


def test_a_conversion_that_makes_values_infinite(tmp_path: Path) -> None:
    hf = spoiled(tmp_path / "hf", {UP_PROJ: {7: 3.4e38}})  # above the largest bfloat16
    with pytest.raises(ValueError, match=f"{UP_PROJ} as bfloat16 contains 1 infinite of"):
        import_hf(hf, tmp_path / "c", dtype="bfloat16")
    assert import_hf(hf, tmp_path / "c").warnings == (
        f"{UP_PROJ} has values up to 3.4e+38, more than 10000: is the file whole?",
    )
    with pytest.raises(ValueError, match=f"{UP_PROJ} contains 1 infinite .* or keep the dtype"):
        export_hf(tmp_path / "c", tmp_path / "out", dtype="bfloat16")
    assert sorted(os.listdir(tmp_path)) == ["c", "hf"]


def test_buffers_are_not_looked_at(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    buffer = {"model.layers.0.self_attn.masked_bias": torch.tensor(-torch.inf)}
    assert (
        import_hf(write_model(tmp_path / "hf", SMALL, {**weights, **buffer}), tmp_path / "c").warnings == ()
    )


def flip(values: Tensor, bit: int) -> None:
    """Flip one bit of the first element."""
    values.view(-1)[:1].view(torch.int16).bitwise_xor_(1 << bit)


@pytest.mark.parametrize("bit", [12, 13])
def test_a_flipped_bit_of_the_exponent_is_named(tmp_path: Path, bit: int) -> None:
    weights = random_weights(SMALL, torch.bfloat16)
    weights[UP_PROJ].view(-1)[0] = 4.0  # exponent 129, so that these bits are off
    hf = write_model(tmp_path / "hf", SMALL, weights, dtype=torch.bfloat16)
    assert import_hf(hf, tmp_path / "good").warnings == ()
    flip(weights[UP_PROJ], bit)
    save_file(weights, hf / "model.safetensors", {"format": "pt"})
    (warning,) = import_hf(hf, tmp_path / "c").warnings
    assert warning.startswith(f"{UP_PROJ} has values up to")
    assert export_hf(tmp_path / "c", tmp_path / "out").warnings == (warning,)
    assert [check.detail for check in verify_checkpoint(tmp_path / "c") if "up to" in check.detail] == [
        warning
    ]


def test_tensors_without_values_are_named_but_biases_may_be_zero(tmp_path: Path) -> None:
    weights = random_weights(QWEN)
    for name in weights:
        if name.endswith(".bias"):
            weights[name].zero_()
    weights["model.layers.0.mlp.up_proj.weight"].zero_()
    weights["model.layers.1.mlp.up_proj.weight"].mul_(1e-20)
    found = import_hf(write_model(tmp_path / "hf", QWEN, weights), tmp_path / "c").warnings
    assert len(found) == 2
    assert found[0] == "model.layers.0.mlp.up_proj.weight has only zeros: was it ever trained?"
    assert found[1].startswith("model.layers.1.mlp.up_proj.weight has no value above")


def set_nan(tensors: dict[str, Tensor]) -> None:
    tensors["decoder.layers.self_attention.linear_qkv.weight"][1, -1] = torch.nan  # a row of v_proj


V_PROJ = "model.layers.1.self_attn.v_proj.weight"


def test_an_export_never_writes_them(tmp_path: Path) -> None:
    import_hf(write_model(tmp_path / "hf", SMALL), tmp_path / "c")
    bad = changed_checkpoint(tmp_path / "c", tmp_path / "bad", set_nan)
    for size in (5_000_000_000, 10_000):
        with pytest.raises(ValueError, match=f"{V_PROJ} contains 48 NaN of .* earlier iteration") as error:
            export_hf(bad, tmp_path / "out", shard_bytes=size)
        assert str(bad / "release") in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["bad", "c", "hf"]


def test_two_sides_that_agree_in_a_nan_fail(tmp_path: Path) -> None:
    """They are equal bit for bit, and still no model."""
    import_hf(write_model(tmp_path / "hf", SMALL), tmp_path / "c")
    bad = changed_checkpoint(tmp_path / "c", tmp_path / "bad", set_nan)
    weights = random_weights(SMALL)
    weights[V_PROJ][-1] = torch.nan
    hf = write_model(tmp_path / "hf-nan", SMALL, weights)
    for checks in (verify_checkpoint(bad), verify_checkpoint(bad, hf=hf, with_logits=False)):
        failed = {check.name: check.detail for check in checks if not check.passed}
        assert failed == {V_PROJ: f"{V_PROJ} contains 48 NaN of 1,536 values"}


def test_no_byte_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = write_model(tmp_path / "hf", SMALL, dtype=torch.bfloat16)
    weights = random_weights(SMALL)
    stock, read = os.preadv, []

    def counted(*arguments: object) -> int:
        read.append(stock(*arguments))  # type: ignore[arg-type]
        return read[-1]

    monkeypatch.setattr("os.preadv", counted)
    import_hf(hf, tmp_path / "c")
    assert sum(read) == sum(2 * tensor.numel() for tensor in weights.values())


def test_the_weights_of_a_run_too(tmp_path: Path) -> None:
    """A run's iteration is named with its number."""
    import_hf(write_model(tmp_path / "hf", SMALL), tmp_path / "c")
    shutil.copytree(hf_folder_of(tmp_path / "c"), hf_folder_of(tmp_path / "run"))
    tensors = read_checkpoint(tmp_path / "c")
    set_nan(tensors)
    write_checkpoint(tmp_path / "run", tensors, SMALL.num_layers, iteration=7)
    with pytest.raises(ValueError, match=rf"iter_0000007: {V_PROJ} contains 48 NaN"):
        export_hf(tmp_path / "run", tmp_path / "out")
