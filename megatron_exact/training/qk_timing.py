"""The window in which query and key projections of the upper layers learn at a smaller rate.

Their learning rate begins at `factor` times that of all other parameters and then rises linearly to the
full rate. The window is a part of the training, measured in samples, so it applies on top of any learning
rate schedule and is the same on every layout. We know the paper (arXiv 2605.10504) through third-party
notes: 0.25 for about the first 4 % of training, back over the next 1 %, upper half of the layers.
`qk_groups.py` applies the window in Megatron's optimizer; `docs/qk_timing.md` describes when to use it.

This module does not import Megatron.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from megatron_exact.model.shapes import num_query_groups_of

DEFAULT_FACTOR = 0.25
DEFAULT_FRACTION = 0.04
DEFAULT_RETURN = 0.01


@dataclass(frozen=True, kw_only=True)
class QkTiming:
    """The window, in parts of the whole training."""

    factor: float = DEFAULT_FACTOR
    """Initial learning rate, as a multiple of that of the other parameters."""
    fraction: float = DEFAULT_FRACTION
    """Part of the training for which the factor applies."""
    return_fraction: float = DEFAULT_RETURN
    """Part of the training, after that, over which the factor rises to 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.factor <= 1:
            raise ValueError(f"--qk-timing-factor {self.factor} is not in [0, 1]: 1 changes nothing")
        for flag, value in (("fraction", self.fraction), ("return", self.return_fraction)):
            if not 0 <= value <= 1:
                raise ValueError(
                    f"--qk-timing-{flag} {value} is not in [0, 1]: it is a part of the training"
                )
        if self.fraction + self.return_fraction > 1:
            raise ValueError(
                f"--qk-timing-fraction {self.fraction} and --qk-timing-return {self.return_fraction} are "
                "together longer than the training: choose smaller ones"
            )

    def window(self, samples: int) -> QkWindow:
        """Return the window of a training of `samples` samples (rows)."""
        return QkWindow(
            factor=self.factor,
            hold_samples=round(self.fraction * samples),
            return_samples=round(self.return_fraction * samples),
        )


@dataclass(frozen=True, kw_only=True)
class QkWindow:
    """The window of one training, in samples."""

    factor: float
    """Initial learning rate, as in `QkTiming`."""
    hold_samples: int
    """Samples for which the factor applies."""
    return_samples: int
    """Samples, after those, over which the factor rises to 1."""

    def multiplier(self, samples: int) -> float:
        """Return the factor on the learning rate after `samples` samples; exactly 1 after the window."""
        if samples < self.hold_samples:
            return self.factor
        if samples >= self.hold_samples + self.return_samples:
            return 1.0
        return self.factor + (1 - self.factor) * (samples - self.hold_samples) / self.return_samples


def timed_layers(num_layers: int) -> range:
    """Return the numbers, from 1, of the upper half of the layers, without the middle of an odd number."""
    return range(num_layers - num_layers // 2 + 1, num_layers + 1)


def add_qk_timing_options(group: argparse._ArgumentGroup) -> None:
    """Add `--separate-qkv`, and `--qk-timing` with its parameters."""
    group.add_argument(
        "--separate-qkv",
        action="store_true",
        help="query, key and value projections as three parameters; the weights in checkpoints stay fused",
    )
    group.add_argument(
        "--qk-timing",
        action="store_true",
        help="a smaller learning rate for queries and keys of the upper half of the layers at first; "
        "implies --separate-qkv",
    )
    for name, default, text in (
        ("factor", DEFAULT_FACTOR, "their initial learning rate, relative to all others"),
        ("fraction", DEFAULT_FRACTION, "part of the training for which it applies"),
        ("return", DEFAULT_RETURN, "part of the training, after that, over which it rises to 1"),
    ):
        group.add_argument(
            f"--qk-timing-{name}",
            type=float,
            default=default,
            metavar="X",
            help=f"{text} (default: %(default)s, from notes of third parties on the paper)",
        )


def qk_timing_of(args: Any) -> QkTiming | None:
    """Return the timing that our options ask for, or None without `--qk-timing`.

    Args:
        args: namespace with the options of `add_qk_timing_options`.

    Raises:
        ValueError: parameters out of range, or given without `--qk-timing`.
    """
    timing = QkTiming(
        factor=args.qk_timing_factor,
        fraction=args.qk_timing_fraction,
        return_fraction=args.qk_timing_return,
    )
    if args.qk_timing:
        return timing
    if timing != QkTiming():
        raise ValueError("--qk-timing-factor, -fraction or -return is given without --qk-timing: add it")
    return None


def settle_separate_qkv(args: Any) -> None:
    """Set `separate_qkv` where `--qk-timing` implies it, and check that separate projections are possible.

    Args:
        args: Megatron's validated namespace with our options, changed in place.

    Raises:
        ValueError: key/value heads or layers that cannot be split, or a scheduler read from a checkpoint.
    """
    timing = qk_timing_of(args)
    args.separate_qkv = bool(args.separate_qkv or timing is not None)
    if not args.separate_qkv:
        return
    groups = num_query_groups_of(args)
    if groups % args.tensor_model_parallel_size:
        raise ValueError(
            f"--separate-qkv: {groups} key/value heads do not divide by --tensor-model-parallel-size "
            f"{args.tensor_model_parallel_size}: choose a smaller size, or leave the projections fused"
        )
    if timing is not None and not timed_layers(args.num_layers):
        raise ValueError(
            f"--qk-timing with --num-layers {args.num_layers}: of one layer none is in the upper half, so "
            "nothing would be timed; drop it, or train a model of 2 layers or more"
        )
    if timing is not None and args.use_checkpoint_opt_param_scheduler:
        raise ValueError(
            "--use-checkpoint-opt_param-scheduler with --qk-timing is not supported: the window follows "
            "from this job's flags; give the flags of the run, which are compared"
        )


def qk_timing_record(args: Any) -> dict[str, float] | None:
    """Return the timing for run.json, or None without one.

    Args:
        args: namespace with the options of `add_qk_timing_options`.
    """
    timing = qk_timing_of(args)
    return None if timing is None else asdict(timing)
