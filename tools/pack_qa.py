#!/usr/bin/env python3
"""Pack question-answer records for QA-SFT: rows of whole records, loss on answers and their EOD alone.

Records are JSON lines with `instruction`, `context` (may be empty) and `response`, as in Dolly-15K. Each is
written with a Jinja chat template, which the manifest records and every fine-tuned model carries along, so
that tools/evaluate_model.py --template model finds it. A record longer than a row is left out and counted.
The pack holds its own tokens; tools/pack_corpus.py --verify proves it, tools/inspect_pack.py shows it and
tools/fine_tune_qa.py trains on it. Both arms of a pair need the same pack.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_exact.command_line import ToolParser, fraction, positive_int, run_tool

EPILOG = """examples:
  pack_qa.py --hub --tokenizer models/llama-3.1-8b --output packs/dolly
  pack_qa.py --input databricks-dolly-15k.jsonl --licence "CC BY-SA 3.0" --tokenizer models/llama-3.1-8b \\
      --row-tokens 4K --output packs/dolly-4k
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="FILE", help=".jsonl, .jsonl.gz or .jsonl.zst")
    source.add_argument(
        "--hub",
        nargs="?",
        const="databricks/databricks-dolly-15k",
        metavar="REPO",
        help="a data set of the Hub with the same fields (default: %(const)s)",
    )
    parser.add_argument("--revision", metavar="R", help="with --hub: commit, tag or branch (the newest)")
    parser.add_argument("--licence", metavar="TEXT", help="of the records (Dolly-15K: CC BY-SA 3.0)")
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="Hugging Face folder of the model"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--template",
        metavar="FILE",
        help="Jinja chat template, or `model` for the tokenizer's own (default: "
        "megatron_exact/data/templates/question_answer.jinja; not stated in the paper)",
    )
    parser.add_argument(
        "--context-place",
        choices=("before", "after"),
        default="before",
        help="where a record's context stands, seen from its instruction (default: %(default)s, as in the "
        "prompts of RULER; not stated in the paper)",
    )
    parser.add_argument(
        "--eod-token",
        metavar="T",
        help="token that ends every answer (default: the tokenizer's eos; not stated in the paper)",
    )
    parser.add_argument("--force-eod-token", action="store_true", help="see tools/tokenize_corpus.py")
    parser.add_argument(
        "--row-tokens",
        type=positive_int,
        default=2048,
        metavar="N",
        help="inputs of a row (default: %(default)s; not stated in the paper)",
    )
    parser.add_argument(
        "--validation-fraction",
        type=fraction,
        default=0.02,
        metavar="F",
        help="of the records, held out (default: %(default)s; not stated in the paper)",
    )
    parser.add_argument(
        "--seed", type=int, default=1234, metavar="S", help="of split and order (default: %(default)s)"
    )
    parser.add_argument(
        "--skip-invalid",
        action="store_true",
        help="leave out and count invalid records, instead of stopping",
    )
    return parser


def main() -> None:
    """Run the tool."""
    arguments = build_parser().parse_args()
    if arguments.revision is not None and arguments.hub is None:
        raise ValueError("--revision belongs to --hub: leave it out")
    from megatron_exact.data.corpus_record import read_corpus_record
    from megatron_exact.data.qa_pack import (
        DEFAULT_TEMPLATE,
        DOLLY,
        DOLLY_LICENCE,
        QaOptions,
        pack_qa,
        qa_files,
        qa_hub,
    )

    is_dolly = arguments.hub == DOLLY
    records = (
        qa_files(arguments.input) if arguments.input else qa_hub(arguments.hub, revision=arguments.revision)
    )
    manifest = pack_qa(
        records,
        arguments.tokenizer,
        arguments.output,
        QaOptions(
            row_tokens=arguments.row_tokens,
            seed=arguments.seed,
            validation_fraction=arguments.validation_fraction,
            template=arguments.template or DEFAULT_TEMPLATE,
            context_place=arguments.context_place,
            skip_invalid=arguments.skip_invalid,
        ),
        licence=arguments.licence or (DOLLY_LICENCE if is_dolly else None),
        eod_token=arguments.eod_token,
        force_eod=arguments.force_eod_token,
    )
    assert manifest.supervision is not None
    record = read_corpus_record(Path(arguments.output) / manifest.sources[0].prefix)
    assert record is not None
    print(
        f"{arguments.output}: rows of {manifest.row_tokens:,}, fingerprint {manifest.fingerprint[:16]}, "
        f"{record.documents:,} records; left out: {manifest.supervision.left_out_records:,} longer than a "
        f"row, {record.skipped:,} invalid"
    )
    for name, split in manifest.splits.items():
        print(
            f"  {name}: {split.rows:,} rows, {split.segments:,} records, {split.tokens:,} tokens, of which "
            f"{split.supervised_targets:,} are targets"
        )


if __name__ == "__main__":
    run_tool(main)
