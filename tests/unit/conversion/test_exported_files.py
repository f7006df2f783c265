"""The window that an export promises, and that no rotary frequency depends on it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.exported_files import exported_window, length_limits
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.conversion.verify_checkpoint import verify_checkpoint
from megatron_exact.lineage import trained_row_tokens
from megatron_exact.model.families import hf_config_of_shape, shape_of_hf_config
from megatron_exact.model.shapes import YarnScaling
from tests.unit.conversion.small_models import LLAMA, QWEN, write_model

YARN = replace(QWEN, rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=4096))

IMPORTED = QWEN.max_position_embeddings


def record(*row_tokens: int | None) -> dict[str, Any]:
    """run.json of the last of several trainings, the first one from random weights."""
    run: dict[str, Any] = {}
    for rows in row_tokens:
        start = {"sha256": "beef", "run": run} if run else None
        run = {"row_tokens": rows, "start_checkpoint": start}
    return run


@pytest.mark.parametrize(
    ("run", "longest"),
    [
        (None, None),
        (record(None), None),
        (record(4096), 4096),
        (record(4096, 8192), 8192),
        (record(4096, 16_384, 512), 16_384),  # instruction tuning at the end
        (record(8192, None), 8192),
    ],
)
def test_the_longest_rows_of_all_trainings_count(run: dict[str, Any] | None, longest: int | None) -> None:
    assert trained_row_tokens(run) == longest


@pytest.mark.parametrize(
    ("run", "wanted", "window"),
    [
        (None, None, IMPORTED),
        (record(IMPORTED // 2), None, IMPORTED),  # never lowered
        (record(IMPORTED), None, IMPORTED),
        (record(2 * IMPORTED), None, 2 * IMPORTED),
        (record(2 * IMPORTED, 512), None, 2 * IMPORTED),
        (record(2 * IMPORTED), 3 * IMPORTED, 3 * IMPORTED),
        (record(512), 512, 512),
        (None, 2 * IMPORTED, 2 * IMPORTED),
    ],
)
def test_the_window_of_an_export(run: dict[str, Any] | None, wanted: int | None, window: int) -> None:
    assert exported_window(QWEN, run, wanted) == window


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (8191, "8191 is below the 8192 tokens .* give 8192 or more"),
        (0, "0 is below"),
        (2**31, "not an"),
    ],
)
def test_a_window_that_is_refused(wanted: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        exported_window(QWEN, record(8192, 512), wanted)
    assert "\n" not in str(error.value)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_only_the_window_changes_and_only_where_it_must(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", QWEN)
    import_hf(hf, tmp_path / "c")
    assert export_hf(tmp_path / "c", tmp_path / "untrained").window == IMPORTED
    for name, row_tokens in (("short", IMPORTED // 2), ("long", 2 * IMPORTED)):
        (tmp_path / "c" / "run.json").write_text(json.dumps(record(row_tokens)))
        found = export_hf(tmp_path / "c", tmp_path / name)
        assert found.imported_window == IMPORTED
        assert found.window == max(IMPORTED, row_tokens)
    before = config_of(hf)
    assert config_of(tmp_path / "untrained") == config_of(tmp_path / "short") == before
    assert config_of(tmp_path / "long") == {**before, "max_position_embeddings": 2 * IMPORTED}
    with pytest.raises(ValueError, match="is below"):
        export_hf(tmp_path / "c", tmp_path / "none", window=IMPORTED)
    assert not (tmp_path / "none").exists()


FAR = torch.tensor([[0, 1, 4095, 8191, 8192, 16_384, 65_535, 131_072]])


def rotary(config: dict[str, Any], window: int) -> tuple[Tensor, ...]:
    """Cosines and sines of transformers at positions far apart."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    known = {**config, "max_position_embeddings": window}
    if config["model_type"] == "llama":
        embedding: Any = LlamaRotaryEmbedding(transformers.LlamaConfig(**known))
    else:
        embedding = Qwen2RotaryEmbedding(transformers.Qwen2Config(**known))
    found: tuple[Tensor, ...] = embedding(torch.zeros(1), FAR)
    return found


@pytest.mark.parametrize("shape", [LLAMA, QWEN, YARN], ids=["llama3 scaling", "plain", "yarn"])
def test_no_frequency_depends_on_the_window(shape: Any) -> None:
    config = hf_config_of_shape(shape)
    assert shape_of_hf_config(config, "it") == shape
    narrow, wide = rotary(config, 16_384), rotary(config, 262_144)
    assert all(torch.equal(one, other) for one, other in zip(narrow, wide, strict=True))


def test_frequencies_that_depend_on_the_window_are_seen() -> None:
    """The negative control of the test above."""
    config = {
        **hf_config_of_shape(QWEN),
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    }
    narrow, wide = rotary(config, 16_384), rotary(config, 262_144)
    assert not torch.equal(narrow[0], wide[0])


