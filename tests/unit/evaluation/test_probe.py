"""The evidence probe: whole runs into a folder, and scores against each answer alone."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from probe_models import CopyingModel, random_model, small_tokenizer, write_model

from megatron_exact.evaluation import probe
from megatron_exact.evaluation.engine import Backend
from megatron_exact.evaluation.probe import ItemResult, Probe, score_items
from megatron_exact.evaluation.probe_items import ProbeItem, ProbeOptions, read_items
from megatron_exact.evaluation.result_folders import merged_info
from megatron_exact.evaluation.shared_prefixes import best_split

TOOL = Path(__file__).resolve().parents[3] / "tools" / "probe_evidence.py"
CPU = Backend(device="cpu")  # whatever other tests of this process made torch say about GPUs
OPTIONS = ProbeOptions(kinds=("answer-position", "field-lookup"), distances=(64, 80), items_per_cell=2)
ITEM = {
    "id": "a",
    "kind": "own-kind",
    "distance": 3,
    "context": 9,
    "prompt": " The object is the mirror. The object is the",
    "prompt_ablated": " The object is the river. The object is the",
    "gold": " mirror",
    "candidates": [" candle", " mirror"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written into."""
    folder = write_model(tmp_path_factory.mktemp("models") / "small")
    (folder / "megatron_exact.json").write_text('{"format_version": 1, "run": {"seed": 7}}')
    return folder


def files_of(results: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(results)): path.read_bytes() for path in results.rglob("*") if path.is_file()
    }


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing was left to score")


