"""Our own flags beside Megatron's: token weighting, pack, records and limits, and their checks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_exact.command_line import ToolParser, non_negative, positive_int
from megatron_exact.data.manifest import Manifest
from megatron_exact.data.rows import TargetLayout
from megatron_exact.data.score_files import ScoreReader, ScoreRecord, open_record
from megatron_exact.data.tokenizers import made_by
from megatron_exact.exposure import (
    DEFAULT_ALPHA,
    DEFAULT_GAMMA,
    RULES,
    RuleParameters,
    Weighting,
    bucket_lower_bounds,
    build_weighting,
    find_rule,
    readers,
)
from megatron_exact.exposure.confidence import (
    CONFIDENCE_RULES,
    DEFAULT_SPARSE_KAPPA,
    ConfidenceParameters,
    default_windows,
)
from megatron_exact.model.families import PRESETS
from megatron_exact.model.shapes import GPU_TILES, Tiles
from megatron_exact.training.flag_classes import GivenFlags, read_flags
from megatron_exact.training.qk_timing import add_qk_timing_options
from megatron_exact.training.refusals import Length, batch_rows

# ----------------------------------------------------------------------------------------------------
# Options of the confidence-based weighting rules, and what they mean for a pack.


def add_confidence_options(group: Any) -> None:
    """Add the options.

    Args:
        group: an argument group of argparse.
    """
    group.add_argument(
        "--confidence-scores",
        metavar="DIR",
        help="stored scores of the pack (megatron-exact score) for dense, sparse, longce, ppmi and npmi; "
        "without them the model in training scores short windows itself, inside each step",
    )
    group.add_argument(
        "--confidence-lambda",
        type=float,
        default=ConfidenceParameters.lam,
        metavar="L",
        help="dense: what every target weighs anyway, 0 to 1 (default: %(default)s; not stated in the "
        "paper)",
    )
    group.add_argument(
        "--confidence-kappa",
        type=float,
        metavar="K",
        help="sparse, ppmi, npmi: the fraction of a row's targets that keep a weight (default: "
        f"{DEFAULT_SPARSE_KAPPA} for sparse, all for the others; not stated in the paper)",
    )
    group.add_argument(
        "--confidence-cap",
        type=float,
        default=ConfidenceParameters.cap,
        metavar="W",
        help="longce: largest weight (default: %(default)s; not stated in the paper)",
    )
    group.add_argument(
        "--confidence-s",
        type=float,
        default=ConfidenceParameters.s,
        metavar="S",
        help="ppmi, npmi: the factor by which a likelihood has to change (default: %(default)s; not stated "
        "in the paper)",
    )
    group.add_argument(
        "--short-window",
        type=positive_int,
        metavar="N",
        help="without --confidence-scores: tokens of a short window (default: row length / 4)",
    )
    group.add_argument(
        "--short-stride",
        type=positive_int,
        metavar="N",
        help="without --confidence-scores: tokens from one short window to the next (default: 3/4 of it)",
    )


def confidence_parameters(options: argparse.Namespace, manifest: Manifest) -> dict[str, Any]:
    """What `build_weighting` takes of these options; nothing for another rule.

    Raises:
        ValueError: scores that no rule would read, of another pack, or beside windows of one's own.
    """
    rule = options.token_weighting
    if rule not in CONFIDENCE_RULES:
        if options.confidence_scores is not None:
            raise ValueError(
                f"--confidence-scores with --token-weighting {rule}, which reads none: choose one of "
                f"{', '.join(CONFIDENCE_RULES)}, or drop it"
            )
        return {}
    scores = score_record(options, manifest)
    if scores is None:
        windows = default_windows(
            manifest.row_tokens, window=options.short_window, stride=options.short_stride
        )
        window, stride = windows.window, windows.stride
    elif options.short_window is not None or options.short_stride is not None:
        raise ValueError(
            "--short-window and --short-stride with --confidence-scores: windows were chosen when the pack "
            "was scored; drop them, or score it again (megatron-exact score)"
        )
    else:
        window, stride = scores.short_window, scores.short_stride
    kappa = options.confidence_kappa
    return {
        "has_scores": scores is not None,
        "confidence_lambda": options.confidence_lambda,
        "confidence_kappa": DEFAULT_SPARSE_KAPPA if kappa is None and rule == "sparse" else kappa,
        "confidence_cap": options.confidence_cap,
        "confidence_s": options.confidence_s,
        "short_window": window,
        "short_stride": stride,
    }


def score_record(options: Any, manifest: Manifest) -> ScoreRecord | None:
    """The record of the stored scores of a job, None without.

    Raises:
        ValueError, FileNotFoundError: missing, incomplete or of another pack.
    """
    if options.confidence_scores is None:
        return None
    return open_record(options.confidence_scores, manifest, "train")


def score_reader(options: Any, manifest: Manifest) -> ScoreReader | None:
    """The stored scores of the training split, None without; raises as `score_record`."""
    if options.confidence_scores is None:
        return None
    return ScoreReader(options.confidence_scores, manifest, "train")


# ----------------------------------------------------------------------------------------------------
# Our own options of a training job.

EXAMPLE = """\
example, two processes on one machine, tensor parallel:

  torchrun --nproc-per-node 2 -m megatron_exact.training.pretrain \\
      --pack packs/long --token-weighting exact \\
      --tensor-model-parallel-size 2 --global-batch-size 8 --train-iters 100 --lr 1e-5 \\
      --save-interval 50 --load runs/exact --save runs/exact --pretrained-checkpoint base

