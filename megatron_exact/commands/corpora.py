"""The verbs that make corpora: `tokenize` and `tokenize-shards`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_exact.command_line import (
    TerminatedError,
    ToolParser,
    command_parser,
    positive_int,
    printable,
)
from megatron_exact.data.documents import DEFAULT_TEXT_KEY, SUFFIXES
from megatron_exact.data.encoding_engine import CHECK_EVERY, ENGINES
from megatron_exact.data.hub_sources import (
    HUB_SOURCES,
    describe_hub_sources,
    describe_origin,
    find_hub_source,
    open_hub,
)
from megatron_exact.shares import share, waiting_line

if TYPE_CHECKING:  # they import numpy
    from megatron_exact.data.documents import CorpusInputs
    from megatron_exact.data.shard_job import ShardJob, SlurmOptions
    from megatron_exact.data.tokenize import TokenizeSummary

TOKENIZE_EXAMPLES = """examples:
  %(prog)s --input books.jsonl.zst notes.txt --tokenizer models/llama3 \\
      --output-prefix tokens/books --workers 8 --licence CC0-1.0
  %(prog)s --list-hub
  %(prog)s --hub open-web-math --max-documents 1_000_000 --tokenizer models/llama3 \\
      --output-prefix tokens/open-web-math
  %(prog)s --hub open-web-math --input downloaded/*.parquet \\
      --tokenizer models/llama3 --output-prefix tokens/open-web-math
"""


def tokenize_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `tokenize`."""
    parser = command_parser(tokenize, prog, TOKENIZE_EXAMPLES)
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
        metavar="N",
        help="tokenizing processes, without effect on the result (default: one for each core)",
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
    add_engine_arguments(parser)
    hub = parser.add_argument_group("Hugging Face Hub", "the paper's corpora, by name")
    hub.add_argument(
        "--hub",
        choices=HUB_SOURCES,
        help="read this data set as a stream, or with --input its downloaded files",
    )
    hub.add_argument("--revision", metavar="R", help="commit, tag or branch (default: the newest)")
    hub.add_argument("--max-documents", type=positive_int, metavar="N", help="rows of the stream to read")
    hub.add_argument("--list-hub", action="store_true", help="show these data sets and the paper's mixes")
    return parser


def add_engine_arguments(parser: ToolParser) -> None:
    """Add `--engine` and `--check-every`."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="library that encodes, without effect on the result. auto: gigatoken where it gives the "
        "same tokens as the tokenizer's own library, except for small inputs; gigatoken: an error where "
        "it does not; reference: the tokenizer's own library (default: %(default)s)",
    )
    parser.add_argument(
        "--check-every",
        type=positive_int,
        default=CHECK_EVERY,
        metavar="N",
        help="one document in N is encoded by both libraries, and a difference stops the job "
        "(default: %(default)s)",
    )


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def choose_inputs(arguments: argparse.Namespace) -> tuple[CorpusInputs, str | None]:
    """Return the inputs of `tokenize` and their licence.

    Raises:
        ValueError: options that contradict each other, or inputs that cannot be read.
    """
    from megatron_exact.data.documents import FileInputs
    from megatron_exact.data.tokenize_journal import unfinished_job

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
    if revision is None:  # a stopped run resumes with the commit it began with
        job = unfinished_job(Path(arguments.output_prefix))
        revision = None if job is None else job["inputs"][0].get("revision")
    return open_hub(source, revision=revision, max_documents=arguments.max_documents), licence


def print_summary(summary: TokenizeSummary) -> None:
    """Print what `tokenize` made, in a few lines."""
    record = summary.record
    for example in summary.skipped_examples:
        print(printable(f"skipped: {example}"), file=sys.stderr)
    if record.skipped > len(summary.skipped_examples):
        print(f"skipped: {record.skipped - len(summary.skipped_examples)} more", file=sys.stderr)
    if record.empty:
        print(f"left out: {record.empty:,} empty documents (no text, or none that gives a token)")
    if summary.resumed_documents:
        print(f"resumed after {summary.resumed_documents:,} documents of a stopped run")
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


def tokenize(words: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Tokenize raw text into a Megatron corpus: PREFIX.bin, PREFIX.idx and the record PREFIX.json.

    A run that is killed, interrupted or out of disk space leaves a hidden folder .NAME.tokenizing
    beside the output. The same command resumes from its last journal entry (every 64 MB of tokens or 30
    s) and writes the same bytes.
    """
    parser = tokenize_parser(prog)
    arguments = parser.parse_args(words)
    if arguments.list_hub:
        print(describe_hub_sources())
        return
    for option in ("tokenizer", "output_prefix"):
        if getattr(arguments, option) is None:
            raise ValueError(f"--{option.replace('_', '-')} is missing (see {parser.prog} --help)")
    from megatron_exact.data.tokenize import tokenize_corpus
    from megatron_exact.data.tokenize_journal import kept_work

    inputs, licence = choose_inputs(arguments)
    try:
        summary = tokenize_corpus(
            inputs,
            arguments.tokenizer,
            arguments.output_prefix,
            workers=arguments.workers or num_cores(),
            skip_invalid=arguments.skip_invalid,
            add_bos=not arguments.no_bos,
            eod_token=arguments.eod_token,
            force_eod=arguments.force_eod_token,
            licence=licence,
            engine=arguments.engine,
            check_every=arguments.check_every,
        )
    except (KeyboardInterrupt, TerminatedError):
        if kept := kept_work(Path(arguments.output_prefix)):
            print(kept, file=sys.stderr)
        raise
    print_summary(summary)


TOKENIZE_SHARDS_EXAMPLES = """examples:
  %(prog)s --input crawl/*.parquet --tokenizer models/llama3 --output tokens/crawl \\
      --tasks 16 --workers 8
  %(prog)s --input crawl/*.parquet --tokenizer models/llama3 --output tokens/crawl \\
      --tasks 512 --workers 64 --workers-per-task 4 --executor slurm --slurm-partition cpu \\
      --slurm-time 04:00:00
  sbatch --array 0-63 examples/slurm/tokenize.sbatch --input crawl/*.parquet \\
      --tokenizer models/llama3 --output tokens/crawl --tasks 512
  megatron-exact pack --source 6:tokens/crawl 24:tokens/books ...
"""


def tokenize_shards_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `tokenize_shards`."""
    parser = command_parser(tokenize_shards, prog, TOKENIZE_SHARDS_EXAMPLES)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help=f"files that end in {', '.join(SUFFIXES)}",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR_OR_FILE",
        help="Hugging Face tokenizer folder, tokenizer.json, or SentencePiece .model",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument("--tasks", type=positive_int, required=True, metavar="N", help="shards to make")
    parser.add_argument(
        "--workers",
        type=positive_int,
        metavar="W",
        help="tasks at a time (default: one for each core)",
    )
    parser.add_argument(
        "--workers-per-task",
        type=positive_int,
        default=1,
        metavar="N",
        help="tokenizing processes of each task, cores of a SLURM task (default: %(default)s)",
    )
    parser.add_argument("--executor", choices=("local", "slurm"), default="local")
    parser.add_argument("--text-key", default=DEFAULT_TEXT_KEY, metavar="K", help="default: %(default)s")
    parser.add_argument("--no-bos", action="store_true", help="see megatron-exact tokenize")
    parser.add_argument("--eod-token", metavar="T", help="see megatron-exact tokenize")
    parser.add_argument("--force-eod-token", action="store_true", help="see megatron-exact tokenize")
    parser.add_argument("--skip-invalid", action="store_true", help="see megatron-exact tokenize")
    parser.add_argument("--licence", metavar="TEXT", help="licence of the text, recorded in each shard")
    parser.add_argument(
        "--shard",
        type=share,
        metavar="I/N",
        help="make every Nth shard, beginning with I, 0 to N - 1, while other processes make the others "
        "(examples/slurm/tokenize.sbatch); without datatrove",
    )
    add_engine_arguments(parser)
    slurm = parser.add_argument_group("SLURM")
    slurm.add_argument("--slurm-partition", metavar="NAME")
    slurm.add_argument("--slurm-time", metavar="LIMIT", help="of one task, for instance 04:00:00")
    slurm.add_argument("--slurm-qos", metavar="NAME")
    slurm.add_argument("--slurm-account", metavar="NAME")
    slurm.add_argument("--slurm-memory-gb-per-cpu", type=positive_int, default=2, metavar="GB")
    slurm.add_argument("--slurm-job-name", default="tokenize", metavar="NAME")
    return parser


def slurm_options(arguments: argparse.Namespace) -> SlurmOptions:
    """Return the SLURM options of `tokenize-shards`.

    Raises:
        ValueError: a necessary one is missing.
    """
    from megatron_exact.data.shard_job import SlurmOptions

    for name in ("slurm_partition", "slurm_time"):
        if getattr(arguments, name) is None:
            raise ValueError(f"--executor slurm needs --{name.replace('_', '-')}")
    return SlurmOptions(
        partition=arguments.slurm_partition,
        time=arguments.slurm_time,
        qos=arguments.slurm_qos,
        account=arguments.slurm_account,
        memory_gb_per_cpu=arguments.slurm_memory_gb_per_cpu,
        job_name=arguments.slurm_job_name,
    )


def tokenize_shards(words: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Tokenize many files into shards of one folder, on this machine or as a SLURM job array.

    Task n makes DIR/n.bin, .idx and .json from its share of the input files (whole files, shares about
    equal in bytes); `megatron-exact pack` takes DIR as one source. datatrove distributes the tasks. The
    same command again makes what is missing: it skips finished tasks and resumes interrupted ones from
    their journals. It works offline.
    """
    arguments = tokenize_shards_parser(prog).parse_args(words)
    from megatron_exact.data.shard_job import (
        ShardJob,
        begin_job,
        missing_shards,
        require_datatrove,
        run_local,
        run_share,
        submit_slurm,
    )

    options = slurm_options(arguments) if arguments.executor == "slurm" else None
    job = ShardJob(
        inputs=tuple(os.path.abspath(path) for path in arguments.input),
        tokenizer=os.path.abspath(arguments.tokenizer),
        output=os.path.abspath(arguments.output),
        tasks=arguments.tasks,
        workers_per_task=arguments.workers_per_task,
        text_key=arguments.text_key,
        skip_invalid=arguments.skip_invalid,
        add_bos=not arguments.no_bos,
        eod_token=arguments.eod_token,
        force_eod=arguments.force_eod_token,
        licence=arguments.licence,
        engine=arguments.engine,
        check_every=arguments.check_every,
    )
    if arguments.shard is not None:
        if options is not None:
            raise ValueError("--shard and --executor slurm both make a job array: leave one of them out")
        begin_job(job)
        run_share(job, arguments.shard)
        if missing := missing_shards(job.output):
            print(waiting_line(arguments.output, arguments.shard, missing))
            return
        _describe_shards(arguments.output, job)
        return
    require_datatrove()
    workers = arguments.workers or num_cores()
    begin_job(job)
    if options is not None:
        script = submit_slurm(job, workers, options)
        print(f"submitted {script}: {job.tasks} tasks; the same command again does what is missing then")
        return
    run_local(job, workers)
    if missing := missing_shards(job.output):
        raise ValueError(
            f"{len(missing)} of {job.tasks} shards are missing, first {missing[0]}: run this command again"
        )
    _describe_shards(arguments.output, job)


def _describe_shards(output: str, job: ShardJob) -> None:
    """Print what the shards of a finished job contain."""
    from megatron_exact.data.corpus_record import read_corpus_record
    from megatron_exact.data.shard_job import shard_prefix

    records = [read_corpus_record(shard_prefix(job.output, task)) for task in range(job.tasks)]
    documents, tokens, skipped, empty = (
        sum(getattr(record, name) for record in records if record is not None)
        for name in ("documents", "tokens", "skipped", "empty")
    )
    print(
        f"{output}: {job.tasks} shards, a source for megatron-exact pack; {documents:,} "
        f"documents, {tokens:,} tokens, {skipped:,} skipped, {empty:,} empty and left out"
    )
