"""The proof, and what it must not let pass."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_exact.conversion import verify_checkpoint as verify_module
from megatron_exact.conversion.export_hf import export_hf, open_checkpoint
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.conversion.safetensors_files import read_fully
from megatron_exact.conversion.torch_dist_reader import StoredData
from megatron_exact.conversion.verify_checkpoint import (
    CheckpointCheck,
    compare_logits,
    verify_checkpoint,
    windows_of,
)
from megatron_exact.files import sha256_file
from megatron_exact.integrity import write_integrity
from megatron_exact.model.families import hf_config_of_shape
from megatron_exact.model.shapes import ModelShape
from tests.unit.conversion.small_models import (
    LLAMA,
    QWEN,
    SHAPES,
    changed_checkpoint,
    flip_bit,
    read_checkpoint,
    write_model,
)

QKV = "decoder.layers.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.mlp.linear_fc1.weight"


def make(tmp_path: Path, shape: ModelShape = LLAMA, **options: Any) -> tuple[Path, Path]:
    """(Hugging Face folder, checkpoint)."""
    hf = write_model(tmp_path / "hf", shape, **options)
    import_hf(hf, tmp_path / "c")
    return hf, tmp_path / "c"


def failures(checks: list[CheckpointCheck]) -> list[str]:
    return [check.name for check in checks if not check.passed]


@pytest.mark.parametrize("name", SHAPES)
def test_an_import_is_proved(tmp_path: Path, name: str) -> None:
    shape = SHAPES[name]
    hf, checkpoint = make(tmp_path, shape)
    checks = list(verify_checkpoint(checkpoint, hf=hf))
    assert failures(checks) == []
    tensors = [check for check in checks if check.max_difference is not None]
    assert [check.max_difference for check in tensors[:-3]] == [0.0] * (len(tensors) - 3)
    logits = tensors[-3:]
    assert [check.name.split(":")[0] for check in logits] == [
        f"logits, {window}" for window in ("short", "middle", "long")
    ]
    assert all(0 < (check.max_difference or 0) < 1e-4 for check in logits)
    assert failures(list(verify_checkpoint(checkpoint))) == []


def test_an_export_with_a_longer_window_is_accepted_and_one_below_the_rows_is_not(tmp_path: Path) -> None:
    _, checkpoint = make(tmp_path, QWEN)
    rows = 2 * QWEN.max_position_embeddings
    (checkpoint / "run.json").write_text(json.dumps({"row_tokens": rows}))
    exported = tmp_path / "exported"
    export_hf(checkpoint, exported)
    checks = list(verify_checkpoint(checkpoint, hf=exported))
    assert failures(checks) == []
    window = next(check for check in checks if check.name == "max_position_embeddings")
    assert window.detail == "8192, 4096 as imported"
    assert any(check.name == "logits, long: positions 8176 to 8191" for check in checks)
    config = json.loads((exported / "config.json").read_text())
    for change, wrong in (
        ({"max_position_embeddings": rows - 1}, "max_position_embeddings"),
        ({"rms_norm_eps": 2e-5}, "config.json"),
    ):
        (exported / "config.json").write_text(json.dumps({**config, **change}))
        assert failures(list(verify_checkpoint(checkpoint, hf=exported, with_logits=False))) == [wrong]


def exchange_gate_and_up(tensors: dict[str, Tensor]) -> None:
    gate, up = tensors[FC1].chunk(2, dim=1)
    tensors[FC1] = torch.cat([up, gate], dim=1)


def order_q_k_v_without_groups(tensors: dict[str, Tensor]) -> None:
    """All of q, then all of k, then all of v."""
    fused = tensors[QKV].view(2, 2, 4, 16, 48)
    parts = fused[:, :, :2], fused[:, :, 2:3], fused[:, :, 3:]
    tensors[QKV] = torch.cat([part.reshape(2, -1, 48) for part in parts], dim=1)


def exchange_k_and_v(tensors: dict[str, Tensor]) -> None:
    tensors[QKV] = tensors[QKV].view(2, 2, 4, 16, 48)[:, :, [0, 1, 3, 2]].reshape(2, -1, 48)


def change_one_bit(tensors: dict[str, Tensor]) -> None:
    tensors[FC1].view(torch.int32)[1, 5, 5] ^= 1


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (exchange_gate_and_up, {"mlp.gate_proj", "mlp.up_proj"}),
        (order_q_k_v_without_groups, {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
        (exchange_k_and_v, {"self_attn.k_proj", "self_attn.v_proj"}),
        (change_one_bit, {"mlp.gate_proj"}),
    ],
)
def test_wrong_orders_fail_by_name(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], wrong: set[str]
) -> None:
    hf, checkpoint = make(tmp_path)
    bad = changed_checkpoint(checkpoint, tmp_path / "bad", change)
    found = failures(list(verify_checkpoint(bad, hf=hf, with_logits=False)))
    assert {".".join(name.split(".")[3:5]) for name in found} == wrong
    assert failures(list(verify_checkpoint(bad))) == [], "by itself it is whole"


def test_scaling_left_out_fails_far_out(tmp_path: Path) -> None:
    hf, checkpoint = make(tmp_path)
    plain = dataclasses.replace(LLAMA, rope_scaling=None)
    (checkpoint / "hf" / "config.json").write_text(json.dumps(hf_config_of_shape(plain)))
    checks = list(verify_checkpoint(checkpoint, hf=hf))
    assert failures(checks)[0] == "config.json"
    assert "rope_scaling" in checks[[c.name for c in checks].index("config.json")].detail
    assert any(name.startswith("logits, long") for name in failures(checks))
    found = {c.name.split(":")[0]: c for c in checks if c.name.startswith("logits")}
    long, short = found["logits, long"], found["logits, short"]
    assert long.max_difference is not None
    assert short.max_difference is not None
    assert long.max_difference > 20 * short.max_difference
    assert long.max_difference > 0.1


@pytest.mark.parametrize("field", ["rope_theta", "norm_epsilon"])
def test_logits_see_what_weights_cannot_tell(tmp_path: Path, field: str) -> None:
    hf, checkpoint = make(tmp_path, QWEN)
    other = dataclasses.replace(QWEN, **{field: {"rope_theta": 1e6, "norm_epsilon": 1e-2}[field]})
    assert not failures(list(compare_logits(checkpoint / "release", QWEN, hf)))
    assert failures(list(compare_logits(checkpoint / "release", other, hf)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("smollm3 tied, second layer without RoPE", {"layers_without_rope": ()}),
        ("olmo2 untied, 2 groups", {"norm_epsilon": 1e-2}),
        ("phi3 untied, 2 groups, half of each head turns", {"rotary_fraction": 1.0}),
    ],
)
def test_a_layer_built_otherwise_fails_far_out(tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    """Negative control of each family's own layers, at positions from 8,192 on."""
    hf, checkpoint = make(tmp_path, SHAPES[name])
    (*_, middle, long) = compare_logits(
        checkpoint / "release", dataclasses.replace(SHAPES[name], **change), hf
    )
    assert (middle.name, long.name) == (
        "logits, middle: positions 8192 to 8207",
        "logits, long: positions 32752 to 32767",
    )
    for check in (middle, long):
        assert not check.passed
        assert (check.max_difference or 0) > 1e-2


