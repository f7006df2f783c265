"""`--separate-qkv` on Transformer Engine's layers: norm and three projections in the fused checkpoint.

Needs Transformer Engine, not a GPU: its modules are built under the CPU runtime and never run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.model.families import PRESETS
from tests.distributed import hf_models, ranks, sharded_keys

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)
LAYERS = "transformer_engine"
CONFIGS = [name for name in hf_models.CONFIGS if not name.startswith("olmo2")]  # local layers only


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    ranks.import_megatron_once()


def make_separate(config: Any) -> None:
    """Change the configuration of a model that is to be built."""
    from megatron_exact.model.layer_specs import separate_qkv_spec

    config.transformer_layer_spec = separate_qkv_spec


def test_a_checkpoint_has_the_keys_and_shapes_of_the_fused_layout(tmp_path: Path) -> None:
    shapes = {name: sharded_keys.reduced(PRESETS[name]) for name in ("qwen2.5-0.5b", "llama-3.1-8b")}
    found = sharded_keys.wanted_keys(shapes, LAYERS, tmp_path, make_separate)
    for name, shape in shapes.items():
        assert sharded_keys.differences(found[name], sharded_keys.expected_keys(shape)) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_the_same_bits(name: str, tmp_path: Path) -> None:
    """Hugging Face > import > Transformer Engine model, every key accounted for > save > export."""
    import_hf(hf_models.save_model(name, tmp_path / "hf"), tmp_path / "checkpoint")
    sharded_keys.load_and_save(tmp_path / "checkpoint", LAYERS, tmp_path / "run", make_separate)
    export_hf(tmp_path / "run", tmp_path / "exported")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("exported", "hf"))
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
