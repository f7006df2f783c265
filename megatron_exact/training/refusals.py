"""What a job may not ask for, each refusal with its reason, before any model is built."""

from __future__ import annotations

from typing import Any

from megatron_exact.data.manifest import Manifest

NOT_CHECKED = "not checked with packed rows"
FROM_PACK = "the data come from --pack"
REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("cp_comm_type", ["p2p"], "the attention of packed rows gathers keys and values, whatever it says"),
    ("hierarchical_context_parallel_sizes", None, "keys and values are gathered in one step"),
    ("hybrid_context_parallel", False, "the rows of a pack have one length"),
    ("reset_attention_mask", False, "boundaries come from the pack, not from scanning for EOD"),
    ("reset_position_ids", False, "boundaries come from the pack, not from scanning for EOD"),
    ("eod_mask_loss", False, "choose --mask-cross-document-targets when packing"),
    ("window_size", None, "the visible context would no longer be the effective context"),
    ("window_attn_skip_freq", None, "the visible context would no longer be the effective context"),
    ("mtp_num_layers", None, "multi-token prediction would bypass the token weights"),
    ("rerun_mode", "disabled", "nothing would ask for a rerun: --on-nonfinite tells of NaN and Inf"),
    ("check_for_large_grads", False, "choose --spike-deviations"),
    ("check_for_spiky_loss", False, "the check belongs to the stock loss function"),
    ("data_path", None, FROM_PACK),
    ("data_args_path", None, FROM_PACK),
    ("per_split_data_args_path", None, FROM_PACK),
    ("train_data_path", None, FROM_PACK),
    ("valid_data_path", None, FROM_PACK),
    ("test_data_path", None, FROM_PACK),
    ("mock_data", False, FROM_PACK),
    ("fim_data", False, FROM_PACK),
    ("sft", False, FROM_PACK),
    ("dataloader_type", "single", "order and epochs belong to the pack"),
    ("phase_transition_iterations", None, "order and epochs belong to the pack"),
    ("full_validation", False, "choose --eval-iters"),
    ("multiple_validation_sets", False, "a pack has one validation split"),
    ("eval_global_batch_size", None, "evaluations use the batch of training"),
    ("eval_micro_batch_size", None, "evaluations use the batch of training"),
    ("step_batch_size_schedule", None, NOT_CHECKED),
    ("decrease_batch_size_if_needed", False, NOT_CHECKED),
    ("tensor_parallel_num_weight_shards", None, NOT_CHECKED),
    ("use_megatron_fsdp", False, NOT_CHECKED),
    ("use_torch_fsdp2", False, NOT_CHECKED),
    ("yaml_cfg", None, "give flags: the file would replace what the pack dictates"),
    ("use_checkpoint_args", False, "give flags: a checkpoint could switch on what is refused here"),
    ("save_retain_interval", None, "choose --keep-last"),
    ("non_persistent_ckpt_type", None, "such checkpoints would be loaded without being verified"),
    ("ckpt_format", "torch_dist", "only torch_dist checkpoints load on any layout"),
    ("dist_ckpt_optim_fully_reshardable", False, "0.19.2 writes damaged optimizer states with it"),
)
"""Megatron argument, the only value that a job may have (None: not given), and why."""


def check_supervision(rule: str, manifest: Manifest) -> None:
    """Refuse to weigh the answers of question-answer records: both arms are tuned alike.

    Args:
        rule: token weighting of the job.
        manifest: of the pack.

    Raises:
        ValueError: another rule than `none` on such a pack.
    """
    if manifest.supervision is not None and rule != "none":
        raise ValueError(
            f"--token-weighting {rule} is refused on a pack of question-answer records: fine-tuning is the "
            "same for every arm, use --token-weighting none"
        )


def refuse_flags(args: Any) -> None:
    """Refuse flags under which document masking, weights or records would not hold.

    Args:
        args: Megatron's namespace, parsed but not yet validated.

    Raises:
        ValueError: the flag, its value and the reason.
    """
    for name, only, reason in REFUSED:
        value = getattr(args, name)
        if value is not None and value != only:
            raise ValueError(f"--{name.replace('_', '-')} {value} is refused: {reason}")
    parts = 2 * args.context_parallel_size
    if args.context_parallel_size > 1 and args.seq_length % parts:
        raise ValueError(
            f"rows of {args.seq_length} tokens do not divide into the {parts} spans of "
            f"--context-parallel-size {args.context_parallel_size}: choose another size, or pack rows of a "
            f"multiple of {parts} tokens"
        )


