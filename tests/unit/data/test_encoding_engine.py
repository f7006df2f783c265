"""gigatoken beside the tokenizer's own library: equal tokens, and every difference is found."""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from numpy.typing import NDArray
from tiny_tokenizers import END, SENTENCES, write_huggingface, write_sentencepiece
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from megatron_exact.data import encoding_engine
from megatron_exact.data.encoding_engine import (
    CheckedEngine,
    EngineDifferenceError,
    GigatokenEncoder,
    choose_engine,
    definition_of,
    first_difference,
    has_unsettled_characters,
    old_characters,
    probe_texts,
    random_text,
)
from megatron_exact.data.hf_tokenizer import TextEncoder
from megatron_exact.data.tokenize import tokenize_corpus
from megatron_exact.data.tokenize_journal import unfinished_folder
from megatron_exact.data.tokenizers import CorpusTokenizer, load_tokenizer

pytest.importorskip("gigatoken")

TEXTS = [f"{number} " + "".join(SENTENCES[: number % 7 + 1]) for number in range(60)]
ADDED = (AddedToken("   ", normalized=False), AddedToken("<tool_call>"), AddedToken("kilowatt"))
NOT_THERE = "gigatoken cannot be imported (import of gigatoken halted; None in sys.modules)"
NEW_CHARACTER = "\U00011de3"  # a digit of Unicode 17


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_huggingface(tmp_path_factory.mktemp("tokenizers") / "llama3", added=ADDED)


