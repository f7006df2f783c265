"""Preflight: examine the arguments of a run without a GPU, a process group or a model.

The arguments are read by the same code as in a run (`job.prepare_job`), and Megatron itself validates them
with the given world size. A node of the cluster is assumed to have Transformer Engine and Apex.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_exact.command_line import describe
from megatron_exact.data.manifest import Manifest
from megatron_exact.files import free_bytes
from megatron_exact.model.families import shape_of_megatron_arguments
from megatron_exact.model.shapes import ModelShape
from megatron_exact.training.checkpoint_start import Start, is_own_folder
from megatron_exact.training.job import Job, expand_recipe, prepare_job
from megatron_exact.training.job_flags import flag_value
from megatron_exact.training.layout import Layout, has_uneven_parts, layout_of_arguments
from megatron_exact.training.memory_forecast import (
    GIB,
    Cluster,
    MemoryForecast,
    forecast_of_arguments,
    layer_parameters,
    layout_faults,
    model_parameters,
    norm_parameters,
    propose_layout,
)


def mean_square_segment(pack: str | Path) -> float:
    """Return the mean over the train split's tokens of the length of their segment.

    Attention over a segment of s tokens costs s^2 / 2 products, so a token costs half of this on average.
    """
    lengths = np.load(Path(pack) / "train" / "segment_tokens.npy", mmap_mode="r").astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


def flops_per_token(shape: ModelShape, segment_tokens: float) -> float:
    """Return the FLOPs that a trained token needs, forward and backward, without recomputation.

    Two for each parameter of a matrix, and twice that for its two gradients. The input embedding is a
    look-up, the output layer a matrix product. Attention counts as masked: causal, within its document.

    Args:
        shape: the model.
        segment_tokens: from `mean_square_segment`.
    """
    matrices = shape.num_layers * (layer_parameters(shape, 1) - norm_parameters(shape))
    matrices += shape.vocab_size * shape.hidden_size
    width = shape.num_attention_heads * shape.head_dim
    attention = shape.num_layers * 2 * 2 * width * segment_tokens / 2
    return 3 * (2 * matrices + attention)


def checkpoint_bytes(shape: ModelShape, *, weight_bytes: int, optimizer_bytes: int) -> int:
    """Return the size of one checkpoint, which has every parameter once on any layout.

    Args:
        shape: the model.
        weight_bytes: bytes of a parameter.
        optimizer_bytes: bytes of its optimizer states, 0 if they are not saved.
    """
    return model_parameters(shape) * (weight_bytes + optimizer_bytes)


Verdict = Literal["ok", "note", "FAILED"]


@dataclass(frozen=True, kw_only=True)
class PreflightCheck:
    """One line of the preflight's table."""

    name: str
    """What was checked."""
    verdict: Verdict
    """`FAILED`: the run could not start, or not end well; `note`: worth a thought."""
    detail: str
    """The finding, with the remedy for a failure."""


def check_layout(
    layout: Layout,
    shape: ModelShape,
    cluster: Cluster,
    *,
    batch_rows: int,
    row_tokens: int,
    has_uneven_parts: bool = False,
) -> Iterator[PreflightCheck]:
    """Check world size and shapes against the layout."""
    faults = layout_faults(
        layout,
        shape,
        cluster,
        batch_rows=batch_rows,
        row_tokens=row_tokens,
        has_uneven_parts=has_uneven_parts,
    )
    for fault in faults:
        yield PreflightCheck(name="layout", verdict="FAILED", detail=fault)
    if not faults:
        replicas = cluster.world_size // layout.model_parallel
        steps = batch_rows // (replicas * layout.micro_batch_rows)
        detail = f"{layout.describe()}; DP{replicas}, {steps} micro-batches a step"
        yield PreflightCheck(name="layout", verdict="ok", detail=detail)
    if has_uneven_parts:
        detail = "the pipeline's parts are not alike: the memory below is that of equal ones"
        yield PreflightCheck(name="layout", verdict="note", detail=detail)
    if layout.tensor_parallel * layout.context_parallel > cluster.gpus_per_node:
        detail = (
            f"TP x CP = {layout.tensor_parallel * layout.context_parallel} reaches beyond a node of "
            f"{cluster.gpus_per_node} GPUs: expect the network to slow every layer"
        )
        yield PreflightCheck(name="layout", verdict="note", detail=detail)


def check_data(manifest: Manifest, *, batch_rows: int, iterations: int) -> Iterator[PreflightCheck]:
    """Compare the pack with what the run will read."""
    rows = manifest.splits["train"].rows
    wanted = iterations * batch_rows
    tokens = wanted * manifest.row_tokens
    detail = (
        f"{rows:,} rows of {manifest.row_tokens:,}, fingerprint {manifest.fingerprint[:16]}; the run reads "
        f"{wanted:,} rows, {tokens:,} tokens in {iterations:,} iterations"
    )
    yield PreflightCheck(name="pack", verdict="ok", detail=detail)
    if rows and wanted > rows:
        detail = f"{wanted / rows:.2f} epochs: rows are repeated, in another order each time"
        yield PreflightCheck(name="pack", verdict="note", detail=detail)


