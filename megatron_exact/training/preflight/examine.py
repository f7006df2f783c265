"""A preflight: the arguments of a run, examined without a GPU, a process group or a model.

The same code reads the arguments as in a run (`job.prepare_job`), and Megatron validates them itself with
the world size given. A node of the cluster is taken to have Transformer Engine and Apex.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_exact.command_line import describe
from megatron_exact.model.megatron_flags import shape_of_megatron_arguments
from megatron_exact.model.shapes import ModelShape
from megatron_exact.training.job import Job, prepare_job
from megatron_exact.training.layout import Layout, layout_of_arguments
from megatron_exact.training.layout_faults import has_uneven_parts
from megatron_exact.training.preflight import checks
from megatron_exact.training.preflight.checks import Check
from megatron_exact.training.preflight.layouts import Cluster, propose_layout
from megatron_exact.training.preflight.memory import MemoryForecast, forecast_of_arguments
from megatron_exact.training.recipes.expansion import expand_recipe


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What a preflight found."""

    checks: list[Check]
    """In the order of the table."""
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
        argv: of `megatron_exact.training.pretrain`.
        cluster: where it is to run.

    Raises:
        ValueError: an unknown recipe or field.
    """
    found: list[Check] = []
    words = expand_recipe(argv)
    said = io.StringIO()
    with _as_rank_zero_of(cluster), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream's import says what this machine lacks
        try:
            with contextlib.redirect_stdout(said):
                job = prepare_job(words, choose_runtime=_cluster_runtime)
        except (ValueError, OSError) as error:
            found.append(Check(name="arguments", verdict="FAILED", detail=describe(error)))
            return Examination(checks=found, forecast=None, proposal=None)
        args, shape, refusal = _validate(job)
    if refusal is not None:
        found.append(Check(name="arguments", verdict="FAILED", detail=refusal))
    else:
        found.append(Check(name="arguments", verdict="ok", detail="Megatron and our checks accept them"))
    if args is None or shape is None:
        return Examination(checks=found, forecast=None, proposal=None)
    for line in _doubts(said.getvalue(), job):
        found.append(Check(name="model", verdict="note", detail=line))
    found += checks.check_resume(job.start, words)
    return _examine_sizes(found, job, args, shape, cluster)


def _examine_sizes(
    found: list[Check], job: Job, args: Any, shape: ModelShape, cluster: Cluster
) -> Examination:
    """The checks that count: layout, rows, memory, disk, time."""
    layout = layout_of_arguments(args)
    replicas = max(1, cluster.world_size // layout.model_parallel)
    batch_rows = args.global_batch_size or layout.micro_batch_rows * replicas
    iterations = args.train_iters or (args.train_samples or 0) // batch_rows
    sizes = {"batch_rows": batch_rows, "row_tokens": args.seq_length}

    def forecast_of(other: Layout) -> MemoryForecast:
        return forecast_of_arguments(args, job.options, shape, other)

    forecast = forecast_of(layout)
    found += checks.check_layout(layout, shape, cluster, **sizes, has_uneven_parts=has_uneven_parts(args))
    found += checks.check_memory(forecast, cluster)
    found += checks.check_data(job.manifest, batch_rows=batch_rows, iterations=iterations)
    found += checks.check_disk(args, job.options, forecast)
    tokens = iterations * batch_rows * args.seq_length
    found += checks.check_time(job, forecast, cluster, tokens=tokens)
    proposal = None
    if any(check.verdict == "FAILED" and check.name in ("layout", "memory") for check in found):
        proposal = propose_layout(forecast_of, cluster, context_parallel=layout.context_parallel, **sizes)
    return Examination(checks=found, forecast=forecast, proposal=proposal)


def _validate(job: Job) -> tuple[Any, ModelShape | None, str | None]:
    """Megatron's namespace and the model's shape as far as they can be had, and why it was refused."""
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
    """What `prepare_job` said beyond the start, which has a line of its own."""
    lines = [line.removeprefix("megatron_exact: ") for line in said.splitlines()]
    known = (job.start.message, job.model.description)
    return [line for line in lines if line and line not in known and not line.startswith("CPU runtime")]


def _cluster_runtime(options: argparse.Namespace) -> tuple[str, ...]:
    """Megatron's flags on a node of the cluster, whatever this machine has."""
    from megatron_exact.training import cpu_runtime

    cpu_runtime.install()  # answers what Megatron's validation asks about the card
    return cpu_runtime.CPU_ARGUMENTS if options.cpu else ()


@contextlib.contextmanager
def _as_rank_zero_of(cluster: Cluster) -> Iterator[None]:
    """The variables that torchrun would set."""
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
