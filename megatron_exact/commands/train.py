"""The verb `train`: check a job's arguments, then start its ranks with torchrun.

torchrun runs in this process, not in a child: it ends with the exit code of the rank that failed first and
one line instead of a traceback, and a signal needs nobody to pass it on.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_exact.command_line import ArgumentError, ToolParser, command_parser, one_line, positive_int
from megatron_exact.training.stages import SHUTDOWN_SECONDS

JOB = "megatron_exact.training.pretrain"

TRAIN_EXAMPLES = """\
examples:

  %(prog)s --nproc-per-node 2 --pack packs/long --token-weighting exact \\
      --pretrained-checkpoint base --load runs/exact --save runs/exact --save-interval 50 \\
      --tensor-model-parallel-size 2 --global-batch-size 8 --train-iters 100 --lr 1e-5

  on the second of two nodes (and with --node-rank 0 on the first):

  %(prog)s --nnodes 2 --node-rank 1 --master-addr node0 --nproc-per-node 8 -- \\
      --recipe llama3.1_8b_16k --pack packs/16k --load runs/exact --save runs/exact ...

Every flag that is not listed here is Megatron's own and is passed on; --megatron-help lists them.
"""


def train_parser(prog: str | None = None) -> ToolParser:
    """Return the parser whose help is that of `train`: torchrun's options and those of a job.

    `train` itself reads torchrun's options alone; the job reads its own in every rank.
    """
    from megatron_exact.training.arguments import add_entry_options, add_options

    parser = command_parser(train, prog, TRAIN_EXAMPLES, allow_abbrev=False)
    add_launcher_options(parser)
    add_options(parser)
    add_entry_options(parser)
    return parser


def ranks_per_node(text: str) -> str:
    """Parse a number of ranks, or a word that torchrun counts by, for argparse."""
    if text not in ("auto", "cpu", "gpu", "xpu"):
        positive_int(text)
    return text


def number_of_nodes(text: str) -> str:
    """Parse a fixed number of nodes for argparse."""
    if ":" in text and len(set(text.split(":"))) > 1:
        raise ArgumentError(
            f"{text!r} is a range: the layout of a Megatron job is fixed, give one number of nodes"
        )
    return str(positive_int(text.partition(":")[0]))


def add_launcher_options(parser: argparse.ArgumentParser) -> None:
    """Add torchrun's options under their own names, but those that say which program it starts."""
    group = parser.add_argument_group(
        "torchrun", "its options, also spelled with underscores; its variables PET_... are read as well"
    )

    def add(name: str, help_text: str, *short: str, type: Callable[[str], Any] = str, **more: Any) -> None:
        other = [f"--{name.replace('-', '_')}"] if "-" in name else []
        if more.get("action") is None:
            more["type"] = type
        group.add_argument(*short, f"--{name}", *other, help=help_text, **more)

    add("nnodes", "nodes of the job (default: 1)", type=number_of_nodes, metavar="N")
    add(
        "nproc-per-node",
        "ranks on this node, or gpu, cpu, auto (default: the recipe's GPUs of a node, else 1)",
        type=ranks_per_node,
        metavar="N",
    )
    add("node-rank", "number of this node, from 0", type=int, metavar="I")
    add("master-addr", "host of node 0", metavar="HOST")
    add("master-port", "port on node 0 (default: 29500)", type=positive_int, metavar="PORT")
    add("rdzv-backend", "rendezvous: static, c10d, etcd", metavar="NAME")
    add("rdzv-endpoint", "of the rendezvous", metavar="HOST:PORT")
    add("rdzv-id", "of the job", metavar="ID")
    add("rdzv-conf", "of the rendezvous", metavar="KEY=VALUE,...")
    add("standalone", "one node, with a rendezvous of its own on a free port", action="store_true")
    add("local-addr", "address of this node", metavar="HOST")
    add("max-restarts", "restarts of all ranks after a failure (default: 0)", type=int, metavar="N")
    add("monitor-interval", "seconds between looks at the ranks", type=float, metavar="S")
    add(
        "shutdown-timeout",
        f"seconds that ranks have to end after a signal (default: {SHUTDOWN_SECONDS})",
        type=positive_int,
        metavar="S",
    )
    add("signals-to-handle", "signals that reach the ranks, such as SIGTERM,SIGUSR1", metavar="NAMES")
    add("start-method", "of multiprocessing", choices=("spawn", "fork", "forkserver"))
    add("role", "of the ranks", metavar="NAME")
    add("log-dir", "where redirected output goes", metavar="DIR")
    add("redirects", "output into files of --log-dir: 3 for all, or 0:1,1:2", "-r", metavar="RANKS")
    add("tee", "output into files and onto the console, as --redirects", "-t", metavar="RANKS")
    add("local-ranks-filter", "ranks whose output the console shows", metavar="I,I")
    add("duplicate-stdout-filters", "copy lines with these words to a file", metavar="WORD,WORD")
    add("duplicate-stderr-filters", "copy lines with these words to a file", metavar="WORD,WORD")
    add("logs-specs", "entry point of another log set-up", metavar="NAME")
    add("event-log-handler", "of torchrun's events", metavar="NAME")
    add(
        "numa-binding",
        "bind ranks to the cores near their GPU",
        choices=("node", "socket", "exclusive", "core-complex"),
    )
    add("virtual-local-rank", "every rank sees its GPU as device 0", action="store_true")


