"""The verbs that show exposure by effective context: `inspect` of a pack, `plan` before there is one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_exact.command_line import (
    ArgumentError,
    ToolParser,
    command_parser,
    fraction,
    png_path,
    positive_int,
    progress_bar,
)

if TYPE_CHECKING:  # it imports numpy
    from megatron_exact.data.forecast import Grid
    from megatron_exact.data.manifest import Manifest

INSPECT_EXAMPLES = """examples:
  %(prog)s packs/web-4k
  %(prog)s packs/web-4k --alpha 0.3 --tau 512 --json
  %(prog)s packs/web-4k --plot exposure.png      (and exposure-lengths.png)
  %(prog)s packs/web-4k --exposure-table exposure_table.json
  %(prog)s /mnt/copy/web-4k --source-root /mnt/corpora
  %(prog)s packs/web-64k --data-parallel 16 --global-batch-size 64 --preset llama-3.1-8b
  %(prog)s packs/4k packs/8k packs/16k --ledger
"""


def inspect_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `inspect`."""
    from megatron_exact.data.manifest import SPLITS
    from megatron_exact.exposure import DEFAULT_ALPHA, DEFAULT_GAMMA, TAU_ROW_FRACTION
    from megatron_exact.exposure.row_weights import DEFAULT_EVIDENCE_NATS

    parser = command_parser(inspect, prog, INSPECT_EXAMPLES)
    parser.add_argument("pack", nargs="+", metavar="DIR", help="a packed dataset; with --ledger several")
    parser.add_argument(
        "--ledger", action="store_true", help="what a chain of stages reads: name their packs in order"
    )
    parser.add_argument("--alpha", type=float, default=DEFAULT_ALPHA, help="mean extra weight of the tail")
    parser.add_argument("--gamma", type=float, default=DEFAULT_GAMMA, help="exponent of inverse frequency")
    parser.add_argument(
        "--tau",
        type=float,
        help=f"effective context where the tail starts (row / {TAU_ROW_FRACTION})",
    )
    parser.add_argument("--split", choices=SPLITS, default="train", help="whose targets to count (train)")
    parser.add_argument("--source-root", metavar="DIR", help="where the corpora lie now, if not as packed")
    parser.add_argument(
        "--scores",
        metavar="DIR",
        help="scores of the pack (megatron-exact score): also show which targets gain from the far context",
    )
    parser.add_argument(
        "--evidence-nats",
        type=float,
        default=DEFAULT_EVIDENCE_NATS,
        metavar="N",
        help="with --scores: nats by which the far context must lower the loss (%(default)s)",
    )
    parser.add_argument(
        "--context-parallel",
        type=int,
        metavar="N",
        help="also show how evenly N context-parallel ranks share the attention of a row",
    )
    steps = parser.add_argument_group("attention of data-parallel ranks, with and without --balance-rows")
    steps.add_argument(
        "--data-parallel", type=positive_int, metavar="N", help="show how evenly N ranks share it"
    )
    steps.add_argument("--global-batch-size", type=positive_int, metavar="N", help="rows of a step")
    steps.add_argument(
        "--micro-batch-size", type=positive_int, default=1, metavar="N", help="of a rank (%(default)s)"
    )
    steps.add_argument(
        "--seed", type=int, default=1234, metavar="S", help="of training, orders the rows (%(default)s)"
    )
    steps.add_argument(
        "--preset", metavar="NAME", help="a model: also show which share of its layers attention is"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--plot",
        type=png_path,
        metavar="FILE.png",
        help="draw exposure here, and lengths into FILE-lengths.png",
    )
    parser.add_argument(
        "--exposure-table",
        type=Path,
        metavar="FILE.json",
        help="write what other training stacks need to weigh these data (megatron_exact.integrations)",
    )
    return parser


def plot(path: Path, content: dict[str, Any], policy: str) -> None:
    """Write both figures of a pack."""
    from megatron_exact.report.exposure_figure import plot_exposure
    from megatron_exact.report.pack_tables import plot_lengths

    row_tokens = content["row_tokens"]
    title = f"{policy}, rows of {row_tokens:,} tokens, {content['split']}"
    tau = content["parameters"]["tau"]
    plot_exposure(path, content["buckets"], row_tokens=row_tokens, tau=tau, title=title)
    beside = path.with_name(path.stem + "-lengths" + path.suffix)
    plot_lengths(beside, content["lengths"], row_tokens=row_tokens, title=title)


