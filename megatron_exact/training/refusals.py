"""What a job may not ask for, each refusal with its reason, before any model is built.

The first part needs neither Megatron nor torch and reads the command line (`GivenFlags`): a job and a
preflight both pass through it, so that neither accepts what the other refuses. The second part reads
Megatron's namespace. Which flags are refused in any case stands in `flag_classes.py`.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_exact.data.manifest import Manifest
from megatron_exact.model.families import PRESETS
from megatron_exact.training.flag_classes import GivenFlags, has_rope

SHAPE_FLAGS = ("--num-layers", "--hidden-size", "--num-attention-heads")
"""What Megatron cannot guess of a model."""
FAMILY_FLAGS = (
    "--ffn-hidden-size --group-query-attention --num-query-groups --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope"
)
"""What makes a Llama of a shape; Qwen2 has --add-qkv-bias as well, Qwen3 --qk-layernorm."""
LARGEST_SEED = 2**31 - 1
MINUTES_OF_A_YEAR = 366 * 24 * 60
LARGEST_RATE = 1000.0
"""A learning rate above it is a slip: one step of Adam would move every weight by so much."""


def check_model_given(job: GivenFlags, *, load: object) -> None:
    """Refuse a job of which nobody says what the model is.

    Args:
        job: the user's flags and what checkpoint or preset add.
        load: folder that the job starts from, None without.

    Raises:
        ValueError: the flags that are missing and the ways to give them.
    """
    missing = [flag for flag in SHAPE_FLAGS if flag not in job]
    if missing:
        found = f" ({load} has no hf folder that describes one)" if load is not None else ""
        what = "no model is given" if len(missing) == len(SHAPE_FLAGS) else f"{', '.join(missing)} missing"
        raise ValueError(
            f"{what}{found}: start from a checkpoint with --pretrained-checkpoint (megatron-exact "
            f"import-hf makes one), name a model with --preset ({', '.join(PRESETS)}), or describe one "
            f"with {' '.join(SHAPE_FLAGS)} {FAMILY_FLAGS}"
        )
    if "--normalization" not in job:
        raise ValueError(
            "--normalization RMSNorm is missing: Megatron would build LayerNorm, which Llama and Qwen2 "
            f"do not have; a Llama is made of {' '.join(SHAPE_FLAGS)} {FAMILY_FLAGS}"
        )
    hidden, heads = job.whole("--hidden-size", 0), job.whole("--num-attention-heads", 1)
    if "--kv-channels" not in job and hidden % heads:
        raise ValueError(
            f"--hidden-size {hidden} does not divide by --num-attention-heads {heads}: choose other sizes, "
            "or the width of a head with --kv-channels"
        )
    width = job.whole("--kv-channels", hidden // heads)
    if width % 2 and has_rope(job):
        raise ValueError(
            f"heads of {width} channels cannot be rotated in pairs: choose an even number of "
            "--kv-channels, or another --hidden-size or --num-attention-heads"
        )
    if job.whole("--ffn-hidden-size", 2) < 2:
        raise ValueError(f"{job.text('--ffn-hidden-size')} is no layer: choose 2 or more")
    groups = job.whole("--num-query-groups", 1)
    if "--group-query-attention" in job and heads % groups:
        raise ValueError(
            f"--num-attention-heads {heads} does not divide by --num-query-groups {groups}: choose other "
            "numbers"
        )


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long a job is, in iterations."""

    batch_rows: int
    """Rows of an iteration."""
    iterations: int
    """Iterations of the whole run."""