def check_resume(start: Start, words: Sequence[str]) -> Iterator[PreflightCheck]:
    """Check whether the same command, started again, will resume where it stopped.

    Args:
        start: the decision about `--load`.
        words: the run's flags.
    """
    is_random = start.checkpoint is None
    detail = f"{start.message}{', from random weights' if is_random else ''}"
    yield PreflightCheck(name="start", verdict="note" if is_random else "ok", detail=detail)
    load, save = flag_value(words, "--load"), flag_value(words, "--save")
    if save is None:
        yield PreflightCheck(name="resume", verdict="note", detail="no --save: nothing will be kept")
        return
    if start.is_resume:
        detail = f"resumes from {start.checkpoint}; its hashes are compared when it is loaded"
        yield PreflightCheck(name="resume", verdict="ok", detail=detail)
    elif is_own_folder(load, save):
        detail = f"{save} contains no checkpoint yet; later the same command will resume there"
        yield PreflightCheck(name="resume", verdict="ok", detail=detail)
    else:
        detail = f"--load is not --save: started again, the command would fail; add --load {save}"
        yield PreflightCheck(name="resume", verdict="note", detail=detail)


def check_disk(args: Any, options: Any, forecast: MemoryForecast) -> Iterator[PreflightCheck]:
    """Check the free space for the checkpoints of the whole run."""
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
    yield PreflightCheck(name="disk", verdict="FAILED" if needed > free else "ok", detail=detail)


def check_memory(forecast: MemoryForecast, cluster: Cluster) -> Iterator[PreflightCheck]:
    """Compare the pipeline stage that needs most with the card."""
    largest = forecast.largest()
    fits = largest.total <= cluster.usable_bytes
    detail = (
        f"{largest.total / GIB:.1f} GiB a GPU at most, {cluster.gpu_memory_gib:g} GiB less "
        f"{cluster.reserve_gib:g} GiB in reserve there"
    )
    yield PreflightCheck(name="memory", verdict="ok" if fits else "FAILED", detail=detail)


