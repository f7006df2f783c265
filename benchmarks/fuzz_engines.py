"""Compare the tokens of gigatoken with those of the tokenizer's own library on random text.

Three kinds of text, all with fixed seeds:

* `code points`: every code point of Unicode between letters, digits, spaces and itself;
* `random`: mixtures of scripts with spaces, ends of lines, digits and contractions;
* `shuffled`: real text, if --text is given, with characters of random documents exchanged.

Texts with characters that Python's Unicode tables do not know are counted apart: a corpus job gives them to
the tokenizer's own library (`encoding_engine.has_new_characters`).

    python benchmarks/fuzz_engines.py --tokenizer tokenizer.json --eod-token '<|end_of_text|>' --seconds 120
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator

from megatron_exact.command_line import ToolParser, positive_int, run_tool
from megatron_exact.data.documents import read_documents
from megatron_exact.data.encoding_engine import (
    GigatokenEncoder,
    definition_of,
    describe_difference,
    first_difference,
    has_new_characters,
    probe_texts,
    random_text,
)
from megatron_exact.data.hf_tokenizer import TextEncoder
from megatron_exact.data.tokenizers import load_tokenizer

BATCH_TEXTS = 256
SHOWN_DIFFERENCES = 10
LONGEST_CHARACTERS = 5000


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
    name: str, texts: Iterator[str], fast: GigatokenEncoder, reference: TextEncoder, seconds: float
) -> int:
    """Compare texts until they or the CPU seconds are used up; returns differences in ordinary text."""
    end = time.process_time() + seconds
    counts = {"texts": 0, "characters": 0, "differences": 0, "new": 0, "new_differences": 0}
    for batch in itertools.batched(texts, BATCH_TEXTS):
        encoded = fast.encode(batch)
        for text, ids, expected in zip(batch, encoded, reference.encode_batch(list(batch)), strict=True):
            difference = describe_difference(text, ids, expected)
            counts["texts"] += 1
            counts["characters"] += len(text)
            if has_new_characters(text):
                counts["new"] += 1
                counts["new_differences"] += difference is not None
            elif difference is not None:
                counts["differences"] += 1
                if counts["differences"] <= SHOWN_DIFFERENCES:
                    print(f"  {difference}")
        if time.process_time() > end:
            break
    print(
        f"{name}: {counts['texts']:,} texts, {counts['characters']:,} characters; {counts['new']:,} texts "
        f"with characters younger than Python's Unicode tables, {counts['new_differences']:,} of them "
        f"differ; of the others {counts['differences']:,} differ",
        flush=True,
    )
    return counts["differences"]


def main() -> int:
    """Return 1 if ordinary text was encoded differently."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="DIR_OR_FILE")
    parser.add_argument("--eod-token", metavar="T", help="if the tokenizer has no eos")
    parser.add_argument("--text", metavar="FILE.jsonl", help="real text to shuffle")
    parser.add_argument("--seconds", type=positive_int, default=60, help="CPU seconds of each kind")
    parser.add_argument("--seed", type=positive_int, default=1)
    options = parser.parse_args()
    reference = load_tokenizer(options.tokenizer, eod_token=options.eod_token, force_eod=True).backend
    definition, added = definition_of(reference)
    fast = GigatokenEncoder(definition)
    print(f"probe: {first_difference(fast, reference, probe_texts(added)) or 'equal'}")
    kinds: dict[str, Iterator[str]] = {"code points": code_points(), "random": random_texts(options.seed)}
    if options.text is not None:
        kinds["shuffled"] = shuffled_texts(options.text, options.seed)
    found = [compare(name, texts, fast, reference, options.seconds) for name, texts in kinds.items()]
    return int(any(found))


if __name__ == "__main__":
    run_tool(main)
