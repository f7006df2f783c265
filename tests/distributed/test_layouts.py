"""The same global batch gives the same loss and gradient norm on every layout."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import jobs, ranks

ITERATIONS = 4
LOSS_BOUND = 2e-6
GRAD_NORM_BOUND = 1e-5
RULES = ("none", "exact", "exact-normalized")

LAYOUTS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "tp1 micro-batch 1": (1, ("--micro-batch-size", 1)),
    "tp2": (2, ("--tensor-model-parallel-size", 2)),
    "pp2": (2, ("--pipeline-model-parallel-size", 2)),
    "pp2 micro-batch 2": (2, ("--pipeline-model-parallel-size", 2, "--micro-batch-size", 2)),
    "dp2 micro-batch 2": (2, ("--micro-batch-size", 2)),
    "tp2 sequence parallel": (2, ("--tensor-model-parallel-size", 2, "--sequence-parallel")),
    "tp2 pp2": (4, ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)),
}


MORE_LAYOUTS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "tp2 micro-batch 2": (2, ("--tensor-model-parallel-size", 2, "--micro-batch-size", 2)),
    "virtual pipeline": (
        2,
        ("--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1),
    ),
    "tp2 pp2 sequence parallel micro-batch 2": (
        4,
        (
            *("--tensor-model-parallel-size", 2, "--sequence-parallel"),
            *("--pipeline-model-parallel-size", 2, "--micro-batch-size", 2),
        ),
    ),
    "recompute full": (
        1,
        ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1),
    ),
    "recompute selective": (1, ("--recompute-granularity", "selective")),
}


@pytest.fixture(scope="module")
def reference(pack: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Records of one process, micro-batch 2, by rule."""

    @functools.cache
    def records(rule: str) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp(f"reference-{rule}")
        return run(pack, checkpoint, rule, 1, ("--micro-batch-size", 2), folder)

    return records


def run(
    pack: Path, checkpoint: Path, rule: str, world: int, layout: tuple[Any, ...], folder: Path
) -> list[dict[str, Any]]:
    start = ("--pretrained-checkpoint", checkpoint, "--run-dir", folder / "run")
    ranks.train(world, jobs.command(pack, rule, ITERATIONS, *start, *layout), folder).check()
    return ranks.read_jsonl(folder / "run" / "losses.jsonl")


def largest_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> float:
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_agrees_with_one_process(
    layout: str, rule: str, pack: Path, checkpoint: Path, reference: Any, tmp_path: Path
) -> None:
    check_layout(*LAYOUTS[layout], pack, checkpoint, rule, reference(rule), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["exact", "exact-normalized"])
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_further_layout_agrees_with_one_process(
    layout: str, rule: str, pack: Path, checkpoint: Path, reference: Any, tmp_path: Path
) -> None:
    check_layout(*MORE_LAYOUTS[layout], pack, checkpoint, rule, reference(rule), tmp_path)


def check_layout(
    world: int,
    flags: tuple[Any, ...],
    pack: Path,
    checkpoint: Path,
    rule: str,
    expected: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    records = run(pack, checkpoint, rule, world, flags, tmp_path)
    assert [line["iteration"] for line in records] == list(range(1, ITERATIONS + 1))
    for line, other in zip(records, expected, strict=True):
        assert line["bucket_targets"] == other["bucket_targets"]
        assert line["targets"] == sum(line["bucket_targets"]) == other["targets"]
    for key, bound in (("loss", LOSS_BOUND), ("weighted_loss", LOSS_BOUND), ("grad_norm", GRAD_NORM_BOUND)):
        difference = largest_difference(records, expected, key)
        assert difference <= bound, f"{key} differs by {difference:.1e} (bound {bound:.0e})"


def test_the_bounds_tell_the_rules_apart(reference: Any) -> None:
    """Negative control: what separates the rules is far above what separates the layouts."""
    none, exact, normalized = (reference(rule) for rule in RULES)
    assert largest_difference(exact, none, "weighted_loss") > 1e4 * LOSS_BOUND
    assert largest_difference(exact, none, "grad_norm") > 100 * GRAD_NORM_BOUND
    assert largest_difference(exact, normalized, "grad_norm") > 100 * GRAD_NORM_BOUND
    assert exact[0]["loss"] == none[0]["loss"] == normalized[0]["loss"]