def write_sentencepiece_bpe(path: Path, symbols: list[str]) -> Path:
    """A SentencePiece model of the kind of Llama 2."""
    text = path.with_suffix(".txt")
    text.write_text("".join(SENTENCES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=symbols,
        minloglevel=2,
    )
    return path


@pytest.fixture(scope="module")
def spm_bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentencepiece_bpe(tmp_path_factory.mktemp("tokenizers") / "bpe.model", [])


def write_lines(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def files_of(prefix: Path) -> list[bytes]:
    return [prefix.with_name(prefix.name + suffix).read_bytes() for suffix in (".bin", ".idx", ".json")]


def gigatoken_of(reference: TextEncoder) -> GigatokenEncoder:
    return GigatokenEncoder(definition_of(reference)[0])


def probe_of(reference: TextEncoder) -> list[str]:
    return probe_texts(definition_of(reference)[1])


class Doctored(GigatokenEncoder):
    """Changes the last token of every text that contains a word."""

    word = "forty"

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        encoded = super().encode(texts)
        for text, ids in zip(texts, encoded, strict=True):
            if self.word in text:
                ids[-1] += 1
        return encoded


@pytest.mark.parametrize("kind", ["hf", "spm_bpe"])
def test_equal_on_random_unicode(kind: str, request: pytest.FixtureRequest) -> None:
    reference = load_tokenizer(request.getfixturevalue(kind)).backend
    fast = pickle.loads(pickle.dumps(gigatoken_of(reference)))  # noqa: S301
    generator = random.Random(16)
    texts = [random_text(generator) for _ in range(1000)]
    texts += [*TEXTS, "a <tool_call>  kilowatt   kilowatts", f"{END} <|begin|> </s><s>", " x", ""]
    assert sum(not text.isascii() for text in texts) > 900
    assert not any(map(has_unsettled_characters, texts))
    for text, ids, expected in zip(texts, fast.encode(texts), reference.encode_batch(texts), strict=True):
        assert ids.tolist() == expected, repr(text)
    assert first_difference(fast, reference, [*probe_of(reference), *TEXTS]) is None


def test_control_tokens_in_text_stay_text_because_gigatoken_does_not_know_them(hf: Path) -> None:
    reference = load_tokenizer(hf).backend
    (expected,) = reference.encode_batch([END])
    assert gigatoken_of(reference).encode([END])[0].tolist() == expected
    untouched = GigatokenEncoder((hf / "tokenizer.json").read_text())
    assert untouched.encode([END])[0].tolist() == [1]  # the end of a document, as text
    assert first_difference(untouched, reference, probe_of(reference)) is not None


def test_the_probe_is_fixed_and_finds_a_doctored_engine(hf: Path) -> None:
    assert probe_texts() == probe_texts()
    assert not any(map(has_unsettled_characters, probe_texts()[: -encoding_engine.RANDOM_PROBE_TEXTS]))
    reference = load_tokenizer(hf).backend
    for word in ("\u0301", "7777", "漢", "   ", "'s", "\r\n", "kilowatt", "camelCase", "\x00"):
        doctored = Doctored(definition_of(reference)[0])
        doctored.word = word
        assert first_difference(doctored, reference, probe_of(reference)) is not None, repr(word)
    doctored.word = "a word that only a document contains"
    assert first_difference(doctored, reference, probe_of(reference)) is None
    assert first_difference(doctored, reference, ["x", doctored.word]) is not None


def choose(tokenizer: CorpusTokenizer, engine: str = "auto", size: int = 0) -> tuple[bool, str]:
    chosen, line = choose_engine(engine, tokenizer.backend, TEXTS, size, 1000)
    return chosen is not None, line


def test_the_choice_is_one_line(
    hf: Path, spm_bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(hf)
    used, line = choose(tokenizer)
    assert used
    assert "equal to tokenizers on a probe text and the first 60 documents" in line
    assert choose(load_tokenizer(spm_bpe))[0]
    assert choose(tokenizer, size=1000) == (False, "")  # a small input
    assert choose(tokenizer, "gigatoken", size=1000)[0]
    assert choose(tokenizer, "reference") == (False, "")
    with pytest.raises(ValueError, match="choose one of auto, gigatoken, reference"):
        choose(tokenizer, "fast")
    # after such a symbol gigatoken 0.10 cuts text otherwise: the probe text contains all symbols
    symbols = write_sentencepiece_bpe(tmp_path / "symbols.model", ["<sep>"])
    used, line = choose(load_tokenizer(symbols))
    assert not used
    assert line.startswith("engine: SentencePiece, because gigatoken gives other tokens")
    unigram = load_tokenizer(write_sentencepiece(tmp_path / "unigram.model"))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([AddedToken("</s>", special=True)])
    words.save(str(tmp_path / "words.json"))
    for unknown in (unigram, load_tokenizer(tmp_path / "words.json", eod_token="</s>")):
        used, line = choose(unknown)
        assert not used
        assert "gigatoken does not support this tokenizer" in line
        with pytest.raises(ValueError, match="leave out --engine gigatoken"):
            choose(unknown, "gigatoken")
    with monkeypatch.context() as patch:
        patch.setattr(encoding_engine, "GigatokenEncoder", Doctored)
        used, line = choose(tokenizer)
        assert not used
        assert line.startswith(
            "engine: tokenizers, because gigatoken gives other tokens than tokenizers (token"
        )
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert choose(tokenizer) == (False, "engine: tokenizers, because " + NOT_THERE)


def test_characters_younger_than_pythons_unicode_go_to_the_reference(hf: Path) -> None:
    assert has_unsettled_characters(f"a{NEW_CHARACTER}")
    assert has_unsettled_characters("\u0378")
    assert has_unsettled_characters("\U0001f600\U0003fffd")
    assert not any(map(has_unsettled_characters, ["plain", "é漢", "\U0001f600 𠮷", "\ue000"]))
    assert all(has_unsettled_characters(text, "é𠮷") for text in ("né", "a𠮷", "\u0378"))
    assert not has_unsettled_characters("漢 \U0001f600", "é𠮷")
    reference = load_tokenizer(hf).backend
    doctored = Doctored(definition_of(reference)[0])
    doctored.word = NEW_CHARACTER
    engine = CheckedEngine(fast=doctored, reference=reference)
    texts = ["x", f"y {NEW_CHARACTER}", "z"]
    encoded = engine.encode(texts, ["a:1", "a:2", "a:3"])
    assert [ids.tolist() for ids in encoded] == reference.encode_batch(texts)


def test_marks_that_tokenizers_does_not_sort_go_to_the_reference(hf: Path, tmp_path: Path) -> None:
    content = json.loads((hf / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}  # as Qwen2.5
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(path, eod_token=END)
    reference, definition = tokenizer.backend, definition_of(tokenizer.backend)[0]
    old = old_characters(definition)
    assert old_characters(definition_of(load_tokenizer(hf).backend)[0]) == ""
    assert "\u0898" in old  # an Arabic mark of Unicode 14
    assert not set(old) & set("é\u0301가\u0f77")
    texts = ["e\u0301 가", "e\u0345\u0898", "plain"]
    expected = reference.encode_batch(texts)
    fast = GigatokenEncoder(definition)
    with_old = CheckedEngine(fast=fast, reference=reference, old=old)
    assert [ids.tolist() for ids in with_old.encode(texts, ["a", "b", "c"])] == expected
    without = CheckedEngine(fast=fast, reference=reference)
    assert [ids.tolist() for ids in without.encode(texts, ["a", "b", "c"])] != expected
    used, line = choose(tokenizer)
    assert used, line


def test_one_document_in_n_is_compared(hf: Path) -> None:
    reference = load_tokenizer(hf).backend
    locations = [f"a.jsonl:{number}" for number in range(1, 3001)]

    def found(check_every: int) -> int:
        engine = CheckedEngine(
            fast=Doctored(definition_of(reference)[0]), reference=reference, check_every=check_every
        )
        count = 0
        for location in locations:
            try:
                engine.encode(["forty"], [location])
            except EngineDifferenceError as error:
                count += str(error).startswith(f"{location}: gigatoken gives other tokens")
        return count

    assert found(1) == 3000
    assert 200 <= found(10) <= 400
    assert found(10) == found(10)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_files_do_not_depend_on_the_engine(tmp_path: Path, hf: Path, workers: int) -> None:
    generator = random.Random(5)
    texts = [*TEXTS, *(random_text(generator) for _ in range(200)), f"{NEW_CHARACTER}9", " ", ""]
    lines = write_lines(tmp_path / "a.jsonl", texts)
    with open(lines, "a") as stream:
        stream.write('{"text": 3}\n{"body": "x"}\n')
    for engine in ("reference", "gigatoken"):
        summary = tokenize_corpus(
            [lines],
            hf,
            tmp_path / engine / "c",
            engine=engine,
            workers=workers,
            skip_invalid=True,
            batch_bytes=4000,
            check_every=7,
        )
        assert [example.rpartition(":")[0] for example in summary.skipped_examples] == [
            f"{lines}:{len(texts) + number}" for number in (1, 2)
        ]
    assert files_of(tmp_path / "reference" / "c") == files_of(tmp_path / "gigatoken" / "c")


@pytest.mark.parametrize("engines", [("gigatoken", "reference"), ("reference", "gigatoken")])
def test_a_stopped_run_resumes_with_the_other_engine(
    tmp_path: Path, hf: Path, engines: tuple[str, str]
) -> None:
    texts = TEXTS * 5
    lines = write_lines(tmp_path / "a.jsonl", texts)
    tokenize_corpus([lines], hf, tmp_path / "whole")
    good = lines.read_bytes()
    options = {"batch_bytes": 2000, "journal_bytes": 1000}
    lines.write_bytes(good.replace(b'{"text": "41 ', b'{"tent": "41 ', 1))
    before = lines.stat()
    prefix = tmp_path / "c"
    with pytest.raises(ValueError, match="no field 'text'"):
        tokenize_corpus([lines], hf, prefix, engine=engines[0], **options)
    lines.write_bytes(good)
    os.utime(lines, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same input, for the journal
    summary = tokenize_corpus([lines], hf, prefix, engine=engines[1], **options)
    assert 0 < summary.resumed_documents < len(texts)
    whole, resumed = files_of(tmp_path / "whole"), files_of(prefix)
    assert resumed[:2] == whole[:2]
    assert json.loads(resumed[2]) == json.loads(whole[2])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_difference_in_the_sample_stops_and_keeps_nothing(
    tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(encoding_engine, "GigatokenEncoder", DoctoredLate)
    late = [*TEXTS * 5, "this one has the word heliotrope"]
    lines = write_lines(tmp_path / "a.jsonl", late)
    prefix = tmp_path / "c"
    with pytest.raises(ValueError, match=f"a.jsonl:{len(late)}: gigatoken gives other tokens") as caught:
        tokenize_corpus(
            [lines],
            hf,
            prefix,
            engine="gigatoken",
            workers=workers,
            check_every=1,
            batch_bytes=2000,
            journal_bytes=1000,
        )
    assert "heliotrope" in str(caught.value)
    assert "--engine reference" in str(caught.value)
    assert not unfinished_folder(prefix).exists()
    summary = tokenize_corpus([lines], hf, prefix, engine="reference")
    assert summary.resumed_documents == 0


class DoctoredLate(Doctored):
    word = "heliotrope"


class Failing(GigatokenEncoder):
    def _load(self) -> None:
        super()._load()
        self._library = self

    def encode(self, texts: Sequence[str] | str) -> list[NDArray[np.uint32]]:  # type: ignore[override]
        if isinstance(texts, str):
            raise RuntimeError("index out of bounds")
        return super().encode(texts)


def test_a_failure_names_the_document_and_the_remedy(hf: Path) -> None:
    reference = load_tokenizer(hf).backend
    engine = CheckedEngine(fast=Failing(definition_of(reference)[0]), reference=reference)
    with pytest.raises(ValueError, match=r"a:1: gigatoken failed .*out of bounds.*--engine reference"):
        engine.encode(["x"], ["a:1"])
    assert "it fails on" in (first_difference(engine.fast, reference, ["x"]) or "")


def test_memory_is_bounded_by_loading_again(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_tokenizer(hf).backend
    fast = gigatoken_of(reference)
    library = fast._library
    assert [ids.tolist() for ids in fast.encode(TEXTS)] == reference.encode_batch(TEXTS)
    assert fast._library is library
    resident = encoding_engine._resident_bytes()
    assert resident > 10 << 20
    monkeypatch.setattr(
        encoding_engine, "_resident_bytes", lambda: resident + (2 * encoding_engine.CACHE_BYTES)
    )
    assert [ids.tolist() for ids in fast.encode(TEXTS)] == reference.encode_batch(TEXTS)
    assert fast._library is not library
