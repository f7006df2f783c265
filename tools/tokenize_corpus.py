"""Tokenize raw text files into a Megatron corpus: PREFIX.bin, PREFIX.idx and the record PREFIX.json."""

from __future__ import annotations

import argparse
import os
import sys

from megatron_exact.command_line import ToolParser, positive_int, run_tool
from megatron_exact.data.documents import DEFAULT_TEXT_KEY, SUFFIXES
from megatron_exact.data.tokenize import TokenizeSummary, tokenize_corpus

EXAMPLE = """example:
  python tools/tokenize_corpus.py --input books.jsonl.zst notes.txt --tokenizer models/llama3 \\
      --output-prefix corpus/books --workers 8 --licence CC0-1.0
"""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help=f"files that end in {', '.join(SUFFIXES)}"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR_OR_FILE",
        help="Hugging Face tokenizer folder, tokenizer.json, or SentencePiece .model",
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="P", help="P.bin, P.idx and P.json are written"
    )
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="tokenizing processes, without effect on the result (default: every core, here %(default)s)",
    )
    parser.add_argument(
        "--text-key",
        default=DEFAULT_TEXT_KEY,
        metavar="K",
        help="field of a .jsonl, column of a .parquet (default: %(default)s)",
    )
    parser.add_argument(
        "--no-bos",
        action="store_true",
        help="do not start documents with the tokens that the tokenizer puts there (Llama 3: BOS)",
    )
    parser.add_argument(
        "--eod-token", metavar="T", help="token that ends every document (default: the tokenizer's eos)"
    )
    parser.add_argument(
        "--skip-invalid",
        action="store_true",
        help="leave out and count documents with invalid UTF-8, invalid JSON, no text or no token",
    )
    parser.add_argument("--licence", metavar="TEXT", help="licence of the text, recorded in P.json")
    return parser.parse_args()


def print_summary(summary: TokenizeSummary) -> None:
    """A few lines for people."""
    record = summary.record
    for example in summary.skipped_examples:
        print(f"skipped: {example}", file=sys.stderr)
    if record.skipped > len(summary.skipped_examples):
        print(f"skipped: {record.skipped - len(summary.skipped_examples)} more", file=sys.stderr)
    special = record.special_tokens
    print(
        f"{summary.prefix}: {record.documents:,} documents, {record.tokens:,} tokens "
        f"({record.tokens / record.documents:,.1f} a document, {record.dtype}), {record.skipped:,} skipped"
    )
    print(
        f"tokenizer: {record.tokenizer['kind']}, {record.tokenizer['vocab_size']:,} ids; each document "
        f"starts with {special['prefix_ids'] or 'its text'} "
        f"and ends with {special['eod_id']} ({special['eod_token']})"
    )


def main() -> None:
    """Tokenize and report."""
    arguments = parse_arguments()
    summary = tokenize_corpus(
        arguments.input,
        arguments.tokenizer,
        arguments.output_prefix,
        workers=arguments.workers,
        text_key=arguments.text_key,
        skip_invalid=arguments.skip_invalid,
        add_bos=not arguments.no_bos,
        eod_token=arguments.eod_token,
        licence=arguments.licence,
    )
    print_summary(summary)


if __name__ == "__main__":
    run_tool(main)