def length_of(job: GivenFlags) -> Length:
    """How long a job is.

    Raises:
        ValueError: it has no length, two, or reads no row.
    """
    iterations, samples = job.word("--train-iters"), job.word("--train-samples")
    if iterations is None and samples is None:
        raise ValueError(
            "--train-iters is missing: say how many iterations to train (or --train-samples, how many rows)"
        )
    if iterations is not None and samples is not None:
        raise ValueError(
            f"--train-iters {iterations} and --train-samples {samples} are two lengths: give one of them"
        )
    rows = batch_rows(job)
    if samples is None:
        assert iterations is not None
        return Length(batch_rows=rows, iterations=int(iterations))
    if int(samples) < rows:
        raise ValueError(
            f"--train-samples {samples} is less than one batch of {rows} rows, nothing would be trained: "
            "give more samples, or a smaller --global-batch-size"
        )
    return Length(batch_rows=rows, iterations=int(samples) // rows)


def batch_rows(job: GivenFlags) -> int:
    """Rows of an iteration: `--global-batch-size`, else a micro-batch for each data-parallel rank."""
    given = job.whole("--global-batch-size", 0)
    if given:
        return given
    sizes = (
        job.whole(f"--{name}-parallel-size", 1) for name in ("tensor-model", "pipeline-model", "context")
    )
    replicas = int(os.environ.get("WORLD_SIZE", "1"))
    for size in sizes:
        replicas //= size
    return max(1, replicas) * job.whole("--micro-batch-size", 1)


def check_pack_has_rows(manifest: Manifest) -> None:
    """Refuse a pack of which nothing can be trained.

    Raises:
        ValueError: what to do.
    """
    if manifest.splits["train"].rows == 0:
        raise ValueError(
            f"the pack's train split has no rows of {manifest.row_tokens} tokens: pack more text, or "
            "shorter rows (--row-tokens)"
        )


def check_schedule(job: GivenFlags) -> Length:
    """Refuse a learning rate, a warm-up, a decay or a weight decay that Megatron would only assert about.

    Returns:
        How long the job is.

    Raises:
        ValueError: the flags, their values and the remedy.
    """
    length = length_of(job)
    faults = itertools.chain(
        _unit_faults(job), _rate_faults(job), _warmup_faults(job, length), _decay_faults(job)
    )
    for fault in faults:
        raise ValueError(fault)
    return length


def _unit_faults(job: GivenFlags) -> Iterator[str]:
    """Iterations beside samples."""
    unit, other = ("iters", "samples") if "--train-iters" in job else ("samples", "iters")
    for name in ("lr-warmup", "lr-decay", "lr-wsd-decay"):
        flag = f"--{name}-{other}"
        if flag in job and job.whole(flag, 0):
            yield (
                f"{job.text(flag)} beside {job.text(f'--train-{unit}')}: the schedule is counted in "
                f"{'iterations' if unit == 'iters' else 'samples'}; give --{name}-{unit}"
            )


def _rate_faults(job: GivenFlags) -> Iterator[str]:
    """Learning rates out of order."""
    if "--lr" not in job:
        yield "--lr is missing: give the largest learning rate, such as --lr 1e-5"
        return
    rate = job.number("--lr", 0)
    for flag in ("--lr", "--decoupled-lr"):
        if job.number(flag, 0) > LARGEST_RATE:
            yield f"{job.text(flag)} is no learning rate: give one up to {LARGEST_RATE:g}"
    for flag, largest in (
        ("--min-lr", "--lr"),
        ("--lr-warmup-init", "--lr"),
        ("--decoupled-min-lr", "--decoupled-lr"),
    ):
        if largest in job and job.number(flag, 0) > job.number(largest, rate):
            yield f"{job.text(flag)} is above {job.text(largest)}: give a smaller one"


def _warmup_faults(job: GivenFlags, length: Length) -> Iterator[str]:
    """A warm-up that does not end before the decay does."""
    unit = "iters" if "--train-iters" in job else "samples"
    end = f"--lr-decay-{unit}" if f"--lr-decay-{unit}" in job else f"--train-{unit}"
    last = job.whole(end, length.iterations)
    fraction, warmup = job.number("--lr-warmup-fraction", 0), job.whole(f"--lr-warmup-{unit}", 0)
    if fraction and warmup:
        yield f"{job.text('--lr-warmup-fraction')} and {job.text(f'--lr-warmup-{unit}')}: give one of them"
    if fraction >= 1:
        yield f"{job.text('--lr-warmup-fraction')} is the whole run: give less than 1"
    if warmup >= last:
        yield (
            f"{job.text(f'--lr-warmup-{unit}')} is not shorter than {end} {last}: the learning rate would "
            "never be reached; give a shorter warm-up or a longer run"
        )
    decay = job.whole(f"--lr-wsd-decay-{unit}", 0)
    if job.word("--lr-decay-style") != "WSD":
        return
    if not decay:
        yield f"--lr-decay-style WSD needs --lr-wsd-decay-{unit}: say how long the rate falls at the end"
    elif decay > last - warmup - fraction * last:
        yield (
            f"{job.text(f'--lr-wsd-decay-{unit}')} begins before the warm-up ends: {end} is {last}; give "
            "a shorter one"
        )


def _decay_faults(job: GivenFlags) -> Iterator[str]:
    """A weight decay that changes without saying from where to where."""
    ends = ("--start-weight-decay", "--end-weight-decay")
    given = [flag for flag in ends if flag in job]
    style = job.word("--weight-decay-incr-style") or "constant"
    if style == "constant" and given:
        yield (
            f"{job.text(given[0])} with a constant weight decay: give --weight-decay, or "
            "--weight-decay-incr-style linear or cosine"
        )
    elif style != "constant" and len(given) < 2:
        missing = " and ".join(flag for flag in ends if flag not in job)
        yield f"--weight-decay-incr-style {style} needs {missing}: say where the decay begins and ends"
    elif given and job.number(ends[0], 0) > job.number(ends[1], 0):
        yield f"{job.text(ends[0])} is above {job.text(ends[1])}: Megatron's weight decay only rises"
    for beta in ("--adam-beta1", "--adam-beta2"):
        if job.number(beta, 0) >= 1:
            yield f"{job.text(beta)} is not below 1: choose another value"


def check_saving(job: GivenFlags) -> None:
    """Refuse `--save` without an interval, of which Megatron makes an assertion without words.

    Raises:
        ValueError: what is missing.
    """
    if "--save" in job and "--save-interval" not in job:
        raise ValueError(
            f"{job.text('--save')} needs --save-interval: say after how many iterations a checkpoint is "
            "written (as many as --train-iters: one at the end)"
        )


def check_combinations(job: GivenFlags) -> None:
    """Refuse values out of range, and flags that do not go together.

    Raises:
        ValueError: the flags, and which to change.
    """
    for fault in itertools.chain(_scale_faults(job), _log_faults(job)):
        raise ValueError(fault)
    if "--fp16" in job and "--bf16" in job:
        raise ValueError("--fp16 and --bf16 are two number types: give one of them")
    if job.whole("--seed", 1) > LARGEST_SEED:
        raise ValueError(f"{job.text('--seed')} is too large: choose a seed up to {LARGEST_SEED}")
    if job.whole("--distributed-timeout-minutes", 1) > MINUTES_OF_A_YEAR:
        raise ValueError(f"{job.text('--distributed-timeout-minutes')} is more than a year: give fewer")
    if "--ddp-bucket-size" in job and "--ddp-num-buckets" in job:
        raise ValueError(
            "--ddp-bucket-size and --ddp-num-buckets both decide the buckets: give one of them"
        )
    if "--use-distributed-optimizer" in job and job.word("--optimizer") not in (None, "adam"):
        raise ValueError(
            f"{job.text('--optimizer')} with --use-distributed-optimizer was not checked: use adam, or "
            "drop --use-distributed-optimizer"
        )


def _scale_faults(job: GivenFlags) -> Iterator[str]:
    """Loss scales of `--fp16` that Megatron would only assert about."""
    smallest = job.number("--min-loss-scale", 1)
    for flag in ("--initial-loss-scale", "--min-loss-scale", "--loss-scale-window"):
        if job.number(flag, 1) <= 0:
            yield f"{job.text(flag)} is not above 0: choose a larger one"
    if job.whole("--hysteresis", 1) < 1:
        yield f"{job.text('--hysteresis')} is not 1 or more: choose a larger one"
    if smallest > job.number("--initial-loss-scale", 2**32):
        yield f"--min-loss-scale {smallest:g} is above --initial-loss-scale (2^32 by default): change one"


def _log_faults(job: GivenFlags) -> Iterator[str]:
    """Profiles of no step, and signals that do not exist."""
    if "--profile" in job and "--use-pytorch-profiler" not in job:
        yield "--profile alone is for NVIDIA's Nsight, which was not tried here: add --use-pytorch-profiler"
    first, last = job.whole("--profile-step-start", 10), job.whole("--profile-step-end", 12)
    if "--profile" in job and first >= last:
        yield f"--profile-step-start {first} is not before --profile-step-end {last}: nothing is profiled"
    name = job.word("--exit-signal")
    if name is not None and name not in signal.Signals.__members__:
        yield f"{job.text('--exit-signal')} is no signal: give a name such as SIGUSR2"


def check_machine(job: GivenFlags, *, is_cpu: bool) -> None:
    """Refuse what the CPU runtime cannot do.

    Args:
        job: the whole Megatron command line, with what the machine dictates.
        is_cpu: whether that is the CPU runtime.

    Raises:
        ValueError: the flag and the remedy.
    """
    for flag, word in (("--distributed-backend", "nccl"), ("--transformer-impl", "transformer_engine")):
        if is_cpu and job.word(flag) == word:
            raise ValueError(f"{flag} {word} needs a GPU, and this job runs on the CPU: drop the flag")


def check_evaluation_start(job: GivenFlags, length: Length) -> None:
    """Refuse evaluations that begin after the run.

    Raises:
        ValueError: the flag and the length.
    """
    first = job.whole("--start-eval-at-iter", 0)
    if first > length.iterations and job.whole("--eval-iters", 0):
        raise ValueError(
            f"--start-eval-at-iter {first} is beyond the {length.iterations} iterations of the run: give a "
            "smaller number, or --eval-iters 0"
        )


def check_evaluation_rows(*, eval_iters: int, batch: int, manifest: Manifest) -> None:
    """Refuse an evaluation of more rows than the pack keeps for it.

    Raises:
        ValueError: the numbers and the remedy.
    """
    wanted, there = eval_iters * batch, manifest.splits["validation"].rows
    if wanted > there:
        raise ValueError(
            f"--eval-iters {eval_iters} x --global-batch-size {batch} asks for "
            f"{wanted} validation rows but the pack has {there}: choose --eval-iters "
            f"{there // batch} or less, or pack with a larger --validation-fraction"
        )


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


def check_rows_divide(args: Any) -> None:
    """Refuse rows that context-parallel ranks cannot share.

    Args:
        args: Megatron's namespace, parsed but not yet validated.

    Raises:
        ValueError: the sizes and the remedy.
    """
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
    check_context_parallel(args)
    check_evaluation_rows(eval_iters=args.eval_iters, batch=args.global_batch_size, manifest=manifest)


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
    remedy = "score the pack first (megatron-exact score) and give --confidence-scores"
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
    if args.hidden_dropout:
        raise ValueError(
            f"--hidden-dropout {args.hidden_dropout:g} with a confidence rule without --confidence-scores: "
            "the long loss, of the training pass, has dropout and the short one none, their difference "
            f"would be noise; {remedy}"
        )
