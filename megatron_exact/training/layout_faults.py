"""What of a model, a batch and the ranks a layout cannot divide, said with the values and a way out.

Upstream refuses the same: one assertion at a time, some without a number, some only when the model is being
built or the first step runs. Here it is said before Megatron validates anything. Parts of a pipeline may be
uneven: `--decoder-first-pipeline-num-layers`, `--decoder-last-pipeline-num-layers`,
`--pipeline-model-parallel-layout`, `--account-for-embedding-in-pipeline-split` and its like for the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_exact.training.layout import Layout, layout_of_arguments

FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
LISTED = "--pipeline-model-parallel-layout"
WIDTHS = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
"""What tensor-parallel ranks share, by Megatron's names."""


def rank_faults(
    layout: Layout, *, world_size: int, batch_rows: int | None, row_tokens: int
) -> Iterator[str]:
    """Faults of the number of ranks, of the batch and of the row.

    Args:
        layout: the layout.
        world_size: ranks in all.
        batch_rows: rows of a step; None is as many as the layout needs.
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
        yield f"--global-batch-size {batch_rows} holds no row: choose a multiple of {at_once}"
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
    """Faults of the tensor-parallel size.

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


def _fits(name: str, width: int, size: int) -> bool:
    # of fewer key/value groups than ranks upstream gives each rank a copy
    return width % size == 0 or (name == "num_query_groups" and size % width == 0)


def even_parts_fault(num_layers: int, stages: int, virtual: int = 1, *, counted: int = 0) -> str | None:
    """What is wrong with equal parts of the layers, None if nothing is.

    Args:
        num_layers: of the model.
        stages: pipeline stages.
        virtual: groups of layers a pipeline stage holds.
        counted: embedding and loss, where they count as a layer each.
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
    """Whether flags say how many layers a pipeline stage has.

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
    """Refuse a layout that the model, the batch or the ranks do not divide by.

    Args:
        args: Megatron's namespace, parsed but not yet validated.

    Raises:
        ValueError: every fault with its values and a way out.
        AssertionError: upstream's, on a `--pipeline-model-parallel-layout` that it cannot read.
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
    """Faults of `--pipeline-model-parallel-layout`."""
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
    """Layers of the first and the last pipeline stage where a flag says them, by flag."""
    layers = {FIRST: args.decoder_first_pipeline_num_layers, LAST: args.decoder_last_pipeline_num_layers}
    return {flag: number for flag, number in layers.items() if number is not None}


def _named_parts_faults(
    named: Mapping[str, int], num_layers: int, stages: int, virtual: int
) -> Iterator[str]:
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
    """Faults of a pipeline stage that holds several groups of layers."""
    stages = layout.pipeline_parallel
    least = 2 if args.overlap_p2p_comm else 3
    if stages < least:
        yield (
            f"an interleaved pipeline needs --pipeline-model-parallel-size {least} or more, not {stages}: "
            "leave out --num-virtual-stages-per-pipeline-rank and --num-layers-per-virtual-pipeline-stage"
        )
    at_once = args.world_size // layout.model_parallel * layout.micro_batch_rows
    if args.global_batch_size is None or not at_once or args.global_batch_size % at_once:
        return  # said elsewhere, or decided by upstream
    micro_batches = args.global_batch_size // at_once
    group = args.microbatch_group_size_per_vp_stage or stages
    if micro_batches < group or 0 < micro_batches % group < stages:
        yield (
            f"an interleaved pipeline takes micro-batches by {group}, and a step has {micro_batches} "
            f"(--global-batch-size {args.global_batch_size} / {at_once}): choose a batch of a multiple of "
            f"{group * at_once} rows"
        )
