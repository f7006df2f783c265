"""From a job to Megatron's validated namespace and model configuration; nothing is built or written yet.

The steps are those of upstream's `parse_and_validate_args`, with our checks between them.
"""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from megatron_exact.training import refusals
from megatron_exact.training.job import Job
from megatron_exact.training.layout_faults import refuse_layout
from megatron_exact.training.qk_timing import settle_separate_qkv
from megatron_exact.training.runtime import cpu_runtime_is_active


def parse_for_megatron(job: Job) -> tuple[Any, Any]:
    """Megatron's validated namespace and model configuration.

    Raises:
        ValueError: flags that Megatron does not know, or that it or we refuse.
    """
    args = parse_flags(job.argv)
    return args, validate_flags(job, args)


def parse_flags(argv: Sequence[str]) -> Any:
    """Megatron's namespace, parsed but not validated.

    Raises:
        ValueError: flags that Megatron does not know.
    """
    from megatron.training.arguments import parse_args

    sys.argv = [sys.argv[0], *argv]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            args = parse_args()
    except SystemExit as error:  # argparse, after hundreds of lines of usage
        last = complaint.getvalue().strip().rpartition("error: ")[2]
        raise ValueError(f"{last}: --help shows our options, --megatron-help Megatron's") from error
    return args


def validate_flags(job: Job, args: Any) -> Any:
    """Validate Megatron's namespace, in place, and derive the model configuration.

    Args:
        job: the job.
        args: from `parse_flags`.

    Raises:
        ValueError: what Megatron or we refuse.
    """
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import validate_args

    from megatron_exact.model.context_parallel import move_rope_into_attention
    from megatron_exact.model.layer_specs import check_packed_attention_supports
    from megatron_exact.model.loss_head import check_tiled_head_supports

    refusals.refuse_flags(args)
    try:
        refuse_layout(args)
        validate_args(args)
    except AssertionError as error:
        asserted = traceback.extract_tb(error.__traceback__)[-1].line  # many of upstream's say no more
        raise ValueError(f"Megatron refuses these flags: {str(error) or asserted}") from error
    for name, value in vars(job.options).items():
        setattr(args, name, value)
    settle_separate_qkv(args)
    refusals.check_megatron_arguments(args, job.manifest)
    job.model.check_arguments(args)
    scores_in_step = job.weighting.row_weights.in_step
    if scores_in_step:
        refusals.check_scores_in_step(args)
    if args.pipeline_model_parallel_size > 1 and (args.micro_batch_size > 1 or scores_in_step):
        # Rows of a micro-batch are flattened into one, and streams of short windows have lengths of their
        # own, so pipeline stages must announce their shapes;
        # upstream allows that with this dispatcher alone, which a model without experts never calls
        args.variable_seq_lengths = True
        args.moe_token_dispatcher_type = "alltoall"
    config = gpt_config_from_args(args)
    # 0.19.2 reads --use-rope-scaling but leaves the factor at 8: Llama 3.2, which has 32, would be damaged
    config.rope_scaling_factor = args.rope_scaling_factor
    if args.loss_head == "tiled":
        check_tiled_head_supports(config.transformer)
    if args.transformer_impl == "local":
        check_packed_attention_supports(config.transformer)
        if args.context_parallel_size > 1:
            move_rope_into_attention(config)
        if not cpu_runtime_is_active() and not (args.bf16 or args.fp16):
            raise ValueError(
                "torch's variable-length attention kernel needs half precision: add --bf16, or install "
                "Transformer Engine"
            )
    return config
