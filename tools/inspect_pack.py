#!/usr/bin/env python3
"""Show the exposure of a pack: targets per bucket of effective context, before and after weighting."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

from megatron_exact.command_line import ToolParser, run_tool
from megatron_exact.data.manifest import SPLITS, Manifest, read_manifest
from megatron_exact.exposure import DEFAULT_ALPHA, DEFAULT_GAMMA, Weighting, build_weighting, default_tau
from megatron_exact.exposure.weights import EmptyTailError
from megatron_exact.files import atomic_file
from megatron_exact.report.exposure import (
    exposure_table,
    format_exposure_table,
    plot_exposure,
    tail_summary,
)

EPILOG = """examples:
  inspect_pack.py packs/web-4k
  inspect_pack.py packs/web-4k --alpha 0.3 --tau 512 --json
  inspect_pack.py packs/web-4k --plot exposure.png
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pack", metavar="DIR", help="a packed dataset")
    parser.add_argument("--alpha", type=float, default=DEFAULT_ALPHA, help="mean extra weight of the tail")
    parser.add_argument("--gamma", type=float, default=DEFAULT_GAMMA, help="exponent of inverse frequency")
    parser.add_argument("--tau", type=float, help="effective context where the tail starts (row / 4)")
    parser.add_argument("--split", choices=SPLITS, default="train", help="whose targets to count (train)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the figure too")
    return parser


def weigh(manifest: Manifest, *, alpha: float, gamma: float, tau: float) -> tuple[Weighting, str | None]:
    """EXACT's weights, and what to say where its tail is empty and training would refuse it.

    They always come from the train split, as in training; --split only says whose targets to show.
    """
    train = manifest.splits["train"].exposure
    place = (train.counts, train.lower, manifest.row_tokens)
    try:
        return build_weighting("exact", *place, alpha=alpha, gamma=gamma, tau=tau), None
    except EmptyTailError as error:
        parameters = {"alpha": alpha, "gamma": gamma, "tau": float(tau)}
        weighting = replace(build_weighting("none", *place), rule="exact", parameters=parameters)
        return weighting, f"note: every weight is shown as 1, training would refuse EXACT here: {error}"


def main() -> None:
    """Run the tool."""
    arguments = build_parser().parse_args()
    manifest = read_manifest(arguments.pack)
    row_tokens = manifest.row_tokens
    tau = default_tau(row_tokens) if arguments.tau is None else arguments.tau
    weighting, note = weigh(manifest, alpha=arguments.alpha, gamma=arguments.gamma, tau=tau)
    shown = manifest.splits[arguments.split].exposure
    table = exposure_table(shown.lower, shown.counts, weighting.bucket_weights)
    if arguments.plot is not None:
        title = f"{manifest.policy}, rows of {row_tokens:,} tokens, {arguments.split}"
        with atomic_file(arguments.plot) as temporary:
            plot_exposure(temporary, table, row_tokens=row_tokens, tau=tau, title=title)
    if arguments.json:
        content: dict[str, Any] = {
            "row_tokens": row_tokens,
            "fingerprint": manifest.fingerprint,
            "split": arguments.split,
            "parameters": weighting.parameters,
            "buckets": table,
            "tail": tail_summary(table, tau),
        }
        print(json.dumps(content, indent=2, allow_nan=False))
    else:
        split = manifest.splits[arguments.split]
        print(
            f"{arguments.pack}: {arguments.split}, {split.rows:,} rows of {row_tokens:,} tokens, "
            f"{manifest.policy}, padding {split.padding_tokens:,}, left out {split.left_out_tokens:,}, "
            f"fingerprint {manifest.fingerprint[:16]}\n"
        )
        print(format_exposure_table(table, row_tokens=row_tokens, tau=tau), end="")
    if note is not None:
        print(note, file=sys.stderr if arguments.json else sys.stdout)


if __name__ == "__main__":
    run_tool(main)
