"""The shipped base model: recalls at short range, not at long range, as docs/miniature.md relies on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.miniature.base_model import BASE_SEED, initial_weights, model_card, write_initial_model
from examples.miniature.experiment import SHIPPED_BASE
from examples.miniature.language import VALUES, write_items
from megatron_exact.evaluation.probe import score_items
from megatron_exact.evaluation.probe_items import read_items

MOST_BYTES = 8_000_000
SHORT, LONG = (16, 64, 96), (256, 384)


def accuracies(model: torch.nn.Module, folder: Path) -> dict[int, float]:
    """Share of right answers by distance."""
    path = folder / "items.jsonl"
    write_items(path, distances=SHORT + LONG, items_per_distance=16, seed=9)
    found: dict[int, list[int]] = {}
    for result in score_items(model, None, read_items(path)):
        line = result.to_json()
        found.setdefault(line["distance"], []).append(line["correct"])
    return {distance: float(np.mean(right)) for distance, right in found.items()}


def test_it_recalls_at_short_range_alone(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(SHIPPED_BASE)).eval()
    right = accuracies(model, tmp_path)
    assert all(right[distance] == 1 for distance in SHORT), right
    assert all(right[distance] <= 0.25 for distance in LONG), right
    # Negative control: without what attention reads, it knows as little as chance
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    blind = accuracies(model, tmp_path)
    assert all(share <= 4 / len(VALUES) for share in blind.values()), blind


def test_the_folder_is_small_and_says_how_it_was_made() -> None:
    assert sum(path.stat().st_size for path in SHIPPED_BASE.iterdir()) < MOST_BYTES
    assert (SHIPPED_BASE / "README.md").read_text(encoding="utf-8") == model_card(BASE_SEED)


def test_first_weights_are_those_of_a_llama_and_scaled_as_said(tmp_path: Path) -> None:
    write_initial_model(tmp_path, seed=3)
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path))
    weights = initial_weights(3)
    state = model.state_dict()
    assert set(state) == set(weights)
    for name, values in weights.items():
        np.testing.assert_array_equal(state[name].numpy(), values)
    expected = {
        "model.embed_tokens.weight": 1.0,
        "model.layers.0.self_attn.q_proj.weight": 128**-0.5,
        "model.layers.1.mlp.down_proj.weight": 0.5 * 256**-0.5,
        "lm_head.weight": 0.3 * 128**-0.5,
    }
    for name, std in expected.items():
        assert weights[name].std() == pytest.approx(std, rel=0.05), name
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 500
