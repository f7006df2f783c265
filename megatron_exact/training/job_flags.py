"""The flags of a training job: those the user gives, and the Megatron flags that follow from the pack.

A job is described by a pack and any Megatron flags. Row length, vocabulary and tokenizer come from the
manifest; a flag that names them as well is only compared. What the method needs is always on, and what
would break document masking is an error before any model is built.

Order of precedence: defaults, then the user's flags, then what the pack and the method dictate.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from megatron_exact.data.manifest import Manifest
from megatron_exact.data.tokenizers import made_by
from megatron_exact.training.flag_classes import GivenFlags, read_flags
from megatron_exact.training.refusals import Length, batch_rows

EVAL_INTERVAL = 1000
"""Iterations between two evaluations where the user gives no number."""
EVALUATION_DIVISOR = 10
"""By default an evaluation reads one row for this many rows of training since the last one."""
DECIDED_FLAGS = frozenset(
    ("--tokenizer-model", "--tokenizer-type", "--load", "--pretrained-checkpoint", "--ckpt-step")
)
"""The user's flags that were compared or decided upon before Megatron sees them."""


def flag_value(argv: Sequence[str], flag: str) -> str | None:
    """Return the value of the last `--flag value` or `--flag=value` in argv, or None."""
    found = None
    for position, word in enumerate(argv):
        if word == flag and position + 1 < len(argv):
            found = argv[position + 1]
        elif word.startswith(flag + "="):
            found = word.removeprefix(flag + "=")
    return found


def has_flag(argv: Sequence[str], flag: str) -> bool:
    """Return whether `--flag` or `--flag=value` is given."""
    return any(word == flag or word.startswith(flag + "=") for word in argv)


def without_flags(argv: Sequence[str], flags: Collection[str]) -> list[str]:
    """Return argv without these flags and their values."""
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


def compare_with_pack(argv: Sequence[str], manifest: Manifest) -> None:
    """Raise for flags that contradict the pack.

    Raises:
        ValueError: the flag, its value and the pack's.
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
    """Raise for a pack with token ids that have no row in the model's embedding.

    Args:
        manifest: manifest of the pack.
        rows: number of rows of the embedding.
        source: where that number comes from.

    Raises:
        ValueError: the largest id, its corpus and the rows.
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
    """Return the whole Megatron command line of a job.

    Args:
        argv: the user's flags without ours.
        manifest: manifest of the pack.
        runtime_arguments: flags of the machine (`CPU_ARGUMENTS`, `missing_kernels`), overridable.
        start: the flags of `Start.arguments`.
        run_dir: folder of the run's records, if any.
        model_flags: flags of the model's shape (`JobModel.flags`).
        window: longest length in tokens of the model's config; only widens `--max-position-embeddings`.
        eval_iters: iterations of an evaluation in this run so far, unless the user gives a number.

    Raises:
        ValueError: neither pack nor flags name a vocabulary.
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
    """Return the defaults, which the user's flags may change."""
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
    """Return the iterations of one evaluation where the user gives no number.

    A tenth of the iterations that are trained between two evaluations, from 1 to 100, as far as the
    validation rows suffice. An evaluation is a forward pass, so all of them cost about 3 % of the training.
    """
    batch = batch_rows(given)
    trained = given.whole("--train-iters", given.whole("--train-samples", 0) // batch)
    between = min(trained, given.whole("--eval-interval", EVAL_INTERVAL))
    wanted = min(100, max(1, between // EVALUATION_DIVISOR))
    return min(wanted, manifest.splits["validation"].rows // batch)


def describe_evaluations(job: GivenFlags, length: Length, manifest: Manifest) -> str:
    """Describe in one line what the evaluations of a whole run will cost.

    Args:
        job: the whole Megatron command line.
        length: length of the run.
        manifest: manifest of the pack.
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
        f"{share:.1%} of the time of training; --eval-iters 0 skips it"
    )


def _dictated(argv: Sequence[str], manifest: Manifest, *, vocabulary: int | str) -> list[str]:
    """Return the flags that the pack and the method decide."""
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
        # without the first, Megatron saves synchronously after a warning
        dictated += ["--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
    return dictated
