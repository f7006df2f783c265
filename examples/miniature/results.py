"""`results.json`: all numbers of the experiment, how they are read, and what an interval allows to say."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.miniature.experiment import (
    CORPUS,
    DESIGNS,
    FAR,
    NEARBY,
    PAPER_ALPHA,
    Experiment,
    FinishedTrial,
    base_hashes,
)
from examples.miniature.language import PROBE_KIND, question_distances
from megatron_exact.data.manifest import read_manifest
from megatron_exact.evaluation.probe_comparison import compare_folders, compare_probes
from megatron_exact.evaluation.result_folders import read_probe_folder, read_probe_results
from megatron_exact.evaluation.statistics import Sampling
from megatron_exact.json_input import parse_corpus_line, read_json_object
from megatron_exact.report.results import Record, bucket_labels, read_run

Entry = dict[str, Any]
MEASURES = ("margin", "effect", "correct")
FORMAT_VERSION = 1
EFFECTIVE_CONTEXT = "effective context"
"""What the table of weights in run.json is by, for rules that weigh by bucket."""
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95 % quantile by number of values; for more, that of the normal distribution is near."""
DOUBT = "?"
"""Mark of a difference that is not significant."""


def collect_results(experiment: Experiment) -> Entry:
    """Collect everything that the page tells.

    Raises:
        ValueError: trials that do not pair.
    """
    settings, finished = experiment.settings, experiment.trials
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
        "base": _base_probe(experiment.started.folder / "probe"),
        "base_sha256": base_hashes(experiment.base),
        "designs": {
            design: _design_results(experiment, [done for done in finished if done.trial.design == design])
            for design in settings.arms
        },
        "versions": run["versions"],
        "git_commit": run["git_commit"],
        "machine": machine(),
        "seconds": {"seconds": sum(done.step.seconds for done in finished), "number": len(finished)},
    }


def _design_results(experiment: Experiment, finished: Sequence[FinishedTrial]) -> Entry:
    """Exposure, and every arm against the first."""
    by_arm: dict[str, list[FinishedTrial]] = {}
    for done in finished:
        by_arm.setdefault(done.trial.arm.name, []).append(done)
    baseline, *others = by_arm.values()
    return {
        "exposure": _exposure(baseline),
        "questions": _questions(baseline),
        "baseline": baseline[0].trial.arm.name,
        "baseline_losses": compare_losses(baseline, baseline),
        "arms": [
            {
                **asdict(arm[0].trial.arm),
                **_weights(arm),
                "probe": _compare_probes(experiment.settings.resamples, baseline, arm),
                "losses": compare_losses(baseline, arm),
            }
            for arm in others
        ],
    }


def _exposure(finished: Sequence[FinishedTrial]) -> Entry:
    """Shares of the supervised targets by bucket, the mean over the seeds."""
    manifests = [read_manifest(done.corpus.folder / "pack") for done in finished]
    counts = np.array([manifest.splits["train"].exposure.counts for manifest in manifests])
    lowers, row_tokens = list(manifests[0].splits["train"].exposure.lower), manifests[0].row_tokens
    return {
        "lower": lowers,
        "labels": bucket_labels(lowers, row_tokens),
        "tau": row_tokens // 4,
        "share": (counts / counts.sum(axis=1, keepdims=True)).mean(axis=0).tolist(),
        "targets": int(counts.sum(axis=1).mean()),
    }


def _questions(finished: Sequence[FinishedTrial]) -> Entry:
    """How many questions the documents of all seeds ask, and the share of those that are far."""
    distances: list[int] = []
    for done in finished:
        with open(done.corpus.folder / CORPUS, encoding="utf-8") as lines:
            for line in lines:
                distances += question_distances(parse_corpus_line(line, "text")["text"].split())
    distant = sum(distance >= FAR[0] for distance in distances)
    return {"number": len(distances), "far_from": FAR[0], "far_share": distant / len(distances)}


def _weights(arm: Sequence[FinishedTrial]) -> Entry:
    """Weights by bucket of effective context in the first seed, and their mean over targets and seeds.

    None for rules without such a table.
    """
    tables = [_run_record(done)["weighting"] for done in arm]
    means = [table.get("mean_weight") for table in tables]
    return {
        "weights": tables[0]["weights"] if tables[0]["by"] == EFFECTIVE_CONTEXT else None,
        "mean_weight": None if None in means else float(np.mean(means)),
    }


