"""Throughput of a job: tokens and model FLOP/s a second, time spent waiting and saving, uneven work.

Attention of packed rows costs the sum of segment_tokens^2, not row_tokens^2. Megatron counts so too
(`num_floating_point_operations`: three times the forward pass, causal half, no recomputation), once
`update_seqlen_stats_from_cu_seqlens` gives it the boundaries, which its own driver leaves to the forward
step. `Throughput.count` calls it, so the FLOP that Megatron logs are right as well.

Times differ between runs that are otherwise equal, so they go into a file of their own, `throughput.jsonl`,
with one object for each log interval; `losses.jsonl` stays identical for the same run. Values are read from
the device only at the end of an interval, in one all-reduce of a few numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import megatron.training.training as driver
import torch
from megatron.training.global_vars import get_tensorboard_writer
from torch import Tensor

from megatron_exact.command_line import duration
from megatron_exact.training.records import RunRecords

PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
)
"""Part of a device's name and its dense half-precision peak by NVIDIA's data sheet; first match."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Throughput of the iterations since the last log."""

    iteration: int
    """The last iteration."""
    iterations: int
    """Number of iterations."""
    seconds: float
    """Elapsed time on the rank that reports, without evaluations and saves."""
    tokens_per_second: float
    """Inputs of all rows a second, padding included."""
    model_tflops: float
    """TFLOP/s of one rank: those of the model alone, with attention as the boundaries make it."""
    mfu: float | None
    """`model_tflops` as a share of the peak; None where no peak is known."""
    peak_tflops: float | None
    """The peak of the device, TFLOP/s."""
    data_wait_seconds: float
    """Time spent waiting for rows, on the rank that waited longest."""
    evaluation_seconds: float
    """Time spent in evaluations within the interval."""
    save_seconds: float
    """Time for which saves held up training, on the rank held up longest."""
    attention_imbalance: float
    """Largest over mean sum of segment_tokens^2 of the data-parallel ranks, mean over the iterations: with
    1.1 the slowest rank has a tenth more attention to compute than the mean."""

    def line(self) -> str:
        """Return the interval as a line for the log."""
        parts = [
            f"throughput in iteration {self.iteration}: {self.tokens_per_second:,.0f} tokens/s",
            f"{self.model_tflops:.3g} model TFLOP/s a rank",
            f"MFU {self.mfu:.1%} of {self.peak_tflops:g}" if self.mfu is not None else "",
            f"data wait {self.data_wait_seconds / self.iterations * 1e3:.1f} ms an iteration",
            f"attention of the busiest rank {self.attention_imbalance:.3f} x mean",
            f"evaluation {self.evaluation_seconds:.1f} s" if self.evaluation_seconds else "",
            f"saving {self.save_seconds:.1f} s" if self.save_seconds else "",
        ]
        return "; ".join(part for part in parts if part)


