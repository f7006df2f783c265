"""Made-up data for RULER: essays, words, and a tokenizer whose tokens are words and marks."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.recorded.made_up_nolima import WORDS

LENGTHS = (1024, 4096)
SAMPLES = 12
SHORT_LIST = 200
"""Words of each kind that are paired as keys of needles."""
CHAT_TASKS = ("niah_multivalue", "vt", "fwe")
"""Recorded with a chat template, too: `cwe` differs there, and the other tasks are like these."""
CHAT_TEMPLATE = "{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
"""NVIDIA's `meta-chat`."""
MORE_WORDS = [f"word{number}" for number in range(20_000)]
"""In the place of NVIDIA's list of English words, which is stored apart from its code."""


def essays() -> str:
    """About 9,000 words in sentences."""
    draw = random.Random("essays")
    clauses = WORDS.split("|")
    found = []
    for _ in range(1_000):
        parts = draw.sample(clauses, draw.randint(1, 2))
        found.append(f"{', and '.join(parts).capitalize()}{draw.choice('..!?')}")
    return " ".join(found)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word and each run of marks; all of them are unknown words."""
    made = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<unk>")
