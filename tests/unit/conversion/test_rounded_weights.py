"""A checkpoint and a folder of different types: what may be rounded, and that rounding hides no damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.exported_files import is_export_of
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.conversion.verify_checkpoint import CheckpointCheck, verify_checkpoint
from megatron_exact.model.shapes import ModelShape
from tests.unit.conversion.small_models import (
    LLAMA,
    QWEN,
    changed_checkpoint,
    read_checkpoint,
    read_weights,
    write_checkpoint,
    write_model,
)

HEAD = "lm_head.weight"


def verified(checkpoint: Path, hf: Path, *, with_logits: bool = False) -> dict[str, CheckpointCheck]:
    """Name -> check."""
    return {check.name: check for check in verify_checkpoint(checkpoint, hf=hf, with_logits=with_logits)}


def failures(checks: dict[str, CheckpointCheck]) -> list[str]:
    return [name for name, check in checks.items() if not check.passed]


def lowest_bit(tensors: dict[str, Tensor]) -> None:
    """A change that rounding to bfloat16 hides."""
    bits = tensors["output_layer.weight"].view(torch.int32)
    before = tensors["output_layer.weight"].bfloat16()
    bits[5, 5] ^= 1
    assert torch.equal(tensors["output_layer.weight"].bfloat16(), before)


def test_a_rounded_import_says_so(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", LLAMA)
    import_hf(hf, tmp_path / "c", dtype="bfloat16")
    checks = verified(tmp_path / "c", hf, with_logits=True)
    assert failures(checks) == []
    assert checks[HEAD].detail == "the folder's float32 rounded to bfloat16"
    assert " rounded " in checks[HEAD].line(50)
    assert " ok" not in checks[HEAD].line(50)


@pytest.mark.parametrize("shape", [LLAMA, QWEN], ids=["untied", "tied"])
def test_a_rounded_export_equals_its_checkpoint_and_says_what_was_rounded(
    tmp_path: Path, shape: ModelShape
) -> None:
    import_hf(write_model(tmp_path / "hf", shape), tmp_path / "c")
    export_hf(tmp_path / "c", tmp_path / "out", dtype="bfloat16")
    checks = verified(tmp_path / "c", tmp_path / "out", with_logits=True)
    assert failures(checks) == []
    assert "an export of this checkpoint" in checks["types"].detail
    tensors = [check for name, check in checks.items() if name.startswith(("model.", "lm_head"))]
    assert {check.detail for check in tensors} == {"the checkpoint's float32 rounded to bfloat16"}
    assert all(check.is_rounded and check.max_difference == 0 for check in tensors)
    assert sum(name.startswith("logits") for name in checks) == 3
    # a copy elsewhere is the same checkpoint, an export as it is rounds nothing
    shutil.copytree(tmp_path / "c", tmp_path / "copy")
    assert failures(verified(tmp_path / "copy", tmp_path / "out")) == []
    export_hf(tmp_path / "c", tmp_path / "kept")
    kept = verified(tmp_path / "c", tmp_path / "kept")
    assert not any(check.is_rounded for check in kept.values())
    assert "types" not in kept


def test_a_rounded_export_of_another_model_fails(tmp_path: Path) -> None:
    """The record may be right and the weights wrong."""
    import_hf(write_model(tmp_path / "hf", LLAMA), tmp_path / "c")
    export_hf(tmp_path / "c", tmp_path / "out", dtype="bfloat16")
    weights = read_weights(tmp_path / "out")
    weights[HEAD].view(torch.int16)[3, 3] ^= 1
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    checks = verified(tmp_path / "c", tmp_path / "out")
    assert failures(checks) == [HEAD]
    assert (checks[HEAD].max_difference or 0) > 0


def test_a_low_bit_of_an_upcast_import_is_not_rounded_away(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", LLAMA, dtype=torch.bfloat16)
    import_hf(hf, tmp_path / "c", dtype="float32")
    sound = verified(tmp_path / "c", hf)
    assert failures(sound) == []
    assert not any(check.is_rounded for check in sound.values())
    assert "taken for its source" in sound["types"].detail
    bad = changed_checkpoint(tmp_path / "c", tmp_path / "bad", lowest_bit)
    checks = verified(bad, hf)
    assert failures(checks) == [HEAD]
    assert checks[HEAD].detail == "equal only if the checkpoint's float32 is rounded to bfloat16"
    assert (checks[HEAD].max_difference or 0) > 0


def test_nor_where_the_source_is_an_export_of_another_checkpoint(tmp_path: Path) -> None:
    """Its record tells of rounding, but not of this checkpoint's."""
    import_hf(write_model(tmp_path / "hf", LLAMA), tmp_path / "first")
    export_hf(tmp_path / "first", tmp_path / "out", dtype="bfloat16")
    import_hf(tmp_path / "out", tmp_path / "c", dtype="float32")
    assert failures(verified(tmp_path / "c", tmp_path / "out")) == []
    bad = changed_checkpoint(tmp_path / "c", tmp_path / "bad", lowest_bit)
    assert failures(verified(bad, tmp_path / "out")) == [HEAD]
    # nor is the checkpoint that was exported still the same with another bit and new hashes
    changed = changed_checkpoint(tmp_path / "first", tmp_path / "changed", lowest_bit)
    assert is_export_of(tmp_path / "out", tmp_path / "first" / "release")
    assert not is_export_of(tmp_path / "out", changed / "release")
    assert HEAD in failures(verified(changed, tmp_path / "out"))


def test_a_low_bit_of_an_upcast_export_is_not_rounded_away(tmp_path: Path) -> None:
    import_hf(write_model(tmp_path / "hf", LLAMA, dtype=torch.bfloat16), tmp_path / "c")
    export_hf(tmp_path / "c", tmp_path / "out", dtype="float32")
    assert failures(verified(tmp_path / "c", tmp_path / "out", with_logits=True)) == []
    weights = read_weights(tmp_path / "out")
    weights[HEAD].view(torch.int32)[5, 5] ^= 1
    save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert failures(verified(tmp_path / "c", tmp_path / "out")) == [HEAD]


def test_the_record_names_iteration_and_content(tmp_path: Path) -> None:
    import_hf(write_model(tmp_path / "hf", LLAMA), tmp_path / "c")
    run = tmp_path / "run"
    write_checkpoint(run, read_checkpoint(tmp_path / "c"), LLAMA.num_layers, iteration=3)
    shutil.copytree(tmp_path / "c" / "hf", run / "hf")
    export_hf(run, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "megatron_exact.json").read_text())["checkpoint"]
    assert record["iteration"] == 3
    assert len(record["sha256"]) == 64
    assert is_export_of(tmp_path / "out", run / "iter_0000003")
    assert not is_export_of(tmp_path / "hf", run / "iter_0000003")
    (run / "iter_0000003" / "integrity.json").unlink()
    assert not is_export_of(tmp_path / "out", run / "iter_0000003")
