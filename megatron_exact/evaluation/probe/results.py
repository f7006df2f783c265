"""`RESULTS/probe.json` and `RESULTS/probe/<kind>.jsonl`: what a probe leaves behind.

A cell enters its file when all its items are scored: the file is written anew and renamed, so that a call
that was interrupted goes on with the next cell. `evaluate_model.py` may fill the same folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_exact.evaluation.probe.items import ProbeCell
from megatron_exact.evaluation.result_record import require_same
from megatron_exact.files import write_text
from megatron_exact.json_input import read_json_lines, read_json_object, require_shape

FORMAT_VERSION = 1
PROBE = "probe.json"
FOLDER = "probe"
RESULT = {
    "id": (str, int),
    "kind": str,
    "distance": int,
    "context": int,
    "item_sha256": str,
    **dict.fromkeys(("margin", "margin_ablated", "correct", "correct_ablated"), float),
}
"""What `compare_runs.py` reads of an item."""
FIXED = ("format_version", "model", "provenance", "options", "items", "dtype")
"""Entries of probe.json that hold for the whole folder."""


def kind_path(results: Path, kind: str) -> Path:
    """Where the items of a kind lie."""
    return results / FOLDER / f"{kind}.jsonl"


def require_same_probe(results: Path, info: dict[str, Any]) -> None:
    """Raise ValueError if the folder holds the probe of another model, or one with other options."""
    if not (results / PROBE).is_file():
        if (results / FOLDER).exists():
            raise ValueError(f"{results / FOLDER} exists without a {PROBE}: choose another --output")
        return
    before = read_probe_record(results)
    for name in FIXED:
        require_same(results, name, before.get(name), info[name])


def read_probe_record(results: Path) -> dict[str, Any]:
    """probe.json.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = results / PROBE
    if not path.is_file():
        raise ValueError(f"{results} has no {PROBE}: run probe_evidence.py into it")
    content = read_json_object(path, "probe the model again")
    try:
        if not isinstance(content["items"]["kinds"], dict):
            raise TypeError("items.kinds is no object")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): probe the model again") from error
    return content


def read_results(results: Path, kind: str) -> list[dict[str, Any]]:
    """Objects of the finished cells of a kind, in the order of the file; none where there is no file.

    Raises:
        ValueError: a line that is no object with the keys of a result.
    """
    path = kind_path(results, kind)
    if not path.is_file():
        return []
    found = []
    for place, content in read_json_lines(path, "probe the model again"):
        try:
            require_shape(content, RESULT)
        except ValueError as error:
            raise ValueError(
                f"{place} is no result of the probe ({error}): probe the model again"
            ) from error
        found.append(content)
    return found


def cell_of(result: dict[str, Any]) -> ProbeCell:
    """The cell that a result belongs to."""
    return ProbeCell(kind=result["kind"], distance=result["distance"], context=result["context"])


def write_results(results: Path, kind: str, found: Sequence[dict[str, Any]]) -> None:
    """Write the file of a kind."""
    lines = [json.dumps(result, ensure_ascii=True, allow_nan=False) for result in found]
    write_text(kind_path(results, kind), "\n".join(lines) + "\n")
