"""What the evaluation demo starts from, all made here: a tokenizer, a model, records and QA data sets.

Nothing is downloaded. The text is Python's own (`corpus.py`), the records and the data sets are invented:
where people live and what they carry.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from megatron_exact.demo.corpus import Sources, find_sources
from megatron_exact.demo.evaluate_settings import EvaluateSettings
from megatron_exact.files import write_text
from megatron_exact.json_input import parse_corpus_line

NAMES = ("Ilse", "Bruno", "Tamsin", "Oskar", "Perpetua", "Jolyon", "Wanda", "Casimir", "Odette", "Ludovic")
TOWNS = ("Lisbon", "Nairobi", "Oslo", "Quito", "Hanoi", "Perth", "Tallinn", "Dakar")
THINGS = ("a lantern", "two letters", "a red umbrella", "an old map", "a basket of pears")
TRADES = ("baker", "sailor", "tailor", "miller", "teacher")
EVERY = 12  # file of the standard library: a few megabytes of text
BEGIN, END = "<|begin|>", "<|endoftext|>"  # the latter is what transformers gives to every Qwen2
INITIAL_STD = 0.05


def demo_sources() -> Sources:
    """A part of the standard library's text, spread over all of it."""
    sources = find_sources(None)
    return replace(sources, files=sources.files[::EVERY])


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path, corpus: Path, book: Path, settings: EvaluateSettings) -> None:
    """A Qwen2 model of random weights and a byte-level tokenizer of the text, as a Hugging Face folder.

    Args:
        folder: to fill.
        corpus: JSON lines with `text`.
        book: the haystack of NoLiMa, so that its words are short in tokens too.
        settings: sizes.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = corpus.read_text(encoding="utf-8").splitlines()
    texts = [parse_corpus_line(line, "text")["text"] for line in lines[:: max(1, len(lines) // 200)]]
    tokenizer.train_from_iterator([*texts, book.read_text(encoding="utf-8")], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)]
    )
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END)
    config = Qwen2Config(
        vocab_size=len(whole),
        hidden_size=settings.hidden,
        intermediate_size=2 * settings.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=INITIAL_STD,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(settings.seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    whole.save_pretrained(folder)


def qa_records(count: int, seed: int) -> list[dict[str, str]]:
    """Records like those of Dolly-15K: every other with a context that holds the answer."""
    draw = Random(seed)
    records = []
    for number in range(count):
        people = draw.sample(NAMES, 3)
        homes = draw.sample(TOWNS, 3)
        facts = [f"{name} lives in {town}." for name, town in zip(people, homes, strict=True)]
        records.append(
            {
                "instruction": f"Who lives in {homes[1]}?"
                if number % 2 == 0
                else f"What does a {draw.choice(TRADES)} called {people[0]} carry?",
                "context": " ".join(facts) if number % 2 == 0 else "",
                "response": people[1] if number % 2 == 0 else f"{people[0]} carries {draw.choice(THINGS)}.",
            }
        )
    return records


def write_qa_data(folder: Path, count: int, seed: int, subjects: Iterable[str]) -> None:
    """Local copies of the six QA data sets in their own fields, invented.

    Args:
        folder: to fill, see docs/evaluation.md.
        count: examples of a task.
        seed: of the examples.
        subjects: folders of MMLU.
    """
    draw = Random(seed)
    pairs = [draw.sample(TOWNS, 4) for _ in range(count)]
    write_rows(
        folder / "arc_challenge" / "test.jsonl",
        (
            {
                "id": str(number),
                "question": f"{NAMES[number % 10]} lives in {towns[0]}. Where does this person live?",
                "choices": {"text": towns, "label": list("ABCD")},
                "answerKey": "A",
            }
            for number, towns in enumerate(pairs)
        ),
    )
    write_rows(
        folder / "piqa" / "validation.jsonl",
        (
            {
                "goal": f"Travel to {a}.",
                "sol1": f"Take the train to {a}.",
                "sol2": f"Paint {b}.",
                "label": 0,
            }
            for a, b, *_ in pairs
        ),
    )
    write_rows(
        folder / "hellaswag" / "validation.jsonl",
        (
            {
                "ind": number,
                "activity_label": "Travel",
                "ctx_a": f"A {TRADES[number % 5]} goes to {towns[0]}",
                "ctx_b": "and",
                "endings": [f"stays in {town}." for town in towns],
                "label": "0",
            }
            for number, towns in enumerate(pairs)
        ),
    )
    write_rows(
        folder / "winogrande" / "validation.jsonl",
        (
            {"sentence": f"{a} is larger than {b}, so _ has more streets.", "option1": a, "option2": b}
            | {"answer": "1"}
            for a, b, *_ in pairs
        ),
    )
    sums = [
        {"question": f"What is {n} + {n + 1}?", "answer": f"It is {2 * n + 1}.\n#### {2 * n + 1}"}
        for n in range(count + 5)
    ]
    write_rows(folder / "gsm8k" / "train.jsonl", sums[count:])
    write_rows(folder / "gsm8k" / "test.jsonl", sums[:count])
    for number, subject in enumerate(subjects):
        row = {"question": f"Which town is number {number}?", "choices": draw.sample(TOWNS, 4)}
        for split in ("dev", "test"):
            write_rows(folder / "mmlu" / subject / f"{split}.jsonl", [{**row, "answer": number % 4}])
