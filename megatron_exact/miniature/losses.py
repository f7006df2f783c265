"""Validation loss by bucket of two arms over seeds, with intervals over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_exact.miniature.experiment import FinishedTrial
from megatron_exact.report.results import Record, read_run

STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantile by number of values; for more, that of the normal distribution is near."""


def compare_losses(baseline: Sequence[FinishedTrial], arm: Sequence[FinishedTrial]) -> dict[str, Any]:
    """Mean loss of the last evaluation, nats a target, by bucket and over groups of buckets.

    Args:
        baseline: one trial a seed.
        arm: the same seeds.

    Returns:
        `buckets` (list), `below`, `tail`, `all`: each `baseline`, `treatment`, `delta`, `interval`.

    Raises:
        ValueError: evaluations of a pair that count other targets.
    """
    pairs = [(_last(one), _last(other)) for one, other in zip(baseline, arm, strict=True)]
    for one, other in pairs:
        if not np.array_equal(one.bucket_targets, other.bucket_targets):
            raise ValueError("two arms of one seed were evaluated on different targets: run them again")
    lowers = np.array(_lower_bounds(baseline[0]))
    in_tail = lowers >= _row_tokens(baseline[0]) // 4
    everything = np.ones_like(in_tail)
    return {
        "buckets": [_compare(pairs, np.arange(len(lowers)) == bucket) for bucket in range(len(lowers))],
        "below": _compare(pairs, ~in_tail),
        "tail": _compare(pairs, in_tail),
        "all": _compare(pairs, everything),
    }


def _last(done: FinishedTrial) -> Record:
    return read_run(done.run).final_evaluation


def _lower_bounds(done: FinishedTrial) -> list[int]:
    bounds: list[int] = read_run(done.run).run["weighting"]["lower_bounds"]
    return bounds


def _row_tokens(done: FinishedTrial) -> int:
    return int(read_run(done.run).run["row_tokens"])


def _compare(pairs: Sequence[tuple[Record, Record]], chosen: NDArray[np.bool_]) -> dict[str, Any]:
    means = np.array([[_mean(record, chosen) for record in pair] for pair in pairs])  # [seeds, 2]
    deltas = means[:, 1] - means[:, 0]
    return {
        "baseline": float(means[:, 0].mean()),
        "treatment": float(means[:, 1].mean()),
        "delta": float(deltas.mean()),
        "interval": student_interval(deltas),
        "pair_deltas": deltas.tolist(),
    }


def _mean(record: Record, chosen: NDArray[np.bool_]) -> float:
    return float(record.bucket_loss_sums[chosen].sum() / record.bucket_targets[chosen].sum())


def student_interval(values: NDArray[np.float64]) -> list[float] | None:
    """95 % interval of the mean of independent values, None for a single one."""
    number = len(values)
    if number < 2:
        return None
    half = STUDENT_T.get(number, 1.96 if number > 30 else 2.262) * values.std(ddof=1) / np.sqrt(number)
    return [float(values.mean() - half), float(values.mean() + half)]
