"""Result files of made-up runs, in the format that training writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exact.exposure import bucket_lower_bounds

ROW_TOKENS = 64
LOWER_BOUNDS = bucket_lower_bounds(ROW_TOKENS).tolist()  # 0, 8, 16, 32
TARGETS = [10, 20, 30, 40]


def record(iteration: int, means: list[float], targets: list[int] | None = None) -> dict[str, Any]:
    """One line of losses.jsonl from the mean loss of each bucket."""
    counts = targets or TARGETS
    sums = [mean * count for mean, count in zip(means, counts, strict=True)]
    return {
        "iteration": iteration,
        "loss": sum(sums) / sum(counts),
        "weighted_loss": 1.1 * sum(sums) / sum(counts),
        "targets": sum(counts),
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "bucket_loss_sums": sums,
        "bucket_targets": counts,
    }


def run_record(rule: str) -> dict[str, Any]:
    """run.json of an arm."""
    return {
        "fingerprint": "f" * 64,
        "row_tokens": ROW_TOKENS,
        "weighting": {
            "rule": rule,
            "parameters": {"alpha": 0.15, "tau": 16.0} if rule == "exact" else {},
            "lower_bounds": LOWER_BOUNDS,
        },
        "start_checkpoint": {"path": "base", "iteration": 5, "sha256": "a" * 64},
        "seed": 3,
        "model": {"num_layers": 2},
        "schedule": {"train_iters": 4, "min_lr": None},
        "layout": {"world_size": 2},
        "versions": {"torch": "2.13.0"},
        "git_commit": "0" * 40,
        "resumes": [],
    }


def write_run(folder: Path, *, rule: str = "none", shift: float = 0.0, iterations: int = 4) -> Path:
    """A run whose losses are those of the standard arm plus `shift`; two evaluations."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).normal(0, 0.1, iterations)

    def line(iteration: int) -> str:
        step = float(noise[iteration - 1]) + shift - 0.1 * iteration
        return json.dumps(record(iteration, [4 + step, 3.5 + step, 3 + step, 2.5 + step])) + "\n"

    (folder / "run.json").write_text(json.dumps(run_record(rule)))
    (folder / "losses.jsonl").write_text("".join(line(i) for i in range(1, iterations + 1)))
    (folder / "evaluations.jsonl").write_text(line(iterations // 2) + line(iterations))
    return folder
