"""Tokenizers of each kind against their own libraries, called plainly."""

from __future__ import annotations

import base64
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tiny_tokenizers import BEGIN, END, SENTENCES, train_bpe, write_huggingface, write_sentencepiece
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from megatron_exact.data.hf_tokenizer import load_for_rendering
from megatron_exact.data.tokenize import eod_in_text
from megatron_exact.data.tokenizers import (
    files_sha256,
    load_tokenizer,
    made_by,
    same_tokenizer,
    tokenizer_sha256,
)

TEXTS = [SENTENCES[0], "x", "Grüße, 世界 \U0001f600\n\n  indented", "".join(SENTENCES)]


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_huggingface(tmp_path_factory.mktemp("tokenizers") / "llama3")


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizers") / "tiny.model")


def plain_ids(folder: Path, text: str) -> list[int]:
    """Text alone, by the tokenizers library."""
    ids: list[int] = (
        Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    )
    return ids


def test_a_document_starts_as_the_tokenizer_says_and_ends_with_one_eod(llama3: Path) -> None:
    tokenizer = load_tokenizer(llama3)
    assert (tokenizer.kind, tokenizer.prefix_ids, tokenizer.eod_id, tokenizer.eod_token) == (
        "huggingface",
        (0,),
        1,
        END,
    )
    upstream = AutoTokenizer.from_pretrained(llama3)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == [*upstream(text)["input_ids"], 1]
        assert ids.tolist() == [0, *plain_ids(llama3, text), 1]


def test_no_bos(llama3: Path) -> None:
    tokenizer = load_tokenizer(llama3, add_bos=False)
    assert tokenizer.prefix_ids == ()
    assert tokenizer.encode_batch(["x"])[0].tolist() == [*plain_ids(llama3, "x"), 1]


@pytest.mark.parametrize("template", [f"$A {END}", f"{BEGIN} $A {END}"])
def test_a_tokenizer_that_appends_eos_still_gives_one(tmp_path: Path, template: str) -> None:
    tokenizer = load_tokenizer(write_huggingface(tmp_path / "llama", template=template))
    (ids,) = tokenizer.encode_batch([TEXTS[0]])
    assert ids[-1] == 1
    assert np.count_nonzero(ids == 1) == 1
    assert (ids[0] == 0) == template.startswith(BEGIN)


def test_a_tokenizer_without_post_processor_has_no_prefix(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_huggingface(tmp_path / "qwen", template=None))
    assert tokenizer.prefix_ids == ()


def test_text_that_spells_a_special_token_stays_text(llama3: Path) -> None:
    text = f"the token {END} and {BEGIN} end"
    assert 1 in plain_ids(llama3, text)  # negative control: the library's default reads it as control
    tokenizer = load_tokenizer(llama3)
    (ids,) = tokenizer.encode_batch([text])
    assert np.count_nonzero(ids == 1) == 1
    assert np.count_nonzero(ids == 0) == 1
    assert train_bpe().decode(ids[1:-1].tolist()) == text
    copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301 - what a worker gets
    assert copy.encode_batch([text])[0].tolist() == ids.tolist()


def test_saved_truncation_and_padding_cut_nothing(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "short", truncation=8)
    assert len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXTS[3]).ids) == 8  # control
    plain = train_bpe().encode(TEXTS[3], add_special_tokens=False).ids
    long, short = load_tokenizer(folder).encode_batch([TEXTS[3], "x"])
    assert long.tolist() == [0, *plain, 1]
    assert len(short) == 3


def test_vocab_size_counts_added_tokens(tmp_path: Path) -> None:
    base = train_bpe().get_vocab_size()
    folder = write_huggingface(tmp_path / "more", added=(AddedToken("<tool>"), AddedToken("<call>")))
    assert load_tokenizer(folder).vocab_size == base + 2


def test_eod_token_is_the_users(llama3: Path) -> None:
    with pytest.raises(ValueError, match=r"'x' is an ordinary piece of text .* --force-eod-token"):
        load_tokenizer(llama3, eod_token="x", add_bos=False)
    tokenizer = load_tokenizer(llama3, eod_token="x", add_bos=False, force_eod=True)
    assert tokenizer.eod_token == "x"
    assert tokenizer.encode_batch(["y"])[0].tolist() == plain_ids(llama3, "y") + plain_ids(llama3, "x")


