"""A family is one file: with `other_names.py` registered, import, export, verification and flags know it.

The model that transformers loads is written here in plain torch, an independent reference of logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from megatron_exact.conversion.checkpoint_layout import extra_state_keys, hf_shapes, megatron_shapes
from megatron_exact.conversion.export_hf import export_hf
from megatron_exact.conversion.import_hf import import_hf
from megatron_exact.conversion.verify_checkpoint import verify_checkpoint
from megatron_exact.model import families
from megatron_exact.model.shapes import (
    FIXED_ARGUMENTS,
    ModelShape,
    megatron_arguments_of,
    megatron_flags,
)
from tests.unit.conversion import other_names
from tests.unit.conversion.small_models import (
    changed_checkpoint,
    random_weights,
    read_weights,
    write_model,
)

SHAPE = ModelShape(
    architecture="othernames",
    num_layers=2,
    hidden_size=40,
    ffn_hidden_size=56,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=12,  # not hidden_size / num_attention_heads
    vocab_size=70,
    max_position_embeddings=512,
    norm_epsilon=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=True,
)


class OtherNamesConfig(PreTrainedConfig):
    model_type = "othernames"
    depth: int = 2
    width: int = 40
    mlp_width: int = 56
    query_heads: int = 4
    key_heads: int = 2
    head_width: int = 12
    context: int = 512
    epsilon: float = 1e-5
    vocab_size: int = 70
    rope_theta: float = 10_000.0
    tie_word_embeddings: bool = False


class Norm(nn.Module):
    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt() * self.weight


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """[heads, tokens, d]: the first half of a head turns with the second."""
    half = x.shape[-1] // 2
    angles = positions[:, None] / base ** (torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
    )


class Block(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        queries, keys = c.query_heads * c.head_width, c.key_heads * c.head_width
        self.c = c
        self.before_attention, self.before_mlp = Norm(c.width, c.epsilon), Norm(c.width, c.epsilon)
        self.query_norm, self.key_norm = Norm(c.head_width, c.epsilon), Norm(c.head_width, c.epsilon)
        self.query = nn.Linear(c.width, queries, bias=False)
        self.key, self.value = (nn.Linear(c.width, keys, bias=False) for _ in range(2))
        self.mix = nn.Linear(queries, c.width, bias=False)
        self.w1, self.w3 = (nn.Linear(c.width, c.mlp_width, bias=False) for _ in range(2))
        self.w2 = nn.Linear(c.mlp_width, c.width, bias=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """[tokens, width]."""
        c, y = self.c, self.before_attention(x)
        q, k, v = (part(y).unflatten(-1, (-1, c.head_width)).transpose(0, 1) for part in self.qkv())
        q = rotate(self.query_norm(q), positions, c.rope_theta)
        k = rotate(self.key_norm(k), positions, c.rope_theta)
        k, v = (part.repeat_interleave(c.query_heads // c.key_heads, 0) for part in (k, v))
        scores = q @ k.transpose(1, 2) / c.head_width**0.5
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        x = x + self.mix(mixed.transpose(0, 1).flatten(1))
        y = self.before_mlp(x)
        return x + self.w2(nn.functional.silu(self.w1(y)) * self.w3(y))

    def qkv(self) -> tuple[nn.Linear, ...]:
        return self.query, self.key, self.value


class OtherNamesForCausalLM(PreTrainedModel):
    config_class = OtherNamesConfig
    base_model_prefix = "body"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.body = nn.Module()
        self.body.tokens = nn.Embedding(config.vocab_size, config.width)
        self.body.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.body.last_norm = Norm(config.width, config.epsilon)
        self.readout = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, position_ids: Tensor, **_: Any) -> CausalLMOutput:
        x = self.body.tokens(input_ids[0])
        for block in self.body.blocks:
            x = block(x, position_ids[0])
        return CausalLMOutput(logits=self.readout(self.body.last_norm(x))[None])


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """The one line, here undone again; and transformers gets the model."""
    AutoConfig.register("othernames", OtherNamesConfig)
    AutoModelForCausalLM.register(OtherNamesConfig, OtherNamesForCausalLM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, "othernames", other_names.FAMILY)
        yield


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return write_model(tmp_path / "hf", SHAPE)


def test_the_config_has_the_familys_own_keys(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    assert {"depth": 2, "width": 40, "context": 512, "parallel_blocks": False}.items() <= config.items()
    assert not {"num_hidden_layers", "hidden_size", "max_position_embeddings"} & set(config)
    assert families.shape_of_hf_config(config, "config.json") == SHAPE
    loaded = OtherNamesConfig.from_pretrained(hf)
    assert (loaded.query_heads, loaded.head_width, loaded.epsilon) == (4, 12, 1e-5)
    with pytest.raises(ValueError, match="parallel_blocks is True: attention and MLP side by side are not"):
        families.shape_of_hf_config({**config, "parallel_blocks": True}, "config.json")
    del config["depth"]
    with pytest.raises(ValueError, match="depth is None, not an integer"):
        families.shape_of_hf_config(config, "config.json")
    with pytest.raises(ValueError, match=r"only Qwen2ForCausalLM.*OtherNamesForCausalLM are"):
        families.shape_of_hf_config({**config, "architectures": ["OtherNamesModels"]}, "config.json")


def test_tensors_and_flags(hf: Path) -> None:
    model = OtherNamesForCausalLM(OtherNamesConfig.from_pretrained(hf))
    assert hf_shapes(SHAPE) == {name: tuple(value.shape) for name, value in model.named_parameters()}
    norms = [key for key in megatron_shapes(SHAPE) if "q_layernorm" in key or "k_layernorm" in key]
    assert [megatron_shapes(SHAPE)[key] for key in norms] == [(2, 12)] * 2
    assert len(extra_state_keys(2, qk_norm=True)) == len(extra_state_keys(2)) + 4
    assert "--qk-layernorm" in megatron_flags(SHAPE)
    arguments = {**FIXED_ARGUMENTS, **megatron_arguments_of(SHAPE), "max_position_embeddings": 512}
    args = SimpleNamespace(**arguments)
    assert families.shape_of_megatron_arguments(args, like=SHAPE) == SHAPE
    assert families.shape_of_megatron_arguments(args).architecture == "qwen3"  # the first one built so


def test_import_export_and_verification(hf: Path, tmp_path: Path) -> None:
    import_hf(hf, tmp_path / "checkpoint")
    checks = list(verify_checkpoint(tmp_path / "checkpoint", hf=hf))
    assert [check.name for check in checks if not check.passed] == []
    assert sum(check.name.startswith("logits") for check in checks) == 3
    export_hf(tmp_path / "checkpoint", tmp_path / "out", window=1024)
    ours, theirs = read_weights(tmp_path / "out"), read_weights(hf)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["OtherNamesForCausalLM"]
    assert config["context"] == 1024
    assert "max_position_embeddings" not in config
    assert all(check.passed for check in verify_checkpoint(tmp_path / "checkpoint", hf=tmp_path / "out"))


def test_names_with_another_prefix_and_a_tied_head(tmp_path: Path) -> None:
    """As the class without an output layer saves it; as a saver that keeps the other of two names does."""
    shape = replace(SHAPE, tied_embeddings=True)
    weights = random_weights(shape)
    bare = {name.removeprefix("body."): tensor for name, tensor in weights.items()}
    import_hf(write_model(tmp_path / "bare", shape, bare), tmp_path / "from_bare")
    head = {("readout.weight" if "tokens" in name else name): value for name, value in weights.items()}
    import_hf(write_model(tmp_path / "head", shape, head), tmp_path / "from_head")
    for name in ("from_bare", "from_head"):
        export_hf(tmp_path / name, tmp_path / f"{name}-out")
        exported = read_weights(tmp_path / f"{name}-out")
        assert set(exported) == set(weights)
        assert all(torch.equal(exported[key], weights[key]) for key in weights)


def exchange_norms(tensors: dict[str, Tensor]) -> None:
    q, k = (f"decoder.layers.self_attention.{x}_layernorm.weight" for x in "qk")
    tensors[q], tensors[k] = tensors[k], tensors[q]


def change_a_norm(tensors: dict[str, Tensor]) -> None:
    tensors["decoder.layers.self_attention.k_layernorm.weight"][1, 3] *= 1.5


@pytest.mark.parametrize("change", [exchange_norms, change_a_norm])
def test_a_wrong_norm_fails_in_the_logits_too(hf: Path, tmp_path: Path, change: Any) -> None:
    """Negative control."""
    import_hf(hf, tmp_path / "checkpoint")
    changed_checkpoint(tmp_path / "checkpoint", tmp_path / "changed", change)
    failed = [check.name for check in verify_checkpoint(tmp_path / "changed", hf=hf) if not check.passed]
    assert any("key_norm" in name for name in failed)
    assert any(name.startswith("logits, middle") for name in failed)
