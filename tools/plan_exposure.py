#!/usr/bin/env python3
"""What if? Predict packs and their exposure from document lengths alone, before anything is packed.

Give sources and a grid of row lengths, policies, mixes and weighting parameters. For each combination the
tool says what the train split of the pack would be (rows, padding, cut documents), how many targets would
see how much of their own document, which share lies in the tail, and the weights EXACT would give it.

A source is a corpus PREFIX.bin/.idx, a folder of such shards, or lengths without tokens: an index
PREFIX.idx alone, a sample (.npy, or .txt with one length a line) or a histogram (.csv with lines of
length,count, or .json with {"length": count}).

Two modes; the tables mark each pack with = or ~:
  =  exact: every number is the one pack_corpus would give. All sources are corpora, or indices alone:
     documents are chosen, split and ordered as packing does with this --seed. (best-fit over a whole
     histogram is exact, too.)
  ~  expected: with --expected, or with a sample or histogram, which does not say which document has which
     length. The split, shares and samples keep each source's distribution of lengths; concat is the
     expectation over where in a row documents begin (in the tests, shares of 20,000 documents come within
     0.005 of a shuffled stream's). The cost depends on the number of distinct lengths, not of documents.

Packs whose train split would not fill one row are named and left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from megatron_exact.command_line import (
    ArgumentError,
    ToolParser,
    fraction,
    png_path,
    positive_int,
    progress_bar,
    run_tool,
)
from megatron_exact.data.forecast import Grid, Mix, forecast_grid, parse_mix, read_sources, why_expected
from megatron_exact.data.manifest import POLICIES, WEIGHT_UNITS
from megatron_exact.data.pack import PackOptions
from megatron_exact.exposure import DEFAULT_ALPHA, DEFAULT_GAMMA
from megatron_exact.files import atomic_file
from megatron_exact.report.forecast_tables import (
    Threshold,
    forecast_cells,
    format_forecast,
    mix_label,
    plot_forecast,
    require_few_series,
)

EPILOG = """examples:
  which row length? both policies, 4K to 128K, as pack_corpus would do it:
    plan_exposure.py --source data/web --validation-fraction 0.01 --seed 1
  which mix of three corpora, 10 billion tokens of each mix, with a figure:
    plan_exposure.py --source data/web data/math data/books --mix 6:24:32 1:3:6 \\
        --train-tokens 10000000000 --row-tokens 16K --expected --plot mixes.png
  how strong a weighting?
    plan_exposure.py --source data/web --row-tokens 16K --policy best-fit --tau row/4,row/2 --alpha 0.15,0.3
  a million lengths stand for a corpus of two billion documents:
    plan_exposure.py --source sample.npy --sample-of-documents 2000000000 --row-tokens 8K,32K --json
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
    """argparse type: values between commas."""

    def parse(text: str) -> list[Value]:
        try:
            return [convert(part.strip()) for part in text.split(",")]
        except ValueError as error:
            raise ArgumentError(str(error)) from None

    return parse


def policy(text: str) -> str:
    """argparse type: one of POLICIES."""
    if text not in POLICIES:
        raise ArgumentError(f"unknown policy {text!r}: choose from {', '.join(POLICIES)}")
    return text


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    """Arguments that span the grid."""
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


def main() -> None:
    """Run the tool."""
    arguments = build_parser().parse_args()
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
        with atomic_file(arguments.plot) as temporary:
            plot_forecast(temporary, cells)


def grid_notes(grid: Grid, why: str | None) -> list[str]:
    """What the tables do not say: why numbers are expectations, and which packs are left out."""
    notes = [] if why is None or all(cell.forecast.is_exact for cell in grid.cells) else [f"~ {why}"]
    return notes + [f"left out: {reason}" for reason in dict.fromkeys(c.reason for c in grid.skipped)]


if __name__ == "__main__":
    run_tool(main)