@pytest.mark.parametrize("token", ["<|nothing|>", "two words", ""])
def test_an_eod_token_that_is_not_one_token_is_refused(llama3: Path, spm: Path, token: str) -> None:
    for path in (llama3, spm):
        with pytest.raises(ValueError, match="--eod-token"):
            load_tokenizer(path, eod_token=token)


def test_a_tokenizer_without_eos_needs_one(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "noeos", eos=None)
    model = write_sentencepiece(tmp_path / "noeos.model", eos_id=-1)
    for path in (folder, folder / "tokenizer.json", model):
        with pytest.raises(ValueError, match="has no eos token to end documents with: name one by --eod"):
            load_tokenizer(path)
    assert load_tokenizer(folder, eod_token=END).eod_id == 1
    assert load_tokenizer(folder / "tokenizer.json", eod_token=END).prefix_ids == (0,)


def test_a_bos_that_is_the_eod_is_refused(llama3: Path) -> None:
    with pytest.raises(ValueError, match="would contain two EODs: use --no-bos"):
        load_tokenizer(llama3, eod_token=BEGIN)
    assert load_tokenizer(llama3, eod_token=BEGIN, add_bos=False).eod_id == 0


def test_sentencepiece(spm: Path) -> None:
    tokenizer = load_tokenizer(spm)
    assert (tokenizer.kind, tokenizer.prefix_ids, tokenizer.eod_id) == ("sentencepiece", (1,), 2)
    upstream = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    assert tokenizer.vocab_size == upstream.get_piece_size()
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids.tolist() == upstream.encode(text, add_bos=True, add_eos=True)
    assert load_tokenizer(spm, add_bos=False).encode_batch(["book"])[0].tolist() == [
        *upstream.encode("book"),
        2,
    ]
    copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301
    assert copy.encode_batch(["book"])[0].tolist() == tokenizer.encode_batch(["book"])[0].tolist()


def test_sentencepiece_text_never_becomes_a_control_symbol(spm: Path) -> None:
    (ids,) = load_tokenizer(spm).encode_batch(["the </s> and <s> end"])
    assert np.count_nonzero(ids == 2) == 1
    assert np.count_nonzero(ids == 1) == 1


def test_sentencepiece_without_bos_has_no_prefix(tmp_path: Path) -> None:
    assert load_tokenizer(write_sentencepiece(tmp_path / "nobos.model", bos_id=-1)).prefix_ids == ()


def test_identity_follows_the_content_not_the_place(llama3: Path, spm: Path, tmp_path: Path) -> None:
    copy = write_huggingface(tmp_path / "elsewhere")
    (copy / "README.md").write_text("not a part of the tokenizer")
    first, second = load_tokenizer(llama3).identity(), load_tokenizer(copy).identity()
    assert first["path"] == str(llama3)
    assert {**first, "path": ""} == {**second, "path": ""}
    assert load_tokenizer(spm).identity().keys() == {"path", "kind", "vocab_size", "sha256"}


def test_a_link_keeps_the_name_that_tells_the_kind(spm: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(spm.read_bytes())
    (tmp_path / "linked.model").symlink_to(tmp_path / "blob")
    assert load_tokenizer(tmp_path / "linked.model").sha256 == tokenizer_sha256(spm)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.model").write_bytes(b"no model")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.bin").write_text("{}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for name, reason in (
        ("missing", "does not exist"),
        ("empty", "has no tokenizer"),
        ("a.model", "not a SentencePiece model"),
        ("a.json", r"is not a tokenizer\.json"),
        ("a.bin", "neither a folder nor"),
        ("broken", r"is not a tokenizer\.json"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_tokenizer(tmp_path / name)


def digits_folder(folder: Path, tokenizer_class: str, **config: str) -> Path:
    """SmolLM's kind: BPE that cuts digits one by one, under the class of a tokenizer that does not."""
    tokenizer = train_bpe()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["2024 and 2023, 12345 of 1999"] * 9, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": tokenizer_class, "eos_token": END, "bos_token": BEGIN, "unk_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, **config}))
    return folder


