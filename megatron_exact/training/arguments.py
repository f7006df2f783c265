"""The command line of a training job: our own options, and the Megatron flags that follow from the pack.

A job is described by a pack and any Megatron flags. Row length, vocabulary and tokenizer come from the
manifest; a flag that names them as well is compared, never obeyed. What the method needs is always on,
and what would break document masking is refused before any model is built.

Order of precedence: defaults, then the user's flags, then what the pack and the method dictate.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from megatron_exact.data.manifest import Manifest
from megatron_exact.data.tokenizers import tokenizer_sha256
from megatron_exact.exposure import (
    DEFAULT_ALPHA,
    DEFAULT_GAMMA,
    RULES,
    Weighting,
    bucket_lower_bounds,
    build_weighting,
)

EXAMPLE = """\
example, two processes on one machine, tensor parallel:

  torchrun --nproc-per-node 2 -m megatron_exact.training.pretrain \\
      --pack packs/long --token-weighting exact \\
      --tensor-model-parallel-size 2 --num-layers 4 --hidden-size 128 --num-attention-heads 4 \\
      --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope \\
      --global-batch-size 8 --train-iters 100 --lr 1e-3 --load base --finetune --save runs/exact

Every other flag is Megatron's own and is passed on; --megatron-help lists them.
"""


DECIDED_FLAGS = frozenset(
    ("--tokenizer-model", "--tokenizer-type", "--load", "--pretrained-checkpoint", "--ckpt-step")
)
"""The user's flags that were compared or decided upon before Megatron sees them."""


def build_parser() -> argparse.ArgumentParser:
    """Our options alone; Megatron's are parsed by Megatron."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_exact.training.pretrain",
        description="Continue pretraining on a packed dataset with effective-context weighting.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    parser.add_argument("--megatron-help", action="store_true", help="list Megatron's own flags")
    return parser


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options that Megatron's parser has to know as well."""
    group = parser.add_argument_group("megatron_exact")
    group.add_argument("--pack", metavar="DIR", help="packed dataset (tools/pack_corpus.py)")
    group.add_argument(
        "--source-root", metavar="DIR", help="where the .bin/.idx files are, if they were moved"
    )
    group.add_argument(
        "--token-weighting",
        default="none",
        metavar="RULE",
        help="; ".join(f"{name}: {rule.summary}" for name, rule in RULES.items()),
    )
    group.add_argument(
        "--exact-alpha",
        type=float,
        default=DEFAULT_ALPHA,
        help="mean extra weight of the tail (default %(default)s, the paper's)",
    )
    group.add_argument(
        "--exact-gamma",
        type=float,
        default=DEFAULT_GAMMA,
        help="exponent of inverse frequency in the tail (default %(default)s, the paper's)",
    )
    group.add_argument(
        "--exact-tau",
        type=float,
        default=None,
        help="first effective context of the tail, tokens (default: row length / 4, the paper's)",
    )
    group.add_argument(
        "--run-dir", metavar="DIR", help="where run.json and losses.jsonl go (default: --save)"
    )
    group.add_argument("--log-row-ids", action="store_true", help="write the row numbers of each iteration")
    group.add_argument(
        "--cpu", action="store_true", help="run on the CPU even where a GPU exists (gloo, local spec)"
    )
    return parser


def flag_value(argv: Sequence[str], flag: str) -> str | None:
    """Value of the last `--flag value` or `--flag=value` in argv, or None."""
    found = None
    for position, word in enumerate(argv):
        if word == flag and position + 1 < len(argv):
            found = argv[position + 1]
        elif word.startswith(flag + "="):
            found = word.removeprefix(flag + "=")
    return found


def has_flag(argv: Sequence[str], flag: str) -> bool:
    """Whether `--flag` or `--flag=value` is given."""
    return any(word == flag or word.startswith(flag + "=") for word in argv)


def compare_with_pack(argv: Sequence[str], manifest: Manifest) -> None:
    """Refuse flags that contradict the pack.

    Raises:
        ValueError: names the flag, its value and the pack's.
    """
    vocabulary = manifest.tokenizer.vocab_size if manifest.tokenizer else None
    for flag, ours in (("--seq-length", manifest.row_tokens), ("--vocab-size", vocabulary)):
        value = flag_value(argv, flag)
        if value is not None and ours is not None and value != str(ours):
            raise ValueError(
                f"{flag} {value} differs from the pack, which has {ours}: "
                "drop the flag, or pack the corpus again"
            )
    path = flag_value(argv, "--tokenizer-model")
    if path is not None and manifest.tokenizer is not None:
        if not Path(path).exists():
            raise ValueError(f"--tokenizer-model {path} does not exist: check the path, or drop the flag")
        given = tokenizer_sha256(path)
        if given != manifest.tokenizer.sha256:
            raise ValueError(
                f"--tokenizer-model {path} has sha256 {given[:12]}..., but the pack was tokenized with "
                f"{manifest.tokenizer.path} ({manifest.tokenizer.sha256[:12]}...): "
                "use the same tokenizer, or tokenize and pack again"
            )


