"""Run the paper's experiment in miniature: paired arms over seeds, from made-up text to intervals.

Every arm continues one small base model on the CPU, one thread a run, through the same tools and training
entry as a real job. OUTPUT/results.json holds all numbers; the page is written from it alone.
An interrupted experiment goes on where it stopped; what is finished and did not change is used again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from megatron_exact.command_line import ToolParser, positive_int, positive_number, run_tool, use_examples

EPILOG = """\
examples:

  run_miniature.py --output miniature                       all arms, five seeds; 40 minutes on two cores
  run_miniature.py --output miniature --page docs           the same, and docs/miniature.md with its figures
  run_miniature.py --page-from docs/miniature/results.json --page docs
  run_miniature.py --output try --seeds 1 --arms standard,exact-1
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool."""
    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, metavar="DIR", help="folder of steps and results")
    add("--seeds", type=positive_int, default=5, metavar="N", help="seeds 1 to N (default: %(default)s)")
    add("--jobs", type=positive_int, default=2, metavar="N", help="runs at a time (default: %(default)s)")
    add("--arms", metavar="NAME,NAME", help="only these, the first one of a design is always run (all)")
    add("--designs", metavar="NAME,NAME", help="only these corpora: distant, near (both)")
    add("--base", type=Path, metavar="DIR", help="base model (default: examples/miniature/base)")
    add("--learning-rate", type=positive_number, metavar="X", help="peak, instead of the experiment's")
    add("--iterations", type=positive_int, metavar="N", help="steps, instead of the experiment's")
    add("--page", type=Path, metavar="DIR", help="write DIR/miniature.md and its figures; needs all arms")
    add("--page-from", type=Path, metavar="FILE", help="run nothing, write the page from a results.json")
    return parser


def main() -> None:
    """Run the tool."""
    options = build_parser().parse_args()
    use_examples(__file__)
    from examples.miniature.experiment import FULL, SHIPPED_BASE, choose_arms
    from examples.miniature.page import require_settings_of_page, write_miniature_page
    from examples.miniature.pipeline import stoppable
    from examples.miniature.run import run_miniature

    if options.page_from is not None:
        print(write_miniature_page(options.page_from, options.page or Path("docs")))
        return
    if options.output is None:
        raise ValueError("--output is missing: name a folder for steps and results")
    arms = choose_arms(FULL.arms, designs=options.designs, names=options.arms)
    training = FULL.long.of_length(options.iterations or FULL.long.iterations)
    if options.learning_rate is not None:
        training = replace(training, learning_rate=options.learning_rate)
    settings = replace(FULL, seeds=options.seeds, arms=arms, long=training)
    base = options.base or SHIPPED_BASE
    if options.page is not None:
        require_settings_of_page(settings, base)
    with stoppable():
        results = run_miniature(options.output, settings, jobs=options.jobs, base=base)
    if options.page is not None:
        print(write_miniature_page(results, options.page))


if __name__ == "__main__":
    run_tool(main)