@pytest.mark.parametrize("model_type", [None, "llama", "qwen2"])
@pytest.mark.parametrize(
    "name", ["GPT2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizer", "GemmaTokenizer"]
)
def test_tokens_are_those_of_the_file(tmp_path: Path, name: str, model_type: str | None) -> None:
    folder = digits_folder(tmp_path / "model", name)
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = "in 2024, 12345 and x"
    upstream = AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        (ids,) = load_tokenizer(folder).encode_batch([text])
    assert ids.tolist() == [*plain_ids(folder, text), 1]
    differs = upstream != plain_ids(folder, text)
    assert (
        any("makes other tokens of text than its tokenizer.json" in str(w.message) for w in said) >= differs
    )
    rendering, doubt = load_for_rendering(folder)  # what evaluation and templates encode with
    assert rendering.encode(text, add_special_tokens=False) == plain_ids(folder, text)
    assert rendering.eos_token_id == 1
    assert (doubt is not None) >= differs


def test_transformers_does_differ_for_some_class(tmp_path: Path) -> None:
    """Negative control of the test above."""
    folder = digits_folder(tmp_path / "model", "GPT2Tokenizer")
    assert AutoTokenizer.from_pretrained(folder).encode("2024") != plain_ids(folder, "2024")
    with pytest.warns(UserWarning, match=r"GPT2Tokenizer and makes other tokens .*of \"The quick"):
        load_tokenizer(folder)


def test_text_that_spells_a_control_token_that_is_not_special_stays_text(tmp_path: Path) -> None:
    added = ("<|fim_prefix|>", "</tool_call>", "[FIM]")
    text_like = ("    ", "Megatron", "世")
    tokens = tuple(AddedToken(one, special=False, normalized=False) for one in (*added, *text_like))
    folder = write_huggingface(tmp_path / "qwen", added=tokens)
    text = f"say {' or '.join(added)} now,    Megatron 世"
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    control = {raw.token_to_id(one) for one in added}
    assert control < set(plain_ids(folder, text))  # negative control: the library reads them
    tokenizer = load_tokenizer(folder)
    (ids,) = tokenizer.encode_batch([text])
    assert not control & set(ids.tolist())
    assert raw.decode(ids[1:-1].tolist(), skip_special_tokens=False) == text
    # Pieces of text that a vocabulary has as added tokens are what the file says, and counted by name.
    assert {raw.token_to_id(one) for one in text_like} <= set(ids.tolist())
    assert {text for _, text in tokenizer.counted_tokens} >= {"Megatron", "世"}
    assert "    " not in {text for _, text in tokenizer.counted_tokens}


