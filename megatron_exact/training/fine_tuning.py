"""QA-SFT of the arms of one experiment: one run for each arm, alike in everything but its start checkpoint.

The arms must be a pair before they are tuned, and afterwards: the records of the runs are compared at both
ends (`lineage`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_exact.data.manifest import Manifest, read_manifest
from megatron_exact.integrity import content_digest, read_integrity
from megatron_exact.lineage import first_difference, unproved_pair
from megatron_exact.training.checkpoint_start import choose_start
from megatron_exact.training.job import check_against_pack, choose_model, with_defaults
from megatron_exact.training.job_flags import flag_value
from megatron_exact.training.recipes import Flag, QaSchedule, Recipe, find_recipe
from megatron_exact.training.run_record import read_run_record
from megatron_exact.training.stages import StageRun, other_setting, refuse_decided
from megatron_exact.training.weighting_options import refuse_unread

STAGE = "qa"
ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class ArmStart:
    """The checkpoint that one arm is tuned from."""

    arm: str
    """Name of the arm, and of its folder."""
    checkpoint: Path
    """Folder of the run of continued pretraining."""
    iteration: int | None
    """Iteration of the checkpoint."""
    sha256: str | None
    """Hash of the checkpoint's content; None without integrity.json."""
    record: dict[str, Any]
    """run.json of the run, with `export_iteration`."""


def parse_arm(text: str) -> tuple[str, Path]:
    """Split `NAME=CHECKPOINT`.

    Raises:
        ValueError: another form, or a name that cannot name a folder.
    """
    name, equals, checkpoint = text.partition("=")
    if not equals or not checkpoint or not ARM_NAME.fullmatch(name):
        raise ValueError(f"--arm {text}: write NAME=CHECKPOINT, such as exact=runs/exact/16k")
    return name, Path(checkpoint)


def plan_fine_tuning(
    pack: str,
    arms: Sequence[tuple[str, Path]],
    output: Path,
    *,
    layout_of: str | None = None,
    arguments: Sequence[str] = (),
) -> list[StageRun]:
    """Plan the runs, one for each arm, in the order given.

    Args:
        pack: a pack of question-answer records.
        arms: name and checkpoint of each arm.
        output: folder that receives `<arm>`.
        layout_of: recipe whose layout, precision and number of GPUs the runs use.
        arguments: more flags for every run; they win over the default schedule.

    Raises:
        ValueError: another kind of pack, arms that are no pair, a run of other settings in an output
            folder, or flags that this tool decides.
    """
    refuse_decided(arguments, by="this tool")
    refuse_unread(arguments, ["none"])
    manifest = read_manifest(pack)
    if manifest.supervision is None:
        raise ValueError(
            f"{pack} is not a pack of question-answer records: make one with megatron-exact pack-qa"
        )
    starts = [_arm_start(name, checkpoint) for name, checkpoint in arms]
    _check_pairs(starts)
    for start in starts:
        check_against_pack(choose_model(None, start.checkpoint, None), manifest)
    recipe = find_recipe(layout_of) if layout_of is not None else None
    layout: list[Flag] = [] if recipe is None else [*recipe.layout.flags(), ("--bf16", None)]
    words = with_defaults([*layout, *QaSchedule().flags()], arguments)
    runs = [_run(pack, start, output / start.arm, recipe, words) for start in starts]
    for start, run in zip(starts, runs, strict=True):
        _check_begun(run, start, manifest, words)
    return runs


def _arm_start(name: str, checkpoint: Path) -> ArmStart:
    start = choose_start(None, None, str(checkpoint))
    assert start.checkpoint is not None
    record = read_run_record(checkpoint)
    if record is None:
        raise ValueError(
            f"--arm {name}={checkpoint}: no run.json there, so nobody can say what it was trained on; name "
            "the folder of a run of continued pretraining"
        )
    files = read_integrity(start.checkpoint)
    return ArmStart(
        arm=name,
        checkpoint=checkpoint,
        iteration=start.iteration,
        sha256=content_digest(files) if files is not None else None,
        record={**record, "export_iteration": start.iteration},
    )


def _check_pairs(starts: Sequence[ArmStart]) -> None:
    if len(starts) < 2:
        raise ValueError("--arm is needed twice at least: standard=CHECKPOINT and exact=CHECKPOINT")
    names = [start.arm for start in starts]
    if len(set(names)) < len(names):
        raise ValueError(f"arms {', '.join(names)}: give each a name of its own")
    for one, other in pairwise(starts):
        difference = first_difference(one.record, other.record) or unproved_pair(one.record, other.record)
        if difference is not None:
            raise ValueError(
                f"{one.checkpoint} and {other.checkpoint} were not trained as a pair: {difference}; arms "
                "differ in their token weighting alone"
            )


def _run(pack: str, start: ArmStart, folder: Path, recipe: Recipe | None, words: Sequence[str]) -> StageRun:
    iterations = flag_value(words, "--train-iters")
    if iterations is None:
        raise ValueError("--train-samples is not supported here: say how many steps with --train-iters")
    decided = [
        *("--pack", pack, "--token-weighting", "none"),
        *("--save", str(folder), "--load", str(folder)),
        *("--pretrained-checkpoint", str(start.checkpoint)),
    ]
    return StageRun(
        stage=STAGE,
        arm=start.arm,
        folder=folder,
        previous=start.checkpoint,
        arguments=(*decided, *words),
        iterations=int(iterations),
        nodes=recipe.nodes if recipe is not None else None,
        gpus_per_node=recipe.gpus_per_node if recipe is not None else None,
    )


def _check_begun(run: StageRun, start: ArmStart, manifest: Manifest, words: Sequence[str]) -> None:
    """Raise ValueError where a run to resume or skip has another pack, seed, start or schedule.

    Otherwise the remaining arms would be trained before `check_pairs` finds the difference.
    """
    record = read_run_record(run.folder)
    if record is None:
        return
    begun = record.get("start_checkpoint") or {}
    for what, found, wanted in (
        ("pack", record.get("fingerprint"), manifest.fingerprint),
        ("seed", record.get("seed"), int(flag_value(words, "--seed") or 0)),
        ("start checkpoint", begun.get("sha256"), start.sha256),
        ("iteration of its start", begun.get("iteration"), start.iteration),
    ):
        if found != wanted:
            raise ValueError(
                f"{run.folder} contains a run whose {what} is {found}, not {wanted}: every arm needs the "
                "same pack and seed, and its own start; choose another --output"
            )
    other = other_setting(record, words, at_resume=False)
    if other is not None:
        name, found, wanted = other
        raise ValueError(
            f"{run.folder} contains a run whose {name} is {found}, not {wanted}: all arms need one "
            "configuration; give its flags again, or choose another --output"
        )