def _compare_probes(
    resamples: int, baseline: Sequence[FinishedTrial], arm: Sequence[FinishedTrial]
) -> Entry:
    """Margin, effect and accuracy by distance and over the ranges, with hierarchical intervals."""
    before, after = ([done.step.folder / "probe" for done in side] for side in (baseline, arm))
    # with few seeds the bootstrap is too narrow: `direction` asks Student's t over the seeds as well
    sampling, ranges = Sampling(resamples=resamples, kind="cells"), [NEARBY, FAR]
    if baseline[0].trial.arm.length == arm[0].trial.arm.length:
        compared = compare_probes(before, after, sampling=sampling, ranges=ranges)
    else:  # more steps are the point of that arm, so its schedule may not agree
        ours, theirs = ([read_probe_folder(path) for path in side] for side in (before, after))
        compared = {"pairing": None, **compare_folders(ours, theirs, sampling, ranges)}

    def kept(entry: Entry, name: str) -> Entry:
        measures = {measure: entry["measures"][measure] for measure in MEASURES}
        return {name: entry[name], "items": entry["items"], **measures}

    return {
        "pairing": compared["pairing"],
        "distances": [kept(entry, "distance") for entry in compared["distances"]],
        "ranges": [kept(entry, "distances") for entry in compared["kinds"]],
        "methods": compared["methods"],
    }


def _base_probe(folder: Path) -> list[Entry]:
    """Margin, effect and right answers (%) of the base model by distance."""
    by_distance: dict[int, list[Any]] = {}
    for item in read_probe_results(folder, PROBE_KIND):
        by_distance.setdefault(item["distance"], []).append(item)
    scale = {"margin": 1, "effect": 1, "correct": 100}
    return [
        {
            "distance": distance,
            **{name: scale[name] * float(np.mean([item[name] for item in items])) for name in MEASURES},
        }
        for distance, items in sorted(by_distance.items())
    ]


def machine() -> Entry:
    """Return what the numbers were made on, without names."""
    model, cpuinfo = platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "system": platform.system()}


def _run_record(done: FinishedTrial) -> Entry:
    return read_json_object(done.step.folder / "run" / "run.json", "remove the folder of the run")


def read_results_file(path: Path) -> Entry:
    """Read a `results.json`.

    Raises:
        OSError: no such file.
        ValueError: another file, or another version of it.
    """
    value = read_json_object(path, "name a results.json")
    if value.get("format_version") != FORMAT_VERSION or "designs" not in value:
        raise ValueError(f"{path} holds no results of the miniature: run tools/run_miniature.py again")
    return value


def compare_losses(baseline: Sequence[FinishedTrial], arm: Sequence[FinishedTrial]) -> Entry:
    """Compare the mean loss of the last evaluation, nats a target, by bucket and over groups of buckets.

    Args:
        baseline: one trial a seed.
        arm: the same seeds.

    Returns:
        `buckets` (list), `below`, `tail`, `all`: each `baseline`, `treatment`, `delta`, `interval`.

    Raises:
        ValueError: evaluations of a pair that count other targets.
    """
    runs = [[read_run(done.step.folder / "run") for done in side] for side in (baseline, arm)]
    pairs = [(one.final_evaluation, other.final_evaluation) for one, other in zip(*runs, strict=True)]
    for one, other in pairs:
        if not np.array_equal(one.bucket_targets, other.bucket_targets):
            raise ValueError("two arms of one seed were evaluated on different targets: run them again")
    first = runs[0][0].run
    lowers = np.array(first["weighting"]["lower_bounds"])
    in_tail = lowers >= first["row_tokens"] // 4
    return {
        "buckets": [_loss(pairs, lowers == lower) for lower in lowers],
        "below": _loss(pairs, ~in_tail),
        "tail": _loss(pairs, in_tail),
        "all": _loss(pairs, np.ones_like(in_tail)),
    }


def _loss(pairs: Sequence[tuple[Record, Record]], chosen: NDArray[np.bool_]) -> Entry:
    """Losses of both sides over the chosen buckets, with Student's interval over the seeds."""
    means = np.array(
        [
            [record.bucket_loss_sums[chosen].sum() / record.bucket_targets[chosen].sum() for record in pair]
            for pair in pairs
        ]
    )  # [seeds, 2]
    deltas = means[:, 1] - means[:, 0]
    return {
        "baseline": float(means[:, 0].mean()),
        "treatment": float(means[:, 1].mean()),
        "delta": float(deltas.mean()),
        "interval": student_interval(deltas),
        "pair_deltas": deltas.tolist(),
    }


