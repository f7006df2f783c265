"""Forecast the memory of each pipeline stage by formula, and propose the fastest layout that fits a card.

Three things fill a card. **State**: weights, gradients and the optimizer's numbers, from the count of
parameters. **Activations**: what autograd keeps of each layer until its backward, for every micro-batch in
flight. **Working memory**: the larger of what the loss head needs while all activations are there, and of
what one layer needs while its backward runs.

The sums are compared with torch's CUDA allocator on a device without a GPU, within 3 %
(tests/cuda/test_rehearsal.py, and docs/rehearsal.md for every recipe), with the peaks of real jobs on the
CPU, within 15 % (tests/distributed/test_memory_forecast.py), and with Megatron's report
(tests/distributed/test_preflight.py; megatron/training/theoretical_memory_usage.py). With Transformer
Engine it was compared with the first ranks of llama3.1_8b_16k and qwen2.5_7b_16k, without the workspace of
cuDNN's attention.

In the formulas h = hidden size, f = feed-forward width, q = width of all query heads, k = width of all key
heads, T = tokens of a micro-batch on one GPU, a = bytes of an activation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_exact.model.shapes import ModelShape, Tiles
from megatron_exact.training.layout import (
    WIDTHS,
    Layout,
    Recompute,
    even_parts_fault,
    rank_faults,
    shared_keys_fault,
    tensor_faults,
)


@dataclass(frozen=True, kw_only=True)
class StageParameters:
    """Parameters of one GPU of one pipeline stage."""

    layers: int
    """Number of its transformer layers."""
    total: int
    """Number of its parameters."""
    table: int
    """Parameters of one table of the vocabulary: the input embedding or the output weight."""
    embedding: int
    """Parameters of the input embedding, 0 on later pipeline stages."""
    largest_matrix: int
    """Parameters of the largest weight of a layer."""


def layer_parameters(shape: ModelShape, tensor_parallel: int) -> int:
    """Return the parameters of one layer on one tensor-parallel GPU; each has whole norms."""
    h, f = shape.hidden_size, shape.ffn_hidden_size
    q, k = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    shared = h * (q + 2 * k) + q * h + 3 * h * f + (q + 2 * k if shape.qkv_bias else 0)
    return shared // tensor_parallel + norm_parameters(shape)


def norm_parameters(shape: ModelShape) -> int:
    """Return the parameters of the norms of one layer."""
    heads = shape.num_attention_heads + shape.num_query_groups if shape.post_norm else 2
    return 2 * shape.hidden_size + (heads * shape.head_dim if shape.qk_norm else 0)


def stage_parameters(shape: ModelShape, layout: Layout, pipeline_rank: int) -> StageParameters:
    """Return the parameters of a GPU of this pipeline stage, assuming that layers divide evenly."""
    layers = shape.num_layers // layout.pipeline_parallel
    is_first, is_last = pipeline_rank == 0, pipeline_rank == layout.pipeline_parallel - 1
    table = shape.vocab_size * shape.hidden_size // layout.tensor_parallel
    total = layers * layer_parameters(shape, layout.tensor_parallel)
    total += table if is_first else 0
    if is_last:
        total += shape.hidden_size  # the final norm
        # a tied output layer is the embedding itself where both lie on one GPU, else a copy of it
        total += 0 if shape.tied_embeddings and is_first else table
    return StageParameters(
        layers=layers,
        total=total,
        table=table,
        embedding=table if is_first else 0,
        largest_matrix=2 * shape.ffn_hidden_size * shape.hidden_size // layout.tensor_parallel,
    )


def model_parameters(shape: ModelShape) -> int:
    """Return the parameters of the whole model."""
    return stage_parameters(shape, Layout(distributed_optimizer=False), 0).total


GIB = 2**30
CUBLAS_WORKSPACE_BYTES, CUBLAS_WORKSPACES = 32 * 2**20, 2
"""Workspaces that torch requests on an H100, for the forward thread and for autograd's."""


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Bytes of the numbers, and which kernels save what."""

    weight_bytes: int = 2
    """Bytes of a weight and of an activation (bf16)."""
    gradient_bytes: int = 4
    """Bytes of an element of the gradient buffer."""
    optimizer_bytes: int = 12
    """Bytes of a parameter in the optimizer: float32 copy and two moments; 8 where weights are float32."""
    fused_norms: bool = True
    """Whether a norm is one operation, which keeps its input and output alone."""
    fused_swiglu: bool = True
    """Whether the gated activation is one operation, which keeps its input alone."""
    flash_attention: bool = True
    """Whether attention is one kernel over all segments; on a CPU it is one call a segment."""
    copies_values: bool = False
    """Whether attention copies its values out of the projection, which is freed (Transformer Engine)."""
    fused_weight_gradient: bool = True
    """Whether a weight's gradient is summed into the buffer without existing on its own."""
    eight_bit: bool = False
    """Whether the layers multiply in 8 bits (`--fp8-format`): a copy of each weight and of its transpose is
    kept for the micro-batches of a step, and inputs of the matrix products are kept in a byte each."""
    loss_head: str = "tiled"
    """`tiled` or `stock`."""
    tiles: Tiles = field(default_factory=Tiles)
    """Tiles of the tiled loss head."""
    fused_optimizer: bool = True
    """Whether the optimizer's step is one kernel; torch's Adam makes a float32 of each parameter in it."""
    library_bytes: int = 0
    """Bytes that cuBLAS allocates through torch for its workspaces."""


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on each GPU of one pipeline stage."""

    pipeline_rank: int
    """Number of the pipeline stage."""
    parameters: int
    """Number of parameters on it (a number, not bytes)."""
    weights: int
    """Bytes of the model's weights."""
    gradients: int
    """Bytes of the gradient buffer."""
    optimizer: int
    """Bytes of the optimizer's states, or of this GPU's share of them."""
    activations: int
    """Bytes of the activations of all micro-batches in flight."""
    working: int
    """Bytes of the loss head or of a layer's backward, and of the libraries' workspaces."""

    @property
    def total(self) -> int:
        """Sum of all parts, bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


@dataclass(frozen=True, kw_only=True)
class MemoryForecast:
    """What the formulas need to know about a job."""

    shape: ModelShape
    """The model."""
    layout: Layout
    """How the model is spread over the GPUs."""
    row_tokens: int
    """Number of tokens in a row."""
    data_parallel: int
    """Number of data-parallel ranks."""
    micro_batches: int
    """Micro-batches of a step on each data-parallel rank."""
    numerics: Numerics = field(default_factory=Numerics)
    """Bytes of the numbers, and which kernels save what."""
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """Modules of selective recomputation."""
    recompute_layers: int = 1
    """Layers between two kept inputs with full recomputation (`--recompute-num-layers`, uniform)."""

    @property
    def tokens(self) -> int:
        """T."""
        rows = self.layout.micro_batch_rows
        return math.ceil(self.row_tokens * rows / self.layout.context_parallel)

    def stages(self) -> list[StageMemory]:
        """Return the forecast of every pipeline stage, in order."""
        return [self._stage(rank) for rank in range(self.layout.pipeline_parallel)]

    def largest(self) -> StageMemory:
        """Return the pipeline stage that needs the most memory."""
        return max(self.stages(), key=lambda stage: stage.total)

    def _stage(self, rank: int) -> StageMemory:
        here = stage_parameters(self.shape, self.layout, rank)
        numerics = self.numerics
        # Megatron shares the states among the data- and the context-parallel ranks
        shards = self.data_parallel * self.layout.context_parallel
        shards = shards if self.layout.distributed_optimizer else 1
        kept, again = self._layer_bytes()
        layers = here.layers / self.layout.virtual_pipeline
        in_flight = self._chunks_in_flight(rank)
        if self.layout.recompute == "full":
            activations = in_flight * math.ceil(layers / self.recompute_layers) * self._input_bytes()
            again = min(self.recompute_layers, layers) * kept
        else:
            activations = in_flight * layers * (kept - again)
        is_last = rank == self.layout.pipeline_parallel - 1
        head = self._head_bytes() if is_last else 0
        # the tiled head adds to the gradient buffer itself, but autograd makes a tensor of the shape of an
        # output weight of its own; that of a tied one is summed with the embedding's
        is_tied = self.shape.tied_embeddings and rank == 0
        table = here.table * numerics.weight_bytes
        if is_last and not is_tied and numerics.loss_head == "tiled":
            head = max(head, table + self.tokens * self.shape.hidden_size * numerics.weight_bytes)
        embedding = here.embedding * numerics.weight_bytes * (2 if is_last and is_tied else 1)
        matrices = here.layers * (
            layer_parameters(self.shape, self.layout.tensor_parallel) - norm_parameters(self.shape)
        )
        return StageMemory(
            pipeline_rank=rank,
            parameters=here.total,
            weights=here.total * numerics.weight_bytes + (2 * matrices if numerics.eight_bit else 0),
            gradients=here.total * numerics.gradient_bytes,
            optimizer=math.ceil(here.total * numerics.optimizer_bytes / shards),
            activations=round(activations),
            # the embedding's gradient comes last, when the activations are gone
            working=numerics.library_bytes
            + round(
                max(
                    head,
                    again + self._backward_bytes(here),
                    embedding - activations,
                    0 if numerics.fused_optimizer else 4 * here.total / shards - activations,
                )
            ),
        )

    def _chunks_in_flight(self, rank: int) -> int:
        """Return how many groups of layers have activations at once (1F1B, and its interleaved form)."""
        stages, groups = self.layout.pipeline_parallel, self.layout.virtual_pipeline
        if groups == 1:
            return min(self.micro_batches, stages - rank)
        warm_up = (stages - rank - 1) * 2 + (groups - 1) * stages + 1
        return min(self.micro_batches * groups, warm_up)

    def _input_bytes(self) -> float:
        """Return the bytes of a layer's input."""
        sharing = self.layout.tensor_parallel if self.layout.sequence_parallel else 1
        return self.tokens * self.shape.hidden_size * self.numerics.weight_bytes / sharing

    def _layer_bytes(self) -> tuple[float, float]:
        """Return what autograd keeps of a layer, and the part that selective recomputation drops, bytes."""
        shape, numerics, tensor = self.shape, self.numerics, self.layout.tensor_parallel
        a = numerics.weight_bytes
        h = shape.hidden_size / (tensor if self.layout.sequence_parallel else 1)
        f = shape.ffn_hidden_size / tensor
        q = shape.num_attention_heads * shape.head_dim / tensor
        k = shape.num_query_groups * shape.head_dim / tensor
        # two norms: the input (in float32 by ours), what lies between, the output that the matrix reads
        norms = 2 * (2 * a * h if numerics.fused_norms else (4 + 2 * a) * h)
        # the projection, which the values are a view of; rotated queries and keys
        is_theirs = numerics.copies_values and self.layout.context_parallel == 1  # else attention is ours
        projections = a * (q + 2 * k if is_theirs else 2 * q + 3 * k)
        if shape.qk_norm:
            # queries in an order of their own; by ours both in float32, and again before the weight
            projections += a * q if numerics.fused_norms else (4 + a) * (q + k)
            projections += (
                4 * (shape.num_attention_heads + shape.num_query_groups) / tensor
            )  # a float32 each
        # a layer without RoPE keeps its keys as a view of the projection
        projections -= a * k * len(shape.layers_without_rope) / shape.num_layers
        if numerics.flash_attention:
            attention = a * q + 4 * shape.num_attention_heads / tensor
        else:  # an output for each segment, and all of them together
            attention = 2 * a * q
        if self.layout.context_parallel > 1:  # keys and values of the whole row
            attention += 2 * a * k * (self.layout.context_parallel - 1)
        mlp = a * (3 * f if numerics.fused_swiglu else 4 * f)
        if numerics.eight_bit:  # a byte for what the matrices read; attention keeps its own result, too
            norms -= 2 * (a - 1) * h
            attention += q
            mlp -= (a - 1) * f
        again = 0.0
        if self.layout.recompute == "selective":
            parts = {"core_attn": attention - a * q, "layernorm": 2 * a * h, "mlp_act": a * f, "mlp": mlp}
            again = sum(parts.get(name, 0.0) for name in self.recompute_modules)
        return self.tokens * (norms + projections + attention + mlp), self.tokens * again

    def _backward_bytes(self, here: StageParameters) -> float:
        """Return the bytes of gradients in a layer's backward at its peak, in the MLP's first matrix."""
        a, tensor = self.numerics.weight_bytes, self.layout.tensor_parallel
        values = 2 * self.shape.ffn_hidden_size / tensor + 3 * self.shape.hidden_size
        weight = 0 if self.numerics.fused_weight_gradient else a * here.largest_matrix
        return self.tokens * a * values + weight

    def _head_bytes(self) -> float:
        """Return the bytes of final norm, loss head and hidden gradient at their peak in backward."""
        shape, numerics, tensor = self.shape, self.numerics, self.layout.tensor_parallel
        a, tokens, h = numerics.weight_bytes, self.tokens, shape.hidden_size
        is_half = a < 4
        sharing = tensor if self.layout.sequence_parallel else 1
        hidden = tokens * h / sharing * (2 * a if numerics.fused_norms else 4 + 2 * a)
        if self.layout.sequence_parallel:  # gathered, to be multiplied
            hidden += tokens * h * a
        columns = math.ceil(shape.vocab_size / tensor)
        if numerics.loss_head == "stock":  # logits, and a copy of them in float32
            return hidden + tokens * columns * (4 + (a if is_half else 0))
        tile_tokens, tile_columns = min(numerics.tiles.tokens, tokens), min(numerics.tiles.columns, columns)
        tile = tile_tokens * tile_columns * (4 + (a if is_half else 0))
        # a block of the weight's gradient in float32, and products that are added to it or to the hidden
        # states' gradient, which is float32, too
        block = (4 + a) * tile_columns * h + a * tile_tokens * h if is_half else 0
        return hidden + tile + block + 4 * tokens * h