def test_every_other_kind_of_scaling_is_refused() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kinds = set(ROPE_INIT_FUNCTIONS) - {"default", "llama3", "yarn"}
    assert {"dynamic", "longrope"} <= kinds
    for kind in sorted(kinds):
        for key in ("rope_type", "type"):
            scaling = {key: kind, "factor": 2.0, "original_max_position_embeddings": 4096}
            with pytest.raises(ValueError, match=f"{kind}' is not supported"):
                shape_of_hf_config({**hf_config_of_shape(QWEN), "rope_scaling": scaling}, "it")


def limits_of(folder: Path) -> dict[str, Any]:
    """Every field of a folder that limits the length."""
    limits = length_limits(folder, config_of(folder))
    return {f"{limit.file} {limit.field}": limit.tokens for limit in limits}


NO_LIMIT = 10**30
"""What transformers writes for "no limit"."""


@pytest.mark.parametrize(
    ("trained", "wanted", "old", "new"),
    [
        (2 * IMPORTED, None, IMPORTED, 2 * IMPORTED),  # the window was extended
        (2 * IMPORTED, 4 * IMPORTED, IMPORTED, 4 * IMPORTED),
        (None, 2 * IMPORTED, IMPORTED, 2 * IMPORTED),
        (2 * IMPORTED, None, 3 * IMPORTED, 3 * IMPORTED),  # large enough
        (2 * IMPORTED, None, NO_LIMIT, NO_LIMIT),
        (IMPORTED, None, IMPORTED // 2, IMPORTED),  # trained inside the window, on more than the limit
        (IMPORTED // 4, None, IMPORTED // 2, IMPORTED // 2),  # somebody's choice
        (None, None, IMPORTED // 2, IMPORTED // 2),
    ],
)
def test_every_limit_of_the_length_follows_the_window(
    tmp_path: Path, trained: int | None, wanted: int | None, old: int, new: int
) -> None:
    hf = write_model(tmp_path / "hf", QWEN)
    fields = {"n_positions": old, "max_sequence_length": float(old), "seq_length": None, "max_length": old}
    (hf / "config.json").write_text(json.dumps({**config_of(hf), **fields}))
    other = {"eos_token": "<|é|>", "added": {"max_length": 7}, "model_input_names": ["input_ids"]}
    (hf / "tokenizer_config.json").write_text(
        json.dumps({**other, "model_max_length": old, "max_len": old})
    )
    sampling = {"do_sample": True, "repetition_penalty": 1.05, "max_new_tokens": 7, "eos_token_id": [1, 2]}
    (hf / "generation_config.json").write_text(json.dumps({**sampling, "max_length": old}))
    text = '{"version":"1.0","truncation":{"direction":"Right","max_length":%d},"model":{"vocab":{"é":1}}}'
    (hf / "tokenizer.json").write_text(text % old, encoding="utf-8")
    import_hf(hf, tmp_path / "c")
    if trained is not None:
        (tmp_path / "c" / "run.json").write_text(json.dumps(record(trained)))
    found = export_hf(tmp_path / "c", tmp_path / "out", window=wanted)
    window = found.window
    assert limits_of(tmp_path / "out") == pytest.approx(
        {
            "config.json max_position_embeddings": window,
            "config.json n_positions": new,
            "config.json max_sequence_length": new,
            "config.json max_length": new,
            "tokenizer_config.json model_max_length": new,
            "tokenizer_config.json max_len": new,
            "generation_config.json max_length": new,
            "tokenizer.json truncation.max_length": new,
        }
    )
    assert len(found.raised) == (7 if new != old else 0)
    assert {limit.tokens for limit in found.raised} == ({old} if new != old else set())

    def read(name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))
        return content

    assert read("tokenizer_config.json") == {**other, "model_max_length": new, "max_len": new}
    assert read("generation_config.json") == {**sampling, "max_length": new}
    assert (tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8") == text % new
    assert found.sampling == {"do_sample": True, "repetition_penalty": 1.05, "max_new_tokens": 7}
    checks = list(verify_checkpoint(tmp_path / "c", hf=tmp_path / "out", with_logits=False))
    assert all(check.passed for check in checks), [check.line(30) for check in checks]
    if new != old:  # the negative control: the imported file again
        shutil.copyfile(hf / "tokenizer_config.json", tmp_path / "out" / "tokenizer_config.json")
        checks = list(verify_checkpoint(tmp_path / "c", hf=tmp_path / "out", with_logits=False))
        (failed,) = [check for check in checks if not check.passed]
        assert f"tokenizer_config.json: model_max_length {old} is below" in failed.detail


def test_a_folder_without_limits_stays_as_it_is(tmp_path: Path) -> None:
    hf = write_model(tmp_path / "hf", QWEN)
    (hf / "generation_config.json").write_text('{"bos_token_id":  1}')
    (hf / "tokenizer.json").write_text('{"truncation": null, "model": {}}')
    import_hf(hf, tmp_path / "c")
    found = export_hf(tmp_path / "c", tmp_path / "out", window=2 * IMPORTED)
    assert (found.raised, found.sampling) == ((), {})
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (hf / name).read_bytes()


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_file_that_no_export_could_read_is_refused_on_import(tmp_path: Path, name: str) -> None:
    hf = write_model(tmp_path / "hf", QWEN)
    (hf / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name} is not JSON"):
        import_hf(hf, tmp_path / "c")
