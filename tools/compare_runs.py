"""Compare evaluated models in pairs: points, 95 % intervals, tests, as comparison.json and comparison.md.

Scores are averaged over each cell (task x length), then over the cells of a suite. Intervals come from
resampling the examples of each cell, both sides together. Give several folders on each side for several
seeds of training: they pair in order and are a second level of the resampling.

Both sides must have answered the same examples, and their trainings must agree in pack, start checkpoint,
seed, schedule and layout as far as the models carry a record; anything else is refused by name. Where all
folders hold an evidence probe (probe_evidence.py), alone or beside the suites, it is compared, too.
"""

from __future__ import annotations

import argparse

from megatron_exact.command_line import ToolParser, positive_int, printable, run_tool

EPILOG = """\
example:

  compare_runs.py --baseline results/standard --treatment results/exact --output comparison \\
      --trained-lengths 1K,1.5K,2K,3K,4K --extrapolated-lengths 5K,6K,8K,12K,16K
  compare_runs.py --baseline results/standard-seed1 results/standard-seed2 \\
      --treatment results/exact-seed1 results/exact-seed2 --output comparison-seeds

K means 1,024 tokens; a suite that was not evaluated at a length does without it.
"""


def build_parser() -> argparse.ArgumentParser:
    """Arguments of this tool."""
    from megatron_exact.evaluation.regimes import token_lengths

    parser = ToolParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for side in ("baseline", "treatment"):
        parser.add_argument(
            f"--{side}",
            nargs="+",
            required=True,
            metavar="RESULTS",
            help="folders of evaluate_model.py or probe_evidence.py, one a training seed",
        )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write into")
    for regime, meaning in (("trained", "up to the training window"), ("extrapolated", "beyond it")):
        parser.add_argument(
            f"--{regime}-lengths",
            type=token_lengths,
            default=(),
            metavar="N,N",
            help=f"lengths {meaning}, such as 1024,1.5K (default: none, all lengths together only)",
        )
    parser.add_argument(
        "--nolima-k",
        type=int,
        choices=(1000, 1024),
        default=1024,
        help="tokens that K means for NoLiMa's lengths; its authors count 1000 (default: %(default)s)",
    )
    parser.add_argument(
        "--probe-distances",
        type=token_lengths,
        default=(),
        metavar="N,N",
        help="average the evidence probe from the first distance to the second, too, such as 4K,64K",
    )
    parser.add_argument(
        "--resamples",
        type=positive_int,
        default=10_000,
        metavar="N",
        help="of the bootstrap and of the test (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: %(default)s)")
    return parser


def main() -> None:
    """Run the tool."""
    arguments = build_parser().parse_args()
    from megatron_exact.evaluation.bootstrap import Sampling
    from megatron_exact.evaluation.comparison import compare_runs, write_comparison
    from megatron_exact.evaluation.regimes import K_TOKENS, Regimes
    from megatron_exact.report.experiment import aggregates_table, probe_table, write_comparison_page

    distances = tuple(length.tokens(K_TOKENS) for length in arguments.probe_distances)
    if len(distances) not in (0, 2):
        raise ValueError(f"--probe-distances: {len(distances)} lengths, give the shortest and the longest")
    content = compare_runs(
        arguments.baseline,
        arguments.treatment,
        regimes=Regimes(
            trained=arguments.trained_lengths,
            extrapolated=arguments.extrapolated_lengths,
            nolima_k_tokens=arguments.nolima_k,
        ),
        sampling=Sampling(resamples=arguments.resamples, seed=arguments.seed),
        probe_ranges=[(distances[0], distances[1])] if distances else [],
    )
    write_comparison(arguments.output, content)
    page = write_comparison_page(arguments.output)
    print(content["pairing"]["statement"])
    for note in content["notes"]:
        print(printable(f"note: {note}"))
    if content["aggregates"]:
        print(f"\n{aggregates_table(content['aggregates'])}")
    if "probe" in content:
        print(f"\n{probe_table(content['probe'])}")
    print(page)


if __name__ == "__main__":
    run_tool(main)
