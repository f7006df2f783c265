"""The parallel layout of a job: its sizes as a recipe states them, and the sizes that do not divide.

`refuse_layout` runs before Megatron validates anything. Megatron rejects the same layouts, but with one
assertion at a time, some without a number, and some only when the model is built or the first step runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel groups, and the options that save memory.

    Raises:
        ValueError: a size below 1, an unknown kind of recomputation, or sequence parallelism on one rank.
    """

    tensor_parallel: int = 1
    """GPUs that share every matrix; keep them within a node."""
    pipeline_parallel: int = 1
    """Pipeline stages: GPUs that share the layers."""
    virtual_pipeline: int = 1
    """Groups of layers on each GPU in an interleaved pipeline; 1 is not interleaved."""
    context_parallel: int = 1
    """GPUs that share the tokens of a row."""
    sequence_parallel: bool = False
    """Whether the tensor-parallel GPUs also split the activations between the matrices along the tokens."""
    micro_batch_rows: int = 1
    """Rows in one forward pass of one data-parallel rank."""
    recompute: Recompute = "none"
    """Activations that backward recomputes: `none`, `selective` or those of `full` layers."""
    distributed_optimizer: bool = True
    """Whether data-parallel ranks share the optimizer's states (ZeRO 1), with overlapped communication."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "context"):
            if getattr(self, f"{name}_parallel") < 1:
                raise ValueError(f"{name}_parallel is {getattr(self, f'{name}_parallel')}: give 1 or more")
        if self.virtual_pipeline < 1 or self.micro_batch_rows < 1:
            raise ValueError("virtual_pipeline and micro_batch_rows are 1 or more")
        if self.recompute not in get_args(Recompute):
            raise ValueError(f"recompute is {self.recompute!r}: choose {', '.join(get_args(Recompute))}")
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError(
                "sequence_parallel needs tensor_parallel above 1: its ranks are the tensor-parallel ones"
            )

    @property
    def model_parallel(self) -> int:
        """GPUs of one copy of the model."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    def flags(self) -> list[tuple[str, str | None]]:
        """Return Megatron's flags for the layout; a flag without a value has None."""
        flags: list[tuple[str, str | None]] = [
            ("--tensor-model-parallel-size", str(self.tensor_parallel)),
            ("--pipeline-model-parallel-size", str(self.pipeline_parallel)),
            ("--micro-batch-size", str(self.micro_batch_rows)),
        ]
        if self.virtual_pipeline > 1:
            flags.append(("--num-virtual-stages-per-pipeline-rank", str(self.virtual_pipeline)))
        if self.context_parallel > 1:
            flags.append(("--context-parallel-size", str(self.context_parallel)))
        if self.sequence_parallel:
            flags.append(("--sequence-parallel", None))
        if self.recompute != "none":
            flags.append(("--recompute-granularity", self.recompute))
        if self.recompute == "full":
            flags += [("--recompute-method", "uniform"), ("--recompute-num-layers", "1")]
        if self.distributed_optimizer:
            flags += [
                ("--use-distributed-optimizer", None),
                ("--overlap-grad-reduce", None),
                ("--overlap-param-gather", None),
            ]
        return flags

    def describe(self) -> str:
        """Describe the layout briefly, such as `TP4 SP PP2, micro-batch 1, recompute full`."""
        parts = [f"TP{self.tensor_parallel}"]
        parts += ["SP"] if self.sequence_parallel else []
        parts += [f"PP{self.pipeline_parallel}"] if self.pipeline_parallel > 1 else []
        parts += [f"VPP{self.virtual_pipeline}"] if self.virtual_pipeline > 1 else []
        parts += [f"CP{self.context_parallel}"] if self.context_parallel > 1 else []
        words = [" ".join(parts), f"micro-batch {self.micro_batch_rows}", f"recompute {self.recompute}"]
        return ", ".join([*words, *(["distributed optimizer"] if self.distributed_optimizer else [])])


def layout_of_arguments(args: Any) -> Layout:
    """Return the layout of Megatron's namespace, validated or not.

    Args:
        args: Megatron's namespace.
    """
    interleaved = getattr(args, "virtual_pipeline_model_parallel_size", None)  # set by validation
    interleaved = interleaved or args.num_virtual_stages_per_pipeline_rank
    return Layout(
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        virtual_pipeline=interleaved or 1,
        context_parallel=args.context_parallel_size,
        # Megatron switches it off without tensor parallelism
        sequence_parallel=args.sequence_parallel and args.tensor_model_parallel_size > 1,
        micro_batch_rows=args.micro_batch_size,
        recompute=args.recompute_granularity or "none",
        distributed_optimizer=args.use_distributed_optimizer,
    )


FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
LISTED = "--pipeline-model-parallel-layout"
WIDTHS = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
"""Sizes that tensor-parallel ranks share, by Megatron's names."""