def check_megatron_arguments(args: Any, manifest: Manifest) -> None:
    """Refuse configurations that only show after Megatron's own validation.

    Args:
        args: Megatron's validated namespace.
        manifest: of the pack.

    Raises:
        ValueError: cause, value and remedy.
    """
    if args.transformer_impl not in ("local", "transformer_engine"):
        raise ValueError(
            f"--transformer-impl {args.transformer_impl} is not supported: use local or transformer_engine"
        )
    if args.attention_backend.name not in ("auto", "flash", "fused"):
        raise ValueError(
            f"--attention-backend {args.attention_backend.name} does not keep documents apart in "
            "packed rows: use auto, flash or fused"
        )
    if args.use_distributed_optimizer and args.optimizer != "adam" and _optimizer_is_torchs():
        raise ValueError(
            f"--optimizer {args.optimizer} with --use-distributed-optimizer was not checked with torch's "
            "optimizers: use adam, or drop --use-distributed-optimizer"
        )
    check_context_parallel(args)
    _check_evaluation_rows(args, manifest)
    if manifest.splits["train"].rows == 0:
        raise ValueError("the pack's train split has no rows: pack more text or shorter rows")


def _optimizer_is_torchs() -> bool:
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER

    return bool(USING_PYTORCH_OPTIMIZER)


def check_context_parallel(args: Any) -> None:
    """Refuse what context parallelism of packed rows cannot do.

    Raises:
        ValueError: cause, value and remedy.
    """
    size = args.context_parallel_size
    if size == 1:
        return
    if args.transformer_impl != "local":
        raise ValueError(
            f"--context-parallel-size {size} with --transformer-impl {args.transformer_impl} is not "
            "supported: Transformer Engine needs documents whose lengths divide by "
            f"{2 * size}; add --transformer-impl local"
        )
    local_tokens = args.seq_length // size
    if args.sequence_parallel and local_tokens % args.tensor_model_parallel_size:
        raise ValueError(
            f"--sequence-parallel: the {local_tokens} tokens of a row that each of {size} context-parallel "
            f"ranks has do not divide by --tensor-model-parallel-size {args.tensor_model_parallel_size}: "
            "choose other sizes, or pack rows of another length"
        )


def check_scores_in_step(args: Any) -> None:
    """Refuse what scoring short windows inside the step cannot do.

    Raises:
        ValueError: cause, value and remedy.
    """
    remedy = "score the pack first (tools/score_tokens.py) and give --confidence-scores"
    if args.context_parallel_size > 1:
        raise ValueError(
            f"--context-parallel-size {args.context_parallel_size} with a confidence rule without "
            "--confidence-scores: short windows would be cut into spans of their own, away from the "
            f"targets that they score; {remedy}"
        )
    if args.virtual_pipeline_model_parallel_size:
        raise ValueError(
            "an interleaved pipeline with a confidence rule without --confidence-scores: its schedule "
            "takes micro-batches by the number of pipeline stages, and those without a long document have "
            f"no short windows; {remedy}"
        )
    if args.cuda_graph_impl != "none":
        raise ValueError(
            f"--cuda-graph-impl {args.cuda_graph_impl} with a confidence rule without "
            f"--confidence-scores: the streams of short windows have lengths of their own; {remedy}"
        )
    if args.tp_comm_overlap:
        raise ValueError(
            "--tp-comm-overlap with a confidence rule without --confidence-scores: its buffers have the "
            f"length of a micro-batch, the streams of short windows have lengths of their own; {remedy}"
        )
    if args.hidden_dropout or args.attention_dropout:
        raise ValueError(
            f"--hidden-dropout {args.hidden_dropout:g} and --attention-dropout {args.attention_dropout:g} "
            "with a confidence rule without --confidence-scores: the long loss, of the training pass, has "
            f"dropout and the short one none, their difference would be noise; {remedy}"
        )


def _check_evaluation_rows(args: Any, manifest: Manifest) -> None:
    wanted, there = args.eval_iters * args.global_batch_size, manifest.splits["validation"].rows
    if wanted > there:
        raise ValueError(
            f"--eval-iters {args.eval_iters} x --global-batch-size {args.global_batch_size} asks for "
            f"{wanted} validation rows but the pack has {there}: choose --eval-iters "
            f"{there // args.global_batch_size} or less, or pack with a larger --validation-fraction"
        )
