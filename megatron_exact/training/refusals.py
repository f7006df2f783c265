"""Combinations of flags, and values, that a job cannot run with; checked before any model is built.

The first part needs neither Megatron nor torch and reads the command line (`GivenFlags`). A job and a
preflight both call it, so both accept the same command lines. The second part reads Megatron's namespace.
Flags that are never supported stand in `flag_classes.py`.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_exact.data.manifest import Manifest
from megatron_exact.model.families import FAMILIES, PRESETS
from megatron_exact.model.family import short
from megatron_exact.model.shapes import num_query_groups_of
from megatron_exact.training.flag_classes import GivenFlags, has_rope
from megatron_exact.training.layout import shared_keys_fault

SHAPE_FLAGS = ("--num-layers", "--hidden-size", "--num-attention-heads")
"""Sizes of a model for which Megatron has no default."""
FAMILY_FLAGS = (
    "--ffn-hidden-size --group-query-attention --num-query-groups --swiglu --normalization RMSNorm "
    "--disable-bias-linear --position-embedding-type rope"
)
"""Flags that models of all our families need beside SHAPE_FLAGS."""
FAMILY_SWITCHES = ", ".join(
    f"{family.model_type} adds {' '.join(family.switches)}"
    for family in FAMILIES.values()
    if family.switches
)
"""Flags that some families need beside FAMILY_FLAGS."""
LARGEST_SEED = 2**31 - 1
MINUTES_OF_A_YEAR = 366 * 24 * 60
LARGEST_RATE = 1000.0
"""A larger learning rate is a slip: one step of Adam would move every weight by this much."""


def check_model_given(job: GivenFlags, *, load: object) -> None:
    """Raise where flags, preset and checkpoint together do not describe a model that can be built.

    Args:
        job: the user's flags, and those that the checkpoint or the preset adds.
        load: the folder that the job starts from, or None.

    Raises:
        ValueError: names the missing flags and the ways to give them, or the sizes that do not divide.
    """
    missing = [flag for flag in SHAPE_FLAGS if flag not in job]
    if missing:
        found = f" ({load} has no hf folder that describes one)" if load is not None else ""
        what = "no model is given" if len(missing) == len(SHAPE_FLAGS) else f"{', '.join(missing)} missing"
        raise ValueError(
            f"{what}{found}: start from a checkpoint with --pretrained-checkpoint (megatron-exact "
            f"import-hf makes one), name a model with --preset ({', '.join(PRESETS)}), or describe one "
            f"with {' '.join(SHAPE_FLAGS)} {FAMILY_FLAGS} ({FAMILY_SWITCHES})"
        )
    if "--normalization" not in job:
        raise ValueError(
            "--normalization RMSNorm is missing: Megatron would build LayerNorm, which no supported model "
            f"family has; a model needs {' '.join(SHAPE_FLAGS)} {FAMILY_FLAGS} ({FAMILY_SWITCHES})"
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
        raise ValueError(f"{job.text('--ffn-hidden-size')} is not a layer size: choose 2 or more")
    groups = job.whole("--num-query-groups", 1)
    if "--group-query-attention" in job and heads % groups:
        raise ValueError(
            f"--num-attention-heads {heads} does not divide by --num-query-groups {groups}: choose other "
            "numbers"
        )


@dataclass(frozen=True, kw_only=True)
class Length:
    """The length of a job."""

    batch_rows: int
    """Rows in each iteration."""
    iterations: int
    """Iterations of the whole run."""


def length_of(job: GivenFlags) -> Length:
    """Return the length of a job.

    Raises:
        ValueError: no length is given, or two are, or the job would read no row.
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
    """Return the rows of an iteration: `--global-batch-size`, else a micro-batch a data-parallel rank."""
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
    """Raise ValueError where a pack's train split is empty."""
    if manifest.splits["train"].rows == 0:
        raise ValueError(
            f"the pack's train split has no rows of {manifest.row_tokens} tokens: pack more text, or "
            "shorter rows (--row-tokens)"
        )