@dataclass(frozen=True)
class Ranks:
    """How many ranks a job has."""

    nodes: int
    per_node: int

    def environment(self) -> dict[str, str]:
        """Return the variables from which a job reads its size, those of its first rank."""
        return {
            **{"RANK": "0", "LOCAL_RANK": "0"},
            "WORLD_SIZE": str(self.nodes * self.per_node),
            "LOCAL_WORLD_SIZE": str(self.per_node),
        }


def split_words(words: Sequence[str], prog: str | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Split a command line into torchrun's options and the arguments of the job.

    Without `--`, torchrun's options may stand anywhere: no flag of Megatron or of ours has one of their
    names. With `--`, they stand before it, and all words after it are the job's.

    Raises:
        ValueError: a bad value, or a word before `--` that is not an option of torchrun.
    """
    parser = ToolParser(prog=prog, add_help=False, allow_abbrev=False)
    add_launcher_options(parser)
    if "--" not in words:
        return parser.parse_known_args(words)
    end = list(words).index("--")
    options, others = parser.parse_known_args(words[:end])
    if others:
        raise ValueError(
            f"{others[0]} stands before -- and is not an option of torchrun: give the job's flags after it "
            f"(see {parser.prog} --help)"
        )
    return options, list(words[end + 1 :])


def choose_ranks(options: argparse.Namespace, job: Sequence[str]) -> Ranks:
    """Return how many ranks a job has, as torchrun's options, its variables or the job's recipe say.

    Raises:
        ValueError: an unknown recipe, several nodes without a word on where they meet, or no GPU to count.
    """
    from megatron_exact.training.job import chosen_recipe

    recipe = chosen_recipe(job)
    nodes_given = _setting(options, "nnodes")
    if nodes_given is None and recipe is not None and recipe.nodes > 1:
        raise ValueError(
            f"the recipe asks for {recipe.nodes} nodes and --nnodes is missing: start this on every node "
            f"with --nnodes {recipe.nodes} --node-rank I --master-addr HOST, or give --nnodes 1"
        )
    nodes = int(number_of_nodes(nodes_given or "1"))
    meeting = ("master_addr", "rdzv_endpoint")
    if nodes > 1 and all(_setting(options, name) is None for name in meeting):
        raise ValueError(
            f"--nnodes {nodes} does not say where the nodes meet: give --node-rank I --master-addr HOST, "
            "or --rdzv-backend c10d --rdzv-endpoint HOST:PORT"
        )
    default = str(recipe.gpus_per_node) if recipe is not None else "1"
    per_node = _setting(options, "nproc_per_node") or default
    if per_node.isdecimal():
        return Ranks(nodes=nodes, per_node=int(per_node))
    from torch.distributed.run import determine_local_world_size

    return Ranks(nodes=nodes, per_node=determine_local_world_size(per_node))


def _setting(options: argparse.Namespace, name: str) -> str | None:
    """Return an option, or the variable that torchrun would take in its place."""
    value: str | None = getattr(options, name)
    return value if value is not None else os.environ.get(f"PET_{name.upper()}")


def check_job(job: Sequence[str], ranks: Ranks) -> None:
    """Check what needs neither Megatron nor torch: flags, pack, checkpoint to start from, schedule.

    Rank 0 checks the same once more, and the data as well: what it says is not said here.

    Raises:
        ValueError: cause, value and remedy.
    """
    from megatron_exact.training.job import prepare_job

    with (
        _environment(ranks.environment()),
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        prepare_job(job, choose_runtime=lambda _: (), reads_data=False)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables of the environment for a block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def launcher_words(options: argparse.Namespace, ranks: Ranks) -> list[str]:
    """Return torchrun's options as words, with our default of the time that a save may take."""
    chosen = dict(vars(options))
    if _setting(options, "shutdown_timeout") is None and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
        chosen["shutdown_timeout"] = SHUTDOWN_SECONDS
    chosen |= {"nnodes": ranks.nodes, "nproc_per_node": ranks.per_node}
    words = []
    for name, value in chosen.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words.append(f"{flag}={value}")
    return words


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the ranks of a node ended."""

    code: int
    """Of the rank that failed first, 128 and the number where a signal ended it; 0 if none failed."""
    kind: str = ""
    """One of `runtime.KINDS`; empty if no rank failed."""
    message: str = ""
    """One line, without `error:`."""


ACCOUNT = {
    "torch.distributed.elastic.multiprocessing.api": ("failed (exitcode", "Sending process %s closing"),
    "torch.distributed.elastic.agent.server.api": (
        "Received %s death signal",
        "Error waiting on exit barrier",  # the node with the store was the first to end
    ),
}
"""Logger of torchrun -> beginnings of its messages that ranks ended, with arguments not filled in."""
ASKED_FOR = ("", "user", "nan")
"""Kinds of an end that our own line says in full: a signal, a refusal, numbers that are not finite."""


class _Account(logging.Filter):
    """Holds back torchrun's account of an end until it is known whether a fault caused it."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is printed now."""
        is_account = str(record.msg).startswith(ACCOUNT[record.name])
        if is_account:
            self.records.append(record)
        return not is_account

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold records back in the block; those that are left in `records` are printed after it."""
        loggers = [logging.getLogger(name) for name in ACCOUNT]
        for logger in loggers:
            logger.addFilter(self)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(self)
            for record in self.records:
                logging.getLogger(record.name).handle(record)


def launch(words: Sequence[str]) -> Ended:
    """Run torchrun on a command line until its ranks have ended.

    torchrun's own messages about the end are printed only if a fault caused it, after the end. With
    --max-restarts they are printed at once, since each attempt has its own.
    """
    from torch.distributed.run import parse_args

    options = parse_args(list(words))  # type: ignore[no-untyped-call]
    account = _Account()
    with account.hold() if options.max_restarts == 0 else contextlib.nullcontext():
        ended = _run(options)
        if ended.kind in ASKED_FOR:
            account.records.clear()
    return ended


def _run(options: argparse.Namespace) -> Ended:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import run

    from megatron_exact.training.runtime import kind_of_ending

    try:
        run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        if first.exitcode < 0:
            line = f"rank {rank} was ended by {first.signal_name()}"
            return Ended(code=128 - first.exitcode, kind="signal", message=line)
        told = first.error_file_data.get("message")  # by `tell_launcher`; a rank may end without a word
        reason = f": {one_line(told['message'])}" if isinstance(told, dict) else ""
        return Ended(
            code=first.exitcode,
            kind=kind_of_ending(first.exitcode, told),
            message=f"rank {rank} ended with exit code {first.exitcode}{reason}",
        )
    except SignalException as ended:
        name = signal.Signals(ended.sigval).name
        return Ended(code=128 + int(ended.sigval), message=f"the ranks were ended after {name}")
    return Ended(code=0)


def train(words: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Continue pretraining on a packed dataset with effective-context weighting.

    Takes torchrun's options, and the arguments of the job: those of `python -m
    megatron_exact.training.pretrain`, anywhere or after a `--`. The arguments are checked before any rank
    is started; then torchrun starts the ranks, and the exit code is that of the rank that failed first.

    The job starts from the weights and the model of --pretrained-checkpoint (`megatron-exact import-hf`
    makes one from a Hugging Face folder). The same command again resumes from the last checkpoint of
    --load. Without a checkpoint, --preset or Megatron's own flags (--num-layers, ...) say what the model
    is.
    """
    words = sys.argv[1:] if words is None else words
    if {"-h", "--help"} & set(words):
        train_parser(prog).print_help()
        return 0
    options, job = split_words(words, prog)
    ranks = choose_ranks(options, job)
    if {"--megatron-help", "--print-arguments"} & set(job):
        from megatron_exact.training import pretrain

        with _environment(ranks.environment()):
            return pretrain.main(job)
    check_job(job, ranks)
    ended = launch([*launcher_words(options, ranks), "-m", JOB, *job])
    if ended.message:
        prefix = "error: " if ended.kind else ""
        print(f"{prefix}{ended.message}", file=sys.stderr, flush=True)
    return ended.code
