#!/usr/bin/env python3
"""Run the whole experiment around the method once, small, on the CPU, without a network.

A tiny model of random weights: continued pretraining of both arms, QA-SFT, export, RULER, NoLiMa (with the
project's own needles), standard QA (invented data sets), the evidence probe, the comparison and the report.
It shows that the parts work together; the scores mean nothing. Needs the extra `eval`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_exact.command_line import ToolParser, run_tool, use_examples

EPILOG = """\
example:
  python tools/run_evaluate_demo.py --output evaluate-demo

It takes four to five minutes on two quiet cores. An interrupted demo resumes where it stopped when it is
called again. Steps whose options, inputs and code did not change are reused; all others are made again.
"""


def main() -> None:
    """Run the demo."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("evaluate-demo"), metavar="DIR", help="folder (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and examples: a smoke test")
    options = parser.parse_args()
    use_examples(__file__)
    from examples.evaluate_demo import FULL, QUICK, run_evaluate_demo
    from examples.miniature.pipeline import stoppable
    from megatron_exact.evaluation.engine import require_lm_eval

    require_lm_eval()
    with stoppable():
        run_evaluate_demo(options.output, QUICK if options.quick else FULL)


if __name__ == "__main__":
    run_tool(main)