It starts from the weights and the model of base (megatron-exact import-hf makes it from a Hugging Face
folder); called again, it goes on from its own last checkpoint. Without a checkpoint, --preset or
Megatron's own flags (--num-layers, ...) say what the model is.
Every other flag is Megatron's own and is passed on; --megatron-help lists them.
"""


def build_parser() -> argparse.ArgumentParser:
    """Our options alone; Megatron's are parsed by Megatron."""
    parser = ToolParser(
        prog="python -m megatron_exact.training.pretrain",
        description="Continue pretraining on a packed dataset with effective-context weighting.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(parser)
    add_entry_options(parser)
    return parser


def add_entry_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that are answered or expanded before Megatron parses anything."""
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="begin with the flags of a named training stage; flags given here win "
        "(list: python -m megatron_exact.training.recipes)",
    )
    parser.add_argument(
        "--recipe-set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the recipe: budget_tokens=2G, nodes=2, recompute=full; repeatable",
    )
    parser.add_argument(
        "--print-arguments",
        action="store_true",
        help="print the whole command with the recipe expanded, for a shell, and exit",
    )
    parser.add_argument("--megatron-help", action="store_true", help="list Megatron's own flags")


def bucket_weights(text: str) -> tuple[tuple[int, float], ...]:
    """argparse type: `0:1.1,8:1.05`, lower edges and weights."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((int(lower), float(weight)) for lower, weight in pairs)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} does not name buckets and weights, such as 0:1.1,8:1.05"
        ) from None


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options that Megatron's parser has to know as well."""
    group = parser.add_argument_group("megatron_exact")
    _add_input_options(group)
    _add_weighting_options(group)
    add_confidence_options(group)
    _add_record_options(group)
    _add_loss_head_options(group)
    _add_checkpoint_options(group)
    _add_watch_options(group)
    add_qk_timing_options(group)
    group.add_argument("--log-row-ids", action="store_true", help="write the row numbers of each iteration")
    group.add_argument(
        "--cpu", action="store_true", help="run on the CPU even where a GPU exists (gloo, local spec)"
    )
    return parser


