"""Rules whose weights are more than a bucket's: the same on every layout and after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_exact.data.manifest import read_manifest
from megatron_exact.data.targets import TargetLayout
from megatron_exact.exposure import build_weighting
from tests.distributed import jobs, ranks
from tests.distributed.layout_matrix import BOUNDS, CONTROL_FACTOR, DAMPED, PP2, TP2, largest_differences

FLAGS = ("--exact-alpha", 2, "--exact-bucket-weights", "0:0", "--save-interval", 3, *DAMPED)


@pytest.fixture(scope="module")
def masked_pack(corpus: Path) -> Path:
    """Rows with padding and masked targets: how many targets a row has takes counting."""
    return jobs.make_pack(corpus, "best-fit", "masked", mask_cross_document_targets=True)


def run_in_parts(
    rule: str, worlds: tuple[tuple[int, tuple[Any, ...]], ...], pack: Path, checkpoint: Path, folder: Path
) -> list[dict[str, Any]]:
    """Records of six iterations, all on one layout or three on each of two."""
    run = folder / "run"
    start = ("--load", run, "--save", run, "--pretrained-checkpoint", checkpoint)
    stop = ("--exit-interval", 6 // len(worlds))
    for part, (world, flags) in enumerate(worlds):
        argv = jobs.command(pack, rule, 6, *start, *stop, *FLAGS, *flags)
        ranks.train(world, argv, folder / f"output-{part}").check()
    return ranks.read_jsonl(run / "losses.jsonl")


@pytest.mark.parametrize(
    ("rule", "worlds"),
    [
        pytest.param("random-same-mass", ((2, PP2), (2, ())), id="random-same-mass, PP2 then DP2"),
        pytest.param(
            *("random-same-mass", ((2, TP2), (2, PP2))), id="random, TP2 then PP2", marks=pytest.mark.slow
        ),
        pytest.param(
            *("packed-position", ((2, TP2), (2, ()))), id="position, TP2 then DP2", marks=pytest.mark.slow
        ),
        pytest.param(
            *("constant", ((2, PP2), (2, TP2))), id="constant, PP2 then TP2", marks=pytest.mark.slow
        ),
    ],
)
def test_resumed_on_another_layout_every_target_has_its_weight(
    rule: str, worlds: Any, masked_pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    whole = run_in_parts(rule, ((1, ()),), masked_pack, checkpoint, tmp_path / "whole")
    parts = run_in_parts(rule, worlds, masked_pack, checkpoint, tmp_path / "parts")
    assert [line["iteration"] for line in parts] == list(range(1, 7))
    for key, difference in largest_differences(parts, whole).items():
        assert difference <= BOUNDS[key], key
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours["bucket_targets"] == theirs["bucket_targets"]
        assert sum(ours["bucket_targets"]) == ours["targets"]
    weighted = [{**line, "loss": line["weighted_loss"]} for line in whole]
    assert largest_differences(weighted, whole)["loss"] > CONTROL_FACTOR * BOUNDS["loss"]


@pytest.mark.slow
def test_matched_mass_is_the_same_on_every_layout(
    masked_pack: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """The dataset makes the weights, so the objective of a layout is that of one process."""

    def records(name: str, world: int, *flags: Any) -> list[dict[str, Any]]:
        folder = tmp_path / name
        start = ("--pretrained-checkpoint", checkpoint, "--run-dir", folder / "run")
        own = ("--exact-alpha", 2, *DAMPED)
        argv = jobs.command(masked_pack, "packed-position", 3, *start, *own, *flags)
        ranks.train(world, argv, folder / "output").check()
        return ranks.read_jsonl(folder / "run" / "losses.jsonl")

    matched = ("--match-mass", "exact")
    whole = records("whole", 1, *matched)
    for name, flags in {"PP2": PP2, "TP2": TP2, "DP2": ()}.items():
        for key, difference in largest_differences(records(name, 2, *flags, *matched), whole).items():
            assert difference <= BOUNDS[key], (name, key)
    unmatched = largest_differences(records("unmatched", 1), whole)
    assert unmatched["weighted_loss"] > CONTROL_FACTOR * BOUNDS["weighted_loss"]


def test_weight_0_trains_nothing_and_counts(masked_pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Every bucket but the first at 0: the objective is the loss of the first over the number of all."""
    lower = read_manifest(masked_pack).splits["train"].exposure.lower
    zeros = ",".join(f"{edge}:0" for edge in lower[1:])
    argv = jobs.command(
        *(masked_pack, "exact", 2, "--exact-bucket-weights", zeros),
        *("--pretrained-checkpoint", checkpoint, "--run-dir", tmp_path / "run"),
    )
    ranks.train(1, argv, tmp_path / "output").check()
    lines = ranks.read_jsonl(tmp_path / "run" / "losses.jsonl")
    assert len(lines) == 2
    for line in lines:
        assert all(targets > 0 for targets in line["bucket_targets"])
        assert line["targets"] == sum(line["bucket_targets"])
        assert line["weighted_loss"] == pytest.approx(
            line["bucket_loss_sums"][0] / line["targets"], rel=1e-6
        )
        assert line["loss"] == pytest.approx(sum(line["bucket_loss_sums"]) / line["targets"], rel=1e-12)


@pytest.mark.slow
def test_run_json_tells_the_table(masked_pack: Path, checkpoint: Path, tmp_path: Path) -> None:
    run_in_parts("packed-position", ((1, ()),), masked_pack, checkpoint, tmp_path)
    manifest = read_manifest(masked_pack)
    exposure = manifest.splits["train"].exposure
    expected = build_weighting(
        *("packed-position", exposure.counts, exposure.lower, jobs.ROW_TOKENS),
        position_counts=TargetLayout(masked_pack, manifest, "train").position_counts,
        alpha=2.0,
        bucket_weights=((0, 0.0),),
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["weighting"] == expected.describe()
    assert record["weighting"]["parameters"] == {"alpha": 2, "gamma": 0.5, "tau": 16, "weight_from_0": 0}