def rank_faults(
    layout: Layout, *, world_size: int, batch_rows: int | None, row_tokens: int
) -> Iterator[str]:
    """Yield what does not divide by the number of ranks: the ranks themselves, the batch or the row.

    Args:
        layout: the layout.
        world_size: ranks in all.
        batch_rows: rows of a step; None for as many as the layout needs.
        row_tokens: tokens of a row.
    """
    tensor, pipeline, context = layout.tensor_parallel, layout.pipeline_parallel, layout.context_parallel
    replicas, rest = divmod(world_size, layout.model_parallel)
    at_once = replicas * layout.micro_batch_rows
    if rest or not replicas:
        yield (
            f"{world_size} ranks (GPUs) do not divide by {layout.model_parallel}, TP {tensor} x PP "
            f"{pipeline} x CP {context}: change the number of ranks or a size"
        )
    elif batch_rows is not None and batch_rows < 1:
        yield f"--global-batch-size {batch_rows} contains no row: choose a multiple of {at_once}"
    elif batch_rows is not None and batch_rows % at_once:
        yield (
            f"--global-batch-size {batch_rows} does not divide by {at_once}, {replicas} data-parallel "
            f"ranks x --micro-batch-size {layout.micro_batch_rows}: choose a global batch size that is a "
            f"multiple of {at_once}, or a smaller micro-batch"
        )
    tokens = layout.micro_batch_rows * row_tokens
    if layout.sequence_parallel and tokens % (tensor * context):
        yield (
            f"--sequence-parallel: the {tokens} tokens of a micro-batch do not divide by "
            f"{tensor * context}, TP {tensor} x CP {context}: drop it, or pack rows of another length"
        )


def tensor_faults(size: int, widths: Mapping[str, int | None]) -> Iterator[str]:
    """Yield the widths that do not divide by the tensor-parallel size.

    Args:
        size: tensor-parallel ranks.
        widths: WIDTHS of the model; None where Megatron derives one.
    """
    known = {name: width for name, width in widths.items() if width is not None}
    fitting = [str(n) for n in range(1, size) if all(_fits(*width, n) for width in known.items())]
    for name, width in known.items():
        if _fits(name, width, size):
            continue
        if name == "vocab_size":
            yield (
                f"a vocabulary of {width} does not divide by --tensor-model-parallel-size {size}: padding "
                "would enter the softmax and change the loss; choose another size, or --vocab-size with "
                "the rows of the model"
            )
        else:
            yield (
                f"{name} {width} does not divide by --tensor-model-parallel-size {size}: choose "
                f"{', '.join(fitting)}"
            )


def shared_keys_fault(size: int, groups: int, *, post_norm: bool) -> str | None:
    """Describe why norms over all keys cannot be split over tensor-parallel ranks, or return None.

    Args:
        size: tensor-parallel ranks.
        groups: key/value groups.
        post_norm: as `ModelShape.post_norm`.
    """
    if not post_norm or groups >= size:
        return None
    return (
        f"--tensor-model-parallel-size {size} with {groups} key/value groups is not supported with norms "
        "over all keys (--post-norm, OLMo 2): several ranks would have the same keys, and count them "
        f"twice; choose at most {groups}"
    )


def _fits(name: str, width: int, size: int) -> bool:
    # with fewer key/value groups than ranks, Megatron gives each rank a copy
    return width % size == 0 or (name == "num_query_groups" and size % width == 0)


def even_parts_fault(num_layers: int, stages: int, virtual: int = 1, *, counted: int = 0) -> str | None:
    """Describe why the layers cannot be split into equal parts, or return None.

    Args:
        num_layers: of the model.
        stages: pipeline stages.
        virtual: groups of layers of a pipeline stage.
        counted: how many of embedding and loss count as a layer.
    """
    parts = stages * virtual
    if (num_layers + counted) % parts == 0:
        return None
    size = f"--pipeline-model-parallel-size {stages}{f' x {virtual} groups of each' if virtual > 1 else ''}"
    more = f" and {counted} for embedding or loss" if counted else ""
    return (
        f"{num_layers} layers{more} do not divide into {parts} pipeline parts, {size}: choose another "
        f"size, or parts of other lengths with {FIRST}, {LAST} or {LISTED}"
    )


def has_uneven_parts(args: Any) -> bool:
    """Return whether flags decide how many layers each pipeline stage has, so that parts may be uneven.

    Args:
        args: Megatron's namespace, validated or not.
    """
    return bool(
        args.pipeline_model_parallel_layout is not None
        or args.hybrid_layer_pattern is not None
        or _named_parts(args)
        or args.account_for_embedding_in_pipeline_split
        or args.account_for_loss_in_pipeline_split
    )


