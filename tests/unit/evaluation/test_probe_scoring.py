"""Shared prefixes and caches give what each prompt gives alone; planted models have known margins."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from probe_models import CopyingModel, random_model, small_tokenizer

from megatron_exact.evaluation import probe
from megatron_exact.evaluation.probe import ItemResult, score_items
from megatron_exact.evaluation.probe_items import ProbeItem, ProbeOptions

TOLERANCE = 1e-4
Ids = tuple[int, ...]


def drawn_items(number: int = 9) -> list[ProbeItem]:
    """Prompts of three lengths whose beginnings are common to two, to several or to none."""
    draw = random.Random(3)

    def ids(length: int) -> Ids:
        return tuple(draw.randrange(97) for _ in range(length))

    leads = {length: ids(length - 12) for length in (20, 33, 60)}
    items = []
    for i in range(number):
        length = (20, 33, 60)[i % 3]
        lead = leads[length] if i < 6 else ids(length - 12)
        candidates = (ids(1), ids(1 + i % 3), (*ids(2), 7), (*ids(2), 8))
        ablated = (*lead, *ids(12)) if i % 2 else (*lead, *ids(9))
        items.append(
            ProbeItem(
                id=str(i),
                kind="drawn",
                distance=5,
                context=length,
                prompt=(*lead, *ids(12)),
                prompt_ablated=ablated,
                gold=candidates[1],
                candidates=candidates,
                competitor=candidates[2],
            )
        )
    items.append(  # both prompts the same: nothing is left for the second step but one token
        ProbeItem(**{**vars(items[0]), "id": "same", "prompt_ablated": items[0].prompt})
    )
    return items


def plain_scores(model: Any, prompt: Any, candidates: tuple[Any, ...]) -> list[float]:
    """One forward pass without a cache for each answer."""
    scores = []
    for candidate in candidates:
        ids = torch.tensor([[*prompt, *candidate]])
        with torch.no_grad():
            found = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0], dim=-1)
        places = range(len(prompt) - 1, ids.shape[1] - 1)
        scores.append(sum(float(found[place, ids[0, place + 1]]) for place in places))
    return scores


def worst_difference(model: Any, results: list[ItemResult]) -> float:
    """Between what was found and the plain passes."""
    worst = 0.0
    for result in results:
        item = result.item
        for prompt, scores in ((item.prompt, result.scores), (item.prompt_ablated, result.scores_ablated)):
            plain = plain_scores(model, prompt, item.candidates)
            worst = max(worst, *(abs(a - b) for a, b in zip(plain, scores, strict=True)))
    return worst


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("batch_tokens", [7, 200, 100_000])  # pieces of a prompt, some prompts, all
def test_scores_are_those_of_each_answer_alone(family: str, batch_tokens: int) -> None:
    model = random_model(family)
    results = score_items(model, None, drawn_items(), batch_tokens=batch_tokens)
    assert [result.item.id for result in results] == [*map(str, range(9)), "same"]
    assert worst_difference(model, results) < TOLERANCE
    assert results[-1].margin == pytest.approx(results[-1].margin_ablated, abs=TOLERANCE)
    for result in results:
        assert result.margin == result.scores[1] - result.scores[2]


ROTARY = {
    "yarn": {"original_max_position_embeddings": 32},
    "llama3": {"original_max_position_embeddings": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "dynamic": {},
}


@pytest.mark.parametrize("kind", ROTARY)
def test_scaled_rotary_frequencies_are_those_of_each_answer_alone_or_refused(kind: str) -> None:
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0, **ROTARY[kind]}
    positions = 32 if kind == "dynamic" else 128
    model = random_model("llama", positions=positions, rope_parameters=parameters)
    if kind == "dynamic":
        with pytest.raises(ValueError, match=r"rope_type dynamic, .* change beyond 32 tokens"):
            score_items(model, None, drawn_items())
    short = [item for item in drawn_items() if item.context == 20]
    items = short if kind == "dynamic" else drawn_items()
    assert worst_difference(model, score_items(model, None, items, batch_tokens=200)) < TOLERANCE


def test_rows_of_the_cache_that_change_places_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    right = probe._select_rows
    monkeypatch.setattr(
        probe, "_select_rows", lambda cache, rows, model: right(cache, [*rows[1:], rows[0]], model)
    )
    model = random_model("llama")
    assert worst_difference(model, score_items(model, None, drawn_items())) > 100 * TOLERANCE


def test_nothing_leaks_between_items_of_a_batch() -> None:
    model, items = random_model("llama"), drawn_items()
    together = score_items(model, None, items)
    for item, result in zip(items, together, strict=True):
        alone = score_items(model, None, [item])[0]
        torch.testing.assert_close(
            torch.tensor([*result.scores, *result.scores_ablated]),
            torch.tensor([*alone.scores, *alone.scores_ablated]),
            atol=TOLERANCE,
            rtol=0,
        )


def test_a_common_beginning_is_read_once() -> None:
    model = CopyingModel(50, reach=5, lift=1.0)
    lead = tuple(range(40))
    items = [
        ProbeItem(
            id=str(number),
            kind="k",
            distance=1,
            context=50,
            prompt=(*lead, number, *range(9)),
            prompt_ablated=(*lead, 20 + number, *range(9)),
            gold=(1,),
            candidates=((1,), (2,)),
            competitor=(2,),
        )
        for number in range(3)
    ]
    score_items(model, None, items)
    assert model.tokens_read == 40 + 6 * 10
    assert probe.best_split([(1, 2, 3), (1, 2, 3)]) == 2  # a token is left to give logits
    assert probe.best_split([(1, 2, 3), (2, 2, 3)]) == 0
    # five prompts with 3 tokens in common save more than two of them with 6
    rows = [
        (9, 9, 9, 1, 1, 1, 0, 0),
        (9, 9, 9, 1, 1, 1, 2, 0),
        *[(9, 9, 9, n, 0, 0, 0, 0) for n in (2, 3, 4)],
    ]
    assert probe.best_split(rows) == 3


def test_batches_hold_one_length_and_keep_to_their_size() -> None:
    requests = [
        probe.Request(prompt=prompt, candidates=((1,), (2, 3), (4, 5)))
        for item in drawn_items()
        for prompt in (item.prompt, item.prompt_ablated)
        if isinstance(prompt, tuple)
    ]
    found = list(probe.batches(requests, 150))
    assert sorted(position for batch in found for position in batch) == list(range(len(requests)))
    for batch in found:
        lengths = {len(requests[position].prompt) for position in batch}
        assert len(lengths) == 1
        assert 2 * len(batch) * lengths.pop() <= 150 or len(batch) == 1


def planted(kind: str, model: CopyingModel) -> dict[int, list[ItemResult]]:
    """Results of our own items by distance."""
    options = ProbeOptions(kinds=(kind,), distances=(64, 128, 256), contexts=(), items_per_cell=4)
    tokenizer = small_tokenizer()
    source = options.item_source(tokenizer, 512)
    found: dict[int, list[ItemResult]] = {}
    for cell in source:
        found.setdefault(cell.distance, []).extend(score_items(model, tokenizer, source[cell]()))
    return found


def test_a_model_that_copies_what_is_near_has_the_effect_it_must() -> None:
    """It reads 140 tokens back: evidence at 64 and 128 tokens lifts the answer by 3 nats, none beyond."""
    found = planted("answer-position", CopyingModel(1000, reach=140, lift=3.0))
    for distance, results in found.items():
        for content in (result.to_json() for result in results):
            expected = 3.0 if distance <= 128 else 0.0
            assert content["margin"] == pytest.approx(expected, abs=1e-5)
            assert content["margin_ablated"] == pytest.approx(0, abs=1e-5)
            assert content["effect"] == pytest.approx(expected, abs=1e-5)
            assert (content["correct"], content["correct_ablated"]) == (int(distance <= 128), 0)


def test_names_in_the_evidence_are_not_enough_for_the_other_kinds() -> None:
    """All answers of a record stand in it, and the distractor of the field names the same person."""
    model = CopyingModel(1000, reach=500, lift=3.0)
    for results in planted("field-lookup", model).values():
        assert {round(abs(result.margin), 4) for result in results} == {0.0}
        assert all(result.to_json()["correct"] == 0 for result in results)
    for results in planted("evidence-field", model).values():
        for result in results:
            assert result.margin == pytest.approx(3, abs=1e-5)
            assert result.to_json()["effect"] == pytest.approx(0, abs=1e-5)


def test_tokens_of_another_vocabulary_and_broken_weights_are_refused() -> None:
    items = drawn_items(1)
    with pytest.raises(ValueError, match=r"has token \d+, the model's vocabulary ends at 9"):
        score_items(CopyingModel(10, reach=1, lift=1.0), None, items)
    with pytest.raises(ValueError, match="its weights or its dtype are no good"):
        score_items(CopyingModel(97, reach=1, lift=float("nan")), None, items)


def test_half_precision_runs() -> None:
    model = random_model("llama").to(torch.bfloat16)
    results = score_items(model, None, drawn_items(3), batch_tokens=100)
    assert worst_difference(model, results) < 0.5