def check_training(job: GivenFlags, manifest: Manifest) -> None:
    """Raise where length, learning rate, weight decay, saving or evaluation cannot be run as given.

    Megatron rejects most of the same, by assertions without a message.

    Args:
        job: the whole Megatron command line.
        manifest: of the pack.

    Raises:
        ValueError: names the flags with their values and the remedy.
    """
    length = length_of(job)
    for fault in itertools.chain(
        _unit_faults(job),
        _rate_faults(job),
        _warmup_faults(job, length),
        _decay_faults(job),
        _saving_faults(job, length),
    ):
        raise ValueError(fault)
    check_evaluation_rows(
        eval_iters=job.whole("--eval-iters", 0), batch=length.batch_rows, manifest=manifest
    )


def _unit_faults(job: GivenFlags) -> Iterator[str]:
    """Yield schedules in iterations with a length in samples, or the other way round."""
    unit, other = ("iters", "samples") if "--train-iters" in job else ("samples", "iters")
    for name in ("lr-warmup", "lr-decay", "lr-wsd-decay"):
        flag = f"--{name}-{other}"
        if flag in job and job.whole(flag, 0):
            yield (
                f"{job.text(flag)} beside {job.text(f'--train-{unit}')}: the schedule is counted in "
                f"{'iterations' if unit == 'iters' else 'samples'}; give --{name}-{unit}"
            )


def _rate_faults(job: GivenFlags) -> Iterator[str]:
    """Yield learning rates that are missing, too large, or above the rate that should bound them."""
    if "--lr" not in job:
        yield "--lr is missing: give the largest learning rate, such as --lr 1e-5"
        return
    rate = job.number("--lr", 0)
    for flag in ("--lr", "--decoupled-lr"):
        if job.number(flag, 0) > LARGEST_RATE:
            yield f"{job.text(flag)} is not a learning rate: give one up to {LARGEST_RATE:g}"
    for flag, largest in (
        ("--min-lr", "--lr"),
        ("--lr-warmup-init", "--lr"),
        ("--decoupled-min-lr", "--decoupled-lr"),
    ):
        if largest in job and job.number(flag, 0) > job.number(largest, rate):
            yield f"{job.text(flag)} is above {job.text(largest)}: give a smaller one"


def _warmup_faults(job: GivenFlags, length: Length) -> Iterator[str]:
    """Yield warm-ups and decays that do not fit into the run."""
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
    """Yield weight decays that change without both ends, or fall, and wrong betas of Adam."""
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


def _saving_faults(job: GivenFlags, length: Length) -> Iterator[str]:
    """Yield `--save` without an interval, and evaluations that would begin after the run."""
    if "--save" in job and "--save-interval" not in job:
        yield (
            f"{job.text('--save')} needs --save-interval: say after how many iterations a checkpoint is "
            "written (as many as --train-iters: one at the end)"
        )
    first = job.whole("--start-eval-at-iter", 0)
    if first > length.iterations and job.whole("--eval-iters", 0):
        yield (
            f"--start-eval-at-iter {first} is beyond the {length.iterations} iterations of the run: give a "
            "smaller number, or --eval-iters 0"
        )


def check_combinations(job: GivenFlags) -> None:
    """Raise ValueError for values out of range, and for flags that exclude each other."""
    for fault in itertools.chain(_scale_faults(job), _log_faults(job)):
        raise ValueError(fault)
    if "--fp16" in job and "--bf16" in job:
        raise ValueError("--fp16 and --bf16 are both given: choose one dtype")
    if "--fp8-format" in job and "--fp8-recipe" not in job:
        raise ValueError(
            f"{job.text('--fp8-format')} needs --fp8-recipe: Megatron would choose delayed scaling, which "
            "cannot be resumed; choose tensorwise"
        )
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
    """Yield loss scales of `--fp16` out of range, for which Megatron has bare assertions."""
    smallest = job.number("--min-loss-scale", 1)
    for flag in ("--initial-loss-scale", "--min-loss-scale", "--loss-scale-window"):
        if job.number(flag, 1) <= 0:
            yield f"{job.text(flag)} is not above 0: choose a larger one"
    if job.whole("--hysteresis", 1) < 1:
        yield f"{job.text('--hysteresis')} is not 1 or more: choose a larger one"
    if smallest > job.number("--initial-loss-scale", 2**32):
        yield f"--min-loss-scale {smallest:g} is above --initial-loss-scale (2^32 by default): change one"


