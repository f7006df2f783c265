"""The made-up documents: what they promise about facts, questions and distances."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_exact.miniature.corpus import CorpusDesign, documents, question_distances, write_corpus
from megatron_exact.miniature.language import ASK, END, FILLERS, KEYS, VALUES, VOCABULARY, write_tokenizer
from megatron_exact.miniature.settings import BASE_STAGES, DESIGNS, DISTANT, NEAR


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
def test_no_base_document_is_longer_than_its_row(stage: object) -> None:
    for document in draw(stage.design, 500):  # type: ignore[attr-defined]
        facts, asked = read(document)
        assert len(document) + 1 <= stage.training.row_tokens <= 128  # type: ignore[attr-defined]
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