def _add_input_options(group: argparse._ArgumentGroup) -> None:
    """What is trained on what."""
    group.add_argument("--pack", metavar="DIR", help="packed dataset (megatron-exact pack)")
    group.add_argument(
        "--source-root", metavar="DIR", help="where the .bin/.idx files are, if they were moved"
    )
    group.add_argument(
        "--verify-data",
        action="store_true",
        help="read every byte of the corpora at the start and compare it with what was packed (default: "
        "sizes, indices, a sample of each .bin and 16 blocks of 64 MB)",
    )
    group.add_argument(
        "--preset",
        metavar="NAME",
        help=f"the model: {', '.join(PRESETS)} (default: that of the checkpoint, or Megatron's flags)",
    )


def _add_weighting_options(group: argparse._ArgumentGroup) -> None:
    """The rule, and the parameters of those that weigh by a table of buckets."""
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
        "--exact-cap",
        type=float,
        metavar="W",
        help="largest weight that the formula may give, 1 or more; what it cuts off is dealt out nowhere "
        "(default: no cap, as in the paper)",
    )
    group.add_argument(
        "--exact-bucket-weights",
        type=bucket_weights,
        default=(),
        metavar="LOWER:W,...",
        help="weights set by hand of buckets named by their lower edge, such as 0:1.1,8:1.05; with 0 a "
        "bucket trains nothing, and still counts in the number of targets (default: the formula's)",
    )


def _add_record_options(group: argparse._ArgumentGroup) -> None:
    """What a run writes of itself."""
    group.add_argument(
        "--run-dir", metavar="DIR", help="where run.json and losses.jsonl go (default: --save)"
    )
    group.add_argument(
        "--peak-tflops",
        type=float,
        metavar="N",
        help="peak of one device, for the MFU in the log (default: known for NVIDIA's data-centre GPUs)",
    )


def _add_loss_head_options(group: argparse._ArgumentGroup) -> None:
    """How the loss is computed."""
    group.add_argument(
        "--loss-head",
        choices=("tiled", "stock"),
        default="tiled",
        help="tiled: logits a tile at a time, computed again in backward, a few percent of the memory; "
        "stock: upstream's, whose logits of all tokens exist at once (default: %(default)s)",
    )
    for side in ("tokens", "columns"):
        sizes = (getattr(Tiles(), side), getattr(GPU_TILES, side))
        group.add_argument(
            f"--loss-head-{side}",
            type=positive_int,
            metavar="N",
            help=f"{side} of a tile of the tiled loss head (default: {sizes[0]} on a CPU, {sizes[1]} on "
            "a GPU)",
        )


def settle_tiles(options: argparse.Namespace, *, on_cpu: bool) -> None:
    """Enter the machine's sizes of a tile where none are given."""
    tiles = Tiles() if on_cpu else GPU_TILES
    options.loss_head_tokens = options.loss_head_tokens or tiles.tokens
    options.loss_head_columns = options.loss_head_columns or tiles.columns


def _add_checkpoint_options(group: argparse._ArgumentGroup) -> None:
    """What is loaded, and what is kept."""
    group.add_argument(
        "--carry-optimizer",
        action="store_true",
        help="take the optimizer's states along from --pretrained-checkpoint, not the weights alone; "
        "iteration, data and learning rate start anew",
    )
    group.add_argument(
        "--skip-integrity-check",
        action="store_true",
        help="load a checkpoint without comparing its files with integrity.json; nothing of it is executed "
        "either way",
    )
    group.add_argument(
        "--keep-last",
        type=positive_int,
        metavar="N",
        help="keep the newest N complete checkpoints; older ones are removed once the step after a save "
        "has shown that it is good, so the last one comes on top (default: keep all)",
    )
    group.add_argument(
        "--keep-every",
        type=positive_int,
        metavar="M",
        help="with --keep-last: iterations divisible by M stay (default: none)",
    )
    group.add_argument(
        "--save-minutes",
        type=non_negative,
        metavar="N",
        help="save when N minutes have passed since the last save, too; 0: only each --save-interval "
        "(default: by Young's formula, from the time of a save and one failure in 50,000 GPU hours)",
    )


