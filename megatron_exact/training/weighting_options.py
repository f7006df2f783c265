"""Options of the weighting rules: their parser, which of them a rule reads, what they mean for a pack.

A flag that the rule does not read would change nothing, and the run would look like another than it is: it
is an error. The table of rules (`exposure/rules.py`) says which flags a rule reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from megatron_exact.command_line import positive_int
from megatron_exact.data.manifest import Manifest
from megatron_exact.data.rows import RowReader
from megatron_exact.data.score_files import ScoreReader, gaining_counts, open_record
from megatron_exact.data.targets import TargetLayout
from megatron_exact.exposure import (
    DEFAULT_ALPHA,
    DEFAULT_GAMMA,
    MASSES,
    RULES,
    TAU_ROW_FRACTION,
    RuleParameters,
    Weighting,
    bucket_lower_bounds,
    build_weighting,
    find_rule,
    readers,
    score_readers,
)
from megatron_exact.exposure.confidence import (
    BORDERS,
    CONFIDENCE_RULES,
    DEFAULT_SPARSE_KAPPA,
    ROW_FRACTION,
    ConfidenceParameters,
    default_windows,
)
from megatron_exact.exposure.row_weights import DEFAULT_EVIDENCE_NATS
from megatron_exact.training.job_flags import flag_value, has_flag


def bucket_weights(text: str) -> tuple[tuple[int, float], ...]:
    """Parse lower edges and weights, such as `0:1.1,8:1.05`, for argparse."""
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((int(lower), float(weight)) for lower, weight in pairs)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} does not name buckets and weights, such as 0:1.1,8:1.05"
        ) from None


def add_weighting_options(group: argparse._ArgumentGroup) -> None:
    """Add `--token-weighting` and the parameters of all rules."""
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
        help="first effective context of the tail, tokens (default: row length / "
        f"{TAU_ROW_FRACTION}, the paper's)",
    )
    group.add_argument(
        "--exact-cap",
        type=float,
        metavar="W",
        help="largest weight that the formula may give, 1 or more; the excess is discarded "
        "(default: no cap, as in the paper)",
    )
    group.add_argument(
        "--exact-bucket-weights",
        type=bucket_weights,
        default=(),
        metavar="LOWER:W,...",
        help="weights of buckets, set by hand and named by their lower edge, such as 0:1.1,8:1.05; at 0 a "
        "bucket trains nothing, and still counts in the number of targets (default: the formula's)",
    )
    group.add_argument(
        "--match-mass",
        type=str.lower,
        choices=tuple(MASSES),
        metavar="RULE",
        help="scale the extra weight of the rule so that the mean weight over the training split equals "
        f"that of RULE ({', '.join(MASSES)}) with the same parameters (default: the rule's own mass)",
    )
    group.add_argument(
        "--exact-evidence-nats",
        type=float,
        default=DEFAULT_EVIDENCE_NATS,
        metavar="N",
        help="exact-evidence: nats by which the far context must lower a target's loss (default: "
        "%(default)s; ours, not of the paper)",
    )
    _add_confidence_options(group)


def _add_confidence_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of the confidence rules."""
    group.add_argument(
        "--confidence-scores",
        metavar="DIR",
        help="stored scores of the pack (megatron-exact score) for exact-evidence, dense, sparse, longce, "
        "ppmi and npmi (and -values); without them the model in training scores short windows itself, "
        "inside each step (not for exact-evidence)",
    )
    group.add_argument(
        "--confidence-lambda",
        type=float,
        default=ConfidenceParameters.lam,
        metavar="L",
        help="dense: smallest weight of a target, 0 to 1 (default: %(default)s; not stated in the paper)",
    )
    group.add_argument(
        "--confidence-kappa",
        type=float,
        metavar="K",
        help="sparse, ppmi, npmi (and -values): the fraction of a row's targets that keep a weight "
        f"(default: {DEFAULT_SPARSE_KAPPA} for sparse, all for the others; not stated in the paper)",
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
        help="ppmi, npmi (and -values): the factor by which a likelihood has to change "
        "(default: %(default)s; not stated in the paper)",
    )
    group.add_argument(
        "--short-window",
        type=positive_int,
        metavar="N",
        help="without --confidence-scores: tokens of a short window "
        f"(default: row length / {ROW_FRACTION})",
    )
    group.add_argument(
        "--short-stride",
        type=positive_int,
        metavar="N",
        help="without --confidence-scores: tokens from one short window to the next (default: 3/4 of it)",
    )
    group.add_argument(
        "--short-border",
        choices=BORDERS,
        help="without --confidence-scores: whether a target past a short window belongs to the next one by "
        f"its own token (target, as in the authors' code) or by its input (input) (default: {BORDERS[0]})",
    )


