"""What token weights and the statistics by context cost: a step of rule exact against a step of rule none.

    python benchmarks/step_cost.py
    python benchmarks/step_cost.py --pairs 4 --layers 2 --hidden 128

One training job of a small Llama in float32 on one thread takes every step on the same row; steps of the
two rules alternate. Rules differ by the table of weights that the dataset looks up and by nothing else, so
the table is exchanged between steps. Given are the medians over pairs of neighbouring steps of the ratio of
their times; half of the pairs begin with the one rule, half with the other.

The statistics (loss and number of targets by effective context, weight mass) run for every rule. Their time
is measured by itself, on targets of the same row, as a share of the median step.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import numpy as np
import small_job
import torch
from small_job import Clock

from megatron_exact.command_line import ToolParser, run_tool

STATISTICS_CALLS = 20


class AlternatingRules:
    """Exchanges the weights of the training rows between steps, and keeps the times."""

    def __init__(self) -> None:
        self.tables: dict[str, Any] = {}
        self.times: list[tuple[str, Clock]] = []
        self.dataset: Any = None

    def watch_datasets(self) -> None:
        """Learn of the dataset when the job opens it."""
        from megatron_exact.training.run import TrainingRun

        stock = TrainingRun.provide_datasets

        @functools.wraps(stock)
        def provide(run: Any, *args: Any, **kwargs: Any) -> Any:
            datasets = stock(run, *args, **kwargs)
            self.dataset = datasets[0]
            exact = self.dataset._row_weights
            self.tables = {"exact": exact, "none": replace(exact, weights=np.ones(exact.weights.shape))}
            return datasets

        TrainingRun.provide_datasets = provide  # type: ignore[method-assign]

    def step(self, stock: Callable[[], Any], number: int) -> Any:
        """none exact exact none none exact ...: pairs in both orders."""
        rule = ("none", "exact", "exact", "none")[number % 4]
        self.dataset._row_weights = self.tables[rule]
        result, clock = small_job.timed(stock)
        self.times.append((rule, clock))
        return result

    def ratios(self, kind: int) -> list[float]:
        """exact / none of each pair; kind 0 is wall time, 1 CPU time. The first four steps warm up."""
        pairs = zip(self.times[4::2], self.times[5::2], strict=True)
        found = []
        for pair in pairs:
            by_rule = {rule: clock[kind] for rule, clock in pair}
            found.append(by_rule["exact"] / by_rule["none"])
        return found


def statistics_seconds(dataset: Any, buckets: int) -> float:
    """CPU time of a row's statistics, median."""
    from megatron_exact.training.batch import Targets
    from megatron_exact.training.loss import TargetStatistics

    row = dataset[0]
    targets = Targets(
        loss_mask=row["loss_mask"][None],
        weights=row["target_weights"][None],
        buckets=row["target_buckets"][None],
    )
    losses = torch.rand(row["tokens"].shape[0])

    def once() -> None:
        running = TargetStatistics(buckets)
        running.add(losses, targets)
        running.take()

    return statistics.median(small_job.timed(once)[1][1] for _ in range(STATISTICS_CALLS))


def main() -> None:
    """Run the benchmark."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=measure.whole_number, default=20, help="default: %(default)s")
    parser.add_argument("--row-tokens", type=measure.whole_number, default=4096, help="%(default)s")
    parser.add_argument("--layers", type=measure.whole_number, default=4, help="default: %(default)s")
    parser.add_argument("--hidden", type=measure.whole_number, default=256, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the documents; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="append the result to FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from megatron_exact.training import cpu_runtime

    cpu_runtime.install()
    rules = AlternatingRules()
    rules.watch_datasets()
    with tempfile.TemporaryDirectory() as folder:
        # one row, epoch after epoch
        size = {"row_tokens": options.row_tokens, "rows": 1, "seed": options.seed}
        pack = small_job.make_pack(Path(folder), **size)
        small_job.run_job([*job_arguments(pack, options)], one_row(rules))
        buckets = len(rules.dataset.reader.split.exposure.lower)
        by_itself = statistics_seconds(rules.dataset, buckets)
    wall, cpu = (rules.ratios(kind) for kind in (0, 1))
    step = statistics.median(clock[1] for _, clock in rules.times[4:])
    row = {
        "pairs": len(cpu),
        "step, CPU s": step,
        "exact / none, CPU": f"{statistics.median(cpu):.4f}",
        "exact / none, wall": f"{statistics.median(wall):.4f}",
        "quartiles, CPU": " ... ".join(f"{q:.3f}" for q in statistics.quantiles(cpu)[::2]),
        "statistics, CPU ms": 1000 * by_itself,
        "of a step": f"{by_itself / step:.3%}",
    }
    measure.publish(
        "step_cost",
        [row],
        title=f"Cost of weights: {options.layers} layers of {options.hidden}, rows of {options.row_tokens}",
        notes=(f"{buckets} buckets of effective context, vocabulary {small_job.VOCABULARY:,}.",),
        file=options.json,
    )


def one_row(rules: AlternatingRules) -> Callable[[Callable[[], Any], int], Any]:
    """Steps that always read the same row."""

    def step(stock: Callable[[], Any], number: int) -> Any:
        rules.dataset.row_of = lambda index: 0
        return rules.step(stock, number)

    return step


def job_arguments(pack: Path, options: argparse.Namespace) -> list[Any]:
    """Of the job."""
    return [
        *("--pack", pack, "--token-weighting", "exact"),
        *("--num-layers", options.layers, "--hidden-size", options.hidden),
        *("--ffn-hidden-size", 3 * options.hidden, "--num-attention-heads", 4),
        *("--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear"),
        *("--position-embedding-type", "rope", "--untie-embeddings-and-output-weights"),
        *("--vocab-size", small_job.VOCABULARY, "--global-batch-size", 1, "--lr", "1e-4"),
        *("--lr-decay-style", "constant", "--log-interval", 1000, "--eval-iters", 0),
        *("--train-iters", 2 * options.pairs + 4),
    ]


if __name__ == "__main__":
    run_tool(main)
