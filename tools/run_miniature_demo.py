"""Continue the shipped base model in three arms of one seed and write a report: the miniature as a demo.

Made-up text is tokenised, packed and measured; the model is imported, trained with standard weights, with
EXACT at the paper's alpha and at an exaggerated one, exported and probed. Every command is printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_exact.command_line import ToolParser, positive_int, run_tool, use_examples

EPILOG = """\
example:

  run_miniature_demo.py --output demo            three minutes; writes demo/report.md and demo/report.html
  run_miniature_demo.py --output demo --quick    one minute: standard and alpha 1, a handful of steps

Times are those of two quiet cores; most of the quick one is the start of Python processes.

An interrupted demo goes on where it stopped when it is called again.
"""


def main() -> None:
    """Run the tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("demo"), metavar="DIR", help="folder (default: %(default)s)")
    add("--jobs", type=positive_int, default=2, metavar="N", help="runs at a time (default: %(default)s)")
    add("--quick", action="store_true", help="two arms, a few steps and questions: a smoke test")
    options = parser.parse_args()
    use_examples(__file__)
    from examples.miniature.experiment import DEMO, QUICK_DEMO
    from examples.miniature.pipeline import stoppable
    from examples.miniature.run import run_demo

    with stoppable():
        run_demo(options.output, QUICK_DEMO if options.quick else DEMO, jobs=options.jobs)


if __name__ == "__main__":
    run_tool(main)