def test_a_tied_head_untied_fails(tmp_path: Path) -> None:
    hf, checkpoint = make(tmp_path, QWEN)
    untied = dataclasses.replace(QWEN, tied_embeddings=False)
    (checkpoint / "hf" / "config.json").write_text(json.dumps(hf_config_of_shape(untied)))
    assert failures(list(verify_checkpoint(checkpoint))) == ["keys and shapes"]
    assert "config.json" in failures(list(verify_checkpoint(checkpoint, hf=hf, with_logits=False)))


def test_one_byte_changed_fails_with_and_without_integrity_file(tmp_path: Path) -> None:
    hf, checkpoint = make(tmp_path)
    release = checkpoint / "release"
    file = release / "__0_0.distcp"
    needle = read_checkpoint(checkpoint)["output_layer.weight"].numpy().tobytes()
    flip_bit(file, file.read_bytes().index(needle) + 9)
    assert failures(list(verify_checkpoint(checkpoint))) == ["release/__0_0.distcp", "lm_head.weight"]
    (release / "integrity.json").unlink()
    assert failures(list(verify_checkpoint(checkpoint))) == ["lm_head.weight"]
    assert failures(list(verify_checkpoint(checkpoint, hf=hf, with_logits=False))) == ["lm_head.weight"]
    write_integrity(release, {"__0_0.distcp": sha256_file(file)})
    names = failures(list(verify_checkpoint(checkpoint)))
    assert names == ["release/.metadata", "release/metadata.json", "lm_head.weight"], "files not listed"


