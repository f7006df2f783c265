"""Tokenizers of a few hundred ids, trained in a second, in the shapes real models come in."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SENTENCES = [
    f"The {adjective} {noun} reads {count} pages of the long book, and {noun}s write them again.\n"
    for adjective in ("quick", "slow", "old", "new", "kind")
    for noun in ("reader", "writer", "fox", "teacher", "engineer", "poet")
    for count in ("two", "three", "forty", "many")
]
BEGIN, END = "<|begin|>", "<|end|>"


def train_bpe() -> Tokenizer:
    """Byte-level BPE with two special tokens: BEGIN is 0, END is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def write_huggingface(
    folder: Path,
    *,
    template: str | None = f"{BEGIN} $A",
    eos: str | None = END,
    added: tuple[AddedToken, ...] = (),
    truncation: int | None = None,
) -> Path:
    """A tokenizer folder; `template` is what the post-processor does with a text (Llama 3 puts BOS)."""
    tokenizer = train_bpe()
    tokenizer.add_tokens(list(added))
    if template is not None:
        specials = [(BEGIN, 0), (END, 1)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    if truncation is not None:
        tokenizer.enable_truncation(truncation)
        tokenizer.enable_padding(length=truncation)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN}
    if eos is not None:
        config["eos_token"] = eos
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_sentencepiece(path: Path, *, bos_id: int = 1, eos_id: int = 2) -> Path:
    """A unigram model; -1 leaves out a control symbol."""
    text = path.with_suffix(".txt")
    text.write_text("".join(SENTENCES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(path.with_suffix("")),
        vocab_size=80,
        bos_id=bos_id,
        eos_id=eos_id,
        hard_vocab_limit=False,
        byte_fallback=False,
        minloglevel=2,
    )
    text.unlink()
    return path
