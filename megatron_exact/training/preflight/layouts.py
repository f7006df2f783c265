"""Which layouts a model, a batch and a machine allow, and the fastest of them that fits a card."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_exact.model.shapes import ModelShape
from megatron_exact.training.layout import Layout, Recompute
from megatron_exact.training.layout_faults import WIDTHS, even_parts_fault, rank_faults, tensor_faults
from megatron_exact.training.preflight.memory import MemoryForecast

TENSOR_COST = 0.05
"""Assumed slow-down of each doubling of tensor parallelism, by its communication; only to order layouts."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where a job is to run."""

    world_size: int
    """GPUs in all."""
    gpus_per_node: int = 8
    """GPUs of one machine."""
    gpu_memory_gib: float = 80.0
    """Of one card, GiB."""
    reserve_gib: float = 6.0
    """What is left for CUDA, NCCL and fragmentation, GiB."""
    peak_tflops: float = 989.0
    """Of one card in the run's precision; H100 SXM, bf16."""
    assumed_mfu: float = 0.4
    """Share of the peak that the model's own operations are assumed to reach."""

    @property
    def usable_bytes(self) -> int:
        """What a job may fill of a card."""
        return int((self.gpu_memory_gib - self.reserve_gib) * 2**30)


def layout_faults(
    layout: Layout,
    shape: ModelShape,
    cluster: Cluster,
    *,
    batch_rows: int,
    row_tokens: int,
    has_uneven_parts: bool = False,
) -> list[str]:
    """What does not divide; empty if everything does.

    Args:
        layout: the layout.
        shape: the model.
        cluster: where it is to run.
        batch_rows: rows of a step.
        row_tokens: tokens of a row.
        has_uneven_parts: whether flags say how many layers each pipeline stage has.
    """
    faults = [
        *rank_faults(layout, world_size=cluster.world_size, batch_rows=batch_rows, row_tokens=row_tokens),
        *tensor_faults(layout.tensor_parallel, {name: getattr(shape, name) for name in WIDTHS}),
    ]
    parts = even_parts_fault(shape.num_layers, layout.pipeline_parallel, layout.virtual_pipeline)
    if parts is not None and not has_uneven_parts:
        faults.append(parts)
    if layout.context_parallel > 1 and row_tokens % (2 * layout.context_parallel):
        faults.append(f"rows of {row_tokens} do not divide by 2 x CP {layout.context_parallel}")
    return faults


def relative_cost(layout: Layout, micro_batches: int) -> float:
    """Time of a step against a layout without recomputation, communication and pipeline bubble.

    The bubble is (p - 1) / (v m) (Narayanan et al. 2021, arXiv 2104.04473, section 2.2); recomputing a
    layer adds a forward to a forward and a backward of twice its size.
    """
    recompute = {"none": 1.0, "selective": 1.05, "full": 4 / 3}[layout.recompute]
    bubble = (layout.pipeline_parallel - 1) / (layout.virtual_pipeline * micro_batches)
    return recompute * (1 + TENSOR_COST * math.log2(layout.tensor_parallel)) * (1 + bubble)


def propose_layout(
    forecast: Callable[[Layout], MemoryForecast],
    cluster: Cluster,
    *,
    batch_rows: int,
    row_tokens: int,
    context_parallel: int = 1,
) -> MemoryForecast | None:
    """The cheapest layout that fits, None if there is none.

    Args:
        forecast: the forecast of the job at hand for another layout.
        cluster: where it is to run.
        batch_rows: rows of a step.
        row_tokens: tokens of a row.
        context_parallel: kept as it is.
    """
    shape = forecast(Layout()).shape
    best: tuple[float, MemoryForecast] | None = None
    for layout in _candidates(shape, cluster, context_parallel):
        if layout_faults(layout, shape, cluster, batch_rows=batch_rows, row_tokens=row_tokens):
            continue
        found = forecast(layout)
        if found.largest().total > cluster.usable_bytes:
            continue
        cost = relative_cost(layout, found.micro_batches)
        if best is None or cost < best[0]:
            best = (cost, found)
    return best[1] if best is not None else None


def _candidates(shape: ModelShape, cluster: Cluster, context_parallel: int) -> Iterator[Layout]:
    recomputes: tuple[Recompute, ...] = ("none", "full")
    tensors = [size for size in range(1, cluster.gpus_per_node + 1) if cluster.gpus_per_node % size == 0]
    pipelines = range(1, min(shape.num_layers, cluster.world_size) + 1)
    for recompute, tensor, pipeline in itertools.product(recomputes, tensors, pipelines):
        replicas, rest = divmod(cluster.world_size, tensor * pipeline * context_parallel)
        if replicas and not rest:
            yield Layout(
                tensor_parallel=tensor,
                pipeline_parallel=pipeline,
                context_parallel=context_parallel,
                sequence_parallel=tensor > 1,
                recompute=recompute,
                distributed_optimizer=replicas > 1,
            )