def inspect(words: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Show what a pack trains on: exposure by effective context before and after weighting, and lengths.

    The first table is figure 1 of EXACT (arXiv 2605.10544): how many targets see how much of their own
    document, and how weighting shifts the training signal towards the tail. The others show how long
    documents are, how long the segments that packing made of them, and what cutting and padding cost.
    Lengths of whole documents need the corpora's .idx files; without them the rest is shown.

    --ledger takes the packs of a chain of stages, in their order. For every source it reports which
    share of its documents and tokens each stage reads, how often each is read (0, 1, 2, ... times),
    which documents two stages share or one evaluates on and another trains on, and the exposure of each
    group of documents along the chain. It needs the packs' arrays and the corpora's .idx files.
    """
    parser = inspect_parser(prog)
    arguments = parser.parse_args(words)
    from megatron_exact.data.attention_work import attention_balance
    from megatron_exact.data.lengths import inspect_lengths
    from megatron_exact.data.manifest import read_manifest
    from megatron_exact.data.pack_arrays import open_arrays
    from megatron_exact.exposure import default_tau
    from megatron_exact.report.exposure_figure import (
        exposure_table,
        format_exposure_table,
        tail_summary,
        weigh_for_display,
    )
    from megatron_exact.report.pack_tables import format_lengths

    def given(*names: str) -> list[str]:
        return [
            f"--{name.replace('_', '-')}"
            for name in names
            if getattr(arguments, name) != parser.get_default(name)
        ]

    of_steps = ("global_batch_size", "micro_batch_size", "seed", "preset")
    if arguments.ledger:
        foreign = given(
            *("alpha", "gamma", "tau", "split", "plot", "scores", "context_parallel", "exposure_table"),
            *("data_parallel", *of_steps),
        )
        if foreign:
            raise ValueError(f"{', '.join(foreign)} with --ledger: it counts documents and targets alone")
        from megatron_exact.data.stage_ledger import make_ledger
        from megatron_exact.report.pack_tables import format_ledger

        ledger = make_ledger(arguments.pack, source_root=arguments.source_root)
        text = (
            json.dumps(ledger, indent=2, allow_nan=False) + "\n"
            if arguments.json
            else format_ledger(ledger)
        )
        print(text, end="")
        return
    if len(arguments.pack) > 1:
        raise ValueError(f"{len(arguments.pack)} packs: name one, or several with --ledger")
    if arguments.data_parallel is None and given(*of_steps):
        raise ValueError(
            f"{', '.join(given(*of_steps))} without --data-parallel: it describes the steps that "
            "data-parallel ranks share, add --data-parallel N"
        )
    (pack,) = arguments.pack
    manifest = read_manifest(pack)
    row_tokens = manifest.row_tokens
    tau = default_tau(row_tokens) if arguments.tau is None else arguments.tau
    # The weights always come from the train split, as in training; --split says whose targets to show.
    train, split = manifest.splits["train"].exposure, manifest.splits[arguments.split]
    weighting, note = weigh_for_display(
        train.counts, train.lower, row_tokens, alpha=arguments.alpha, gamma=arguments.gamma, tau=tau
    )
    table = exposure_table(split.exposure.lower, split.exposure.counts, weighting.bucket_weights)
    lengths, missing = inspect_lengths(pack, manifest, arguments.split, source_root=arguments.source_root)
    content: dict[str, Any] = {
        "row_tokens": row_tokens,
        "fingerprint": manifest.fingerprint,
        "split": arguments.split,
        "parameters": weighting.parameters,
        "buckets": table,
        "tail": tail_summary(table, tau),
        "lengths": lengths,
    }
    if arguments.scores is not None:
        content["evidence"] = evidence_table(arguments, pack, manifest)
    if arguments.context_parallel is not None:
        content["attention_balance"] = asdict(
            attention_balance(
                open_arrays(Path(pack) / arguments.split, split),
                row_tokens=row_tokens,
                ranks=arguments.context_parallel,
            )
        )
    if arguments.data_parallel is not None:
        content["step_balance"] = step_table(arguments, pack, manifest)
    if arguments.plot is not None:
        plot(arguments.plot, content, manifest.policy)
    if arguments.exposure_table is not None:
        from megatron_exact.integrations.exposure_table import table_of_pack, write_table

        write_table(table_of_pack(pack, source_root=arguments.source_root), arguments.exposure_table)
    if arguments.json:
        print(json.dumps(content, indent=2, allow_nan=False))
    else:
        targets = "" if manifest.supervision is None else f", {manifest.supervision.targets} supervised"
        print(
            f"{pack}: {arguments.split}, {split.rows:,} rows of {row_tokens:,} tokens, "
            f"{manifest.policy}{targets}, fingerprint {manifest.fingerprint[:16]}\n"
        )
        print(format_exposure_table(table, row_tokens=row_tokens, tau=tau))
        if arguments.scores is not None:
            print(format_evidence(content["evidence"], arguments.evidence_nats))
        print(format_lengths(lengths), end="")
        if arguments.context_parallel is not None:
            print(format_balance(content["attention_balance"]))
        if arguments.data_parallel is not None:
            print(format_steps(content["step_balance"]))
    for line in (note, missing):
        if line is not None:
            print(line, file=sys.stderr if arguments.json else sys.stdout)


def evidence_table(arguments: argparse.Namespace, pack: str, manifest: Manifest) -> list[dict[str, float]]:
    """Count the targets of each bucket that gain from the far context, by stored scores.

    Raises:
        ValueError, FileNotFoundError: scores of another pack, or damaged; a negative number of nats.
    """
    from megatron_exact.data.rows import RowReader
    from megatron_exact.data.score_files import ScoreReader, gaining_counts

    if not arguments.evidence_nats >= 0:
        raise ValueError(f"--evidence-nats is {arguments.evidence_nats}: give a number >= 0")
    gaining, others = gaining_counts(
        RowReader(pack, arguments.split, source_root=arguments.source_root),
        ScoreReader(arguments.scores, manifest, arguments.split),
        arguments.evidence_nats,
    )
    lower = manifest.splits[arguments.split].exposure.lower
    return [
        {
            "lower": edge,
            "gaining": yes,
            "others": no,
            "gaining_share": yes / (yes + no) if yes + no else 0.0,
        }
        for edge, yes, no in zip(lower, gaining.tolist(), others.tolist(), strict=True)
    ]


def format_balance(balance: dict[str, float]) -> str:
    """Return the line of `attention_balance` for a terminal."""
    return (
        f"\nattention over {balance['ranks']} context-parallel ranks, a row a micro-batch: the busiest "
        f"rank has {balance['mean']:.2f} times the mean's work on average, {balance['most']:.2f} in the "
        f"worst row; ranks wait {balance['waiting']:.1%} of the time in attention"
    )


def step_table(arguments: argparse.Namespace, pack: str, manifest: Manifest) -> dict[str, Any]:
    """Measure how evenly data-parallel ranks share the steps of an epoch, with and without balanced rows.

    Raises:
        ValueError: no global batch size, one that does not divide or exceeds the split, an unknown preset.
    """
    from megatron_exact.data.attention_work import StepLayout, balance_steps, row_pairs, step_balance
    from megatron_exact.data.pack_arrays import open_arrays
    from megatron_exact.data.shuffle import row_permutation

    if arguments.global_batch_size is None:
        raise ValueError("--data-parallel needs --global-batch-size, the rows of a step")
    layout = StepLayout(
        rows=arguments.global_batch_size,
        ranks=arguments.data_parallel,
        micro_batch_rows=arguments.micro_batch_size,
    )
    split = manifest.splits[arguments.split]
    work = row_pairs(open_arrays(Path(pack) / arguments.split, split), row_tokens=manifest.row_tokens)[
        row_permutation(split.rows, arguments.seed, 0).all()
    ]
    orders = {"as drawn": work, "balanced": balance_steps(work, layout)}
    table: dict[str, Any] = {
        "layout": asdict(layout),
        "attention": {name: asdict(step_balance(order, layout)) for name, order in orders.items()},
    }
    if arguments.preset is not None:
        from megatron_exact.model.families import preset
        from megatron_exact.training.memory_forecast import layer_parameters

        shape = preset(arguments.preset)
        # forward FLOP of a layer: 2 a parameter and token, 4 a channel of the query heads and pair
        rest = (
            manifest.row_tokens
            * layer_parameters(shape, 1)
            / (2 * shape.num_attention_heads * shape.head_dim)
        )
        table["preset"] = arguments.preset
        table["attention_share"] = float(work.mean() / (work.mean() + rest))
        table["layer"] = {
            name: asdict(step_balance(order + rest, layout)) for name, order in orders.items()
        }
    return table


def format_steps(table: dict[str, Any]) -> str:
    """Return the table of `step_table` for a terminal."""
    layout = table["layout"]
    lines = [
        f"\n{layout['ranks']} data-parallel ranks, {layout['rows']} rows a step, "
        f"{layout['micro_batch_rows']} a micro-batch: work of the busiest rank over the mean (mean, "
        "worst), and waiting in a step",
        f"{'':32}  {'step':>12}  {'micro-batch':>12}  {'waiting':>7}",
    ]
    parts = {"attention": "attention"}
    if "layer" in table:
        parts["layer"] = f"layer ({table['attention_share']:.0%} attention)"
    for part, name in parts.items():
        for order, found in table[part].items():
            step, micro = (
                f"{found[f'{what}_mean']:.3f}, {found[f'{what}_worst']:.3f}"
                for what in ("step", "micro_batch")
            )
            lines.append(f"{name + ', ' + order:32}  {step:>12}  {micro:>12}  {found['waiting']:>7.1%}")
    if "layer" in table:
        lines.append(f"a layer of {table['preset']}, counted in FLOP")
    return "\n".join(lines)


def format_evidence(table: list[dict[str, float]], nats: float) -> str:
    """Return the table of `evidence_table` for a terminal."""
    lines = [
        f"targets whose loss the far context lowers by more than {nats:g} nats (ours, by --scores)",
        "",
    ]
    lines.append(f"{'from':>8}{'gain':>14}{'others':>14}{'share':>9}")
    lines += [
        f"{row['lower']:>8,}{row['gaining']:>14,}{row['others']:>14,}{row['gaining_share']:>9.1%}"
        for row in table
    ]
    return "\n".join(lines) + "\n"


PLAN_EXAMPLES = """examples:
  which row length? both policies, 4K to 128K, as pack_corpus would do it:
    %(prog)s --source data/web --validation-fraction 0.01 --seed 1
  which mix of three corpora, 10 billion tokens of each mix, with a figure:
    %(prog)s --source data/web data/math data/books --mix 6:24:32 1:3:6 \\
        --train-tokens 10000000000 --row-tokens 16K --expected --plot mixes.png
  how strong a weighting?
    %(prog)s --source data/web --row-tokens 16K --policy best-fit --tau row/4,row/2 --alpha 0.15,0.3
  a million lengths stand for a corpus of two billion documents:
    %(prog)s --source sample.npy --sample-of-documents 2000000000 --row-tokens 8K,32K --json
"""


SHARED_OPTIONS = (
    "train_tokens",
    "allow_repeats",
    "weight_unit",
    "validation_fraction",
    "seed",
    "mask_cross_document_targets",
    "corpus_slice",
)


def list_of[Value](convert: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Return an argparse type for values between commas."""

    def parse(text: str) -> list[Value]:
        try:
            return [convert(part.strip()) for part in text.split(",")]
        except ValueError as error:
            raise ArgumentError(str(error)) from None

    return parse


def policy(text: str) -> str:
    """Parse a packing policy for argparse."""
    from megatron_exact.data.manifest import POLICIES

    if text not in POLICIES:
        raise ArgumentError(f"unknown policy {text!r}: choose from {', '.join(POLICIES)}")
    return text


def plan_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `plan`."""
    from megatron_exact.data.manifest import WEIGHT_UNITS

    parser = command_parser(plan, prog, PLAN_EXAMPLES)
    parser.add_argument(
        "--source",
        action="extend",
        nargs="+",
        default=[],
        metavar="[WEIGHT:]SOURCE",
        help="see above; weights are shares of the train split, on all sources or none",
    )
    parser.add_argument(
        "--sample-of-documents",
        type=positive_int,
        nargs="+",
        default=[],
        metavar="N",
        help="how many documents the samples stand for: one number for all, or one each",
    )
    add_grid(parser)
    pack = parser.add_argument_group("options of pack_corpus, the same for all")
    pack.add_argument("--train-tokens", type=positive_int, metavar="N", help="tokens of the train split")
    pack.add_argument(
        "--allow-repeats", action="store_true", help="repeat sources shorter than their share"
    )
    pack.add_argument(
        "--weight-unit", choices=WEIGHT_UNITS, default=WEIGHT_UNITS[0], help="of weights and mixes"
    )
    pack.add_argument("--validation-fraction", type=fraction, default=0.0, metavar="F", help="default 0")
    pack.add_argument("--seed", type=int, default=0, metavar="S", help="default 0; matters in exact mode")
    pack.add_argument("--mask-cross-document-targets", action="store_true", help="as in pack_corpus")
    pack.add_argument("--corpus-slice", metavar="I/N", help="as in pack_corpus")
    parser.add_argument("--expected", action="store_true", help="do not plan document by document")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--plot", type=png_path, metavar="FILE.png", help="draw exposure, tail share and cuts too"
    )
    return parser


def add_grid(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that span the grid."""
    from megatron_exact.data.manifest import POLICIES
    from megatron_exact.exposure import DEFAULT_ALPHA, DEFAULT_GAMMA
    from megatron_exact.report.pack_tables import Threshold

    grid = parser.add_argument_group("the grid", "lists between commas; every combination is shown")
    rows = [1024 * size for size in (4, 8, 16, 32, 64, 128)]
    grid.add_argument(
        "--row-tokens", type=list_of(positive_int), default=rows, metavar="N,...", help="4K,8K,...,128K"
    )
    grid.add_argument(
        "--policy", type=list_of(policy), default=list(POLICIES), metavar="P,...", help=",".join(POLICIES)
    )
    grid.add_argument(
        "--mix",
        action="extend",
        nargs="+",
        default=[],
        metavar="W:W:...",
        help="shares of the sources in their order, one or more mixes, in place of weights",
    )
    thresholds = [Threshold(divisor=4)]
    grid.add_argument(
        "--tau",
        type=list_of(Threshold.parse),
        default=thresholds,
        metavar="T,...",
        help="effective context where the tail starts: tokens, or row/4 (the default)",
    )
    for name, default in (("alpha", DEFAULT_ALPHA), ("gamma", DEFAULT_GAMMA)):
        grid.add_argument(
            f"--{name}", type=list_of(float), default=[default], metavar="X,...", help=f"default {default}"
        )


def plan(words: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Predict packs and their exposure from document lengths alone, before anything is packed.

    Give sources and a grid of row lengths, policies, mixes and weighting parameters. Each combination
    gets the train split of its pack (rows, padding, cut documents), how many targets would see how much
    of their own document, which share lies in the tail, and the weights EXACT would give it.

    A source is a corpus PREFIX.bin/.idx, a folder of such shards, or lengths without tokens: an index
    PREFIX.idx alone, a sample (.npy, or .txt with one length a line) or a histogram (.csv with lines of
    length,count, or .json with {"length": count}).

    Two modes; the tables mark each pack with = or ~:
      =  exact: every number is the one packing would give. All sources are corpora, or indices alone:
         documents are chosen, split and ordered as packing does with this --seed. (best-fit over a whole
         histogram is exact, too.)
      ~  expected: with --expected, or with a sample or histogram, which does not say which document has
         which length. The split, shares and samples keep each source's distribution of lengths; concat is
         the expectation over where in a row documents begin (in the tests, shares of 20,000 documents
         come within 0.005 of a shuffled stream's). The cost depends on the number of distinct lengths, not
         of documents.

    Packs whose train split would not fill one row are named and left out.
    """
    arguments = plan_parser(prog).parse_args(words)
    from megatron_exact.data.forecast import Mix, forecast_grid, parse_mix, read_sources, why_expected
    from megatron_exact.data.pack import PackOptions
    from megatron_exact.report.pack_tables import (
        forecast_cells,
        format_forecast,
        mix_label,
        plot_forecast,
        require_few_series,
    )

    sources, weights = read_sources(arguments.source, arguments.sample_of_documents)
    if arguments.mix and weights is not None:
        raise ValueError("--mix and weights at --source: give one of the two")
    mixes: list[Mix | None] = [parse_mix(text, len(sources)) for text in arguments.mix] or [weights]
    if arguments.plot is not None:
        require_few_series({(policy, mix_label(mix)) for policy in arguments.policy for mix in mixes})
    options = {name: getattr(arguments, name) for name in SHARED_OPTIONS}
    packs = [
        PackOptions(row_tokens=row_tokens, policy=policy, **options)
        for row_tokens in dict.fromkeys(arguments.row_tokens)
        for policy in dict.fromkeys(arguments.policy)
    ]
    with progress_bar("forecasting", len(mixes) * len(packs), "pack") as bar:
        grid = forecast_grid(sources, mixes, packs, expected=arguments.expected, on_cell=bar.update)
    cells = forecast_cells(
        [cell.as_json() for cell in grid.cells],
        taus=arguments.tau,
        alphas=arguments.alpha,
        gammas=arguments.gamma,
    )
    if arguments.json:
        content: dict[str, Any] = {
            "sources": [str(s.path) for s in sources],
            "options": options,
            "cells": cells,
            "skipped": [cell.as_json() for cell in grid.skipped],
        }
        print(json.dumps(content, indent=2, allow_nan=False))
    else:
        notes = grid_notes(grid, why_expected(sources, arguments.expected))
        print(format_forecast(cells) + "".join(f"\n{note}\n" for note in notes), end="", flush=True)
    if arguments.plot is not None:
        plot_forecast(arguments.plot, cells)


def grid_notes(grid: Grid, why: str | None) -> list[str]:
    """Return what the tables do not say: why numbers are expectations, and which packs are left out."""
    notes = [] if why is None or all(cell.forecast.is_exact for cell in grid.cells) else [f"~ {why}"]
    return notes + [f"left out: {reason}" for reason in dict.fromkeys(c.reason for c in grid.skipped)]
