"""A tokenizer and models for the probe: tiny random ones, and one whose log-probabilities are known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from megatron_exact.evaluation import probe_items, probe_wording

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def small_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits words as Llama 3 does, trained on the words of the probe itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    grammars = probe_wording.FILLERS.values()
    words = [
        *(
            part
            for grammar in grammars
            for part in grammar.subjects + grammar.predicates + grammar.adverbials
        ),
        *probe_wording.PEOPLE,
        *(word for _, answers in probe_wording.ANSWER_FORMS for word in answers),
        *(form for form, _ in probe_wording.ANSWER_FORMS),
        *(f"{form.opening} {form.pair} {' '.join(form.fields)}" for form in probe_wording.RECORD_FORMS),
    ]
    needles = [f"{needle.needle} {needle.question}" for needle in probe_items.own_needles()]
    tokenizer.train_from_iterator([*(f" {word}" for word in words), *needles], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentencepiece_like_tokenizer(style: str) -> PreTrainedTokenizerFast:
    """BPE in which a space is the first character of a piece, as SentencePiece writes it.

    `llama` prepends a space to every text and has no words, as in Llama 2; `metaspace` does so in its
    splitter into words, as in newer conversions; `across words` learned pieces that contain spaces.
    """
    texts = [
        *(sentence for grammar in probe_wording.FILLERS.values() for sentence in grammar.sentences()[::9]),
        *(
            f"{form.opening} {form.pair} {' '.join(form.fields)} 123."
            for form in probe_wording.RECORD_FORMS
        ),
        *(f" {name}" for name in probe_wording.PEOPLE),
        *30 * ["Yes. In record 123, the owner is Anna. Question: Who is it? The owner is Anna"],
        "What slept? The zebra woke; 7 lions",
    ]
    letters = sorted({letter for text in texts for letter in text} - {" "} | {"'"})
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if style == "across words":
        tokenizer.normalizer = normalizer
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation("isolated")]
        )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if style == "llama":
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.Split("\0", "removed")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def random_model(
    family: str, *, vocabulary: int = 97, positions: int = 512, seed: int = 0, **more: Any
) -> Any:
    """Two layers with grouped heads and weights large enough for far tokens to matter."""
    torch.manual_seed(seed)
    if family == "llama":
        config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=positions, **SMALL, **more)
        return LlamaForCausalLM(config).eval()
    config = Qwen2Config(vocab_size=vocabulary, max_position_embeddings=positions, **SMALL, **more)
    return Qwen2ForCausalLM(config).eval()


def write_model(folder: Path, *, positions: int = 512, seed: int = 0) -> Path:
    """A random Llama with the small tokenizer."""
    tokenizer = small_tokenizer()
    model = random_model("llama", vocabulary=len(tokenizer), positions=positions, seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class SeenTokens:
    """The cache of `CopyingModel`: the tokens themselves."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def batch_select_indices(self, indices: Tensor) -> None:
        """As the caches of transformers."""
        self.rows = [list(self.rows[row]) for row in indices.tolist()]


class CopyingModel:
    """Gives every token among the last `reach` ones a logit of `lift`, all others 0."""

    def __init__(self, vocabulary: int, *, reach: int, lift: float) -> None:
        self.config = SimpleNamespace(vocab_size=vocabulary)
        self.device = torch.device("cpu")
        self.reach, self.lift = reach, lift
        self.tokens_read = 0

    def __call__(
        self, *, input_ids: Tensor, past_key_values: Any, use_cache: bool, logits_to_keep: int = 0
    ) -> SimpleNamespace:
        cache = past_key_values or SeenTokens()
        cache.rows = cache.rows or [[] for _ in input_ids]
        self.tokens_read += input_ids.numel()
        kept = logits_to_keep or input_ids.shape[1]
        logits = torch.zeros(len(input_ids), kept, self.config.vocab_size)
        for number, (row, new) in enumerate(zip(cache.rows, input_ids.tolist(), strict=True)):
            row += new
            for place in range(kept):
                seen = row[: len(row) - kept + place + 1]
                logits[number, place, seen[-self.reach :]] = self.lift
        return SimpleNamespace(logits=logits, past_key_values=cache)
