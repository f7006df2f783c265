"""The verbs of whole experiments: `experiment` runs one, `plan-power` says how many seeds it needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_exact.command_line import ArgumentError, ToolParser, command_parser, positive_int, printable

EXPERIMENT_EXAMPLES = """\
examples:

  %(prog)s examples/experiments/llama3.1_8b.toml --dry-run
  %(prog)s examples/experiments/miniature.toml
  %(prog)s experiment.toml --output work --only train,export
"""


def experiment_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `experiment`."""
    parser = command_parser(experiment, prog, EXPERIMENT_EXAMPLES)
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="definition of the experiment")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of everything (default: experiments/NAME)"
    )
    parser.add_argument(
        "--only", metavar="STEP,STEP", help="only these steps: kinds such as train, or names (--dry-run)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print every command, GPU-hours, room on disk and missing files, and run nothing",
    )
    return parser


def experiment(words: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Run a whole experiment from one file: from text to a row of Table 1.

    FILE.toml names the model, corpora, stages, arms (rules with parameters), seeds, tuning, suites and
    machine; docs/experiments.md lists the keys, and examples/experiments has files for the paper's seven
    models and for small ones. Every step is a command of this project, which --dry-run prints. The same
    command again skips what is finished and resumes what is not.

    It ends with DIR/table1.csv in the layout of the paper's table 1, DIR/report.html, and
    DIR/ledger.json, which records the commands, state and seconds of every step. What was not run is
    shown as not run.
    """
    arguments = experiment_parser(prog).parse_args(words)
    from megatron_exact.experiments.definition import read_experiment_file
    from megatron_exact.experiments.experiment_plan import Planner
    from megatron_exact.experiments.step_runner import StepRunner, describe_plan

    definition = read_experiment_file(arguments.file)
    output = arguments.output or Path("experiments") / arguments.file.stem
    runner = StepRunner(Planner(definition, output), arguments.file)
    if arguments.dry_run:
        print("\n".join(describe_plan(runner, arguments.only)))
        return
    if runner.run(arguments.only):
        for name in ("table1.csv", "report.html", "ledger.json"):
            if (output / name).is_file():
                print(output / name)


POWER_EXAMPLES = """\
examples:

  %(prog)s comparisons/exact --effect 1
  %(prog)s comparisons/exact --effect 1 --pairs 6,8,12,24 --examples 1,4 --simulations 400
  %(prog)s --deltas=-0.10,0.42,0.35,0.21,0.24 --effect 0.26
"""


def numbers(convert: type) -> Any:
    """Return an argparse type for numbers between commas."""

    def parse(text: str) -> list[Any]:
        try:
            return [convert(word) for word in text.split(",")]
        except ValueError:
            raise ArgumentError(f"{text!r} is not a list of numbers such as 1,2,4") from None

    return parse


def whole_numbers(text: str) -> list[int]:
    """Parse whole numbers above 0 between commas for argparse."""
    return [positive_int(word) for word in text.split(",")]


def probability(text: str) -> float:
    """Parse a number strictly between 0.05 and 1 for argparse: below, chance alone is as good."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.05 < value < 1:
        raise ArgumentError(f"{text!r} is not a power: give a number above 0.05 and below 1, such as 0.8")
    return value


def plan_power_parser(prog: str | None = None) -> ToolParser:
    """Return the parser of `plan-power`."""
    parser = command_parser(plan_power, prog, POWER_EXAMPLES)
    add = parser.add_argument
    add("comparison", nargs="?", type=Path, metavar="DIR", help="folder of megatron-exact compare")
    add(
        "--deltas",
        type=numbers(float),
        metavar="D,D",
        help="in its place: the differences of pilot seeds (=D,D where the first is negative)",
    )
    add("--effect", type=float, metavar="D", help="difference to see, in the unit of the average")
    add("--power", type=probability, default=0.8, metavar="P", help="probability of it (%(default)s)")
    add(
        "--pairs",
        type=whole_numbers,
        default=[1, 4, 6, 8, 12, 16, 24],
        metavar="N,N",
        help="numbers of seeds to show (1,4,6,8,12,16,24)",
    )
    add(
        "--examples",
        type=whole_numbers,
        default=[1, 2, 4],
        metavar="K,K",
        help="times the examples of the comparison to show (1,2,4)",
    )
    add("--only", metavar="TEXT", help="averages whose name contains this, such as 'ruler trained'")
    add(
        "--simulations",
        type=positive_int,
        metavar="N",
        help="check the numbers of seeds that --effect needs by N simulated comparisons each",
    )
    add("--seed", type=int, default=0, help="of the simulations (%(default)s)")
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser


def plan_power(words: Sequence[str] | None = None, *, prog: str | None = None) -> None:
    """Plan how many seeds and examples show an effect, from the results of a comparison.

    DIR is a comparison of a pilot; the results that it names are read again. How far a difference varies
    with the seed of training, with the example, and with both together decides when its 95 % interval
    excludes 0. Shown are, for numbers of seeds (pairs of runs) and of examples, the smallest difference
    that is seen with this power, and with --effect the number of seeds that it needs. Of a probe whose
    items share sentence forms, the forms take the place of the examples.

    From a pilot of one pair nothing is known about other seeds: the plan then is about examples alone.
    Few pilot seeds give a rough plan; plan again from the results.
    """
    arguments = plan_power_parser(prog).parse_args(words)
    from megatron_exact.evaluation import power, statistics
    from megatron_exact.report.comparison_page import power_lines

    if (arguments.comparison is None) == (arguments.deltas is None):
        raise ValueError("give the folder of a comparison, or --deltas of pilot seeds")
    if arguments.simulations is not None and arguments.effect is None:
        raise ValueError("--simulations checks what --effect needs: give --effect, too")
    if arguments.simulations is not None and arguments.deltas is not None:
        raise ValueError("--simulations draws examples again, and --deltas has none: name a comparison")
    if arguments.deltas is not None:
        known = {"--deltas": (power.units_of_deltas(arguments.deltas), 1.0, "units of the differences")}
        factors = [1]
    else:
        known = power.units_of_comparison(arguments.comparison)
        factors = arguments.examples
    if arguments.only is not None:
        chosen = {name: found for name, found in known.items() if arguments.only in name}
        if not chosen:
            raise ValueError(f"--only {arguments.only}: there are {', '.join(known)}")
        known = chosen
    plans = []
    for name, (units, scale, unit) in known.items():
        scaled = statistics.scaled_units(units, scale)
        components = power.components_of(scaled)
        pairs = arguments.pairs if components.pairs > 1 else [1]
        if arguments.deltas is not None:  # nothing is known about examples, so nothing about one pair
            pairs = [number for number in pairs if number > 1]
        record = power.plan_record(
            components,
            kind=scaled.kind,
            effect=arguments.effect,
            pairs=pairs,
            factors=factors,
            power=arguments.power,
        )
        for needed in record["pairs_needed"] or ():
            if arguments.simulations is not None and needed["pairs"] is not None:
                needed["simulated_power"] = power.simulated_power(
                    *(scaled, arguments.effect, needed["pairs"]),
                    factor=needed["examples_factor"],
                    draws=arguments.simulations,
                    rng=statistics.generator(arguments.seed, "power", name),
                )
        plans.append({"average": name, "unit": unit, "power": arguments.power, **record})
    if arguments.json:
        print(json.dumps(plans, indent=2, allow_nan=False))
        return
    for plan in plans:
        print("\n".join(printable(line) for line in power_lines(plan, arguments.effect)))
