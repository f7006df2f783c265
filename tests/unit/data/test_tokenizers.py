"""Tokenizers of each kind against their own libraries, called plainly."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tiny_tokenizers import BEGIN, END, SENTENCES, train_bpe, write_huggingface, write_sentencepiece
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from megatron_exact.data.tokenizers import load_tokenizer, tokenizer_sha256

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
    tokenizer = load_tokenizer(llama3, eod_token="x", add_bos=False)
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
    with pytest.raises(ValueError, match="would hold two EOD: use --no-bos"):
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
    (copy / "tokenizer_config.json").write_text('{"eos_token": "<|begin|>"}')
    assert tokenizer_sha256(copy) != first["sha256"]
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
        ("empty", "holds no tokenizer"),
        ("a.model", "no SentencePiece model"),
        ("a.json", r"no tokenizer\.json"),
        ("a.bin", "neither a folder nor"),
        ("broken", "could not be loaded"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_tokenizer(tmp_path / name)
