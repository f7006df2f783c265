"""Whether two models come from one pair of trainings, read from what their exports say about themselves.

`results.json` carries the `megatron_exact.json` of the model under `provenance`, whose `run` is the
run.json of the training. What makes two such records a pair: `megatron_exact.lineage`.
"""

from __future__ import annotations

from typing import Any

from megatron_exact.evaluation.result_folders import ResultFolder
from megatron_exact.evaluation.training_history import last_run
from megatron_exact.lineage import NEEDED, first_difference, unproved_pair


def training_record(folder: ResultFolder) -> dict[str, Any] | None:
    """run.json of the training behind a result folder, with `export_iteration`; None if there is none."""
    provenance = folder.provenance
    if provenance is None:
        return None
    run = last_run(provenance)
    if not isinstance(run, dict) or not run:
        return None
    return {**run, "export_iteration": provenance.get("iteration")}


def check_training_pair(baseline: ResultFolder, treatment: ResultFolder) -> str | None:
    """Compare the trainings of both sides of a pair.

    Returns:
        None if they are one pair, else why that cannot be verified.

    Raises:
        ValueError: both sides carry a record and the records disagree.
    """
    before, after = training_record(baseline), training_record(treatment)
    without = [
        str(folder.path) for folder, record in ((baseline, before), (treatment, after)) if record is None
    ]
    if before is None or after is None:
        verb = "carries" if len(without) == 1 else "carry"
        return f"{' and '.join(without)} {verb} no record of a training"
    difference = first_difference(before, after)
    if difference is not None:
        raise ValueError(
            f"{baseline.path} and {treatment.path} were not trained as a pair: {difference}; "
            "compare runs that differ in their token weighting alone"
        )
    missing = [key for key in NEEDED if key not in before or key not in after]
    if missing:
        return f"the records of {baseline.path} and {treatment.path} do not both name {', '.join(missing)}"
    return unproved_pair(before, after)
