"""The made-up language: what its documents and questions promise about facts and distances."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from examples.miniature.base_model import BASE_STAGES, BaseStage
from examples.miniature.experiment import DESIGNS, DISTANT, FULL, NEAR
from examples.miniature.language import (
    ASK,
    END,
    FILLERS,
    KEYS,
    VALUES,
    VOCABULARY,
    CorpusDesign,
    documents,
    prompt_tokens,
    question_distances,
    write_corpus,
    write_items,
    write_tokenizer,
)
from megatron_exact.evaluation.probe_items import read_items


def draw(design: CorpusDesign, number: int, seed: int = 3) -> list[list[str]]:
    return [document for document, _ in zip(documents(design, seed), range(number), strict=False)]


def read(document: list[str]) -> tuple[dict[str, tuple[str, int]], list[tuple[str, str, int]]]:
    """Facts by key (value, its place) and questions (key, value, distance of value to value)."""
    facts: dict[str, tuple[str, int]] = {}
    asked = []
    for place, word in enumerate(document):
        if word in KEYS:
            value = document[place + 1]
            if place and document[place - 1] == ASK:
                asked.append((word, value, place + 1 - facts[word][1]))
            else:
                assert word not in facts
                facts[word] = (value, place + 1)
    return facts, asked


def test_distant_documents_ask_once_for_each_fact_of_their_first_quarter() -> None:
    for document in draw(DESIGNS[DISTANT], 300):
        facts, asked = read(document)
        assert Counter(key for key, _, _ in asked) == dict.fromkeys(facts, 1)
        assert all(facts[key][0] == value for key, value, _ in asked)
        assert all(place < len(document) // 4 for _, place in facts.values())
        assert len({value for value, _ in facts.values()}) == len(facts) <= 8
        words = Counter("filler" if word in FILLERS else "other" for word in document)
        assert words["other"] == 5 * len(facts)


@pytest.mark.parametrize("name", [DISTANT, NEAR])
def test_distances_of_questions(name: str) -> None:
    for document in draw(DESIGNS[name], 300):
        assert question_distances(document) == [distance for _, _, distance in read(document)[1]]
    assert question_distances(["k01", "v03", "w00", ASK, "k01", "v03"]) == [4]


def test_near_documents_have_the_same_lengths_and_short_distances() -> None:
    distant, near = (draw(DESIGNS[name], 2_000) for name in (DISTANT, NEAR))
    for document in near:
        facts, asked = read(document)
        assert [key for key, _, _ in asked] == list(facts)
        assert all(distance <= 3 + DESIGNS[NEAR].near_words for _, _, distance in asked)
    far = [distance for document in distant for _, _, distance in read(document)[1]]
    assert max(far) > 300  # the measurement would see distant questions
    quantiles = [
        np.quantile([len(document) for document in side], [0.1, 0.5, 0.9]) for side in (distant, near)
    ]
    assert quantiles[0] == pytest.approx(quantiles[1], rel=0.1)
    assert quantiles[0][1] == pytest.approx(72, rel=0.1)
    # facts of near documents stand anywhere, not in the first quarter alone
    places = [place / len(document) for document in near for _, place in read(document)[0].values()]
    assert np.mean(np.array(places) > 0.5) > 0.3


@pytest.mark.parametrize("stage", BASE_STAGES, ids=lambda stage: stage.name)
def test_no_base_document_is_longer_than_its_row(stage: BaseStage) -> None:
    for document in draw(stage.design, 500):
        facts, asked = read(document)
        assert len(document) + 1 <= stage.training.row_tokens <= 128
        assert all(facts[key][0] == value for key, value, _ in asked)
        assert asked


def test_a_corpus_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    design = DESIGNS[DISTANT]
    numbers = [
        write_corpus(tmp_path / f"{seed}.{i}", design, seed=seed, tokens=5_000)
        for i, seed in enumerate((1, 1, 2))
    ]
    one, again, other = ((tmp_path / name).read_bytes() for name in ("1.0", "1.1", "2.2"))
    assert one == again != other
    lines = [json.loads(line)["text"].split() for line in one.splitlines()]
    assert len(lines) == numbers[0]
    tokens = sum(len(words) + 1 for words in lines)
    assert 5_000 <= tokens < 5_000 + 512


def test_the_tokenizer_has_one_token_a_word_and_loads_beside_a_llama_config(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, window_tokens=64)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path))
    words = ["k07", "v21", "w03", "ask", "k07"]
    assert tokenizer(" ".join(words))["input_ids"] == [VOCABULARY.index(word) for word in words]
    assert len(tokenizer) == len(set(VOCABULARY)) == 82 == 2 + len(KEYS) + len(VALUES) + len(FILLERS)
    assert tokenizer.eos_token == END


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
        assert len(words) == item["context"] == prompt_tokens(item["distance"]) < FULL.long.row_tokens
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
