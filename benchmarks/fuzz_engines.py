"""Compare the tokens of gigatoken with those of the tokenizer's own library on random text.

Three kinds of text, all with fixed seeds:

* `code points`: every code point of Unicode between letters, digits, spaces and itself;
* `random`: mixtures of scripts with spaces, ends of lines, digits and contractions;
* `runs`: long runs of spaces, ends of lines, letters, digits or signs, and words of thousands of letters;
* `shuffled`: real text, if --text is given, with characters of random documents exchanged.

Texts with characters on which libraries disagree by the age of their Unicode tables are counted apart: a
corpus job gives them to the tokenizer's own library (`encoding_engine.has_unsettled_characters`).

    python benchmarks/fuzz_engines.py --tokenizer tokenizer.json --eod-token '<|end_of_text|>' --seconds 120

`--split qwen2` replaces the normalizer and the pre-tokenizer of a byte-level tokenizer.json (such as that
of Llama 3) by those of Qwen2.5: NFC, and digits one by one. Normalizing and splitting text is where the
engines differ. Counts so far are printed each minute, so that an interrupted run has shown something.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_exact.command_line import ToolParser, positive_int, run_tool
from megatron_exact.data.documents import read_documents
from megatron_exact.data.encoding_engine import (
    GigatokenEncoder,
    definition_of,
    describe_difference,
    first_difference,
    has_unsettled_characters,
    old_characters,
    probe_texts,
    random_text,
)
from megatron_exact.data.hf_tokenizer import TextEncoder
from megatron_exact.data.tokenizers import load_tokenizer

BATCH_TEXTS = 256
SHOWN_DIFFERENCES = 10
LONGEST_CHARACTERS = 5000
REPORT_SECONDS = 60.0
RUN_UNITS = (
    " ",
    "\n",
    "\r\n",
    "\t",
    " \n",
    "\u00a0",
    "\u3000",
    "a",
    "Z",
    "7",
    "-",
    "=",
    "'",
    ".",
    "\u0301",
    "漢",
)
QWEN2_NORMALIZER = {"type": "NFC"}
QWEN2_PATTERN = (  # pre_tokenizer of the tokenizer.json of Qwen2.5
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def code_points() -> Iterator[str]:
    """Return one text for each code point, surrogates excepted."""
    for number in itertools.chain(range(0xD800), range(0xE000, 0x110000)):
        one = chr(number)
        yield f"a{one}b {one}1{one}\n {one} '{one}. {one}{one}  {one}"


def random_texts(seed: int) -> Iterator[str]:
    """Endless mixtures of scripts."""
    generator = random.Random(seed)
    while True:
        yield random_text(generator, generator.choice((8, 64, 512)))


def run_texts(seed: int) -> Iterator[str]:
    """Endless texts in which few kinds of characters follow each other in runs of up to thousands."""
    generator = random.Random(seed)
    while True:
        runs = []
        for _ in range(generator.randint(1, 12)):
            unit = (
                random_text(generator, 3)[:3] if generator.random() < 0.5 else generator.choice(RUN_UNITS)
            )
            runs.append(unit * int(generator.lognormvariate(1.5, 1.7)))
        yield "".join(runs)[:LONGEST_CHARACTERS]


def shuffled_texts(path: str, seed: int) -> Iterator[str]:
    """Endless pieces of real text, some characters of which are random."""
    generator = random.Random(seed)
    pieces = []
    for document in itertools.islice(read_documents(path), 2000):
        start = generator.randrange(max(1, len(document.text) - LONGEST_CHARACTERS))
        pieces.append(document.text[start : start + LONGEST_CHARACTERS])
    while True:
        piece = list(generator.choice(pieces))
        for _ in range(generator.randint(1, 1 + len(piece) // 20)):
            place = generator.randrange(len(piece))
            piece[place] = (
                random_text(generator, 2) if generator.random() < 0.7 else generator.choice(piece)
            )
        yield "".join(piece)


def compare(
    name: str,
    texts: Iterator[str],
    fast: GigatokenEncoder,
    reference: TextEncoder,
    old: str,
    seconds: float,
) -> int:
    """Compare texts until they or the CPU seconds are used up; returns differences in ordinary text."""
    started = reported = time.process_time()
    counts = {"texts": 0, "characters": 0, "differences": 0, "apart": 0, "apart_differences": 0}

    def report(so_far: str) -> None:
        print(
            f"{name}{so_far}: {counts['texts']:,} texts, {counts['characters']:,} characters, "
            f"{time.process_time() - started:,.0f} CPU s; {counts['apart']:,} texts with unsettled "
            f"characters, {counts['apart_differences']:,} of them differ; of the others "
            f"{counts['differences']:,} differ",
            flush=True,
        )

    for batch in itertools.batched(texts, BATCH_TEXTS):
        encoded = fast.encode(batch)
        for text, ids, expected in zip(batch, encoded, reference.encode_batch(list(batch)), strict=True):
            difference = describe_difference(text, ids, expected)
            counts["texts"] += 1
            counts["characters"] += len(text)
            if has_unsettled_characters(text, old):
                counts["apart"] += 1
                counts["apart_differences"] += difference is not None
            elif difference is not None:
                counts["differences"] += 1
                if counts["differences"] <= SHOWN_DIFFERENCES:
                    print(f"  {difference}: {text!r}", flush=True)
        if time.process_time() > started + seconds:
            break
        if time.process_time() > reported + REPORT_SECONDS:
            reported = time.process_time()
            report(", so far")
    report("")
    return counts["differences"]


def with_split_of_qwen2(tokenizer: str, folder: Path) -> str:
    """Write a tokenizer.json that normalizes and splits text as Qwen2.5 does; returns its path."""
    content = json.loads(Path(tokenizer).read_text(encoding="utf-8"))
    content["normalizer"] = QWEN2_NORMALIZER
    split = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False}
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_of]}
    content["model"]["ignore_merges"] = False
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def main() -> int:
    """Return 1 if ordinary text was encoded differently."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="DIR_OR_FILE")
    parser.add_argument("--eod-token", metavar="T", help="if the tokenizer has no eos")
    parser.add_argument("--text", metavar="FILE.jsonl", help="real text to shuffle")
    parser.add_argument("--seconds", type=positive_int, default=60, help="CPU seconds of each kind")
    parser.add_argument("--seed", type=positive_int, default=1)
    parser.add_argument("--split", choices=("own", "qwen2"), default="own", help="see above")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = options.tokenizer
        if options.split == "qwen2":
            tokenizer = with_split_of_qwen2(tokenizer, Path(folder))
        reference = load_tokenizer(tokenizer, eod_token=options.eod_token, force_eod=True).backend
    definition, added = definition_of(reference)
    fast, old = GigatokenEncoder(definition), old_characters(definition)
    print(f"{len(old)} characters are normalized by another table than Python's")
    print(f"probe: {first_difference(fast, reference, probe_texts(added), old) or 'equal'}")
    kinds: dict[str, Iterator[str]] = {
        "code points": code_points(),
        "random": random_texts(options.seed),
        "runs": run_texts(options.seed),
    }
    if options.text is not None:
        kinds["shuffled"] = shuffled_texts(options.text, options.seed)
    found = [compare(name, texts, fast, reference, old, options.seconds) for name, texts in kinds.items()]
    return int(any(found))


if __name__ == "__main__":
    run_tool(main)