def refuse_layout(args: Any) -> None:
    """Raise where the model, the batch or the ranks do not divide by the layout.

    Args:
        args: Megatron's namespace, parsed but not yet validated.

    Raises:
        ValueError: names every fault with its values and a remedy.
        AssertionError: Megatron's, on a `--pipeline-model-parallel-layout` that it cannot read.
    """
    layout = layout_of_arguments(args)
    rows = {"batch_rows": args.global_batch_size, "row_tokens": args.seq_length}
    faults = list(rank_faults(layout, world_size=args.world_size, **rows))
    widths = {name: getattr(args, name) for name in WIDTHS}
    if not args.group_query_attention:
        widths["num_query_groups"] = None
    faults += tensor_faults(layout.tensor_parallel, widths)
    if args.num_layers is not None and args.hybrid_layer_pattern is None:
        faults += _pipeline_faults(args, layout)
    if faults:
        raise ValueError("; ".join(faults))


def _pipeline_faults(args: Any, layout: Layout) -> Iterator[str]:
    """Yield faults of the split of the layers over pipeline stages."""
    stages, virtual = layout.pipeline_parallel, layout.virtual_pipeline
    counted = args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
    if args.pipeline_model_parallel_layout is not None:
        yield from _listed_faults(args, stages)
        return
    if args.num_layers_per_virtual_pipeline_stage is not None:
        each = args.num_layers_per_virtual_pipeline_stage
        if each < 1 or (args.num_layers + counted) % (stages * each):
            yield (
                f"{args.num_layers} layers do not divide by {stages * each}, --pipeline-model-parallel-size"
                f" {stages} x --num-layers-per-virtual-pipeline-stage {each}: choose other sizes"
            )
            return
        virtual = (args.num_layers + counted) // (stages * each)
    elif named := _named_parts(args):
        yield from _named_parts_faults(named, args.num_layers, stages, virtual)
    else:
        fault = even_parts_fault(args.num_layers, stages, virtual, counted=counted)
        if fault is not None:
            yield fault
    if virtual > 1:
        yield from _interleaving_faults(args, layout)


def _listed_faults(args: Any, stages: int) -> Iterator[str]:
    """Yield faults of `--pipeline-model-parallel-layout`."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    text = args.pipeline_model_parallel_layout
    parts = PipelineParallelLayerLayout.parse_str_to_list(text)
    if len(parts) % stages:
        yield (
            f"{LISTED} {text} has {len(parts)} parts, which do not divide by "
            f"--pipeline-model-parallel-size {stages}: name a part for each pipeline stage, | between them"
        )
    listed = sum(part.count(LayerType.decoder) for part in parts)
    if listed != args.num_layers:
        yield f"{LISTED} {text} lists {listed} layers, the model has {args.num_layers}: write a t for each"


def _named_parts(args: Any) -> dict[str, int]:
    """Return the layers of the first and the last pipeline stage where a flag gives them, by flag."""
    layers = {FIRST: args.decoder_first_pipeline_num_layers, LAST: args.decoder_last_pipeline_num_layers}
    return {flag: number for flag, number in layers.items() if number is not None}


def _named_parts_faults(
    named: Mapping[str, int], num_layers: int, stages: int, virtual: int
) -> Iterator[str]:
    """Yield faults of numbers of layers given for the first and the last pipeline stage."""
    for flag, layers in named.items():
        if layers < 1 or layers % virtual:
            groups = f", a multiple of its {virtual} groups" if virtual > 1 else ""
            yield f"{flag} {layers}: a pipeline stage has 1 layer or more{groups}; choose another number"
    others, left = stages - len(named), num_layers - sum(named.values())
    fits = left > 0 and left % (others * virtual) == 0 if others > 0 else (others, left) == (0, 0)
    if not fits:
        words = " and ".join(f"{flag} {layers}" for flag, layers in named.items())
        groups = f" of {virtual} groups each" if virtual > 1 else ""
        yield (
            f"{words} leave {left} of {num_layers} layers to {others} more pipeline stages{groups}, "
            f"which they do not divide by: change a number, or --pipeline-model-parallel-size {stages}"
        )


def _interleaving_faults(args: Any, layout: Layout) -> Iterator[str]:
    """Yield faults of an interleaved pipeline, whose stages have several groups of layers."""
    stages = layout.pipeline_parallel
    least = 2 if args.overlap_p2p_comm else 3
    if stages < least:
        yield (
            f"an interleaved pipeline needs --pipeline-model-parallel-size {least} or more, not {stages}: "
            "leave out --num-virtual-stages-per-pipeline-rank and --num-layers-per-virtual-pipeline-stage"
        )
    at_once = args.world_size // layout.model_parallel * layout.micro_batch_rows
    if args.global_batch_size is None or not at_once or args.global_batch_size % at_once:
        return  # reported by rank_faults, or Megatron chooses it
    micro_batches = args.global_batch_size // at_once
    group = args.microbatch_group_size_per_vp_stage or stages
    if micro_batches < group or 0 < micro_batches % group < stages:
        yield (
            f"an interleaved pipeline takes micro-batches by {group}, and a step has {micro_batches} "
            f"(--global-batch-size {args.global_batch_size} / {at_once}): choose a batch of a multiple of "
            f"{group * at_once} rows"
        )