def _log_faults(job: GivenFlags) -> Iterator[str]:
    """Yield profiles without a step, and signals that do not exist."""
    if "--profile" in job and "--use-pytorch-profiler" not in job:
        yield "--profile alone is for NVIDIA's Nsight, which was not tried here: add --use-pytorch-profiler"
    first, last = job.whole("--profile-step-start", 10), job.whole("--profile-step-end", 12)
    if "--profile" in job and first >= last:
        yield f"--profile-step-start {first} is not before --profile-step-end {last}: nothing is profiled"
    name = job.word("--exit-signal")
    if name is not None and name not in signal.Signals.__members__:
        yield f"{job.text('--exit-signal')} is not a signal: give a name such as SIGUSR2"


def check_machine(job: GivenFlags, *, is_cpu: bool) -> None:
    """Raise ValueError for flags that need a GPU in a job on the CPU.

    Args:
        job: the whole Megatron command line, with the flags that the machine dictates.
        is_cpu: whether the job uses the CPU runtime.
    """
    for flag, word in (("--distributed-backend", "nccl"), ("--transformer-impl", "transformer_engine")):
        if is_cpu and job.word(flag) == word:
            raise ValueError(f"{flag} {word} needs a GPU, and this job runs on the CPU: drop the flag")


def check_evaluation_rows(*, eval_iters: int, batch: int, manifest: Manifest) -> None:
    """Raise ValueError where an evaluation reads more rows than the pack's validation split has."""
    wanted, there = eval_iters * batch, manifest.splits["validation"].rows
    if wanted > there:
        raise ValueError(
            f"--eval-iters {eval_iters} x --global-batch-size {batch} asks for "
            f"{wanted} validation rows but the pack has {there}: choose --eval-iters "
            f"{there // batch} or less, or pack with a larger --validation-fraction"
        )


def check_supervision(rule: str, manifest: Manifest) -> None:
    """Raise ValueError for a weighting rule other than `none` on a pack of question-answer records.

    Fine-tuning is the same for every arm, so that arms differ in their continued pretraining alone.
    """
    if manifest.supervision is not None and rule != "none":
        raise ValueError(
            f"--token-weighting {rule} is not supported on a pack of question-answer records: "
            "fine-tuning is the same for every arm; use --token-weighting none"
        )


def check_rows_divide(args: Any) -> None:
    """Raise ValueError for rows that context-parallel ranks cannot share.

    Args:
        args: Megatron's namespace, parsed but not yet validated.
    """
    parts = 2 * args.context_parallel_size
    if args.context_parallel_size > 1 and args.seq_length % parts:
        raise ValueError(
            f"rows of {args.seq_length} tokens do not divide into the {parts} spans of "
            f"--context-parallel-size {args.context_parallel_size}: choose another size, or pack rows of a "
            f"multiple of {parts} tokens"
        )


def check_layers(args: Any) -> None:
    """Raise where the layers of the chosen implementation are not those of the model.

    Args:
        args: Megatron's namespace with our options.

    Raises:
        ValueError: norms after attention and MLP with Transformer Engine, or with fewer key/value groups
            than tensor-parallel ranks.
    """
    if args.post_norm and args.transformer_impl != "local":
        raise ValueError(
            "norms after attention and MLP (--post-norm, OLMo 2) are not supported with Transformer "
            "Engine's layers: add --transformer-impl local"
        )
    size = args.tensor_model_parallel_size
    if fault := shared_keys_fault(size, num_query_groups_of(args), post_norm=args.post_norm):
        raise ValueError(fault)
    check_layers_without_rope(args)


