"""Options of the confidence-based weighting rules, and what they mean for a pack."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_exact.command_line import positive_int
from megatron_exact.data.manifest import Manifest
from megatron_exact.data.score_files import ScoreReader, ScoreRecord, open_record
from megatron_exact.exposure.confidence import (
    CONFIDENCE_RULES,
    DEFAULT_SPARSE_KAPPA,
    ConfidenceParameters,
    default_windows,
)


def add_confidence_options(group: Any) -> None:
    """Add the options.

    Args:
        group: an argument group of argparse.
    """
    group.add_argument(
        "--confidence-scores",
        metavar="DIR",
        help="stored scores of the pack (tools/score_tokens.py) for dense, sparse, longce, ppmi and npmi; "
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
            "was scored; drop them, or score it again (tools/score_tokens.py)"
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
