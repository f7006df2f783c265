"""A language of 82 words in which the only thing to know is which value a document gave to which key.

A document is a line of words. `k07 v21` states a fact: the value of k07 is v21, in this document only.
`ask k07` asks for it and is followed by its value. Filler words carry no information. So a value after
`ask` can be known from nothing but the statement, whose distance is in our hands, and every other value
and filler word cannot be known at all.
"""

from __future__ import annotations

from pathlib import Path

from megatron_exact.files import write_json
from megatron_exact.json_input import parse_json

END = "<end>"
ASK = "ask"
KEYS = tuple(f"k{number:02}" for number in range(32))
VALUES = tuple(f"v{number:02}" for number in range(32))
FILLERS = tuple(f"w{number:02}" for number in range(16))
VOCABULARY = (END, ASK, *KEYS, *VALUES, *FILLERS)
TOKEN_IDS = {word: number for number, word in enumerate(VOCABULARY)}


def write_tokenizer(folder: Path, *, window_tokens: int) -> None:
    """Write a Hugging Face tokenizer with one token a word, the end-of-document token being the first.

    Args:
        folder: exists; receives `tokenizer.json` and `tokenizer_config.json`.
        window_tokens: longest text that the model is made for.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    # A word that the language does not have becomes END, which tokenising then refuses to find in a text
    tokenizer = Tokenizer(WordLevel(TOKEN_IDS, unk_token=END))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    write_json(folder / "tokenizer.json", parse_json(tokenizer.to_str(), "the tokenizer", "make it again"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "TokenizersBackend",
            "eos_token": END,
            "unk_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": window_tokens,
        },
    )
