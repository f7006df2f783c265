#!/usr/bin/env python3
"""Show what a pack trains on: exposure by effective context before and after weighting, and lengths.

The first table is figure 1 of EXACT (arXiv 2605.10544): how many targets see how much of their own
document, and how weighting shifts the training signal towards the tail. The others show how long documents
are, how long the segments that packing made of them, and what cutting and padding cost. Whole documents'
lengths need the corpora's .idx files; without them the rest is shown.

--ledger takes the packs of a chain of stages, in their order, and says of every source which share of its
documents and tokens each stage reads, how often each is read (0, 1, 2, ... times), which documents two
stages share or one evaluates on and another trains on, and the exposure of each group of documents along
the chain. It needs the packs' arrays and the corpora's .idx files.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_exact.command_line import ToolParser, png_path, run_tool
from megatron_exact.data.lengths import inspect_lengths
from megatron_exact.data.manifest import SPLITS, read_manifest
from megatron_exact.data.stage_ledger import make_ledger
from megatron_exact.exposure import DEFAULT_ALPHA, DEFAULT_GAMMA, default_tau
from megatron_exact.files import atomic_file
from megatron_exact.report.exposure_figure import (
    exposure_table,
    format_exposure_table,
    plot_exposure,
    tail_summary,
    weigh_for_display,
)
from megatron_exact.report.pack_tables import format_ledger, format_lengths, plot_lengths

EPILOG = """examples:
  inspect_pack.py packs/web-4k
  inspect_pack.py packs/web-4k --alpha 0.3 --tau 512 --json
  inspect_pack.py packs/web-4k --plot exposure.png      (and exposure-lengths.png)
  inspect_pack.py /mnt/copy/web-4k --source-root /mnt/corpora
  inspect_pack.py packs/4k packs/8k packs/16k --ledger
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pack", nargs="+", metavar="DIR", help="a packed dataset; with --ledger several")
    parser.add_argument(
        "--ledger", action="store_true", help="what a chain of stages reads: name their packs in order"
    )
    parser.add_argument("--alpha", type=float, default=DEFAULT_ALPHA, help="mean extra weight of the tail")
    parser.add_argument("--gamma", type=float, default=DEFAULT_GAMMA, help="exponent of inverse frequency")
    parser.add_argument("--tau", type=float, help="effective context where the tail starts (row / 4)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="whose targets to count (train)")
    parser.add_argument("--source-root", metavar="DIR", help="where the corpora lie now, if not as packed")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--plot",
        type=png_path,
        metavar="FILE.png",
        help="draw exposure here, and lengths into FILE-lengths.png",
    )
    return parser


def plot(path: Path, content: dict[str, Any], policy: str) -> None:
    """Write both figures."""
    row_tokens = content["row_tokens"]
    title = f"{policy}, rows of {row_tokens:,} tokens, {content['split']}"
    with atomic_file(path) as temporary:
        tau = content["parameters"]["tau"]
        plot_exposure(temporary, content["buckets"], row_tokens=row_tokens, tau=tau, title=title)
    with atomic_file(path.with_name(path.stem + "-lengths" + path.suffix)) as temporary:
        plot_lengths(temporary, content["lengths"], row_tokens=row_tokens, title=title)


def main() -> None:
    """Run the tool."""
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.ledger:
        foreign = [
            f"--{name}"
            for name in ("alpha", "gamma", "tau", "split", "plot")
            if getattr(arguments, name) != parser.get_default(name)
        ]
        if foreign:
            raise ValueError(f"{', '.join(foreign)} with --ledger: it counts documents and targets alone")
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
    if arguments.plot is not None:
        plot(arguments.plot, content, manifest.policy)
    if arguments.json:
        print(json.dumps(content, indent=2, allow_nan=False))
    else:
        targets = "" if manifest.supervision is None else f", {manifest.supervision.targets} supervised"
        print(
            f"{pack}: {arguments.split}, {split.rows:,} rows of {row_tokens:,} tokens, "
            f"{manifest.policy}{targets}, fingerprint {manifest.fingerprint[:16]}\n"
        )
        print(format_exposure_table(table, row_tokens=row_tokens, tau=tau))
        print(format_lengths(lengths), end="")
    for line in (note, missing):
        if line is not None:
            print(line, file=sys.stderr if arguments.json else sys.stdout)


if __name__ == "__main__":
    run_tool(main)
