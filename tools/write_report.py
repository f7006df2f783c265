#!/usr/bin/env python3
"""Write the report of an experiment: the paper's tables and figures, its numbers beside yours.

From result files alone: comparisons of compare_runs.py (with the evidence probe where it was run) and
packs. Tables 1, 2 and 3, figures 1, 3, 4 and 5, what was compared, and licences, as report.md with PNG
figures and as one report.html that needs no other file, no network and no script. What was not run is shown
as not run.

A comparison belongs to the paper's model that its models were exported as, or to the one that LABEL names.
Table 1 takes EXACT with the paper's parameters; other rules and parameters are rows of table 3.
"""

from __future__ import annotations

import argparse

from megatron_exact.command_line import ToolParser, run_tool

EPILOG = """\
example:

  write_report.py --comparison comparisons/qwen-0.5b --pack packs/web-4k --output report
  write_report.py --comparison Qwen2.5-0.5B=comparisons/a LLaMA-3.1-8B=comparisons/exact \\
      LLaMA-3.1-8B=comparisons/packed-position --exposure exposure-16k.json --output report

exposure-16k.json is what inspect_pack.py --json printed, with its --alpha, --gamma and --tau.
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--comparison",
        nargs="+",
        default=[],
        metavar="[LABEL=]DIR",
        help="folders of compare_runs.py; without any the page shows the paper's numbers alone",
    )
    parser.add_argument(
        "--pack",
        nargs="+",
        default=[],
        metavar="DIR",
        help="packs, for figure 1, with the weights that treatments were trained with",
    )
    parser.add_argument(
        "--exposure",
        nargs="+",
        default=[],
        metavar="FILE.json",
        help="outputs of inspect_pack.py --json, for figure 1 without the packs or with other parameters",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write into")
    return parser


def main() -> None:
    """Run the tool."""
    arguments = build_parser().parse_args()
    from megatron_exact.report.experiment import read_experiment, write_experiment_report

    files = read_experiment(arguments.comparison, arguments.pack, arguments.exposure)
    for path in write_experiment_report(arguments.output, files):
        print(path)


if __name__ == "__main__":
    run_tool(main)