def _add_watch_options(group: argparse._ArgumentGroup) -> None:
    """When a job says something, and when it ends."""
    group.add_argument(
        "--on-nonfinite",
        choices=("stop", "skip"),
        default="stop",
        help="a loss or gradient of NaN or Inf: stop the job, or skip the step; both tell rank, row and "
        "segment (default: %(default)s)",
    )
    group.add_argument(
        "--spike-deviations",
        type=non_negative,
        default=8.0,
        metavar="K",
        help="tell of a loss K robust deviations above the median of the iterations before it, with its "
        "rows; 0: never (default: %(default)s)",
    )
    group.add_argument(
        "--spike-window",
        type=positive_int,
        default=64,
        metavar="N",
        help="iterations that a spike is measured by (default: %(default)s)",
    )
    group.add_argument(
        "--rank-timeout-seconds",
        type=non_negative,
        default=300.0,
        metavar="T",
        help="end the job, and name the rank, when one makes no progress for T seconds; start-up, the "
        "first iteration, saves and evaluations have 6 T; 0: never (default: %(default)g)",
    )


# ----------------------------------------------------------------------------------------------------
# `--megatron-help`: the flags of Megatron's own parser.


def show_megatron_help() -> None:
    """Print upstream's help and exit with code 0.

    Some of its texts hold a bare %, which argparse takes for a format: those are printed as they are.
    """
    from megatron.training.arguments import parse_args

    stock = argparse.HelpFormatter._expand_help

    def expand(self: argparse.HelpFormatter, action: argparse.Action) -> str:
        try:
            return stock(self, action)
        except (KeyError, TypeError, ValueError):
            return action.help or ""

    argparse.HelpFormatter._expand_help = expand  # type: ignore[method-assign]
    try:
        sys.argv = [sys.argv[0], "--help"]
        parse_args()
    finally:
        argparse.HelpFormatter._expand_help = stock  # type: ignore[method-assign]


# ----------------------------------------------------------------------------------------------------
# The flags of a training job: those the user gives, and the Megatron flags that follow from the pack.
#
# A job is described by a pack and any Megatron flags. Row length, vocabulary and tokenizer come from the
# manifest; a flag that names them as well is compared, never obeyed. What the method needs is always on,
# and what would break document masking is refused before any model is built.
#
# Order of precedence: defaults, then the user's flags, then what the pack and the method dictate.

EVAL_INTERVAL = 1000
"""Iterations between two evaluations, where the user names no number."""
EVALUATION_DIVISOR = 10
"""By default an evaluation reads this many times fewer rows than are trained between two of them."""
DECIDED_FLAGS = frozenset(
    ("--tokenizer-model", "--tokenizer-type", "--load", "--pretrained-checkpoint", "--ckpt-step")
)
"""The user's flags that were compared or decided upon before Megatron sees them."""


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
    row_tokens = flag_value(argv, "--seq-length")
    if row_tokens is not None and row_tokens != str(manifest.row_tokens):
        raise ValueError(
            f"--seq-length {row_tokens} differs from the pack, which has {manifest.row_tokens}: "
            "drop the flag, or pack the corpus again"
        )
    vocabulary = flag_value(argv, "--vocab-size")
    known = manifest.tokenizer.vocab_size if manifest.tokenizer else 0
    if vocabulary is not None and (not vocabulary.isdigit() or int(vocabulary) < known):
        raise ValueError(
            f"--vocab-size {vocabulary} is below the {known} ids of the pack's tokenizer: drop the flag, "
            "or give the number of rows of the model's embedding (Qwen2.5 has more rows than ids)"
        )
    path = flag_value(argv, "--tokenizer-model")
    if path is not None and manifest.tokenizer is not None:
        if not Path(path).exists():
            raise ValueError(f"--tokenizer-model {path} does not exist: check the path, or drop the flag")
        if not made_by(manifest.tokenizer.sha256, path):
            raise ValueError(
                f"--tokenizer-model {path} is another tokenizer than {manifest.tokenizer.path} "
                f"(sha256 {manifest.tokenizer.sha256[:12]}...), which made the pack: use the same one, or "
                "tokenize and pack again"
            )


