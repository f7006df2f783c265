"""Prompts are exact to the token, and say what they must."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_models import sentencepiece_like_tokenizer, small_tokenizer

from megatron_exact.evaluation.probe_items import (
    KINDS,
    ProbeItem,
    ProbeOptions,
    Question,
    Writer,
    cells_of,
    encode_item,
    item_from_json,
    own_fillers,
    own_needles,
    place,
    read_field_needles,
    read_filler,
    read_items,
)
from megatron_exact.evaluation.probe_wording import ANSWER_FORMS, FILLERS, PEOPLE, RECORD_FORMS
from megatron_exact.evaluation.result_folders import ProbeCell

NEEDLES = Path(__file__).resolve().parents[3] / "examples" / "needles"
TOKENIZER = small_tokenizer()
WRITER = Writer(TOKENIZER)
FILLER = own_fillers(1000, WRITER)["landscape"]
QUESTION = Question(
    evidence=" A zebra slept; 7 zebras woke.",
    counterfactual=None,
    cloze=" What slept? The",
    gold=" zebra",
    candidates=(" zebra", " lion"),
    competitor=" lion",
)


def own_items(kind: str, **options: Any) -> list[ProbeItem]:
    source = ProbeOptions(kinds=(kind,), **options).item_source(TOKENIZER, 600)
    return [item for make in source.values() for item in make()]


def text_of(ids: Any) -> str:
    return str(TOKENIZER.decode(ids))


@given(
    distance=st.integers(20, 400),
    beyond=st.integers(30, 300),
    other=st.sampled_from(
        [None, " One owl.", " Here a very long sentence about nothing at all stands in its way."]
    ),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_the_distance_is_exact(distance: int, beyond: int, other: str | None, seed: int) -> None:
    cell = ProbeCell(kind="k", distance=distance, context=distance + beyond)
    question = Question(**{**vars(QUESTION), "counterfactual": other})
    item = place(question, cell, "x", writer=WRITER, filler=FILLER, draw=random.Random(seed))
    prompt, ablated = item.prompt, item.prompt_ablated
    evidence, cloze = WRITER.encode(QUESTION.evidence), WRITER.encode(QUESTION.cloze)
    assert len(prompt) == len(ablated) == cell.context
    found = [n for n in range(cell.context) if prompt[n : n + len(evidence)] == evidence]
    assert len(found) == 1
    answer_position, last_of_evidence = cell.context, found[0] + len(evidence) - 1
    assert answer_position - last_of_evidence == distance
    assert prompt[-len(cloze) :] == ablated[-len(cloze) :] == cloze
    assert prompt[-distance + 1 :] == ablated[-distance + 1 :]
    assert prompt[0] == ablated[0] == TOKENIZER.bos_token_id
    assert "zebra" not in text_of(ablated)
    if other is not None:
        there = WRITER.encode(other)
        end = cell.context - distance + 1
        assert ablated[end - len(there) : end] == there


def test_pieces_joined_as_ids_are_what_the_joined_text_gives() -> None:
    for kind in KINDS:
        item = own_items(
            kind, distances=(128,), contexts=() if kind != KINDS[2] else (256,), items_per_cell=1
        )[0]
        cloze = text_of(item.prompt)[-30:]
        cloze = cloze[cloze.index(" ") :]
        assert TOKENIZER.encode(cloze + str(item.gold), add_special_tokens=False) == [
            *TOKENIZER.encode(cloze, add_special_tokens=False),
            *TOKENIZER.encode(item.gold, add_special_tokens=False),
        ]
    # whole sentences of filler, evidence and cloze: encoded apart and encoded together
    first, second = FILLER.tokens[: FILLER.ends[3]], FILLER.tokens[FILLER.ends[3] : FILLER.ends[6]]
    pieces = [first, WRITER.encode(QUESTION.evidence), second, WRITER.encode(QUESTION.cloze)]
    joined = [token for piece in pieces for token in piece]
    assert TOKENIZER.encode(text_of(joined), add_special_tokens=False) == joined


@pytest.mark.parametrize("style", ["llama", "metaspace"])
def test_sentencepiece_tokens_are_those_of_the_joined_text(style: str) -> None:
    tokenizer = sentencepiece_like_tokenizer(style)
    writer = Writer(tokenizer)
    assert writer.start == (tokenizer.bos_token_id,)
    if style == "llama":  # the control: a piece alone is not what it is inside a text
        assert tuple(tokenizer.encode(" Anna", add_special_tokens=False)) != writer.encode(" Anna")
    filler = own_fillers(500, writer)["office"]
    cell = ProbeCell(kind="k", distance=100, context=300)
    item = place(QUESTION, cell, "x", writer=writer, filler=filler, draw=random.Random(0))
    encoded = encode_item(item, tokenizer)
    whole = [*encoded.prompt, *encoded.candidates[encoded.gold]]
    stop = writer.encode(" a.")[-1]
    after = whole.index(stop) + 1  # the first piece of filler is cut
    text = tokenizer.decode(whole[after:])
    assert text.endswith("What slept? The zebra")
    assert (
        tokenizer.encode(f"Yes. {text.lstrip()}", add_special_tokens=False)[-len(whole[after:]) :]
        == (whole[after:])
    )
    assert len(encoded.prompt) == cell.context


def test_a_tokenizer_that_joins_words_is_an_error() -> None:
    tokenizer = sentencepiece_like_tokenizer("across words")
    with pytest.raises(ValueError, match="other tokens than the text as a whole: give --items"):
        Writer(tokenizer)


def test_filler_pieces_end_with_a_sentence_and_have_their_length(tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randrange(0, 200) for _ in range(3)]
        pieces = FILLER.draw(lengths, draw)
        assert [len(piece) for piece in pieces] == lengths
        assert all(text_of(piece).endswith(".") for piece in pieces if piece)
    with pytest.raises(ValueError, match=r"an item needs .* give a longer --filler"):
        FILLER.draw([10**6], draw)
    (tmp_path / "book.txt").write_text("One owl sat.\nIt was  dark! Was it?\n")
    book = read_filler(tmp_path / "book.txt", WRITER)
    assert text_of(book.tokens) == " One owl sat. It was dark! Was it?"
    assert len(book.ends) == 3
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match="contains no text"):
        read_filler(tmp_path / "empty.txt", WRITER)


def test_every_kind_has_forms_and_every_form_meets_the_fillers() -> None:
    for kind in KINDS:
        contexts = (256,) if kind == "evidence-field" else ()
        items = own_items(kind, distances=(64, 128), contexts=contexts, items_per_cell=96)
        few = own_items(kind, distances=(64, 128), contexts=contexts, items_per_cell=5)
        for cell in {item.cell for item in items}:
            there = [item for item in items if item.cell == cell]
            assert Counter(Counter(item.form for item in there).values()) == {4: 24}  # 24 forms, four times
            assert len({(item.form, item.filler) for item in there}) == 96
            assert [item.form for item in few if item.cell == cell] == [item.form for item in there[:5]]


def test_answer_position_is_answered_by_its_evidence_alone() -> None:
    for item in own_items("answer-position", distances=(64, 256), items_per_cell=48):
        text, ablated = text_of(item.prompt), text_of(item.prompt_ablated)
        beginning = re.escape(item.form).replace(r"\{place\}", r"\w+").replace(r"\{name\}", r"\w+")
        cloze = re.search(rf" {beginning}$", text)
        assert cloze is not None
        assert text.count(f"{cloze[0]}{item.gold}.") == text.count(cloze[0]) - 1 == 1
        words = re.findall(r" \w+", text)
        assert [answer for answer in item.candidates if answer in words] == [item.gold]
        assert not [answer for answer in item.candidates if answer in re.findall(r" \w+", ablated)]


def test_field_lookup_needs_the_field() -> None:
    asked: dict[str, set[tuple[int, int, int]]] = {}
    for item in own_items("field-lookup", distances=(64,), items_per_cell=480):
        (form,) = (form for form in RECORD_FORMS if form.opening == item.form)
        text = text_of(item.prompt)
        pair = re.escape(form.pair).replace(r"\{field\}", "([a-z]+)").replace(r"\{name\}", "( [A-Z][a-z]+)")
        pair = pair.replace("\\ ( ", "( ")
        opening = re.escape(form.opening).replace(r"\{number\}", r"(\d+)")
        cloze = re.search(rf" {opening} {pair.removesuffix('( [A-Z][a-z]+)')}$", text)
        assert cloze is not None, text[-80:]
        record = text[text.index(f" {form.opening.format(number=cloze[1])}") : text.rindex(cloze[0])]
        fields = dict(re.findall(pair, record.split(".")[0]))
        assert set(fields) == set(form.fields)
        assert fields[cloze[2]] == item.gold
        assert set(fields.values()) == set(item.candidates)
        assert not [answer for answer in item.candidates if str(answer) in text_of(item.prompt_ablated)]
        places = (
            form.fields.index(cloze[2]),
            item.candidates.index(item.gold),
            list(fields).index(cloze[2]),
        )
        asked.setdefault(item.form, set()).add(places)
    assert len(asked) == len(RECORD_FORMS)
    for place_in in zip(*set.union(*asked.values()), strict=True):
        assert len(set(place_in)) == 4  # the field, the place of the answer and of the field vary


def test_the_field_replaces_evidence_by_its_type() -> None:
    for item in own_items("evidence-field", distances=(64, 128), contexts=(256, 512), items_per_cell=24):
        evidence = item.form.partition(". Wh")[0]
        sentence = re.escape(evidence).replace(r"\{CHAR\}", "([A-Z][a-z]+)").replace(r"\{1\}", r"([^.]*?)")
        original = re.findall(rf"{sentence}\.", text_of(item.prompt))
        other = re.findall(rf"{sentence}\.", text_of(item.prompt_ablated))
        assert len(original) == len(other) == 1
        assert f" {original[0][0]}" == item.gold
        assert other[0][0] == original[0][0]
        assert original[0][1] != other[0][1]
        question = text_of(item.prompt).rsplit(" Question: ", 1)[1]
        assert question == text_of(item.prompt_ablated).rsplit(" Question: ", 1)[1]


FUNCTION_WORDS = frozenset(
    {"a", "an", "the", "and", "in", "on", "at", "to", "of", "for", "by", "with", "as", "is", "was", "has"}
    | {"have", "had", "doe", "do", "not", "who", "which", "from", "that"}
)


def test_evidence_and_question_share_no_content_word() -> None:
    for needle in own_needles():
        evidence, question = (
            {word.rstrip("s") for word in re.findall(r"\w+", text.lower())}
            for text in (needle.needle.replace("{CHAR}", ""), needle.question)
        )
        shared = (evidence & question) - {word.rstrip("s") for word in FUNCTION_WORDS}
        assert not shared, (needle.name, shared)


def test_fillers_have_no_answer_and_do_not_repeat_each_other() -> None:
    answers = {word.lower() for _, words in ANSWER_FORMS for word in words} | {
        name.lower() for name in PEOPLE
    }
    seen: set[str] = set()
    for name, grammar in FILLERS.items():
        sentences = set(grammar.sentences())
        assert len(sentences) > 1000
        assert not sentences & seen
        seen |= sentences
        words = {word for sentence in sentences for word in re.findall(r"\w+", sentence.lower())}
        assert not words & answers, (name, words & answers)


def test_needles_of_nolimas_form_make_a_field(tmp_path: Path) -> None:
    path = NEEDLES / "needlesets" / "needle_set.json"
    assert len(read_field_needles(path)) > 4
    items = own_items("evidence-field", distances=(128,), contexts=(512,), items_per_cell=5, needles=path)
    assert all(len(set(item.candidates)) == 4 for item in items)
    experiment = json.loads(path.read_text())[0]
    alone = [{**experiment, "tests": {"T1": experiment["tests"]["T1"]}}]
    (tmp_path / "alone.json").write_text(json.dumps(alone))
    with pytest.raises(ValueError, match="no needle has another one of its kind"):
        read_field_needles(tmp_path / "alone.json")


def test_cells_draw_for_themselves() -> None:
    one = own_items("answer-position", distances=(64,), items_per_cell=3)
    more = own_items("answer-position", distances=(128, 64), items_per_cell=5)
    assert one == [item for item in more if item.distance == 64][:3]
    assert one != own_items("answer-position", distances=(64,), items_per_cell=3, seed=1)
    assert len({item.prompt for item in more}) == len(more)


def test_the_grid() -> None:
    assert [cell.distance for cell in cells_of(["field-lookup"], (), (), 1024)] == [64, 128, 256, 512]
    assert [cell.context for cell in cells_of(["field-lookup"], (300,), (), None)] == [396]
    assert max(cell.distance for cell in cells_of(["field-lookup"], (), (), None)) == 65_536
    field = cells_of(["evidence-field"], (), (), 1024)
    assert [(cell.distance, cell.context) for cell in field] == [
        (64, 256), (64, 512), (64, 1024), (128, 256), (128, 512), (128, 1024),
        (256, 512), (256, 1024), (512, 1024),
    ]  # fmt: skip
    for kinds, distances, contexts, window, reason in [
        (["other"], (), (), None, "choose from answer-position"),
        (["field-lookup"], (64, 64), (), None, "give each length once"),
        (["evidence-field"], (512,), (512, 2048, 1024), None, "no cell has 512 tokens"),
        (["field-lookup"], (), (), 100, "is too short for a cell"),
    ]:
        with pytest.raises(ValueError, match=reason):
            cells_of(kinds, distances, contexts, window)


def test_what_does_not_fit_is_refused() -> None:
    for distance, context in ((4, 100), (64, 66)):
        cell = ProbeCell(kind="k", distance=distance, context=context)
        with pytest.raises(ValueError, match="which do not fit"):
            place(QUESTION, cell, "x", writer=WRITER, filler=FILLER, draw=random.Random(0))


LINE: dict[str, Any] = {
    "id": "a",
    "kind": "k",
    "distance": 3,
    "context": 9,
    "prompt": " A zebra. The",
    "prompt_ablated": [5, 6, 7],
    "gold": " zebra",
    "candidates": [" lion", " zebra", [8, 9]],
}


def test_items_of_files(tmp_path: Path) -> None:
    item = item_from_json(LINE)
    assert (item.competitor, item.prompt_ablated, item.candidates[2]) == (" lion", (5, 6, 7), (8, 9))
    encoded = encode_item(item, TOKENIZER)
    assert encoded.prompt == tuple(TOKENIZER.encode(" A zebra. The"))
    assert encoded.prompt[0] == TOKENIZER.bos_token_id
    assert encoded.candidates[1] == tuple(TOKENIZER.encode(" zebra", add_special_tokens=False))
    assert (encoded.gold, encoded.competitor) == (1, 0)
    assert encoded.window == len(encoded.prompt) + max(map(len, encoded.candidates)) - 1
    path = tmp_path / "items.jsonl"
    lines = [LINE, {**LINE, "id": "b", "competitor": [8, 9]}, {**LINE, "kind": "l"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_items(path) == [item_from_json(line) for line in lines]
    hashes = {encode_item(one, TOKENIZER).sha256 for one in read_items(path)}
    assert len(hashes) == 2  # the competitor decides the result, the name of the kind does not


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "../x"}, "use a-z, 0-9 and hyphens"),
        ({"distance": -1}, "below 0"),
        ({"distance": 1.5}, "not a whole number"),
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": [1, -2]}, "neither text nor a list"),
        ({"gold": " owl"}, "gold and competitor must be among"),
        ({"competitor": " zebra"}, "its competitor is gold"),
        ({"candidates": [" zebra"]}, "fewer than two"),
        ({"candidates": [" zebra", " lion", " lion"]}, "twice"),
        ({"goold": " zebra"}, "unknown key 'goold'"),
        ({"gold": None}, "neither text"),
    ],
)
def test_lines_that_are_no_items(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{json.dumps({**LINE, 'id': 'b', **change})}\n")
    with pytest.raises(ValueError, match=rf"line 2 is not an item of the probe: .*{re.escape(reason)}"):
        read_items(path)


def test_files_of_items_that_are_empty_or_repeat_themselves(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="contains no items"):
        read_items(path)
    path.write_text(2 * (json.dumps(LINE) + "\n"))
    with pytest.raises(ValueError, match="comes twice in k"):
        read_items(path)
    path.write_text(json.dumps({key: value for key, value in LINE.items() if key != "gold"}) + "\n")
    with pytest.raises(ValueError, match="it has no 'gold'"):
        read_items(path)
    with pytest.raises(ValueError, match="leave the other options out"):
        ProbeOptions(items=path, distances=(64,))