class Throughput:
    """Counts on every rank; the last rank reports.

    Args:
        args: Megatron's namespace, with our options.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.peak_tflops = peak_tflops(args)
        self._began: float | None = None
        self._aside = {"data": 0.0, "evaluation": 0.0, "save": 0.0}
        self._squares: Tensor | None = None
        self._squares_by_iteration: list[Tensor] = []
        self._mean_squares: list[float] = []
        self._tokens = self._operations = 0.0

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """Time an evaluation, a save, or waiting for data."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._aside[what] += time.perf_counter() - began

    def waiting(self, iterator: Iterator[Any] | None) -> Iterator[Any] | None:
        """Wrap an iterator so that the time for each item counts as waiting for data."""
        if self._began is None:
            self._began = time.perf_counter()
            self._aside = dict.fromkeys(self._aside, 0.0)  # time before the first step does not count
        return None if iterator is None else _Waiting(iterator, self)

    def count(self, cu_seqlens: Tensor, model: Any) -> None:
        """Add the boundaries of a training micro-batch, int32 [segments + 1], without a device sync."""
        if driver.get_attr_wrapped_model(model, "vp_stage") not in (None, 0):
            return  # virtual pipeline stages see the same micro-batch again
        driver.update_seqlen_stats_from_cu_seqlens(cu_seqlens)
        lengths = cu_seqlens.diff().double()
        squares = lengths.square().sum()
        self._squares = squares if self._squares is None else self._squares + squares

    def end_iteration(
        self, iteration: int, squares: float | None, tokens: float | None, records: RunRecords | None
    ) -> None:
        """Add an iteration and, at the end of a log interval, report it; called on every rank.

        Args:
            iteration: its number.
            squares: sum of segment_tokens^2 over the global batch, as Megatron has reduced it.
            tokens: inputs of the global batch, likewise.
            records: the run's records on the rank that writes them, else None.
        """
        args, local = self.args, self._squares
        self._squares = None
        if squares is not None and tokens is not None and local is not None:
            self._squares_by_iteration.append(local)
            self._mean_squares.append(squares / args.data_parallel_size)
            self._tokens += tokens
            self._operations += driver.num_floating_point_operations(
                args, args.global_batch_size, squares, tokens
            )
        if iteration % args.log_interval or not self._mean_squares:
            return
        interval = self._end_interval(iteration)
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            left = self._time_left(interval)
            print(f"megatron_exact: {interval.line()}{left}", flush=True)
            _draw(interval)
            if records is not None:
                records.throughput(asdict(interval))

    def _time_left(self, interval: Interval) -> str:
        """Return the time to the last iteration at the speed of an interval, and what it costs."""
        iterations = (self.args.train_iters or 0) - interval.iteration
        seconds = iterations * interval.seconds / interval.iterations
        if seconds <= 0:
            return ""
        hours = seconds * self.args.world_size / 3600
        cost = f", {hours:,.1f} GPU-hours" if torch.cuda.is_available() else ""
        return f"; about {duration(seconds)} left{cost} (without evaluations and saves)"

    def _end_interval(self, iteration: int) -> Interval:
        """Reduce the counts over the ranks and begin the next interval."""
        now, count = time.perf_counter(), len(self._mean_squares)
        assert self._began is not None
        busy = now - self._began - self._aside["evaluation"] - self._aside["save"]
        squares_here = torch.stack(self._squares_by_iteration)
        largest = torch.cat(
            [squares_here.new_tensor([self._aside["data"], self._aside["save"]]), squares_here]
        )
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        data, save, *squares = largest.tolist()
        imbalance = sum(most / mean for most, mean in zip(squares, self._mean_squares, strict=True)) / count
        tflops = self._operations / busy / self.args.world_size / 1e12
        interval = Interval(
            iteration=iteration,
            iterations=count,
            seconds=busy,
            tokens_per_second=self._tokens / busy,
            model_tflops=tflops,
            mfu=tflops / self.peak_tflops if self.peak_tflops else None,
            peak_tflops=self.peak_tflops,
            data_wait_seconds=data,
            evaluation_seconds=self._aside["evaluation"],
            save_seconds=save,
            attention_imbalance=imbalance,
        )
        self._began = now
        self._aside = dict.fromkeys(self._aside, 0.0)
        self._squares_by_iteration, self._mean_squares = [], []
        self._tokens = self._operations = 0.0
        return interval


class _Waiting:
    """An iterator whose items are timed."""

    def __init__(self, iterator: Iterator[Any], throughput: Throughput) -> None:
        self._iterator, self._throughput = iterator, throughput

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with self._throughput.aside("data"):
            return next(self._iterator)


def peak_tflops(args: Any) -> float | None:
    """Return `--peak-tflops`, else the device's half-precision peak; None where it is unknown."""
    if args.peak_tflops is not None:
        return float(args.peak_tflops)
    if not (args.bf16 or args.fp16):
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS if part in name), None)


def _draw(interval: Interval) -> None:
    """Draw an interval in TensorBoard, where the job writes there."""
    writer = get_tensorboard_writer()
    if writer is None:
        return
    for name, value in asdict(interval).items():
        if name not in ("iteration", "iterations", "peak_tflops") and value is not None:
            writer.add_scalar(f"throughput/{name}", value, interval.iteration)