def test_tokens_that_only_the_config_has(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "model", eos="<|stop|>")
    number = train_bpe().get_vocab_size()
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    decoder = {str(number): {"content": "<|stop|>", "special": True}}
    path.write_text(json.dumps({**config, "added_tokens_decoder": decoder}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eod_id, tokenizer.eod_token, tokenizer.vocab_size) == (number, "<|stop|>", number + 1)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == number
    path.write_text(json.dumps({**config, "added_tokens_decoder": {"7": {"content": "<|stop|>"}}}))
    with pytest.raises(ValueError, match="the files are not of one tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("template", [None, f"{BEGIN} $A"])
def test_bos_is_the_post_processors_word_and_another_flag_is_said(
    tmp_path: Path, template: str | None, add_bos: bool
) -> None:
    folder = write_huggingface(tmp_path / "model", template=template)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_bos_token": add_bos}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tokenizer = load_tokenizer(folder)
    assert tokenizer.prefix_ids == ((0,) if template else ())
    assert [*tokenizer.prefix_ids] == AutoTokenizer.from_pretrained(folder).encode("x")[:-1]
    assert len(said) == (add_bos != (template is not None))  # a line where the file says otherwise


def test_identity_is_of_what_decides_tokens(llama3: Path, tmp_path: Path) -> None:
    first = tokenizer_sha256(llama3)
    assert tokenizer_sha256(llama3 / "tokenizer.json") == first
    content = json.loads((llama3 / "tokenizer.json").read_text())

    def changed(name: str, content: dict[str, Any], config: dict[str, Any] | None = None) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(content, indent=4, sort_keys=True))
        if config is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return tokenizer_sha256(folder)

    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    chat = {"chat_template": "{{ messages }}", "model_max_length": 5, "eos_token": END}
    for number, (same, config) in enumerate(
        (
            (content, chat),
            ({**content, "truncation": None, "decoder": None}, None),
            ({**content, "model": {**content["model"], "merges": merges, "dropout": None}}, None),
        )
    ):
        assert changed(f"same{number}", same, config) == first
    vocab = {**content["model"]["vocab"]}
    vocab["x"], vocab["y"] = vocab["y"], vocab["x"]
    swapped = [{**content["added_tokens"][0], "id": 1}, {**content["added_tokens"][1], "id": 0}]
    for name, other in {
        "vocab": {"model": {**content["model"], "vocab": vocab}},
        "merges": {"model": {**content["model"], "merges": content["model"]["merges"][1:]}},
        "normalizer": {"normalizer": {"type": "NFC"}},
        "pre_tokenizer": {"pre_tokenizer": {**content["pre_tokenizer"], "add_prefix_space": True}},
        "post_processor": {"post_processor": None},
        "added_tokens": {
            "added_tokens": swapped,
            "model": {**content["model"], "vocab": {**content["model"]["vocab"], BEGIN: 1, END: 0}},
        },
    }.items():
        assert changed(name, {**content, **other}) != first, name


def test_a_record_of_the_files_is_still_known(llama3: Path, tmp_path: Path) -> None:
    old = {"path": str(llama3), "kind": "huggingface", "sha256": files_sha256(llama3)}
    new = {**old, "path": str(tmp_path / "gone"), "sha256": tokenizer_sha256(llama3)}
    assert old["sha256"] != new["sha256"]
    assert made_by(old["sha256"], llama3)
    assert made_by(files_sha256(llama3 / "tokenizer.json"), llama3)
    assert same_tokenizer(old, new)
    assert same_tokenizer(new, old)
    other = write_huggingface(tmp_path / "other", template=None)
    assert not made_by(old["sha256"], other)
    assert not same_tokenizer(old, {**new, "sha256": tokenizer_sha256(other)})
    assert not same_tokenizer({**old, "path": str(tmp_path / "gone")}, new)  # nothing says what it was


def test_other_ends_in_the_configs_of_the_model_are_said(llama3: Path, tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "model")
    for name, ids, is_said in (("config.json", 1, False), ("generation_config.json", [0, 1], False)):
        (folder / name).write_text(json.dumps({"model_type": "llama", "eos_token_id": ids}))
        with warnings.catch_warnings(record=True) as said:
            load_tokenizer(folder)
        assert bool(said) == is_said
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    with pytest.warns(
        UserWarning, match=r"ends with 1 \(<\|end\|>\), .* generation_config.json names 0 \(<\|b"
    ):
        load_tokenizer(folder)


def test_a_tiktoken_file_is_answered_with_tokenizer_json(tmp_path: Path) -> None:
    lines = [f"{base64.b64encode(bytes([number])).decode()} {number}\n" for number in range(256)]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    for path in (tmp_path / "tokenizer.model", tmp_path):
        with pytest.raises(ValueError, match=r"is a tiktoken vocabulary.*use the tokenizer\.json"):
            load_tokenizer(path)


def test_an_unknown_word_is_not_called_the_eod(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<|end|>": 0, "a": 1, "b": 2}, unk_token="<|end|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json", eod_token="<|end|>")
    assert "does not know 'unheard' and writes its unknown token" in eod_in_text(loaded, "a unheard b")
    assert "contains the EOD token '<|end|>' itself" in eod_in_text(loaded, "a <|end|> b")


def test_an_unknown_word_of_sentencepiece_is_named(spm: Path) -> None:
    loaded = load_tokenizer(spm, eod_token="<unk>", force_eod=True)
    assert "does not know '世界'" in eod_in_text(loaded, "The 世界 reads")


def test_folders_without_tokenizer_json(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "full", template=None)
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (legacy / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (legacy / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "unk_token": END, "bos_token": END}
    (legacy / "tokenizer_config.json").write_text(json.dumps(config))
    (ids,) = load_tokenizer(legacy).encode_batch([TEXTS[0]])
    assert ids.tolist() == [*AutoTokenizer.from_pretrained(legacy).encode(TEXTS[0]), 1]