def stop_after(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt the run when so many cells are scored."""
    right, done = probe.score_items, Counter[str]()

    def counted(*arguments: Any, **named: Any) -> Any:
        if done["cells"] == cells:
            raise KeyboardInterrupt
        done["cells"] += 1
        return right(*arguments, **named)

    monkeypatch.setattr(probe, "score_items", counted)


def test_what_is_written(model: Path, tmp_path: Path) -> None:
    summaries = Probe(model, tmp_path / "r", OPTIONS, backend=CPU).run()
    assert set(files_of(tmp_path / "r")) == {
        "probe.json",
        "probe/answer-position.jsonl",
        "probe/field-lookup.jsonl",
    }
    record = json.loads((tmp_path / "r" / "probe.json").read_text())
    assert record["finished"] is True
    assert set(record["model"]) == {"name", "config_sha256", "tokenizer_sha256", "weights_sha256"}
    assert record["provenance"] == {"format_version": 1, "run": {"seed": 7}}
    assert record["items"]["kinds"] == {"answer-position": 4, "field-lookup": 4}
    assert record["options"]["distances"] == [64, 80]
    assert record["dtype"] == "float32"  # what `auto` came to
    assert record["backend"]["device"] == "cpu"
    lines = (tmp_path / "r" / "probe" / "field-lookup.jsonl").read_text().splitlines()
    assert [json.loads(line)["distance"] for line in lines] == [64, 64, 80, 80]
    for content in map(json.loads, lines):
        assert content["context"] == content["prompt_tokens"] == content["distance"] + 96
        assert content["effect"] == content["margin"] - content["margin_ablated"]
        place = content["candidates"].index(content["gold"])
        other = content["candidates"].index(content["competitor"])
        assert content["margin"] == content["scores"][place] - content["scores"][other]
        assert content["correct"] == int(max(content["scores"]) == content["scores"][place])
    assert [(str(one.cell), one.items, one.is_new) for one in summaries][:2] == [
        ("answer-position/64/160", 2, True),
        ("answer-position/80/176", 2, True),
    ]


def test_a_probe_that_was_interrupted_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Probe(model, tmp_path / "whole", OPTIONS, backend=CPU).run()
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            Probe(model, tmp_path / "parts", OPTIONS, backend=CPU).run()
    assert json.loads((tmp_path / "parts" / "probe.json").read_text())["finished"] is False
    summaries = Probe(model, tmp_path / "parts", OPTIONS, backend=CPU).run()
    assert [one.is_new for one in summaries] == [False, False, False, True]
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    monkeypatch.setattr(probe, "score_items", never)
    assert not any(one.is_new for one in Probe(model, tmp_path / "parts", OPTIONS, backend=CPU).run())


def test_a_folder_belongs_to_one_probe(model: Path, tmp_path: Path) -> None:
    Probe(model, tmp_path / "r", OPTIONS, backend=CPU).run()
    before = files_of(tmp_path / "r")
    other = write_model(tmp_path / "other", seed=1)
    for folder, options, backend, reason in [
        (other, OPTIONS, None, "another model: name"),
        (model, ProbeOptions(**{**vars(OPTIONS), "seed": 1}), None, "another options: seed"),
        (model, OPTIONS, Backend(dtype="bfloat16"), "another dtype"),
    ]:
        with pytest.raises(ValueError, match=reason):
            Probe(folder, tmp_path / "r", options, backend=backend)
    assert files_of(tmp_path / "r") == before
    (tmp_path / "r" / "probe" / "field-lookup.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(ValueError, match="line 1 is not a result of the probe"):
        Probe(model, tmp_path / "r", OPTIONS, backend=CPU).run()
    (tmp_path / "r" / "probe.json").unlink()
    with pytest.raises(ValueError, match="exists without a probe"):
        Probe(model, tmp_path / "r", OPTIONS)


def test_suites_may_be_evaluated_into_the_folder_of_a_probe(tmp_path: Path) -> None:
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe.json").write_text("{}")
    record = {"options": {}, "template": None, "sources": {}}
    about = {"model": 1, "backend": {"name": "hf", "dtype": "float32", "calls": []}}
    (tmp_path / ".results.json.partial-1-ab").write_text("")  # another call is writing
    assert merged_info(tmp_path, about, "ruler", record)["suites"] == {"ruler": record}
    (tmp_path / "something").write_text("")
    with pytest.raises(ValueError, match=r"has no results\.json"):
        merged_info(tmp_path, about, "ruler", record)


def test_items_beyond_the_model_are_refused(model: Path, tmp_path: Path) -> None:
    far = ProbeOptions(kinds=("answer-position",), distances=(500,), items_per_cell=1)
    with pytest.raises(ValueError, match=r"takes 596 positions.*--allow-beyond-positions"):
        Probe(model, tmp_path / "r", far)
    assert not (tmp_path / "r").exists()
    (summary,) = Probe(model, tmp_path / "r", far, backend=CPU, allow_beyond_positions=True).run()
    assert (summary.cell.context, summary.items) == (596, 1)


def test_options_that_nothing_reads_are_refused(tmp_path: Path) -> None:
    for name, value in (("contexts", (512,)), ("needles", tmp_path)):
        with pytest.raises(ValueError, match=rf"--{name} is read by evidence-field alone"):
            ProbeOptions(**{**vars(OPTIONS), name: value})
    with pytest.raises(ValueError, match="--items brings its own kinds"):
        ProbeOptions(items=tmp_path, kinds=("field-lookup",))


def test_a_device_that_is_not_there_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--device cuda:99: torch finds"):
        Probe(model, tmp_path / "r", OPTIONS, backend=Backend(device="cuda:99"))
    assert not (tmp_path / "r").exists()


def run_tool_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    spec = importlib.util.spec_from_file_location("probe_evidence", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["probe_evidence.py", *map(str, arguments)])
    module.main()


def test_the_tool_scores_items_of_a_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(ITEM) + "\n" + json.dumps({**ITEM, "id": "b", "gold": " candle"}) + "\n")
    command = ["--model", model, "--items", path, "--output", tmp_path / "r", "--device", "cpu"]
    run_tool_main(monkeypatch, *command)
    assert capsys.readouterr().out.startswith("own-kind/3/9: margin ")
    lines = (tmp_path / "r" / "probe" / "own-kind.jsonl").read_text().splitlines()
    one, other = map(json.loads, lines)
    assert one["margin"] == -other["margin"]
    assert {one["correct"], other["correct"]} == {0, 1}
    assert one["gold"] == " mirror"
    run_tool_main(monkeypatch, *command)
    assert "(finished before)" in capsys.readouterr().out
    path.write_text(json.dumps({**ITEM, "prompt": " A"}) + "\n")
    with pytest.raises(ValueError, match="another options: items"):
        run_tool_main(monkeypatch, *command)
    assert read_items(path)[0].prompt == " A"


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
    right = probe.select_rows
    monkeypatch.setattr(
        probe, "select_rows", lambda cache, rows, model: right(cache, [*rows[1:], rows[0]], model)
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
    assert best_split([(1, 2, 3), (1, 2, 3)], 2) == 2  # a token is left to give logits
    assert best_split([(1, 2, 3), (2, 2, 3)], 2) == 0
    # five prompts with 3 tokens in common save more than two of them with 6
    rows = [
        (9, 9, 9, 1, 1, 1, 0, 0),
        (9, 9, 9, 1, 1, 1, 2, 0),
        *[(9, 9, 9, n, 0, 0, 0, 0) for n in (2, 3, 4)],
    ]
    assert best_split(rows, len(rows[0]) - 1) == 3


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
    found = planted("answer-position", CopyingModel(2500, reach=140, lift=3.0))
    for distance, results in found.items():
        for content in (result.to_json() for result in results):
            expected = 3.0 if distance <= 128 else 0.0
            assert content["margin"] == pytest.approx(expected, abs=1e-5)
            assert content["margin_ablated"] == pytest.approx(0, abs=1e-5)
            assert content["effect"] == pytest.approx(expected, abs=1e-5)
            assert (content["correct"], content["correct_ablated"]) == (int(distance <= 128), 0)


def test_names_in_the_evidence_are_not_enough_for_the_other_kinds() -> None:
    """All answers of a record stand in it, and the distractor of the field names the same person."""
    model = CopyingModel(2500, reach=500, lift=3.0)
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
    with pytest.raises(ValueError, match="check its weights and its dtype"):
        score_items(CopyingModel(97, reach=1, lift=float("nan")), None, items)


def test_half_precision_runs() -> None:
    model = random_model("llama").to(torch.bfloat16)
    results = score_items(model, None, drawn_items(3), batch_tokens=100)
    assert worst_difference(model, results) < 0.5
