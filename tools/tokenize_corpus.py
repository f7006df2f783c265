"""Tokenize raw text into a Megatron corpus: PREFIX.bin, PREFIX.idx and the record PREFIX.json.

A run that is killed, stopped or out of disk leaves a hidden folder .NAME.tokenizing beside the output, and
the same command goes on from its last journal entry (every 64 MB of tokens or 30 s), to the same bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_exact.command_line import TerminatedError, ToolParser, positive_int, printable, run_tool
from megatron_exact.data.documents import DEFAULT_TEXT_KEY, SUFFIXES
from megatron_exact.data.hub_sources import (
    HUB_SOURCES,
    describe_hub_sources,
    describe_origin,
    find_hub_source,
    open_hub,
)
from megatron_exact.data.tokenize import CorpusInputs, FileInputs, TokenizeSummary, tokenize_corpus
from megatron_exact.data.tokenize_journal import kept_work, unfinished_job

EXAMPLE = """examples:
  python tools/tokenize_corpus.py --input books.jsonl.zst notes.txt --tokenizer models/llama3 \\
      --output-prefix tokens/books --workers 8 --licence CC0-1.0
  python tools/tokenize_corpus.py --list-hub
  python tools/tokenize_corpus.py --hub open-web-math --max-documents 1_000_000 --tokenizer models/llama3 \\
      --output-prefix tokens/open-web-math
  python tools/tokenize_corpus.py --hub open-web-math --input downloaded/*.parquet \\
      --tokenizer models/llama3 --output-prefix tokens/open-web-math
"""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", nargs="+", metavar="FILE", help=f"files that end in {', '.join(SUFFIXES)}"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR_OR_FILE",
        help="Hugging Face tokenizer folder, tokenizer.json, or SentencePiece .model",
    )
    parser.add_argument("--output-prefix", metavar="P", help="P.bin, P.idx and P.json are written")
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="tokenizing processes, without effect on the result (default: every core, here %(default)s)",
    )
    parser.add_argument(
        "--text-key",
        metavar="K",
        help=f"field of a .jsonl, column of a .parquet (default: {DEFAULT_TEXT_KEY})",
    )
    parser.add_argument(
        "--no-bos",
        action="store_true",
        help="do not start documents with the tokens that the tokenizer puts there (Llama 3: BOS)",
    )
    parser.add_argument(
        "--eod-token",
        metavar="T",
        help="added or special token that ends every document (default: the tokenizer's eos)",
    )
    parser.add_argument(
        "--force-eod-token",
        action="store_true",
        help="take an --eod-token that is an ordinary piece of text; it must not occur in the text",
    )
    parser.add_argument(
        "--skip-invalid",
        action="store_true",
        help="leave out and count documents with invalid UTF-8 or JSON, or without the text field "
        "(those whose text is empty are always left out)",
    )
    parser.add_argument("--licence", metavar="TEXT", help="licence of the text, recorded in P.json")
    hub = parser.add_argument_group("Hugging Face Hub", "the paper's corpora, by name")
    hub.add_argument(
        "--hub",
        choices=HUB_SOURCES,
        help="read this data set as a stream, or with --input its downloaded files",
    )
    hub.add_argument("--revision", metavar="R", help="commit, tag or branch (default: the newest)")
    hub.add_argument("--max-documents", type=positive_int, metavar="N", help="rows of the stream to read")
    hub.add_argument("--list-hub", action="store_true", help="show these data sets and the paper's mixes")
    return parser.parse_args()


def choose_inputs(arguments: argparse.Namespace) -> tuple[CorpusInputs, str | None]:
    """The inputs and their licence.

    Raises:
        ValueError: options that contradict each other, or inputs that cannot be read.
    """
    if arguments.hub is None:
        if arguments.input is None:
            raise ValueError("no input: name files by --input, or a data set by --hub (see --list-hub)")
        if arguments.revision is not None or arguments.max_documents is not None:
            raise ValueError("--revision and --max-documents belong to --hub: leave them out")
        text_key = arguments.text_key or DEFAULT_TEXT_KEY
        return FileInputs(arguments.input, text_key=text_key), arguments.licence
    source = find_hub_source(arguments.hub)
    if arguments.text_key is not None:
        raise ValueError(f"--text-key: --hub {source.name} knows that it is {source.text_field!r}")
    licence = arguments.licence or source.licence
    if arguments.input is not None:
        if arguments.max_documents is not None:
            raise ValueError("--max-documents belongs to a stream: leave it out, or leave out --input")
        origin = describe_origin(source, arguments.revision)
        return FileInputs(arguments.input, text_key=source.text_field, hub=origin), licence
    revision = arguments.revision
    if revision is None:  # a stopped run goes on with the commit it began with
        job = unfinished_job(Path(arguments.output_prefix))
        revision = None if job is None else job["inputs"][0].get("revision")
    return open_hub(source, revision=revision, max_documents=arguments.max_documents), licence


def print_summary(summary: TokenizeSummary) -> None:
    """A few lines for people."""
    record = summary.record
    for example in summary.skipped_examples:
        print(printable(f"skipped: {example}"), file=sys.stderr)
    if record.skipped > len(summary.skipped_examples):
        print(f"skipped: {record.skipped - len(summary.skipped_examples)} more", file=sys.stderr)
    if record.empty:
        print(f"left out: {record.empty:,} empty documents (no text, or none that gives a token)")
    if summary.resumed_documents:
        print(f"went on after {summary.resumed_documents:,} documents of a stopped run")
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
    if record.counted_tokens:
        named = ", ".join(f"{token!r} {times:,} times" for token, times in record.counted_tokens.items())
        print(f"text that became an added or unknown token of the tokenizer: {named}")


def main() -> None:
    """Tokenize and report."""
    arguments = parse_arguments()
    if arguments.list_hub:
        print(describe_hub_sources())
        return
    for option in ("tokenizer", "output_prefix"):
        if getattr(arguments, option) is None:
            raise ValueError(f"--{option.replace('_', '-')} is missing (see --help)")
    inputs, licence = choose_inputs(arguments)
    try:
        summary = tokenize_corpus(
            inputs,
            arguments.tokenizer,
            arguments.output_prefix,
            workers=arguments.workers,
            skip_invalid=arguments.skip_invalid,
            add_bos=not arguments.no_bos,
            eod_token=arguments.eod_token,
            force_eod=arguments.force_eod_token,
            licence=licence,
        )
    except (KeyboardInterrupt, TerminatedError):
        if kept := kept_work(Path(arguments.output_prefix)):
            print(kept, file=sys.stderr)
        raise
    print_summary(summary)


if __name__ == "__main__":
    run_tool(main)