def require_ids_in_embedding(manifest: Manifest, rows: int, source: str) -> None:
    """Refuse a pack with token ids that the model has no row for.

    Args:
        manifest: of the pack.
        rows: of the model's embedding.
        source: where that number comes from.

    Raises:
        ValueError: names the largest id, its corpus and the rows.
    """
    for one in manifest.sources:
        if one.largest_id is not None and one.largest_id >= rows:
            raise ValueError(
                f"the corpus {one.prefix} of the pack has the token id {one.largest_id}, but the embedding "
                f"of {source} has {rows} rows, ids 0 to {rows - 1}: tokenize the corpus with the model's "
                "tokenizer, or train a model with more rows"
            )


def megatron_arguments(
    argv: Sequence[str],
    manifest: Manifest,
    *,
    runtime_arguments: Sequence[str],
    start: Sequence[str],
    run_dir: Path | None,
    model_flags: Sequence[str] = (),
    window: int = 0,
    eval_iters: int | None = None,
) -> list[str]:
    """The whole Megatron command line of a job.

    Args:
        argv: the user's flags without ours.
        manifest: of the pack.
        runtime_arguments: what the machine dictates (`CPU_ARGUMENTS`, `missing_kernels`), overridable.
        start: the flags of `Start.arguments`.
        run_dir: folder of the run's records, if any.
        model_flags: what follows from the shape of the model (`JobModel.flags`).
        window: tokens that the model's config promises; only widens `--max-position-embeddings`.
        eval_iters: iterations of an evaluation in this run so far, unless the user says another number.

    Raises:
        ValueError: a vocabulary that nobody names.
    """
    known = manifest.tokenizer.vocab_size if manifest.tokenizer else None
    # compared in compare_with_pack, JobModel.flags and check_vocabulary
    vocabulary = flag_value((*argv, *model_flags), "--vocab-size") or known
    if vocabulary is None:
        raise ValueError(
            "the pack names no tokenizer and so no vocabulary: add --vocab-size, or pack again "
            "with --tokenizer"
        )
    if has_flag((*argv, *model_flags), "--vocab-size") and str(vocabulary).isdigit():
        source = "--vocab-size" if has_flag(argv, "--vocab-size") else "the model"
        require_ids_in_embedding(manifest, int(vocabulary), source)
    defaults = _defaults(argv, manifest, window=window, run_dir=run_dir, eval_iters=eval_iters)
    dictated = _dictated(argv, manifest, vocabulary=vocabulary)
    chosen = without_flags(argv, DECIDED_FLAGS)
    return [*defaults, *runtime_arguments, *model_flags, *chosen, *start, *dictated]


def _defaults(
    argv: Sequence[str], manifest: Manifest, *, window: int, run_dir: Path | None, eval_iters: int | None
) -> list[str]:
    """What the user's flags may change."""
    defaults = [
        *("--micro-batch-size", "1"),
        *("--attention-dropout", "0"),
        *("--hidden-dropout", "0"),
        *("--max-position-embeddings", str(max(manifest.row_tokens, window))),
        *("--eval-interval", str(EVAL_INTERVAL)),
        # Megatron's 100 leaves a slow run silent; the CPU runtime makes it 1
        *("--log-interval", "10"),
        # It saves random states and asks all ranks for reruns at every step; our watch never asks for one
        *("--rerun-mode", "disabled"),
    ]
    if run_dir is not None:
        defaults += ["--tensorboard-dir", str(run_dir / "tensorboard")]
    if not has_flag(argv, "--eval-iters"):
        number = default_eval_iters(read_flags(argv), manifest) if eval_iters is None else eval_iters
        defaults += ["--eval-iters", str(number)]
    return defaults