def check_time(
    job: Job, forecast: MemoryForecast, cluster: Cluster, *, tokens: int
) -> Iterator[PreflightCheck]:
    """Estimate the hours at a stated share of the peak."""
    flops = flops_per_token(forecast.shape, mean_square_segment(job.options.pack)) * tokens
    peak, share = cluster.peak_tflops, cluster.assumed_mfu
    seconds = flops / (cluster.world_size * peak * 1e12 * share)
    detail = (
        f"{seconds / 3600:.2f} hours for {tokens:,} tokens at {share:.0%} of {peak:g} TFLOP/s a GPU "
        f"({flops:.3g} model FLOPs; loading, saving and evaluating not counted)"
    )
    yield PreflightCheck(name="time", verdict="ok", detail=detail)


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The findings of a preflight."""

    checks: list[PreflightCheck]
    """All checks, in the order of the table."""
    forecast: MemoryForecast | None
    """Memory of the layout asked for; None where the arguments could not be read that far."""
    proposal: MemoryForecast | None
    """Memory of a layout that fits, where the one asked for does not."""

    @property
    def passed(self) -> bool:
        """Whether the run could start and would fit."""
        return all(check.verdict != "FAILED" for check in self.checks)


def examine(argv: Sequence[str], cluster: Cluster) -> Examination:
    """Examine the arguments of a run.

    Args:
        argv: arguments of `megatron_exact.training.pretrain`.
        cluster: the machines of the run.

    Raises:
        ValueError: an unknown recipe or field.
    """
    found: list[PreflightCheck] = []
    words = expand_recipe(argv)
    said = io.StringIO()
    with _as_rank_zero_of(cluster), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's import says what this machine lacks
        try:
            with contextlib.redirect_stdout(said):
                job = prepare_job(words, choose_runtime=_cluster_runtime)
        except (ValueError, OSError) as error:
            found.append(PreflightCheck(name="arguments", verdict="FAILED", detail=describe(error)))
            return Examination(checks=found, forecast=None, proposal=None)
        args, shape, refusal = _validate(job)
    if refusal is not None:
        found.append(PreflightCheck(name="arguments", verdict="FAILED", detail=refusal))
    else:
        found.append(
            PreflightCheck(name="arguments", verdict="ok", detail="Megatron and our checks accept them")
        )
    if args is None or shape is None:
        return Examination(checks=found, forecast=None, proposal=None)
    for line in _doubts(said.getvalue(), job):
        found.append(PreflightCheck(name="model", verdict="note", detail=line))
    found += check_resume(job.start, words)
    return _examine_sizes(found, job, args, shape, cluster)


def _examine_sizes(
    found: list[PreflightCheck], job: Job, args: Any, shape: ModelShape, cluster: Cluster
) -> Examination:
    """Check the sizes: layout, rows, memory, disk, time."""
    layout = layout_of_arguments(args)
    replicas = max(1, cluster.world_size // layout.model_parallel)
    batch_rows = args.global_batch_size or layout.micro_batch_rows * replicas
    iterations = args.train_iters or (args.train_samples or 0) // batch_rows
    sizes = {"batch_rows": batch_rows, "row_tokens": args.seq_length}

    def forecast_of(other: Layout) -> MemoryForecast:
        return forecast_of_arguments(args, job.options, shape, other)

    forecast = forecast_of(layout)
    found += check_layout(layout, shape, cluster, **sizes, has_uneven_parts=has_uneven_parts(args))
    found += check_memory(forecast, cluster)
    found += check_data(job.manifest, batch_rows=batch_rows, iterations=iterations)
    found += check_disk(args, job.options, forecast)
    tokens = iterations * batch_rows * args.seq_length
    found += check_time(job, forecast, cluster, tokens=tokens)
    proposal = None
    if any(check.verdict == "FAILED" and check.name in ("layout", "memory") for check in found):
        proposal = propose_layout(forecast_of, cluster, context_parallel=layout.context_parallel, **sizes)
    return Examination(checks=found, forecast=forecast, proposal=proposal)


def _validate(job: Job) -> tuple[Any, ModelShape | None, str | None]:
    """Return Megatron's namespace and the model's shape, None if not readable, and the first error."""
    from megatron_exact.training.megatron_parse import parse_flags, validate_flags

    refusal = None
    args = shape = None
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            args = parse_flags(job.argv)
            validate_flags(job, args)
        except (ValueError, AssertionError, RuntimeError) as error:
            refusal = describe(error)
    if args is not None:
        if args.kv_channels is None and args.num_attention_heads:  # validation ended before its default
            args.kv_channels = (args.hidden_size or 0) // args.num_attention_heads
        try:
            shape = job.model.shape or shape_of_megatron_arguments(args)
        except (ValueError, TypeError) as error:
            refusal = refusal or describe(error)
    return args, shape, refusal


def _doubts(said: str, job: Job) -> list[str]:
    """Return what `prepare_job` logged besides the start, which has its own line."""
    lines = [line.removeprefix("megatron_exact: ") for line in said.splitlines()]
    known = (job.start.message, job.model.description)
    return [line for line in lines if line and line not in known and not line.startswith("CPU runtime")]


def _cluster_runtime(options: argparse.Namespace) -> tuple[str, ...]:
    """Return Megatron's flags for a node of the cluster, whatever this machine has."""
    from megatron_exact.training import cpu_runtime

    cpu_runtime.install()  # answers what Megatron's validation asks about the card
    return cpu_runtime.CPU_ARGUMENTS if options.cpu else ()


@contextlib.contextmanager
def _as_rank_zero_of(cluster: Cluster) -> Iterator[None]:
    """Set the variables that torchrun would set."""
    wanted = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(cluster.world_size),
        "LOCAL_WORLD_SIZE": str(min(cluster.world_size, cluster.gpus_per_node)),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


PARTS = ("weights", "gradients", "optimizer", "activations", "working", "total")


def format_examination(found: Examination) -> str:
    """Return the report: checks, memory by pipeline stage, a layout that fits if needed, verdict."""
    lines = [f"{check.verdict:<8}{check.name:<11}{check.detail}" for check in found.checks]
    if found.forecast is not None:
        lines += ["", *memory_table(found.forecast)]
    if found.proposal is not None:
        lines += ["", "a layout that fits:", "", *memory_table(found.proposal), ""]
        lines += [f"    {flag} {value or ''}".rstrip() for flag, value in found.proposal.layout.flags()]
    elif any(check.verdict == "FAILED" and check.name in ("memory", "layout") for check in found.checks):
        lines += ["", "no layout of these GPUs fits: take more GPUs, shorter rows or a smaller batch"]
    failures = sum(check.verdict == "FAILED" for check in found.checks)
    failed = f"{failures} check{'s' if failures > 1 else ''} failed"
    verdict = "the run can start and fits" if found.passed else failed
    return "\n".join([*lines, "", verdict])


def memory_table(forecast: MemoryForecast) -> list[str]:
    """Return a line for each pipeline stage, in GiB a GPU."""
    head = f"GiB a GPU, {forecast.layout.describe()}"
    lines = [head, f"{'pipeline stage':<16}{'parameters':>16}" + "".join(f"{part:>13}" for part in PARTS)]
    for stage in forecast.stages():
        numbers = "".join(f"{getattr(stage, part) / GIB:>13.2f}" for part in PARTS)
        lines.append(f"{stage.pipeline_rank:<16}{stage.parameters:>16,}{numbers}")
    return lines
