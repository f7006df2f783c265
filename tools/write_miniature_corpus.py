"""Write made-up documents for the base model in examples/miniature/base, and questions for the probe.

The documents state facts early and ask for them later (docs/miniature.md); their lengths are heavy-tailed,
up to 511 words. They are drawn by chance: no text of anybody is in them, and the same seed draws the same
documents. OUTPUT/corpus.jsonl is the input of tools/tokenize_corpus.py, OUTPUT/questions.jsonl that of
tools/probe_evidence.py --items.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_exact.command_line import ToolParser, positive_int, run_tool, use_examples

EPILOG = """\
example:
  python tools/write_miniature_corpus.py --output texts
"""


def main() -> None:
    """Run the tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder, made if it is missing")
    add(
        "--tokens",
        type=positive_int,
        default=600_000,
        metavar="N",
        help="of all documents (default: %(default)s)",
    )
    add("--questions", type=positive_int, default=48, metavar="N", help="a distance (default: %(default)s)")
    add("--seed", type=int, default=1, metavar="N", help="of the draw (default: %(default)s)")
    add("--design", choices=("distant", "near"), default="distant", help="where facts stand (%(default)s)")
    options = parser.parse_args()
    use_examples(__file__)
    from examples.miniature.experiment import DESIGNS, FULL
    from examples.miniature.language import write_corpus, write_items

    corpus, questions = options.output / "corpus.jsonl", options.output / "questions.jsonl"
    number = write_corpus(corpus, DESIGNS[options.design], seed=options.seed, tokens=options.tokens)
    write_items(questions, distances=FULL.distances, items_per_distance=options.questions)
    print(f"{corpus}: {number:,} documents, about {options.tokens:,} tokens")
    print(f"{questions}: {options.questions:,} questions at each of {len(FULL.distances)} distances")


if __name__ == "__main__":
    run_tool(main)
