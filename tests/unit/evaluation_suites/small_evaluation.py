"""A tiny model folder, and models of lm-eval that answer without a network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_exact.evaluation.suites.suite import SuiteOptions, all_options

ROOT = Path(__file__).resolve().parents[3]
NEEDLES = ROOT / "examples" / "needles"
BOOK = NEEDLES / "haystack" / "rand_shuffle" / "rand_book_1.txt"
CHARACTERS = (
    "Ilse",
    "Bruno",
    "Tamsin",
    "Oskar",
    "Perpetua",
    "Jolyon",
    "Wanda",
    "Casimir",
    "Odette",
    "Ludovic",
)
RULER_PHRASES = """\
Some special magic numbers uuids are hidden within the following text. Make sure to memorize it. I will quiz
you about the numbers afterwards. One of the special magic numbers for is: What are all the special magic
mentioned in the provided text? The special magic number for in the text is A uuid is hidden. The grass is
green. The sky is blue. The sun is yellow. Here we go. There and back again. Memorize and track the chain(s)
of variable assignment hidden in the following text. VAR = VAR Question: Find all variables that are
assigned the value in the text above. Answer: According to the chain(s) of variable assignment in the text
above, 5 variables are assgined the value, they are: Below is a numbered list of words.
"""


def suite_options(suite: str, **values: Any) -> SuiteOptions:
    """Options of a suite, its own ones among the others."""
    own = {option.name for option in all_options()} & set(values)
    common = {name: value for name, value in values.items() if name not in own}
    return SuiteOptions(suite=suite, own={name: values[name] for name in own}, **common)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with about 3,000 pieces; puts a BOS before a text, like Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([BOOK.read_text(), *[RULER_PHRASES] * 3], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def write_small_model(folder: Path, *, positions: int = 4096) -> Path:
    """A Llama of one layer with random weights, and its tokenizer."""
    tokenizer = small_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class AnsweringModel(LM):
    """Generates what a function of the prompt says, and finds short continuations likely."""

    tokenizer_name = "small"

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__()
        self.answer = answer
        self.tokenizer: Any = None
        self.prompts: list[str] = []

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [(-float(len(request.args[1])), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError


def ruler_oracle(prompt: str) -> str:
    """The answer to any RULER prompt, from its text alone."""
    if "special magic" in prompt:
        body, _, question = prompt.rpartition("\nWhat ")
        words = re.search(r"special magic \S+ for (.*) mentioned in the provided text\?", question)
        assert words is not None
        keys = {key.removeprefix("and ") for key in words.group(1).split(", ")}
        needles = re.findall(r"One of the special magic \S+ for (\S+) is: (\S+)\.", body)
        return " ".join(value for key, value in needles if key in keys)
    if "VAR" in prompt:
        text = prompt[prompt.rindex("Memorize and track the chain(s)") :]
        value = re.findall(r"assigned the value (\d+) in the text above", text)[-1]
        known = {value}
        found: list[str] = []
        for name, _, source in re.findall(r"VAR (\w+) = (VAR )?(\w+)", text):
            if source in known:
                known.add(name)
                found.append(name)
        return " ".join(found)
    if "numbered list of words" in prompt:
        last = prompt.rpartition("Below is a numbered list of words.")[2]  # behind the worked example
        words = Counter(re.findall(r"\d+\. (\S.*?)(?= \d+\. |$)", last.rpartition("\nQuestion:")[0]))
        return " ".join(word for word, _ in words.most_common(10))
    coded = Counter(re.findall(r"\b[a-z]{6}\b", prompt.partition("coded words. ")[2].partition("\nQ")[0]))
    return " ".join(word for word, _ in coded.most_common(3))


def needle_oracle(prompt: str) -> str:
    """The answer to a prompt of our own needle set: the one character whom the chronicle names."""
    haystack = prompt.partition("chronicle.")[2].partition("Answer from the chronicle")[0]
    return " ".join(name for name in CHARACTERS if re.search(rf"\b{name}\b", haystack))
