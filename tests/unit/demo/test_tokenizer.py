"""The demo's SentencePiece model: repeatable, lossless, refused where the text is too uniform."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece

from megatron_exact.demo.tokenizer import sample_lines, train_tokenizer

LINES = [f"def function_{i % 37}(argument_{i % 11}):\n    return {i} * value_{i % 23}" for i in range(600)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    return path


def test_equal_text_gives_equal_models_that_lose_nothing(tmp_path: Path, corpus: Path) -> None:
    for name in ("one.model", "two.model"):
        train_tokenizer(corpus, tmp_path / name, vocabulary=320, sample_bytes=1 << 20)
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "one.model"))
    assert model.vocab_size() == 320
    assert (model.unk_id(), model.bos_id(), model.eos_id(), model.pad_id()) == (0, 1, 2, -1)
    text = "def  f(x):\n\treturn  x  # caf\u00e9 \u2192\n"
    assert model.decode(model.encode(text)) == text


def test_the_sample_is_spread_over_the_corpus(corpus: Path) -> None:
    lines = list(sample_lines(corpus, corpus.stat().st_size // 4))
    everything = [line for text in LINES for line in text.split("\n")]
    assert lines == everything[3::4]


def test_too_uniform_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"text": "aaaa bbbb\n" * 100}) + "\n")
    with pytest.raises(ValueError, match=r"cannot make 2,000 pieces .*name more text"):
        train_tokenizer(path, tmp_path / "t.model", vocabulary=2000, sample_bytes=1 << 20)
    assert not (tmp_path / "t.model").exists()
