"""Items of the probe, read back word by word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_exact.evaluation.probe.items import read_items
from megatron_exact.miniature.language import ASK, KEYS, VALUES, VOCABULARY
from megatron_exact.miniature.probe_items import prompt_tokens, write_items
from megatron_exact.miniature.settings import FULL, LONG_ROW_TOKENS


def test_distances_are_exact_and_the_ablated_prompt_has_no_evidence(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    write_items(path, distances=FULL.distances, items_per_distance=20)
    items = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(items) == 20 * len(FULL.distances) == len({item["id"] for item in items})
    for item in items:
        words, ablated = (
            [VOCABULARY[token] for token in item[name]] for name in ("prompt", "prompt_ablated")
        )
        gold, competitor = (VOCABULARY[item[name][0]] for name in ("gold", "competitor"))
        key = words[-1]
        assert words[-2] == ASK
        assert key in KEYS
        statements = [place for place, word in enumerate(words[:-1]) if word == key]
        assert len(statements) == 1
        value_place = statements[0] + 1
        assert words[value_place] == gold
        assert len(words) - value_place == item["distance"]
        assert len(words) == item["context"] == prompt_tokens(item["distance"]) < LONG_ROW_TOKENS
        # the evidence alone is exchanged, for a fact with another key and another value
        changed = [place for place, (a, b) in enumerate(zip(words, ablated, strict=True)) if a != b]
        assert changed == [value_place - 1, value_place]
        assert key not in ablated[:-1]
        assert gold not in ablated
        assert ablated[value_place] in VALUES
        assert ablated[value_place - 1] in KEYS
        assert competitor != gold
        assert competitor in words
        assert [VOCABULARY[one] for (one,) in item["candidates"]] == list(VALUES)
    assert len(read_items(path)) == len(items)  # the probe's own reader takes them


def test_items_do_not_depend_on_which_distances_are_asked(tmp_path: Path) -> None:
    write_items(tmp_path / "one", distances=(64,), items_per_distance=5)
    write_items(tmp_path / "two", distances=(16, 64), items_per_distance=5)
    assert (tmp_path / "two").read_text().endswith((tmp_path / "one").read_text())
    write_items(tmp_path / "other", distances=(64,), items_per_distance=5, seed=1)
    assert (tmp_path / "one").read_text() != (tmp_path / "other").read_text()


@pytest.mark.parametrize("distance", [5, 6, 16, 17, 100])
def test_short_distances_have_room(tmp_path: Path, distance: int) -> None:
    write_items(tmp_path / "items", distances=(distance,), items_per_distance=3)
    for line in (tmp_path / "items").read_text().splitlines():
        assert len(json.loads(line)["prompt"]) == prompt_tokens(distance)