def test_a_damaged_record_is_named_with_its_file_and_a_remedy(tmp_path: Path) -> None:
    hf, checkpoint = make(tmp_path)
    file = checkpoint / "release" / "__0_0.distcp"
    with open_checkpoint(file.parent, LLAMA) as stored:
        chunk = stored.tensors["output_layer.weight"].chunks[0]
    data = file.read_bytes()
    record = data[chunk.start : chunk.start + chunk.length].replace(b"data.pkl", b"data.pkk")
    file.write_bytes(data[: chunk.start] + record + data[chunk.start + chunk.length :])
    for other in (None, hf):
        checks = list(verify_checkpoint(checkpoint, hf=other, with_logits=False))
        assert failures(checks) == ["release/__0_0.distcp", "lm_head.weight"]
        detail = next(check.detail for check in checks if check.name == "lm_head.weight")
        assert f"{file}: the record of output_layer.weight at [0, 0] is damaged (it contains no" in detail
        assert "copy this one again" in detail


def test_without_integrity_file_only_records_of_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, checkpoint = make(tmp_path)
    release = checkpoint / "release"
    file = release / "__0_0.distcp"
    whole = file.stat().st_size
    with open(file, "ab") as stream:
        stream.truncate(whole + (8 << 20))  # as large as states of an optimizer
    (release / "integrity.json").unlink()
    sizes: list[int] = []

    def count(descriptor: int, out: memoryview, offset: int, where: Path) -> None:
        sizes.append(len(out))
        read_fully(descriptor, out, offset, where)

    monkeypatch.setattr(verify_module, "read_fully", count)
    assert failures(list(verify_checkpoint(checkpoint))) == []
    weights = sum(tensor.numel() * tensor.itemsize for tensor in read_checkpoint(checkpoint).values())
    assert weights <= sum(sizes) < whole
    sizes.clear()
    assert failures(list(verify_checkpoint(checkpoint, hf=hf, with_logits=False))) == []
    assert sizes == [], "a comparison reads the records itself"


def test_a_record_without_columns_is_read(tmp_path: Path) -> None:
    _, checkpoint = make(tmp_path)
    with (
        open_checkpoint(checkpoint / "release", LLAMA) as stored,
        open(checkpoint / "release" / "__0_0.distcp", "rb") as stream,
    ):
        scan = verify_module.RecordScan(stored, LLAMA, with_values=True)
        chunk = dataclasses.replace(stored.tensors["output_layer.weight"].chunks[0], shape=(5, 0))
        data = StoredData(start=0, size=3, crc=0, first=1)
        parts = scan._read_data(stream, "output_layer.weight", chunk, data)
        assert sum(part.nbytes for part in parts) == 3


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    _, checkpoint = make(tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["decoder.final_layernorm.weight"][3] = torch.nan

    bad = changed_checkpoint(checkpoint, tmp_path / "bad", spoil)
    assert failures(list(verify_checkpoint(bad))) == ["model.norm.weight"]


def test_another_model_of_the_same_shape_fails_everywhere(tmp_path: Path) -> None:
    _, checkpoint = make(tmp_path)
    other = write_model(
        tmp_path / "other", LLAMA, {k: v + 0.01 for k, v in read_hf(tmp_path / "hf").items()}
    )
    checks = list(verify_checkpoint(checkpoint, hf=other, with_logits=False))
    tensors = [check for check in checks if check.shape is not None]
    assert all(not check.passed for check in tensors)
    for check in tensors:
        assert check.max_difference == pytest.approx(0.01, rel=1e-3)
        assert check.mean_difference == pytest.approx(0.01, rel=1e-3)
        assert "FAILED" in check.line(50)


def read_hf(folder: Path) -> dict[str, Tensor]:
    from tests.unit.conversion.small_models import read_weights

    return read_weights(folder)


def test_an_incomplete_model_is_one_line(tmp_path: Path) -> None:
    hf, checkpoint = make(tmp_path)
    (hf / "model.safetensors").write_bytes(b"short")
    checks = list(verify_checkpoint(checkpoint, hf=hf))
    assert "keys and shapes" in failures(checks)
    assert "logits" in failures(checks)
    shutil.rmtree(checkpoint / "release")
    with pytest.raises(ValueError, match="contains no release"):
        list(verify_checkpoint(checkpoint))


@pytest.mark.parametrize("window", [1, 3, 4, 5, 63, 64, 4096, 32_768])
def test_windows_ascend_inside_the_models_window(window: int) -> None:
    shape = dataclasses.replace(QWEN, max_position_embeddings=window)
    positions = [p for w in windows_of(shape) for p in range(w.first, w.first + w.tokens)]
    assert positions == sorted(set(positions))
    assert positions[0] == 0
    assert positions[-1] < window


def test_windows_reach_beyond_the_original_length() -> None:
    assert [window.first for window in windows_of(LLAMA)] == [0, 4096, 16_368]
