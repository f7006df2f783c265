"""The importer's table is what Transformer Engine's layer spec asks for, for every preset.

Needs Transformer Engine, not a GPU: its modules are built under the CPU runtime and never run.
`tests/distributed/test_sharded_keys.py` makes the same comparison with the local layer spec and proves that
it sees differences.
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

# norms after attention and MLP are not supported with Transformer Engine's layers
BUILT = {name: shape for name, shape in PRESETS.items() if not shape.post_norm}
CONFIGS = [name for name in hf_models.CONFIGS if not name.startswith("olmo2")]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
)


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    ranks.import_megatron_once()


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    shapes = {name: sharded_keys.reduced(shape) for name, shape in BUILT.items()}
    return sharded_keys.wanted_keys(shapes, "transformer_engine", tmp_path_factory.mktemp("keys"))


@pytest.mark.parametrize("name", BUILT)
def test_transformer_engine_asks_for_what_the_importer_writes(
    name: str, wanted: dict[str, dict[str, Any]]
) -> None:
    expected = sharded_keys.expected_keys(sharded_keys.reduced(PRESETS[name]))
    assert sharded_keys.differences(wanted[name], expected) == []


def test_the_modules_are_transformer_engines() -> None:
    """Else the comparison above would be that of the local layer spec."""
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    assert HAVE_TE
    spec = get_gpt_layer_with_transformer_engine_spec()
    modules = spec.submodules.self_attention.submodules
    assert "TE" in getattr(modules.linear_qkv, "__name__", str(modules.linear_qkv))


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_the_same_bits(name: str, tmp_path: Path) -> None:
    """Hugging Face > import > Transformer Engine model, every key accounted for > save > export."""
    import_hf(hf_models.save_model(name, tmp_path / "hf"), tmp_path / "checkpoint")
    sharded_keys.load_and_save(tmp_path / "checkpoint", "transformer_engine", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "exported")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("exported", "hf"))
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
