"""The window that an export promises, and that no rotary frequency depends on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.exported_files import exported_window
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.model.hf_config import hf_config_of_shape, shape_of_hf_config
from megatron_exact.trainings import trained_row_tokens
from tests.unit.conversion.small_models import LLAMA, QWEN, write_model

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


@pytest.mark.parametrize("shape", [LLAMA, QWEN], ids=["llama3 scaling", "plain"])
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

    kinds = set(ROPE_INIT_FUNCTIONS) - {"default", "llama3"}
    assert {"dynamic", "yarn", "longrope"} <= kinds
    for kind in sorted(kinds):
        for key in ("rope_type", "type"):
            scaling = {key: kind, "factor": 2.0, "original_max_position_embeddings": 4096}
            with pytest.raises(ValueError, match=f"{kind}' is not supported"):
                shape_of_hf_config({**hf_config_of_shape(QWEN), "rope_scaling": scaling}, "it")
