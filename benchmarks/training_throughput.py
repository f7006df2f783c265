"""A training step on a CPU: this project, two loops over transformers, and bare matrix products.

    python benchmarks/training_throughput.py
    python benchmarks/training_throughput.py --row-tokens 2048
    python benchmarks/training_throughput.py --steps 2 --layers 2 --row-tokens 1024

A Llama of 20 million parameters trains in float32 on one thread, on rows of lognormal documents (median 600
tokens, sigma 1). The loops are what one would otherwise write: `LlamaForCausalLM` with SDPA, cross-entropy
of all targets, clipping and `torch.optim.AdamW`. "Dense mask" takes the row at once, with a block-diagonal
causal mask and position ids that start at 0 in each document; "each document alone" calls the model for one
segment after the other, without a mask or padding, and adds up the gradients. All start from the same
weights (imported by this project) and take the same rows with the same settings, so their losses have to
agree, step by step.

The bare products have the shapes of the model's own, forward, gradient of the input and of the weight, and
those of attention over the causal half of each segment, in blocks of 256 queries. Nothing else is in them:
no softmax, no norm, no optimizer, no product computed twice. Their FLOPs are the "model FLOPs".

All alternate step by step in one process, on the same row; numbers are medians over the steps but the
first. `step_profile.py` shows where the time goes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import measure
import small_job
import torch
import torch.nn.functional as F
from small_job import VOCABULARY, Clock
from torch import Tensor

from megatron_exact.command_line import ToolParser, run_tool

LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.01, 1.0
HEAD_DIM = 64
QUERY_BLOCK = 256
OURS, LOOP, BARE = "this project", "transformers, dense mask", "bare matrix products"
ALONE = "transformers, each document alone"


def make_model(folder: Path, options: argparse.Namespace) -> Any:
    """A random Llama, saved for the import."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // HEAD_DIM,
        max_position_embeddings=options.row_tokens,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


class TransformersLoop:
    """The plain loop, one step a call."""

    def __init__(self, model: Any) -> None:
        self.model = model.train()
        shrinking = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": shrinking, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
            lr=LEARNING_RATE,
        )

    def step(self, row: dict[str, Tensor]) -> float:
        """Train on one row; the loss before the step."""
        self.optimizer.zero_grad()
        loss = self.backward(row)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss

    def backward(self, row: dict[str, Tensor]) -> float:
        """Leave the gradients of a row in the parameters; its loss."""
        lengths = row["cu_seqlens"].diff()
        document = torch.repeat_interleave(torch.arange(lengths.shape[0]), lengths)
        visible = (document[:, None] == document).tril()[None, None]
        logits = self.model(
            input_ids=row["tokens"][None],
            position_ids=row["position_ids"][None],
            attention_mask=visible,
            use_cache=False,
        ).logits
        losses = F.cross_entropy(logits[0], row["labels"], reduction="none")
        loss = (losses * row["loss_mask"]).sum() / row["loss_mask"].sum()
        loss.backward()
        return float(loss.detach())


class LoopOverDocuments(TransformersLoop):
    """The same loop with one call of the model for each segment."""

    def backward(self, row: dict[str, Tensor]) -> float:
        """Leave the gradients of a row in the parameters; its loss."""
        total = 0.0
        for start, stop in pairwise(row["cu_seqlens"].tolist()):
            logits = self.model(input_ids=row["tokens"][None, start:stop], use_cache=False).logits
            losses = F.cross_entropy(logits[0], row["labels"][start:stop], reduction="none")
            loss = (losses * row["loss_mask"][start:stop]).sum() / row["loss_mask"].sum()
            loss.backward()
            total += float(loss.detach())
        return total


