"""The same global batch gives the same loss and gradient norm on every layout of `layout_matrix.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import jobs
from tests.distributed import layout_matrix as matrix

Records = list[dict[str, Any]]
Runner = Callable[..., Records]


@pytest.fixture(scope="module")
def start(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return matrix.make_start(pack, tmp_path_factory.mktemp("layouts") / "start")


@pytest.fixture(scope="module")
def reference(pack: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Records of one process by rule (and further flags)."""

    @functools.cache
    def records(rule: str, *more: Any) -> Records:
        return matrix.run(matrix.REFERENCE, rule, pack, start, tmp_path_factory.mktemp("reference"), *more)

    return records


@pytest.fixture(scope="module")
def quick_run(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Runs two layers on four rows, which is enough where there are two parts of either at most."""
    start = matrix.make_start(pack, tmp_path_factory.mktemp("quick_layouts") / "start", ())

    @functools.cache
    def records(layout: matrix.Layout, rule: str, fault: Any = None) -> Records:
        folder = tmp_path_factory.mktemp("quick")
        return matrix.run(layout, rule, pack, start, folder, size=(), fault=fault)

    return records


def rules(*, quick: bool) -> list[tuple[str, str]]:
    """Layout and rule of the tests that are quick, or of all others."""
    return [
        (name, rule)
        for name, layout in matrix.LAYOUTS.items()
        for rule in matrix.RULES
        if (rule in layout.quick) == quick
    ]


UNEVEN = {
    "first": ("--decoder-first-pipeline-num-layers", 1),
    "listed": ("--pipeline-model-parallel-layout", "Ettt|tL"),
}
"""Pipeline stages of 1 and 3 layers, and of 3 and 1."""
CONTROLS = [(layout, rule) for layout in matrix.CONTROL_LAYOUTS for rule in matrix.CONTROLS]


def check(records: Records, expected: Records, bounds: dict[str, float]) -> None:
    assert [line["iteration"] for line in records] == list(range(1, matrix.ITERATIONS + 1))
    assert matrix.same_targets(records, expected)
    for key, difference in matrix.largest_differences(records, expected).items():
        assert difference <= bounds[key], f"{key} differs by {difference:.1e} (bound {bounds[key]:.0e})"


@pytest.mark.parametrize(("layout", "rule"), rules(quick=True))
def test_layout_agrees_with_one_process(layout: str, rule: str, quick_run: Runner) -> None:
    records = quick_run(matrix.LAYOUTS[layout], rule)
    check(records, quick_run(matrix.REFERENCE, rule), matrix.BOUNDS)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "rule"), rules(quick=False))
def test_further_layout_agrees_with_one_process(
    layout: str, rule: str, pack: Path, start: Path, reference: Runner, tmp_path: Path
) -> None:
    records = matrix.run(matrix.LAYOUTS[layout], rule, pack, start, tmp_path)
    check(records, reference(rule), matrix.BOUNDS)


@pytest.mark.parametrize("parts", ["first", pytest.param("listed", marks=pytest.mark.slow)])
def test_uneven_pipeline_stages_agree_with_one_process(
    parts: str, pack: Path, start: Path, reference: Runner, tmp_path: Path
) -> None:
    layout = matrix.Layout(world=2, flags=(*matrix.PP2, *UNEVEN[parts]))
    check(matrix.run(layout, "exact", pack, start, tmp_path), reference("exact"), matrix.BOUNDS)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "rule"), CONTROLS)
def test_control_agrees_with_one_process(
    layout: str, rule: str, pack: Path, start: Path, reference: Runner, tmp_path: Path
) -> None:
    records = matrix.run(matrix.LAYOUTS[layout], rule, pack, start, tmp_path, *matrix.DAMPED)
    check(records, reference(rule, *matrix.DAMPED), matrix.BOUNDS)


def seen_weights(name: str, pack: Path, start: Path, folder: Path) -> list[list[bytes]]:
    """Weights that the loss of each rank sees under `random-same-mass`, by row, in no order.

    Ranks whose loss is not computed are left out.
    """

    def record() -> None:
        from megatron_exact.training import run

        sound, seen = run.weighted_token_loss, []

        def recording(losses: Any, targets: Any, *args: Any, **kwargs: Any) -> Any:
            seen.extend((targets.weights * targets.loss_mask).reshape(-1, jobs.ROW_TOKENS).unbind())
            torch.save(seen, folder / f"seen{torch.distributed.get_rank()}.pt")
            return sound(losses, targets, *args, **kwargs)

        run.weighted_token_loss = recording

    layout = matrix.REFERENCE if name == "reference" else matrix.LAYOUTS[name]
    matrix.run(layout, "random-same-mass", pack, start, folder, fault=record)
    return [[row.numpy().tobytes() for row in torch.load(file)] for file in sorted(folder.glob("seen*.pt"))]


@pytest.mark.slow
def test_the_loss_sees_the_same_random_weights_on_every_layout(
    pack: Path, start: Path, tmp_path: Path
) -> None:
    """To the bit, so what a layout changes about a run is rounding; see DAMPED."""
    (rows,) = seen_weights("reference", pack, start, tmp_path / "reference")
    assert len(set(rows)) > 1
    for name, parts in (("TP2 + SP", 1), ("PP2, micro-batch 2", 1), ("DP2", 2)):
        seen = seen_weights(name, pack, start, tmp_path / name)
        copies = len(seen) // parts  # tensor-parallel ranks see the same rows
        assert sorted(row for rank in seen for row in rank) == sorted(rows * copies), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", matrix.BF16_LAYOUTS)
def test_bfloat16_layout_agrees_with_one_process(
    layout: str, pack: Path, start: Path, reference: Runner, tmp_path: Path
) -> None:
    records = matrix.run(matrix.LAYOUTS[layout], "exact", pack, start, tmp_path, *matrix.BF16)
    check(records, reference("exact", *matrix.BF16), matrix.BF16_BOUNDS)


@pytest.mark.parametrize("fault", matrix.FAULTS)
def test_a_fault_of_context_parallelism_is_far_outside_the_bounds(fault: str, quick_run: Runner) -> None:
    """Negative control."""
    records = quick_run(matrix.LAYOUTS["CP2"], "exact", matrix.FAULTS[fault])
    expected = quick_run(matrix.REFERENCE, "exact")
    assert matrix.same_targets(records, expected)
    for key, difference in matrix.largest_differences(records, expected).items():
        assert difference > matrix.CONTROL_FACTOR * matrix.BOUNDS[key], key


def test_the_bounds_tell_the_rules_apart(quick_run: Runner) -> None:
    """Negative control: what separates the rules is far above what separates the layouts."""
    none, exact, normalized = (quick_run(matrix.REFERENCE, rule) for rule in matrix.RULES)
    for one, other in ((exact, none), (normalized, none), (exact, normalized)):
        difference = matrix.largest_differences(one, other)["grad_norm"]
        assert difference > matrix.CONTROL_FACTOR * matrix.BOUNDS["grad_norm"]
        assert difference > matrix.BF16_BOUNDS["grad_norm"]
    assert exact[0]["loss"] == none[0]["loss"] == normalized[0]["loss"]
    difference = matrix.largest_differences(exact, none)["weighted_loss"]
    assert difference > matrix.CONTROL_FACTOR * matrix.BOUNDS["weighted_loss"]
