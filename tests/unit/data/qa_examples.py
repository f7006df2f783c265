"""Small question-answer records, and what must become of each, token by token, without the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.unit.data.tiny_tokenizers import SENTENCES

Record = dict[str, Any]


def make_records(count: int = 60, seed: int = 0) -> list[Record]:
    """Records of different lengths; every third has a context, some have white space at the edges."""
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        sentences = [SENTENCES[i].strip() for i in rng.integers(0, len(SENTENCES), 4)]
        records.append(
            {
                "instruction": f"Who reads page {number}?",
                "context": sentences[0] if number % 3 == 0 else "",
                "response": " ".join(sentences[1 : 2 + number % 3]) + "\n" * (number % 2),
                "category": "closed_qa",
            }
        )
    return records


def write_records(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@dataclass
class PlainRecord:
    """One record as tokens; target[i] says whether token i is one whose prediction counts."""

    ids: list[int]
    is_target: list[bool]


def encode_plainly(tokenizer_dir: Path, record: Record) -> PlainRecord:
    """Prompt and answer as evaluation would tokenize the prompt, then the answer and one EOD."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_dir))
    question = record["instruction"].strip()
    if record["context"].strip():
        question = record["context"].strip() + "\n\n" + question
    prompt = tokenizer.encode(f"### Question:\n{question}\n\n### Answer:\n")
    answer = tokenizer.encode(record["response"].strip(), add_special_tokens=False)
    ids = [*prompt, *answer, tokenizer.eos_token_id]
    return PlainRecord(ids, [False] * len(prompt) + [True] * (len(answer) + 1))