def products(options: argparse.Namespace, segments: list[int]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(left, right, how often) of every matrix product of a step."""
    h, f = options.hidden, options.hidden * 8 // 3
    tokens = options.row_tokens
    for outputs, inputs, times in (
        (3 * h, h, options.layers),
        (h, h, options.layers),
        (2 * f, h, options.layers),
        (h, f, options.layers),
        (VOCABULARY, h, 1),
    ):
        x, weight, y = (
            torch.randn(shape) for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        )
        for pair in ((x, weight.t()), (y, weight), (y.t(), x)):
            yield *pair, times
    heads = h // HEAD_DIM
    for length in segments:
        block = min(length, QUERY_BLOCK)
        blocks, keys = length / block, (length + 1) // 2  # a query sees half of its segment, on average
        queries, scores = torch.randn(heads, block, HEAD_DIM), torch.randn(heads, block, keys)
        key = torch.randn(heads, keys, HEAD_DIM)
        often = round(options.layers * blocks)
        for pair in (
            *((queries, key.transpose(1, 2)),) * 2,  # scores, and the gradient of the weights
            *((scores, key),) * 2,  # output, gradient of the queries
            *((scores.transpose(1, 2), queries),) * 2,  # gradients of keys and values
        ):
            yield *pair, often


def bare_products(prepared: list[tuple[Tensor, Tensor, int]]) -> float:
    """Multiply them all; returns FLOPs."""
    operations = 0.0
    for left, right, times in prepared:
        for _ in range(times):
            torch.matmul(left, right)
        operations += 2.0 * times * left.numel() * right.shape[-1]
    return operations


class Comparison:
    """Called in place of upstream's training step: all contenders on the row of that step."""

    def __init__(self, options: argparse.Namespace, loops: dict[str, TransformersLoop], rows: Any) -> None:
        self.options, self.loops, self.rows = options, loops, rows
        self.times: dict[str, list[Clock]] = {name: [] for name in (OURS, *loops, BARE)}
        self.losses: dict[str, list[float]] = {name: [] for name in loops}
        self.operations: list[float] = []
        self.segments: list[int] = []

    def step(self, stock: Callable[[], Any], number: int) -> Any:
        """All contenders, in turn in alphabetical and in reverse order."""
        row = self.rows[number]
        lengths = row["cu_seqlens"].diff()
        row["cu_seqlens"] = row["cu_seqlens"][: int((lengths > 0).sum()) + 1]
        prepared = list(products(self.options, row["cu_seqlens"].diff().tolist()))
        contenders: dict[str, Callable[[], Any]] = {OURS: stock, BARE: lambda: bare_products(prepared)}
        for name, loop in self.loops.items():
            contenders[name] = partial(loop.step, row)
        self.segments.append(row["cu_seqlens"].shape[0] - 1)
        results = {}
        for name in sorted(contenders, reverse=bool(number % 2)):
            results[name], clock = small_job.timed(contenders[name])
            self.times[name].append(clock)
        for name, losses in self.losses.items():
            losses.append(results[name])
        self.operations.append(results[BARE])
        return results[OURS]

    def table(self) -> list[measure.Row]:
        """A row a contender; the first step, which warms up, is left out."""
        table = []
        for name, clocks in self.times.items():
            pairs = list(zip(clocks[1:], self.times[OURS][1:], self.times[BARE][1:], strict=True))
            rates = [work / clock[1] for work, clock in zip(self.operations[1:], clocks[1:], strict=True)]
            table.append(
                {
                    "contender": name,
                    "step, wall s": statistics.median(clock[0] for clock in clocks[1:]),
                    "step, CPU s": statistics.median(clock[1] for clock in clocks[1:]),
                    "tokens / CPU s": self.options.row_tokens
                    / statistics.median(clock[1] for clock in clocks[1:]),
                    "model GFLOP / CPU s": statistics.median(rates) / 1e9,
                    "x this project, CPU": statistics.median(own[1] / ours[1] for own, ours, _ in pairs),
                    "x bare products, CPU": statistics.median(own[1] / bare[1] for own, _, bare in pairs),
                }
            )
        return table


def job_arguments(pack: Path, checkpoint: Path, run: Path, options: argparse.Namespace) -> list[Any]:
    """Of our job, with the loop's settings."""
    return [
        *("--pack", pack, "--token-weighting", "none", "--pretrained-checkpoint", checkpoint),
        *("--run-dir", run, "--seed", options.seed, "--global-batch-size", 1, "--eval-iters", 0),
        *("--train-iters", options.steps + 1, "--lr", LEARNING_RATE, "--lr-decay-style", "constant"),
        *("--weight-decay", WEIGHT_DECAY, "--clip-grad", CLIP, "--log-interval", 1000),
    ]


def parse_options(description: str | None, *, steps: int) -> argparse.Namespace:
    """Parse the size of model and rows, for `step_profile.py` as well.

    Args:
        description: of the benchmark.
        steps: default of --steps.

    Raises:
        ValueError: a width that heads do not divide.
    """
    parser = ToolParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=measure.whole_number, default=steps, help="default: %(default)s")
    parser.add_argument("--row-tokens", type=measure.whole_number, default=4096, help="%(default)s")
    parser.add_argument("--layers", type=measure.whole_number, default=8, help="default: %(default)s")
    parser.add_argument("--hidden", type=measure.whole_number, default=384, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of rows and weights; default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="append the result to FILE")
    options = parser.parse_args()
    if options.hidden % HEAD_DIM:
        raise ValueError(
            f"--hidden {options.hidden} does not divide by heads of {HEAD_DIM}: give a multiple"
        )
    return options


def main() -> None:
    """Run the benchmark."""
    options = parse_options(__doc__, steps=8)
    torch.set_num_threads(1)
    from megatron_exact.conversion.import_hf import import_hf
    from megatron_exact.data.dataset import PackedDataset
    from megatron_exact.training import cpu_runtime
    from megatron_exact.training.records import read_lines
    from megatron_exact.training.run_record import LOSSES

    cpu_runtime.install()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = {"row_tokens": options.row_tokens, "rows": options.steps + 1, "seed": options.seed}
        pack = small_job.make_pack(folder, **rows)
        model = make_model(folder / "hf", options)
        parameters = sum(p.numel() for p in model.parameters())
        loops = {LOOP: TransformersLoop(model), ALONE: LoopOverDocuments(copy.deepcopy(model))}
        import_hf(folder / "hf", folder / "checkpoint")
        dataset = PackedDataset(pack, "train", num_samples=options.steps + 1, seed=options.seed)
        comparison = Comparison(options, loops, dataset)
        arguments = job_arguments(pack, folder / "checkpoint", folder / "run", options)
        small_job.run_job(arguments, comparison.step)
        losses = [line["loss"] for line in read_lines(folder / "run" / LOSSES)]
    difference = max(
        abs(ours / theirs - 1)
        for of_loop in comparison.losses.values()
        for ours, theirs in zip(losses, of_loop, strict=True)
    )
    work = statistics.median(comparison.operations[1:]) / 1e9
    measure.publish(
        "training_throughput",
        comparison.table(),
        title=f"A training step, {parameters / 1e6:.1f} million parameters, rows of {options.row_tokens:,}",
        notes=(
            f"float32, one thread; {options.steps} steps of one row of {min(comparison.segments[1:])} to "
            f"{max(comparison.segments[1:])} segments, {work:.0f} model GFLOP each (median). "
            f"Largest relative difference of the losses of project and loops: {difference:.1e}.",
        ),
        file=options.json,
    )


if __name__ == "__main__":
    run_tool(main)