def megatron_arguments(
    argv: Sequence[str],
    manifest: Manifest,
    *,
    runtime_arguments: Sequence[str],
    start: Sequence[str],
    run_dir: Path | None,
) -> list[str]:
    """The whole Megatron command line of a job.

    Args:
        argv: the user's flags without ours.
        manifest: of the pack.
        runtime_arguments: what the machine dictates (`CPU_ARGUMENTS`), overridable.
        start: the flags of `Start.arguments`.
        run_dir: folder of the run's records, if any.

    Raises:
        ValueError: a vocabulary that nobody names.
    """
    vocabulary = manifest.tokenizer.vocab_size if manifest.tokenizer else flag_value(argv, "--vocab-size")
    if vocabulary is None:
        raise ValueError(
            "the pack names no tokenizer and so no vocabulary: add --vocab-size, or pack again "
            "with --tokenizer"
        )
    row_tokens = str(manifest.row_tokens)
    defaults = [
        *("--micro-batch-size", "1"),
        *("--attention-dropout", "0"),
        *("--hidden-dropout", "0"),
        *("--max-position-embeddings", row_tokens),
        *("--eval-interval", "1000"),
        *runtime_arguments,
    ]
    if not runtime_arguments and importlib.util.find_spec("transformer_engine") is None:
        defaults += ["--transformer-impl", "local"]
    if run_dir is not None:
        defaults += ["--tensorboard-dir", str(run_dir / "tensorboard")]
    if not has_flag(argv, "--eval-iters"):
        batch = int(flag_value(argv, "--global-batch-size") or 1)
        defaults += ["--eval-iters", str(min(100, manifest.splits["validation"].rows // batch))]
    dictated = [
        *("--seq-length", row_tokens),
        # Training needs no text: the ids are checked where they are made
        *("--tokenizer-type", "NullTokenizer"),
        *("--vocab-size", str(vocabulary)),
        # Padded rows of the vocabulary would enter the softmax and make the loss depend on TP
        *("--make-vocab-size-divisible-by", "1"),
        "--calculate-per-token-loss",
        "--dataloader-inter-document-masking",
        # Without it a model built with the wrong switches loads, and drops keys, in silence
        *("--dist-ckpt-strictness", "raise_all"),
    ]
    return [*defaults, *without_flags(argv, DECIDED_FLAGS), *start, *dictated]


def without_flags(argv: Sequence[str], flags: Collection[str]) -> list[str]:
    """argv without these flags and their values."""
    kept: list[str] = []
    skip_value = False
    for word in argv:
        if skip_value:
            skip_value = False
        elif word in flags:
            skip_value = True
        elif word.split("=", 1)[0] not in flags:
            kept.append(word)
    return kept


REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("context_parallel_size", 1, "context parallelism of packed rows is not there yet"),
    ("reset_attention_mask", False, "boundaries come from the pack, not from scanning for EOD"),
    ("reset_position_ids", False, "boundaries come from the pack, not from scanning for EOD"),
    ("eod_mask_loss", False, "choose --mask-cross-document-targets when packing"),
    ("sft", False, "the rows come from --pack"),
    ("mtp_num_layers", None, "multi-token prediction would bypass the token weights"),
    ("hybrid_context_parallel", False, "the rows of a pack have one length"),
    ("full_validation", False, "choose --eval-iters"),
    ("multiple_validation_sets", False, "a pack has one validation split"),
    ("data_path", None, "the data come from --pack"),
    ("train_data_path", None, "the data come from --pack"),
    ("valid_data_path", None, "the data come from --pack"),
    ("mock_data", False, "the data come from --pack"),
    ("dataloader_type", "single", "order and epochs belong to the pack"),
    ("legacy", False, "only Megatron-Core models take packed rows"),
    ("label_smoothing", 0.0, "the method weighs plain cross-entropies"),
    ("dist_ckpt_optim_fully_reshardable", False, "0.19.2 writes damaged optimizer states with it"),
    ("use_megatron_fsdp", False, "not checked with packed rows"),
    ("use_torch_fsdp2", False, "not checked with packed rows"),
)
"""Megatron argument, the only value that a job may have, and why."""


def refuse_flags(args: Any) -> None:
    """Refuse flags under which document masking, weights or records would not hold.

    Args:
        args: Megatron's namespace, parsed but not yet validated.

    Raises:
        ValueError: the flag, its value and the reason.
    """
    for name, only, reason in REFUSED:
        value = getattr(args, name, None)
        if value is not None and value != only and not (only is None and not value):
            raise ValueError(f"--{name.replace('_', '-')} {value} is refused: {reason}")


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
    if args.vocab_size % args.tensor_model_parallel_size:
        raise ValueError(
            f"a vocabulary of {args.vocab_size} does not divide by "
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size}: padding would enter the "
            "softmax and change the loss; choose another size, or a tokenizer with a suitable vocabulary"
        )
    if args.attention_backend.name not in ("auto", "flash", "fused"):
        raise ValueError(
            f"--attention-backend {args.attention_backend.name} does not keep documents apart in "
            "packed rows: use auto, flash or fused"
        )
    _check_evaluation_rows(args, manifest)
    if manifest.splits["train"].rows == 0:
        raise ValueError("the pack's train split has no rows: pack more text or shorter rows")


def _check_evaluation_rows(args: Any, manifest: Manifest) -> None:
    wanted, there = args.eval_iters * args.global_batch_size, manifest.splits["validation"].rows
    if wanted > there:
        raise ValueError(
            f"--eval-iters {args.eval_iters} x --global-batch-size {args.global_batch_size} asks for "
            f"{wanted} validation rows but the pack has {there}: choose --eval-iters "
            f"{there // args.global_batch_size} or less, or pack with a larger --validation-fraction"
        )


def weighting_of(options: argparse.Namespace, manifest: Manifest) -> Weighting:
    """The rule of a job applied to the training split's counts.

    Raises:
        ValueError: an unknown rule or parameters out of range.
    """
    return build_weighting(
        options.token_weighting,
        manifest.splits["train"].exposure.counts,
        bucket_lower_bounds(manifest.row_tokens),
        manifest.row_tokens,
        alpha=options.exact_alpha,
        gamma=options.exact_gamma,
        tau=options.exact_tau,
    )
