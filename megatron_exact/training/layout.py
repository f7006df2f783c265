"""How a model and its batch are spread over GPUs: what a recipe says and a preflight examines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel groups, and what is traded for memory.

    Raises:
        ValueError: a size below 1, an unknown kind of recomputation, or sequence parallelism of one.
    """

    tensor_parallel: int = 1
    """GPUs that share every matrix; keep it within a node."""
    pipeline_parallel: int = 1
    """Pipeline stages: GPUs that share the layers."""
    virtual_pipeline: int = 1
    """Groups of layers a GPU holds in an interleaved pipeline; 1 is not interleaved."""
    context_parallel: int = 1
    """GPUs that share the tokens of a row."""
    sequence_parallel: bool = False
    """Whether the tensor-parallel GPUs also share what lies between the matrices."""
    micro_batch_rows: int = 1
    """Rows in one forward pass of one data-parallel rank."""
    recompute: Recompute = "none"
    """Activations that are computed again in backward: `none`, `selective` or those of `full` layers."""
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
        """GPUs that one copy of the model takes."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    def flags(self) -> list[tuple[str, str | None]]:
        """Megatron's flags for it; a flag without a value has None."""
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
        """Short words, such as `TP4 SP PP2, micro-batch 1, recompute full`."""
        parts = [f"TP{self.tensor_parallel}"]
        parts += ["SP"] if self.sequence_parallel else []
        parts += [f"PP{self.pipeline_parallel}"] if self.pipeline_parallel > 1 else []
        parts += [f"VPP{self.virtual_pipeline}"] if self.virtual_pipeline > 1 else []
        parts += [f"CP{self.context_parallel}"] if self.context_parallel > 1 else []
        words = [" ".join(parts), f"micro-batch {self.micro_batch_rows}", f"recompute {self.recompute}"]
        return ", ".join([*words, *(["distributed optimizer"] if self.distributed_optimizer else [])])


def layout_of_arguments(args: Any) -> Layout:
    """The layout that Megatron's namespace asks for, validated or not.

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
        # upstream switches it off without tensor parallelism
        sequence_parallel=args.sequence_parallel and args.tensor_model_parallel_size > 1,
        micro_batch_rows=args.micro_batch_size,
        recompute=args.recompute_granularity or "none",
        distributed_optimizer=args.use_distributed_optimizer,
    )
