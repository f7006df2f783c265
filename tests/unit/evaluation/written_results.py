"""Result folders of made-up models, in the format that `tools/evaluate_model.py` writes."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_exact.evaluation.result_folders import ResultFolder, read_result_folder

RUN: dict[str, Any] = {
    "fingerprint": "f" * 64,
    "row_tokens": 4096,
    "weighting": {"rule": "none"},
    "start_checkpoint": {"iteration": None, "sha256": "5" * 64, "verified": True},
    "seed": 1,
    "model": {"num_layers": 2},
    "schedule": {"train_iters": 10, "lr": 1e-4, "eval_iters": 0, "finetune": True},
    "layout": {"tensor_model_parallel_size": 1},
    "versions": {"torch": "2.13.0"},
    "git_commit": "abc",
    "resumes": [],
}


def provenance(**changes: Any) -> dict[str, Any]:
    """A megatron_exact.json whose run.json has these entries changed."""
    return {"format_version": 1, "iteration": 10, "run": copy.deepcopy({**RUN, **changes})}


def example_lines(task: str, length: int, scores: Sequence[float], salt: str = "") -> list[dict[str, Any]]:
    """The objects of one cell, example i with id `i`."""
    return [
        {
            "id": str(number),
            "task": task,
            "length": length,
            "prompt_sha256": hashlib.sha256(f"{salt}{task}{length}{number}".encode()).hexdigest(),
            "prediction": "7",
            "references": ["7"],
            "score": score,
        }
        for number, score in enumerate(scores)
    ]


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """One cell's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_results(
    folder: Path,
    cells: Mapping[tuple[str, str, int], Sequence[float]],
    *,
    salt: str = "",
    **info: Any,
) -> Path:
    """A result folder from (suite, task, length) -> scores; `info` goes into results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"model": {"name": folder.name}, **info}))
    for (suite, task, length), scores in cells.items():
        write_lines(folder / suite / task / f"{length}.jsonl", example_lines(task, length, scores, salt))
    return folder


def sign_cells(folder: Path) -> None:
    """Write the hashes of the cells into results.json, as evaluate_model.py does."""
    record = folder / "results.json"
    files = sorted(folder.glob("*/*/*.jsonl"))
    cells = {
        str(file.relative_to(folder).with_suffix("")): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }
    record.write_text(json.dumps({**json.loads(record.read_text()), "cells": cells}))


def read_new(folder: Path, **info: Any) -> ResultFolder:
    """A folder of one cell with this results.json."""
    return read_result_folder(write_results(folder, {("ruler", "vt", 1024): [1.0]}, **info))


Cell = tuple[str, int, int]
Rows = Sequence[tuple[float, float, int, int]]
"""(margin, margin_ablated, correct, correct_ablated) of each item."""


def write_probe(
    folder: Path, cells: Mapping[Cell, Rows], *, salt: str = "", forms: Sequence[str] = (), **info: Any
) -> Path:
    """A finished probe; the items of a cell are the same for one salt."""
    (folder / "probe").mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {}
    for (kind, distance, context), rows in cells.items():
        for number, (margin, ablated, correct, correct_ablated) in enumerate(rows):
            content = {
                "id": f"{distance}-{context}-{number}",
                "kind": kind,
                "distance": distance,
                "context": context,
                "item_sha256": f"{salt}{kind}{distance}{context}{number}",
                "margin": margin,
                "margin_ablated": ablated,
                "correct": correct,
                "correct_ablated": correct_ablated,
                **({"form": forms[number]} if forms else {}),
            }
            lines.setdefault(kind, []).append(json.dumps(content) + "\n")
    for kind, found in lines.items():
        (folder / "probe" / f"{kind}.jsonl").write_text("".join(found))
    kinds = {kind: len(found) for kind, found in lines.items()}
    record = {"items": {"kinds": kinds}, "finished": True, "model": {"name": folder.name}, **info}
    (folder / "probe.json").write_text(json.dumps(record))
    return folder