def forecast_of_arguments(args: Any, options: Any, shape: ModelShape, layout: Layout) -> MemoryForecast:
    """Return the forecast for Megatron's namespace.

    Args:
        args: Megatron's namespace, validated or not.
        options: our own options (loss head and --cpu are read).
        shape: the model.
        layout: the one to examine, which need not be the namespace's.
    """
    half = args.bf16 or args.fp16
    fused = args.transformer_impl == "transformer_engine"
    data_parallel = max(1, args.world_size // layout.model_parallel)
    batch = args.global_batch_size or layout.micro_batch_rows * data_parallel
    return MemoryForecast(
        shape=shape,
        layout=layout,
        row_tokens=args.seq_length,
        data_parallel=data_parallel,
        micro_batches=max(1, batch // (layout.micro_batch_rows * data_parallel)),
        recompute_modules=tuple(args.recompute_modules or ("core_attn",)),
        recompute_layers=args.recompute_num_layers or 1,
        numerics=Numerics(
            weight_bytes=2 if half else 4,
            gradient_bytes=2 if args.grad_reduce_in_bf16 else 4,
            optimizer_bytes=12 if half else 8,
            fused_norms=fused or options.cpu,
            fused_swiglu=args.bias_swiglu_fusion,
            flash_attention=not options.cpu,
            copies_values=fused,
            eight_bit=args.fp8 is not None,
            fused_weight_gradient=args.gradient_accumulation_fusion,
            loss_head=options.loss_head,
            tiles=Tiles(tokens=options.loss_head_tokens, columns=options.loss_head_columns),
            fused_optimizer=fused or options.cpu or args.optimizer != "adam",
            # Transformer Engine has one of its own beside torch's
            library_bytes=0 if options.cpu else (CUBLAS_WORKSPACES + fused) * CUBLAS_WORKSPACE_BYTES,
        ),
    )


TENSOR_COST = 0.05
"""Assumed slow-down of each doubling of tensor parallelism, by its communication; only to order layouts."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines on which a job is to run."""

    world_size: int
    """Number of GPUs in all."""
    gpus_per_node: int = 8
    """Number of GPUs of one machine."""
    gpu_memory_gib: float = 80.0
    """Memory of one card, GiB."""
    reserve_gib: float = 6.0
    """Reserve for CUDA, NCCL and fragmentation, GiB."""
    peak_tflops: float = 989.0
    """Peak of one card in the run's precision; the default is an H100 SXM with bf16."""
    assumed_mfu: float = 0.4
    """Share of the peak that the model's own operations are assumed to reach."""

    @property
    def usable_bytes(self) -> int:
        """Bytes of a card that a job may fill."""
        return int((self.gpu_memory_gib - self.reserve_gib) * GIB)


def layout_faults(
    layout: Layout,
    shape: ModelShape,
    cluster: Cluster,
    *,
    batch_rows: int,
    row_tokens: int,
    has_uneven_parts: bool = False,
) -> list[str]:
    """Return what does not divide, or an empty list.

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
    keys = shared_keys_fault(layout.tensor_parallel, shape.num_query_groups, post_norm=shape.post_norm)
    if keys is not None:
        faults.append(keys)
    if layout.context_parallel > 1 and row_tokens % (2 * layout.context_parallel):
        faults.append(f"rows of {row_tokens} do not divide by 2 x CP {layout.context_parallel}")
    return faults


def relative_cost(layout: Layout, micro_batches: int) -> float:
    """Return the time of a step relative to one without recomputation, communication and bubble.

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
    """Return the forecast of the cheapest layout that fits, or None.

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