def default_eval_iters(given: GivenFlags, manifest: Manifest) -> int:
    """Iterations of one evaluation where the user names no number.

    A tenth of the iterations that are trained between two evaluations, from 1 to 100, as far as the
    validation rows reach: an evaluation is forward alone, so all of them cost about 3 % of the training.
    """
    batch = batch_rows(given)
    trained = given.whole("--train-iters", given.whole("--train-samples", 0) // batch)
    between = min(trained, given.whole("--eval-interval", EVAL_INTERVAL))
    wanted = min(100, max(1, between // EVALUATION_DIVISOR))
    return min(wanted, manifest.splits["validation"].rows // batch)


def describe_evaluations(job: GivenFlags, length: Length, manifest: Manifest) -> str:
    """One line that says what the evaluations of a whole run will cost.

    Args:
        job: the whole Megatron command line.
        length: of the run.
        manifest: of the pack.
    """
    iterations, interval = job.whole("--eval-iters", 0), job.whole("--eval-interval", EVAL_INTERVAL)
    if not iterations:
        empty = manifest.splits["validation"].rows < length.batch_rows
        why = "the pack has fewer validation rows than a batch" if empty else "--eval-iters 0"
        return f"no evaluation: {why}"
    before = max(0, job.whole("--start-eval-at-iter", 0) - 1) // interval  # left out
    times = max(0, length.iterations // interval - before)
    times += length.iterations % interval != 0  # and once at the end
    rows = iterations * length.batch_rows
    # a forward pass is a third of a step: the backward pass costs twice as much
    share = times * iterations / 3 / length.iterations
    return (
        f"evaluation: {times} x {rows} validation rows (every {interval} iterations and at the end), about "
        f"{share:.1%} of the time of training; --eval-iters 0 leaves it out"
    )


def _dictated(argv: Sequence[str], manifest: Manifest, *, vocabulary: int | str) -> list[str]:
    """What the pack and the method decide."""
    dictated = [
        *("--seq-length", str(manifest.row_tokens)),
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
    if has_flag(argv, "--async-save"):
        # without the first, upstream saves synchronously after a warning
        dictated += ["--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
    return dictated


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
        position_counts=TargetLayout(options.pack, manifest, "train", options.source_root).position_counts,
        alpha=options.exact_alpha,
        gamma=options.exact_gamma,
        tau=options.exact_tau,
        cap=options.exact_cap,
        bucket_weights=tuple(options.exact_bucket_weights),
        **confidence_parameters(options, manifest),
    )


# ----------------------------------------------------------------------------------------------------
# Flags of the weighting rules, and which of them a rule reads: the table of rules says so.
#
# A flag that the rule does not read would change nothing, and the run would look like another than it is.


def flag_of(parameter: str) -> str:
    """The flag that sets a field of RuleParameters."""
    prefix = "" if parameter.startswith(("confidence_", "short_")) else "exact_"
    return f"--{prefix}{parameter}".replace("_", "-")


PARAMETER_OF = {flag_of(field.name): field.name for field in fields(RuleParameters)}
"""Flag -> field of RuleParameters."""


def unread_flags(rule: str) -> tuple[str, ...]:
    """Flags of other rules' parameters, each of which takes one value.

    Raises:
        ValueError: an unknown rule.
    """
    own = find_rule(rule).parameters
    return tuple(flag for flag, parameter in PARAMETER_OF.items() if parameter not in own)


def refuse_unread(argv: Sequence[str], rules: Sequence[str]) -> None:
    """Refuse flags that none of these rules reads.

    Args:
        argv: a command line, recipes expanded.
        rules: of the job, or of all arms that get the command line.

    Raises:
        ValueError: the flags, their values and the rules that read them; an unknown rule.
    """
    unread = set(PARAMETER_OF).intersection(*map(unread_flags, rules))
    found = [
        f"{flag} {flag_value(argv, flag)} (read by {', '.join(readers(parameter))})"
        for flag, parameter in PARAMETER_OF.items()
        if flag in unread and has_flag(argv, flag)
    ]
    if found:
        who = f"--token-weighting {rules[0]} does" if len(rules) == 1 else f"the arms {', '.join(rules)} do"
        raise ValueError(
            f"{who} not read {' and '.join(found)}: nothing would change; drop what is not read, or choose "
            "a rule that reads it"
        )
