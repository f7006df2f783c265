"""The tokenizer that a model is evaluated with: the one that its corpora were cut with, or one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from megatron_exact.data.tokenizers import tokenizer_sha256
from megatron_exact.evaluation.engine import load_tokenizer, require_eos
from tests.unit.data.tiny_tokenizers import END, write_huggingface


def edit(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def test_text_is_cut_as_the_file_says_and_the_difference_is_said(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "model", template=None)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), digits])
    tokenizer.save(str(folder / "tokenizer.json"))
    edit(
        folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", unk_token=END, chat_template="x"
    )
    with pytest.warns(UserWarning, match="as GPT2Tokenizer and makes other tokens of text"):
        loaded = load_tokenizer(folder)
    text = "two 2 readers"
    assert loaded.encode(text) == tokenizer.encode(text).ids
    assert (loaded.eos_token, loaded.chat_template) == (END, "x")


def test_an_end_that_only_the_config_names(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "model", eos=None)
    with pytest.raises(ValueError, match=r"neither the tokenizer nor the configs of .* name a token"):
        require_eos(load_tokenizer(folder), folder)
    edit(folder / "config.json", model_type="llama", eos_token_id=[1, 0])
    with pytest.warns(UserWarning, match=r"names no eos: <\\|end\\|>, as in config.json"):
        loaded = load_tokenizer(folder)
    require_eos(loaded, folder)
    assert loaded.eos_token_id == 1


def test_another_tokenizer_than_the_exported_one_is_refused(tmp_path: Path) -> None:
    folder = write_huggingface(tmp_path / "model")
    edit(folder / "megatron_exact.json", tokenizer_sha256=tokenizer_sha256(folder / "tokenizer.json"))
    edit(folder / "tokenizer_config.json", chat_template="{{ messages }}")  # changes no token
    load_tokenizer(folder)
    edit(folder / "tokenizer.json", normalizer={"type": "NFKC"})
    with pytest.raises(ValueError, match="is not the tokenizer that the model was trained"):
        load_tokenizer(folder)
