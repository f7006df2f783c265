"""What a preflight looks at, a line each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_exact.data.manifest import Manifest
from megatron_exact.model.shapes import ModelShape
from megatron_exact.training.arguments import flag_value
from megatron_exact.training.checkpoints.start import Start, is_own_folder
from megatron_exact.training.job import Job
from megatron_exact.training.layout import Layout
from megatron_exact.training.preflight.cost import (
    checkpoint_bytes,
    flops_per_token,
    free_bytes,
    mean_square_segment,
)
from megatron_exact.training.preflight.layouts import Cluster, layout_faults
from megatron_exact.training.preflight.memory import GIB, MemoryForecast

Verdict = Literal["ok", "note", "FAILED"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table."""

    name: str
    """What was looked at."""
    verdict: Verdict
    """`FAILED`: the run could not start, or not end well; `note`: worth a thought."""
    detail: str
    """What was found; for a failure with the remedy."""


def check_layout(
    layout: Layout,
    shape: ModelShape,
    cluster: Cluster,
    *,
    batch_rows: int,
    row_tokens: int,
    has_uneven_parts: bool = False,
) -> Iterator[Check]:
    """World size and shapes against the sizes of the layout."""
    faults = layout_faults(
        layout,
        shape,
        cluster,
        batch_rows=batch_rows,
        row_tokens=row_tokens,
        has_uneven_parts=has_uneven_parts,
    )
    for fault in faults:
        yield Check(name="layout", verdict="FAILED", detail=fault)
    if not faults:
        replicas = cluster.world_size // layout.model_parallel
        steps = batch_rows // (replicas * layout.micro_batch_rows)
        detail = f"{layout.describe()}; DP{replicas}, {steps} micro-batches a step"
        yield Check(name="layout", verdict="ok", detail=detail)
    if has_uneven_parts:
        detail = "the pipeline's parts are not alike: the memory below is that of equal ones"
        yield Check(name="layout", verdict="note", detail=detail)
    if layout.tensor_parallel * layout.context_parallel > cluster.gpus_per_node:
        detail = (
            f"TP x CP = {layout.tensor_parallel * layout.context_parallel} reaches beyond a node of "
            f"{cluster.gpus_per_node} GPUs: expect the network to slow every layer"
        )
        yield Check(name="layout", verdict="note", detail=detail)


def check_data(manifest: Manifest, *, batch_rows: int, iterations: int) -> Iterator[Check]:
    """The pack against what the run will read."""
    rows = manifest.splits["train"].rows
    wanted = iterations * batch_rows
    tokens = wanted * manifest.row_tokens
    detail = (
        f"{rows:,} rows of {manifest.row_tokens:,}, fingerprint {manifest.fingerprint[:16]}; the run reads "
        f"{wanted:,} rows, {tokens:,} tokens in {iterations:,} iterations"
    )
    yield Check(name="pack", verdict="ok", detail=detail)
    if rows and wanted > rows:
        detail = f"{wanted / rows:.2f} epochs: rows are repeated, in another order each time"
        yield Check(name="pack", verdict="note", detail=detail)


def check_resume(start: Start, words: Sequence[str]) -> Iterator[Check]:
    """Whether the same command, started again, will go on where it stopped.

    Args:
        start: the decision about `--load`.
        words: the run's flags.
    """
    is_random = start.checkpoint is None
    detail = f"{start.message}{', from random weights' if is_random else ''}"
    yield Check(name="start", verdict="note" if is_random else "ok", detail=detail)
    load, save = flag_value(words, "--load"), flag_value(words, "--save")
    if save is None:
        yield Check(name="resume", verdict="note", detail="no --save: nothing will be kept")
        return
    if start.is_resume:
        detail = f"goes on from {start.checkpoint}; its hashes are compared when it is loaded"
        yield Check(name="resume", verdict="ok", detail=detail)
    elif is_own_folder(load, save):
        detail = f"{save} holds no checkpoint yet; the same command will go on from there"
        yield Check(name="resume", verdict="ok", detail=detail)
    else:
        detail = f"--load is not --save: started again, the command would refuse; add --load {save}"
        yield Check(name="resume", verdict="note", detail=detail)


def check_disk(args: Any, options: Any, forecast: MemoryForecast) -> Iterator[Check]:
    """Room for the checkpoints of the whole run."""
    if args.save is None:
        return
    one = checkpoint_bytes(
        forecast.shape,
        weight_bytes=forecast.numerics.weight_bytes,
        optimizer_bytes=0 if args.no_save_optim else forecast.numerics.optimizer_bytes,
    )
    there = 0
    if Path(args.save).is_dir():
        there = sum(1 for path in Path(args.save).glob("iter_*") if path.is_dir())
    saved = math.ceil((args.train_iters or 0) / (args.save_interval or args.train_iters or 1))
    kept = saved
    if options.keep_last is not None:
        kept = min(saved, options.keep_last + 1)  # the next one is whole before the oldest goes
    needed, free = max(0, kept - there) * one, free_bytes(args.save)
    detail = f"{kept} checkpoints of {one / GIB:.2f} GiB, {there} there; {free / GIB:.1f} GiB free"
    if needed > free:
        detail += f", {needed / GIB:.1f} needed: raise --save-interval, add --keep-last, or save elsewhere"
    yield Check(name="disk", verdict="FAILED" if needed > free else "ok", detail=detail)


def check_memory(forecast: MemoryForecast, cluster: Cluster) -> Iterator[Check]:
    """The pipeline stage that needs most against the card."""
    largest = forecast.largest()
    fits = largest.total <= cluster.usable_bytes
    detail = (
        f"{largest.total / GIB:.1f} GiB a GPU at most, {cluster.gpu_memory_gib:g} GiB less "
        f"{cluster.reserve_gib:g} GiB in reserve there"
    )
    yield Check(name="memory", verdict="ok" if fits else "FAILED", detail=detail)


def check_time(job: Job, forecast: MemoryForecast, cluster: Cluster, *, tokens: int) -> Iterator[Check]:
    """Expected hours at a stated share of the peak."""
    flops = flops_per_token(forecast.shape, mean_square_segment(job.options.pack)) * tokens
    peak, share = cluster.peak_tflops, cluster.assumed_mfu
    seconds = flops / (cluster.world_size * peak * 1e12 * share)
    detail = (
        f"{seconds / 3600:.2f} hours for {tokens:,} tokens at {share:.0%} of {peak:g} TFLOP/s a GPU "
        f"({flops:.3g} model FLOPs; loading, saving and evaluating not counted)"
    )
    yield Check(name="time", verdict="ok", detail=detail)