EIGHT_BIT_MULTIPLE = 16
"""Dimensions of an 8-bit matrix are multiples of this: cuBLAS reads 16 bytes at once."""


def check_eight_bit(args: Any) -> None:
    """Raise where matrix products cannot be in 8 bits (`--fp8-format`).

    Rows are never padded for it: the tokens of a micro-batch on a GPU divide, or the job does not start.

    Args:
        args: Megatron's namespace, parsed but not yet validated.

    Raises:
        ValueError: other layers than Transformer Engine's, which would silently stay in bf16, another dtype
            than bf16, or sizes that do not divide.
    """
    if args.fp8 is None:
        return
    if args.transformer_impl != "transformer_engine":
        raise ValueError(
            f"--fp8-format {args.fp8} needs the layers of Transformer Engine, the local ones would stay "
            "in bf16: install it and drop --transformer-impl local, or drop --fp8-format"
        )
    if not args.bf16:
        raise ValueError(f"--fp8-format {args.fp8} needs --bf16, for all that is not in 8 bits: add it")
    tensor = args.tensor_model_parallel_size
    sharing = tensor if args.sequence_parallel else 1
    heads = args.num_attention_heads
    width = args.kv_channels or args.hidden_size // heads
    groups = args.num_query_groups if args.group_query_attention else heads
    ffn = args.ffn_hidden_size or 4 * args.hidden_size
    sizes = {
        "tokens of a micro-batch": args.seq_length
        * args.micro_batch_size
        // (args.context_parallel_size * sharing),
        "hidden size": args.hidden_size,
        "width of its queries": heads * width // tensor,
        "width of its queries, keys and values": (heads + 2 * max(groups, tensor)) * width // tensor,
        "feed-forward width": ffn // tensor,
    }
    wrong = {name: size for name, size in sizes.items() if size % EIGHT_BIT_MULTIPLE}
    if wrong:
        listed = ", ".join(f"{name} {size}" for name, size in wrong.items())
        raise ValueError(
            f"--fp8-recipe {args.fp8_recipe} needs multiples of {EIGHT_BIT_MULTIPLE} on each GPU, but "
            f"there are: {listed}; choose another layout, or rows of another length, or drop --fp8-format"
        )


def check_layers_without_rope(args: Any) -> None:
    """Raise ValueError where --no-rope-freq does not say of every layer whether it has rotary embedding.

    Args:
        args: Megatron's namespace.
    """
    pattern, layers = args.no_rope_freq, args.num_layers
    if pattern is None:
        return
    listed = "or a list with a 0 or 1 for each layer, 1 for one without rotary embedding"
    if isinstance(pattern, int):
        if pattern < 1 or layers % pattern:
            fitting = ", ".join(str(every) for every in range(1, layers + 1) if layers % every == 0)
            raise ValueError(
                f"--no-rope-freq {pattern} does not divide the {layers} layers of the model: give one of "
                f"{fitting}, {listed}"
            )
    elif len(pattern) != layers or not {0, 1} >= set(pattern):
        raise ValueError(
            f"--no-rope-freq {short(pattern)} with {len(pattern)} entries does not describe the {layers} "
            f"layers of the model: give a number that divides {layers}, {listed}"
        )


def check_context_parallel(args: Any) -> None:
    """Raise ValueError for settings that context parallelism of packed rows does not support.

    Args:
        args: Megatron's validated namespace.
    """
    size = args.context_parallel_size
    if size == 1:
        return
    local_tokens = args.seq_length // size
    if args.sequence_parallel and local_tokens % args.tensor_model_parallel_size:
        raise ValueError(
            f"--sequence-parallel: the {local_tokens} tokens of a row that each of {size} context-parallel "
            f"ranks has do not divide by --tensor-model-parallel-size {args.tensor_model_parallel_size}: "
            "choose other sizes, or pack rows of another length"
        )


def check_scores_in_step(args: Any) -> None:
    """Raise ValueError for settings under which short windows cannot be scored inside the step.

    Args:
        args: Megatron's validated namespace.
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
