"""comparison.json of made-up comparisons, in the format that compare_runs.py writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TRAINED, EXTRAPOLATED = ("1K", "2K"), ("4K",)
TOKENS = {"1K": 1024, "2K": 2048, "4K": 4096}
LONG = {
    "nolima": [
        *("needle_set", "needle_set_hard", "needle_set_w_Distractor", "needle_set_MC"),
        *("needle_set_ONLYDirect", "needle_set_w_CoT"),
    ],
    "ruler": [
        *(f"niah_{kind}_{number}" for kind in ("single", "multikey") for number in (1, 2, 3)),
        *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"),
    ],
}
"""Tasks of the suites with windows."""
QA = ("arc_challenge", "gsm8k", "hellaswag", "mmlu", "piqa", "winogrande")


def estimate(baseline: float, delta: float, half_width: float = 1.0) -> dict[str, Any]:
    """One entry's numbers."""
    return {
        "cells": 3,
        "examples": 300,
        "baseline": baseline,
        "treatment": baseline + delta,
        "delta": delta,
        "ci95": [delta - half_width, delta + half_width],
        "relative_lift_percent": 100 * delta / baseline if baseline else None,
    }


def side(
    rule: str | None,
    *,
    preset: str | None = None,
    name: str = "exported",
    parameters: dict[str, float] | None = None,
    licences: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One run of a pair: a weighted stage, then instruction tuning; no record if the rule is None."""
    stages = [
        {"rule": rule, "parameters": parameters or {}, "row_tokens": 4096},
        {"rule": "none", "parameters": {}, "row_tokens": 2048},
    ]
    return {
        "results": f"results/{rule}",
        "model": {"name": name},
        "token_weighting": None if rule is None else "none",
        "seed": 1,
        "fingerprint": "f" * 64,
        "iteration": 10,
        "preset": preset,
        "training": [] if rule is None else stages,
        "licences": licences or {"model": None, "corpora": []},
    }


def measures(baseline: float, delta: float, half_width: float = 0.1) -> dict[str, Any]:
    """Measures of one probe entry: effect in nats, right answers in points."""

    def one(scale: float) -> dict[str, Any]:
        return {
            "baseline": scale * baseline,
            "treatment": scale * (baseline + delta),
            "delta": scale * delta,
            "ci95": [scale * (delta - half_width), scale * (delta + half_width)],
            "pair_deltas": [scale * delta],
        }

    return {"effect": one(1), "correct": one(10)}


def probe(distances: Sequence[int] = (64, 128, 4096, 65536)) -> dict[str, Any]:
    """Two kinds by distance, one field; its cell of far evidence and short context is missing."""
    cells, by_distance, kinds = [], [], []
    for kind in ("answer-position", "field-lookup"):
        for number, distance in enumerate(distances):
            entry = {
                "kind": kind,
                "distance": distance,
                "items": 20,
                "measures": measures(3 - number, 0.2 * number),
            }
            cells.append({**entry, "context": distance + 10})
            by_distance.append({**entry, "cells": 1})
        for low, high in ((distances[0], distances[-1]), (4096, 65536)):
            kinds.append(
                {
                    "kind": kind,
                    "distances": [low, high],
                    "cells": 4,
                    "items": 80,
                    "measures": measures(1, 0.15),
                }
            )
    for distance in (64, 128):
        for context in (128, 256, 512):
            if (distance, context) != (128, 128):
                cells.append(
                    {
                        "kind": "evidence-field",
                        "distance": distance,
                        "context": context,
                        "items": 20,
                        "measures": measures(2 - distance / 100, distance / 500 - 0.05),
                    }
                )
    return {"cells": cells, "distances": by_distance, "kinds": kinds, "methods": {}}


def long_cells(keys: Iterable[tuple[str, str, int]], examples: int = 500) -> list[dict[str, Any]]:
    """Cells of (suite, task, length)."""
    return [
        {"suite": suite, "task": task, "length": length, **estimate(20, 1), "examples": examples}
        for suite, task, length in keys
    ]


def comparison(
    rule: str | None = "exact",
    *,
    preset: str | None = "qwen2.5-0.5b",
    gain: float = 2.0,
    parameters: dict[str, float] | None = None,
    has_probe: bool = False,
    has_regimes: bool = True,
    **about: Any,
) -> dict[str, Any]:
    """A whole comparison; gains grow with the window, and RULER's are half of NoLiMa's."""
    aggregates, lengths = [], []
    for suite, share in (("nolima", 1.0), ("ruler", 0.5)):
        for regime, factor in (("trained", 1.0), ("extrapolated", 1.5), ("all", 1.2)):
            if has_regimes or regime == "all":
                entry = {"suite": suite, "regime": regime, **estimate(20, gain * share * factor)}
                aggregates.append(entry)
        for number, window in enumerate((*TRAINED, *EXTRAPOLATED)):
            lengths.append(
                {
                    "suite": suite,
                    "length": TOKENS[window],
                    **estimate(20 - 5 * number, gain * share * (number + 1)),
                }
            )
    cells = [
        {"suite": "qa", "task": task, "length": 0, **estimate(50, number / 10)}
        for number, task in enumerate(QA)
    ]
    cells += long_cells(
        (suite, task, TOKENS[window])
        for suite, tasks in LONG.items()
        for task in tasks
        for window in (*TRAINED, *EXTRAPOLATED)
    )
    aggregates.append({"suite": "qa", "regime": "all", **estimate(50, 0.25)})
    lengths.append({"suite": "qa", "length": 0, **estimate(50, 0.25)})
    content: dict[str, Any] = {
        "format_version": 1,
        "pairing": {"verified": True, "statement": "training verified as paired: all agree"},
        "runs": [
            {
                "baseline": side(None if rule is None else "none", preset=preset, **about),
                "treatment": side(rule, preset=preset, parameters=parameters, **about),
            }
        ],
        "options": {
            "trained_lengths": list(TRAINED) if has_regimes else [],
            "extrapolated_lengths": list(EXTRAPOLATED) if has_regimes else [],
            "nolima_k_tokens": 1024,
        },
        "methods": {"ci95": "percentiles"},
        "notes": ["one pair of runs"],
        "aggregates": aggregates,
        "lengths": lengths,
        "cells": cells,
    }
    return {**content, "probe": probe()} if has_probe else content


def write_comparison(folder: Path, content: dict[str, Any]) -> Path:
    """Write comparison.json into a folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(content))
    return folder


def write_pack(folder: Path, licence: str | None = "odc-by") -> Path:
    """The part of a pack's manifest that the report reads."""
    folder.mkdir(parents=True)
    manifest = {
        "row_tokens": 64,
        "splits": {"train": {"exposure": {"lower": [0, 8, 16, 32], "counts": [400, 300, 200, 100]}}},
        "sources": [{"prefix": "../corpora/web", "licence": licence}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
