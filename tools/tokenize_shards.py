"""Tokenize many files as shards of one folder, on this machine or as a SLURM job array.

Task n makes DIR/n.bin, .idx and .json from its share of the input files (whole files, shares about equal in
bytes); tools/pack_corpus.py takes DIR as one source. datatrove hands out the tasks. The same command again
does what is missing: finished tasks are skipped, a stopped one goes on from its journal. It works offline.
"""

from __future__ import annotations

import argparse
import os

from megatron_exact.command_line import ToolParser, positive_int, run_tool
from megatron_exact.data.corpus_record import read_corpus_record
from megatron_exact.data.documents import DEFAULT_TEXT_KEY, SUFFIXES
from megatron_exact.data.shard_job import (
    ShardJob,
    SlurmOptions,
    begin_job,
    missing_shards,
    require_datatrove,
    run_local,
    shard_prefix,
    submit_slurm,
)

EXAMPLE = """examples:
  python tools/tokenize_shards.py --input crawl/*.parquet --tokenizer models/llama3 --output tokens/crawl \\
      --tasks 16 --workers 8
  python tools/tokenize_shards.py --input crawl/*.parquet --tokenizer models/llama3 --output tokens/crawl \\
      --tasks 512 --workers 64 --workers-per-task 4 --executor slurm --slurm-partition cpu \\
      --slurm-time 04:00:00
  python tools/pack_corpus.py --source 6:tokens/crawl 24:tokens/books ...
"""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = ToolParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        default=len(os.sched_getaffinity(0)),
        metavar="W",
        help="tasks at a time (default: %(default)s)",
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
    parser.add_argument("--no-bos", action="store_true", help="see tools/tokenize_corpus.py")
    parser.add_argument("--eod-token", metavar="T", help="see tools/tokenize_corpus.py")
    parser.add_argument("--force-eod-token", action="store_true", help="see tools/tokenize_corpus.py")
    parser.add_argument("--skip-invalid", action="store_true", help="see tools/tokenize_corpus.py")
    parser.add_argument("--licence", metavar="TEXT", help="licence of the text, recorded in each shard")
    slurm = parser.add_argument_group("SLURM")
    slurm.add_argument("--slurm-partition", metavar="NAME")
    slurm.add_argument("--slurm-time", metavar="LIMIT", help="of one task, for instance 04:00:00")
    slurm.add_argument("--slurm-qos", metavar="NAME")
    slurm.add_argument("--slurm-account", metavar="NAME")
    slurm.add_argument("--slurm-memory-gb-per-cpu", type=positive_int, default=2, metavar="GB")
    slurm.add_argument("--slurm-job-name", default="tokenize", metavar="NAME")
    return parser.parse_args()


def slurm_options(arguments: argparse.Namespace) -> SlurmOptions:
    """The SLURM options; ValueError if a necessary one is missing."""
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


def main() -> None:
    """Run or submit the tasks."""
    arguments = parse_arguments()
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
    )
    require_datatrove()
    begin_job(job)
    if options is not None:
        script = submit_slurm(job, arguments.workers, options)
        print(f"submitted {script}: {job.tasks} tasks; the same command again does what is missing then")
        return
    run_local(job, arguments.workers)
    if missing := missing_shards(job.output):
        raise ValueError(
            f"{len(missing)} of {job.tasks} shards are missing, first {missing[0]}: run this command again"
        )
    records = [read_corpus_record(shard_prefix(job.output, task)) for task in range(job.tasks)]
    documents, tokens, skipped, empty = (
        sum(getattr(record, name) for record in records if record is not None)
        for name in ("documents", "tokens", "skipped", "empty")
    )
    print(
        f"{arguments.output}: {job.tasks} shards, a source for tools/pack_corpus.py; {documents:,} "
        f"documents, {tokens:,} tokens, {skipped:,} skipped, {empty:,} empty and left out"
    )


if __name__ == "__main__":
    run_tool(main)
