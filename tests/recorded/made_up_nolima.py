"""Made-up data in NoLiMa's form: six needle sets, two books, and a tokenizer that needs no training.

The authors' code gets them when its prompts are recorded, and ours in the test. Everything follows from
this file and from Python's generator, so that no library's version changes it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_exact.evaluation.suites.nolima import TASKS

LENGTHS = (250, 1500)
"""Tokens of the haystack: below 500 the official distractor has fixed depths."""
NAMES = ["Adalgisa", "Béatrice", "Corwin", "Dunja", "Evander", "Fenella", "Gwydion"]
MERGES = (
    "t h|Ġ t|Ġt h|Ġth e|i n|e r|a n|Ġ a|Ġa n|Ġan d|o n|r e|h e|e n|o u|Ġ w|i t|Ġ s|Ġ o|Ġo f|. Ċ|Ċ Ċ|, Ġ|"
    ". ĊĊ|e d|in g|s t|l l|Ġ b|Ġ h|Ġh e|Ġ m|! Ċ|Ã ©|Ġ r|r i|v er|o w|Ġ l|Ġ f|l a|k e|m p|Ġla|a s|Ġw as"
)
WORDS = (
    "the river was low and grey|a bell rang over the water|nobody spoke of the ferry|lamps burned in the"
    " harbour|the old café stood empty|he counted the steps again|rain fell on the slate roofs|they carried"
    " the crates inland|her letters came on Thursdays|the naïve clerk wrote it all down|a dog — perhaps two"
    " — barked|the mill had not turned since spring|snow lay on the quay|the pilot waited for the tide"
)
TEMPLATE = "A part of a book:\n\n{haystack}\n\nSay in a word: {question}"


def book(number: int) -> str:
    """A text with lines of one or two sentences, some of them followed by an empty line."""
    draw = random.Random(f"book {number}")
    sentences = WORDS.split("|")
    lines = []
    for _ in range(600):
        count = draw.randint(1, 2)
        line = " ".join(
            f"{draw.choice(sentences).capitalize()} {draw.randint(2, 999)}." for _ in range(count)
        )
        lines.append(line + draw.choice(["", "", "", "\n"]))
    return "\n".join(lines) + "\n"


def experiment(number: str, **changes: Any) -> dict[str, Any]:
    """One experiment of a set, with a drawn name and two kinds of questions."""
    return {
        "id": number,
        "system_prompt": "",
        "task_template": TEMPLATE,
        "needle": "Then {CHAR} moved into a room beside the {1}.",
        "questions": {"onehop": "Who lives near {2}?", "twohop": "Who lives in {3}?"},
        "character_set": NAMES,
        "tests": {
            "T1": {"input_args": ["Sagrada", "a church", "Spain"]},
            "T2": {"input_args": ["Brücke", "a bridge", "Prague"]},
        },
        **changes,
    }


def needle_sets() -> dict[str, list[dict[str, Any]]]:
    """Every shape that the authors' form allows: see the comments."""
    plain = experiment("0401")
    # given answers in the place of drawn ones; the set's system message, which is not sent
    given = experiment(
        "0402B",
        needle="It was Ottokar who painted the {1}.",
        character_set=[],
        system_prompt="Be terse.",
        tests={"T9": {"input_args": ["Alps", "mountains"], "gold_answers": ["Ottokar", "Otto"]}},
        questions={"onehop": "Who painted {2}?"},
    )
    # a distractor with an argument, one without (which the authors' code does not place), one with {CHAR}
    distracted = experiment(
        "0403",
        distractors={"onehop": "There was talk of {2} that winter.", "twohop": "Nobody went abroad."},
    )
    with_name = experiment("0404", distractors=dict.fromkeys(("onehop", "twohop"), "{CHAR} saw {3} once."))
    # the drawn name in the question, braces in the template, line ends around the haystack
    asks_by_name = experiment(
        "0405",
        task_template="{{book}}\n{haystack}\n{{/book}}\nQ: {question}\nAnswer in the last line.\n",
        questions={"onehop": "What stands beside {CHAR}'s room, {2} or nothing?"},
    )
    sets = [[plain, given], [experiment("0411")], [distracted, with_name], [given], [plain], [asks_by_name]]
    return dict(zip(TASKS, sets, strict=True))


def write_data(folder: Path) -> Path:
    """The sets and books in a folder as the authors' script leaves it."""
    (folder / "needlesets").mkdir(parents=True)
    for name, content in needle_sets().items():
        text = json.dumps(content, ensure_ascii=False)
        (folder / "needlesets" / f"{name}.json").write_text(text, encoding="utf-8")
    books = folder / "haystack" / "rand_shuffle"
    books.mkdir(parents=True)
    for number in (1, 2):
        (books / f"rand_book_{number}.txt").write_text(book(number), encoding="utf-8")
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few dozen merges, of which some cross a line end; puts a BOS before a text."""
    merges = [tuple(pair.split(" ")) for pair in MERGES.split("|") if " " in pair]
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [first + second for first, second in merges]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