def student_interval(values: NDArray[np.float64]) -> list[float] | None:
    """Return the 95 % interval of the mean of independent values, None for a single one."""
    number = len(values)
    if number < 2:
        return None
    half = STUDENT_T.get(number, 1.96 if number > 30 else 2.262) * values.std(ddof=1) / np.sqrt(number)
    return [float(values.mean() - half), float(values.mean() + half)]


def arms_of(results: Entry, design: str) -> dict[str, Entry]:
    """Return the arms of a design by name, without the one that they are compared with."""
    return {arm["name"]: arm for arm in results["designs"][design]["arms"]}


def over_range(arm: Entry, span: tuple[int, int]) -> Entry:
    """Return the measures of an arm's probe over a range of distances, `FAR` or `NEARBY`."""
    found: Entry = next(entry for entry in arm["probe"]["ranges"] if tuple(entry["distances"]) == span)
    return found


def far(arm: Entry) -> Entry:
    """Return the measures at distances that the base model was not trained on."""
    return over_range(arm, FAR)


def nearby(arm: Entry) -> Entry:
    """Return the measures at distances that the base model knows."""
    return over_range(arm, NEARBY)


def signed(measure: Entry, decimals: int = 2) -> str:
    """Return `+1.23 [+0.80, +1.66]`, a difference with its interval."""
    delta, *ends = (f"{value:+.{decimals}f}" for value in (measure["delta"], *(_interval(measure) or ())))
    return f"{delta} [{', '.join(ends)}]" if ends else delta


def marked(measure: Entry, decimals: int = 2) -> str:
    """Return `signed`, with the mark `DOUBT` where the difference is not significant."""
    return signed(measure, decimals) + ("" if direction(measure) else f" {DOUBT}")


def row_title(arm: Entry) -> str:
    """Return an arm's title; alphas that are not the paper's are called exaggerated."""
    is_exaggerated = arm["alpha"] is not None and arm["alpha"] > PAPER_ALPHA
    return f"{arm['title']} (exaggerated)" if is_exaggerated else str(arm["title"])


def _interval(measure: Entry) -> list[float] | None:
    interval: list[float] | None = measure.get("ci95") or measure.get("interval")
    return interval


def hull(measure: Entry) -> tuple[float, float]:
    """Return the lowest and highest end of the measure's interval and, over several seeds, of Student's.

    A bootstrap over few seeds gives intervals that are too narrow, so both have to agree.
    """
    over_seeds = student_interval(np.array(measure.get("pair_deltas", ())))
    intervals = [interval for interval in (_interval(measure), over_seeds) if interval]
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def direction(measure: Entry) -> int:
    """Return 1 or -1 where all intervals lie above or below 0, 0 where one of them contains it."""
    low, high = hull(measure)
    return 1 if low > 0 else -1 if high < 0 else 0


def over_seeds(deltas: Sequence[float]) -> Entry:
    """Return the mean of one difference a seed, with Student's 95 % interval."""
    values = np.array(deltas, dtype=np.float64)
    return {"delta": float(values.mean()), "interval": student_interval(values)}


def between_arms(before: Entry, after: Entry) -> Entry:
    """Return the difference of two arms in a measure, seed by seed, with Student's 95 % interval.

    Args:
        before: a measure against standard.
        after: the same measure of another arm against the same standard.
    """
    pairs = zip(before["pair_deltas"], after["pair_deltas"], strict=True)
    return over_seeds([other - one for one, other in pairs])


def verdict(measure: Entry) -> str:
    """Return what the interval says of the compared arm."""
    words = {1: "above standard", -1: "below standard", 0: "not significantly different from standard"}
    return words[direction(measure)]


def weighted_shares(shares: list[float], weights: list[float]) -> list[float]:
    """Return the shares after weighting, sum 1."""
    masses = [share * weight for share, weight in zip(shares, weights, strict=True)]
    return [mass / sum(masses) for mass in masses]


def thousandths(entry: Entry) -> Entry:
    """Return a difference of losses in thousandths of a nat, with its interval; without values by seed."""
    interval = entry["interval"] and [1000 * end for end in entry["interval"]]
    return {"delta": 1000 * entry["delta"], "interval": interval}
