"""`results.json`: all numbers of the experiment, from the files that its steps left."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_exact.data.manifest import read_manifest
from megatron_exact.evaluation.bootstrap import Sampling
from megatron_exact.evaluation.probe.compare import compare_folders, compare_probes
from megatron_exact.evaluation.probe.matching import read_probe_folder
from megatron_exact.evaluation.probe.results import read_results
from megatron_exact.files import write_json
from megatron_exact.json_input import parse_corpus_line, read_json_object
from megatron_exact.miniature.corpus import question_distances
from megatron_exact.miniature.experiment import CORPUS, FinishedBase, FinishedTrial, base_hashes
from megatron_exact.miniature.losses import compare_losses
from megatron_exact.miniature.probe_items import KIND
from megatron_exact.miniature.settings import DESIGNS, FAR, NEARBY, MiniatureSettings
from megatron_exact.report.results import bucket_labels

MEASURES = ("margin", "effect", "correct")
FORMAT_VERSION = 1
EFFECTIVE_CONTEXT = "effective context"
"""What the table of weights in run.json is by, for rules that weigh by bucket."""


def collect_results(
    settings: MiniatureSettings, finished: Sequence[FinishedTrial], begun: FinishedBase
) -> dict[str, Any]:
    """Everything that the page tells.

    Args:
        settings: of the experiment.
        finished: all its trials.
        begun: the base model and its probe.

    Raises:
        ValueError: trials that do not pair.
    """
    designs = {
        design: _design_results(settings, [done for done in finished if done.trial.design == design])
        for design in settings.arms
    }
    run = _run_record(finished[0])
    return {
        "format_version": FORMAT_VERSION,
        "settings": {
            "seeds": settings.seeds,
            "training": asdict(settings.long),
            "corpora": {design: asdict(DESIGNS[design]) for design in settings.arms},
            "validation_fraction": settings.validation_fraction,
            "items_per_distance": settings.items_per_distance,
            "resamples": settings.resamples,
            "model": run["model"],
        },
        "base": _base_probe(begun.probe),
        "base_sha256": base_hashes(begun.tokenizer),
        "designs": designs,
        "versions": run["versions"],
        "git_commit": run["git_commit"],
        "machine": machine(),
        "seconds": {"seconds": sum(done.seconds for done in finished), "number": len(finished)},
    }


def _design_results(settings: MiniatureSettings, finished: Sequence[FinishedTrial]) -> dict[str, Any]:
    """Exposure, and every arm against the first."""
    by_arm: dict[str, list[FinishedTrial]] = {}
    for done in finished:
        by_arm.setdefault(done.trial.arm.name, []).append(done)
    baseline, *others = by_arm.values()
    return {
        "exposure": exposure(baseline),
        "questions": questions(baseline),
        "baseline": baseline[0].trial.arm.name,
        "baseline_losses": compare_losses(baseline, baseline),
        "arms": [
            {
                **asdict(arm[0].trial.arm),
                "weights": _weights(arm[0]),
                "mean_weight": _mean_weight(arm),
                "probe": _compare_probes(settings, baseline, arm),
                "losses": compare_losses(baseline, arm),
            }
            for arm in others
        ],
    }


def exposure(finished: Sequence[FinishedTrial]) -> dict[str, Any]:
    """Shares of the supervised targets by bucket, the mean over the seeds."""
    manifests = [read_manifest(done.pack) for done in finished]
    counts = np.array([manifest.splits["train"].exposure.counts for manifest in manifests])
    shares = counts / counts.sum(axis=1, keepdims=True)
    lowers = list(manifests[0].splits["train"].exposure.lower)
    row_tokens = manifests[0].row_tokens
    tau = row_tokens // 4
    return {
        "lower": lowers,
        "labels": bucket_labels(lowers, row_tokens),
        "tau": tau,
        "share": shares.mean(axis=0).tolist(),
        "targets": int(counts.sum(axis=1).mean()),
    }


def questions(finished: Sequence[FinishedTrial]) -> dict[str, Any]:
    """How many questions the documents of all seeds ask, and the share of those that are far."""
    distances: list[int] = []
    for done in finished:
        with open(done.pack.parent / CORPUS, encoding="utf-8") as lines:
            for line in lines:
                distances += question_distances(parse_corpus_line(line, "text")["text"].split())
    far = sum(distance >= FAR[0] for distance in distances)
    return {"number": len(distances), "far_from": FAR[0], "far_share": far / len(distances)}


def _mean_weight(arm: Sequence[FinishedTrial]) -> float | None:
    """Mass of the weights over the number of targets, the mean over the seeds; None without a table."""
    means = [_run_record(done)["weighting"].get("mean_weight") for done in arm]
    return None if None in means else float(np.mean(means))


def _weights(done: FinishedTrial) -> list[float] | None:
    """Weights by bucket of effective context in the first seed; None for rules without such a table."""
    weighting = _run_record(done)["weighting"]
    by_bucket = weighting["by"] == EFFECTIVE_CONTEXT
    return weighting["weights"] if by_bucket else None


def _compare_probes(
    settings: MiniatureSettings, baseline: Sequence[FinishedTrial], arm: Sequence[FinishedTrial]
) -> dict[str, Any]:
    """Margin, effect and accuracy by distance and over the ranges, with hierarchical intervals."""
    before, after = [done.probe for done in baseline], [done.probe for done in arm]
    sampling = Sampling(resamples=settings.resamples)
    ranges = [NEARBY, FAR]
    if baseline[0].trial.arm.length == arm[0].trial.arm.length:
        compared = compare_probes(before, after, sampling=sampling, ranges=ranges)
    else:  # more steps are the point of that arm, so its schedule may not agree
        ours, theirs = ([read_probe_folder(path) for path in side] for side in (before, after))
        compared = {"pairing": None, **compare_folders(ours, theirs, sampling, ranges)}
    return {
        "pairing": compared["pairing"],
        "distances": [_kept(entry, "distance") for entry in compared["distances"]],
        "ranges": [_kept(entry, "distances") for entry in compared["kinds"]],
        "methods": compared["methods"],
    }


def _kept(entry: dict[str, Any], name: str) -> dict[str, Any]:
    return {
        name: entry[name],
        "items": entry["items"],
        **{measure: entry["measures"][measure] for measure in MEASURES},
    }


def _base_probe(folder: Path) -> list[dict[str, Any]]:
    """Margin and accuracy of the base model by distance."""
    by_distance: dict[int, list[Any]] = {}
    for item in read_results(folder, KIND):
        by_distance.setdefault(item["distance"], []).append(item)
    return [
        {
            "distance": distance,
            "margin": float(np.mean([item["margin"] for item in items])),
            "effect": float(np.mean([item["effect"] for item in items])),
            "correct": 100 * float(np.mean([item["correct"] for item in items])),
        }
        for distance, items in sorted(by_distance.items())
    ]


def machine() -> dict[str, Any]:
    """What the numbers were made on, without names."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "system": platform.system()}


def write_results(path: Path, results: dict[str, Any]) -> Path:
    """Write them atomically; returns the path."""
    write_json(path, results)
    return path


def _run_record(done: FinishedTrial) -> dict[str, Any]:
    return read_json_object(done.run / "run.json", "remove the folder of the run")


def read_results_file(path: Path) -> dict[str, Any]:
    """Read what `write_results` wrote.

    Raises:
        OSError: no such file.
        ValueError: another file, or another version of it.
    """
    value = read_json_object(path, "name a results.json")
    if value.get("format_version") != FORMAT_VERSION or "designs" not in value:
        raise ValueError(f"{path} holds no results of the miniature: run tools/run_miniature.py again")
    return value