def weighting_of(options: argparse.Namespace, manifest: Manifest) -> Weighting:
    """Apply the rule of a job to the training split's counts.

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
        match_mass=options.match_mass,
        evidence_nats=options.exact_evidence_nats,
        gaining_counts=None
        if options.confidence_scores is None
        else lambda nats: gaining_counts(
            RowReader(options.pack, "train", source_root=options.source_root),
            ScoreReader(options.confidence_scores, manifest, "train"),
            nats,
        )[0],
        **confidence_parameters(options, manifest),
    )


def confidence_parameters(options: argparse.Namespace, manifest: Manifest) -> dict[str, Any]:
    """Return the arguments of `build_weighting` from these options; empty for other rules.

    Raises:
        ValueError, FileNotFoundError: scores that are missing, incomplete or of another pack, that the rule
            does not read, or together with short windows.
    """
    rule = options.token_weighting
    if rule not in CONFIDENCE_RULES:
        if options.confidence_scores is not None and not find_rule(rule).reads_scores:
            raise ValueError(
                f"--confidence-scores with --token-weighting {rule}, which reads none: choose one of "
                f"{', '.join(score_readers())}, or drop it"
            )
        return {"has_scores": options.confidence_scores is not None}
    folder = options.confidence_scores
    scores = None if folder is None else open_record(folder, manifest, "train")
    if scores is None:
        windows = default_windows(
            manifest.row_tokens,
            window=options.short_window,
            stride=options.short_stride,
            border=options.short_border or BORDERS[0],
        )
        window, stride, border = windows.window, windows.stride, windows.border
    elif {options.short_window, options.short_stride, options.short_border} != {None}:
        raise ValueError(
            "--short-window, --short-stride or --short-border with --confidence-scores: windows were "
            "chosen when the pack was scored; drop them, or score it again (megatron-exact score)"
        )
    else:
        window, stride, border = scores.short_window, scores.short_stride, scores.short_border
    kappa = options.confidence_kappa
    return {
        "has_scores": scores is not None,
        "confidence_lambda": options.confidence_lambda,
        "confidence_kappa": DEFAULT_SPARSE_KAPPA if kappa is None and rule == "sparse" else kappa,
        "confidence_cap": options.confidence_cap,
        "confidence_s": options.confidence_s,
        "short_window": window,
        "short_stride": stride,
        "short_border": border,
    }


def score_reader(options: Any, manifest: Manifest) -> ScoreReader | None:
    """Return the stored scores of the training split, or None without `--confidence-scores`.

    Raises:
        ValueError, FileNotFoundError: the scores are missing, incomplete or of another pack.
    """
    if options.confidence_scores is None:
        return None
    return ScoreReader(options.confidence_scores, manifest, "train")


def flag_of(parameter: str) -> str:
    """Return the flag that sets a field of RuleParameters."""
    prefix = "" if parameter.startswith(("confidence_", "short_", "match_")) else "exact_"
    return f"--{prefix}{parameter}".replace("_", "-")


PARAMETER_OF = {flag_of(field.name): field.name for field in fields(RuleParameters)}
"""Flag -> field of RuleParameters."""


def unread_flags(rule: str) -> tuple[str, ...]:
    """Return the flags that a rule does not read; each takes one value.

    Raises:
        ValueError: an unknown rule.
    """
    own = find_rule(rule).parameters
    return tuple(flag for flag, parameter in PARAMETER_OF.items() if parameter not in own)


def refuse_unread(argv: Sequence[str], rules: Sequence[str]) -> None:
    """Raise for flags that none of these rules reads.

    Args:
        argv: a command line with recipes expanded.
        rules: the rule of the job, or of all arms that get the command line.

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
