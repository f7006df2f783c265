"""`results.json`, written: what a result folder is about, and what may not be mixed in it.

`{"format_version", "model": {"name", "config_sha256", "tokenizer_sha256", "weights_sha256"}, "lm_eval",
"provenance", "backend": {"name", "dtype", "calls": [{"versions", ...}]},
"suites": {suite: {"options", "template", "sources": {name: sha256}}}}`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_exact.evaluation.result_folders import FORMAT_VERSION, RESULTS, Cell
from megatron_exact.files import write_json
from megatron_exact.folder_lock import LEASE, Lease
from megatron_exact.json_input import read_json_object

SHOWN_CHARACTERS = 60
MERGE_SECONDS = 30
"""How long a call waits for others that merge what they have."""


def merged_info(results: Path, info: dict[str, Any], suite: str, record: dict[str, Any]) -> dict[str, Any]:
    """The content of results.json with one more suite, or more of a suite that is there.

    Args:
        results: the folder; it may not exist yet.
        info: what holds for the whole folder; the `calls` of its `backend` are united.
        suite: name of the suite.
        record: its `options`, `template` and `sources`; sources are united.

    Raises:
        ValueError: the folder holds another model, other options, or something else altogether.
    """
    content = {"format_version": FORMAT_VERSION, **info}
    before = _read(results)
    if before is None:
        return {**content, "suites": {suite: record}, "cells": {}}
    for name, value in content.items():
        if name != "backend":
            require_same(results, name, before.get(name), value)
    content["backend"] = _united_backend(results, before.get("backend"), content["backend"])
    suites = before["suites"]
    if suite in suites:
        there = suites[suite]
        require_same(results, f"options of {suite}", there.get("options"), record["options"])
        require_same(results, f"template of {suite}", there.get("template"), record["template"])
        sources = there.get("sources") or {}
        common = {name: sources[name] for name in sources if name in record["sources"]}
        require_same(results, "data", common, {name: record["sources"][name] for name in common})
        record = {**record, "sources": {**sources, **record["sources"]}}
    cells = {} if before.get("cells") is None else {"cells": before["cells"]}  # none in older folders
    return {**content, "suites": {**suites, suite: record}, **cells}


def write_merged(results: Path, info: dict[str, Any], suite: str, record: dict[str, Any]) -> dict[str, Any]:
    """Write what `merged_info` gives and return it; of two calls at a time, neither loses its suite.

    Raises:
        ValueError: as `merged_info`: another call may have filled the folder in the meantime.
    """
    results.mkdir(parents=True, exist_ok=True)
    with _alone_in(results):
        merged = merged_info(results, info, suite, record)
        write_json(results / RESULTS, merged)
    return merged


def record_cell(results: Path, cell: Cell, sha256: str) -> None:
    """Write the hash of a finished cell into results.json.

    Raises:
        ValueError: another file stood there when the cell was finished.
    """
    with _alone_in(results):
        content = _read(results)
        if content is None or content.get("cells") is None:  # a folder of an older version
            return
        before = content["cells"].get(str(cell), sha256)
        if before != sha256:
            raise ValueError(
                f"{results / str(cell)}.jsonl has changed since it was written, or is of another model: "
                "remove the file and call again to evaluate the cell again"
            )
        if str(cell) not in content["cells"]:
            content["cells"][str(cell)] = sha256
            write_json(results / RESULTS, content)


def forget_cell(results: Path, cell: Cell) -> None:
    """Take the hash of a cell whose file was removed out of results.json."""
    with _alone_in(results):
        content = _read(results)
        if content is not None and (content.get("cells") or {}).pop(str(cell), None) is not None:
            write_json(results / RESULTS, content)


def _alone_in(results: Path) -> Lease:
    """The lease of a folder that exists; others wait for it."""
    return Lease(
        results / LEASE,
        folder=results,
        purpose="writing its results.json",
        remedy="choose another --output",
        wait_seconds=MERGE_SECONDS,
    )


def _united_backend(results: Path, before: Any, now: dict[str, Any]) -> dict[str, Any]:
    """How all calls of a folder ran the model, which must be in one number type on one engine."""
    if before is None:
        raise ValueError(
            f"{results} was made by a version that did not record backend and dtype, so that nobody can "
            "say whether they are the same now: choose another --output"
        )
    for name in ("name", "dtype"):
        require_same(results, f"backend: {name}", before.get(name), now[name])
    calls = before.get("calls") or []
    return {**now, "calls": [*calls, *(call for call in now["calls"] if call not in calls)]}


def _read(results: Path) -> dict[str, Any] | None:
    path = results / RESULTS
    if not path.is_file():
        others = [] if not results.is_dir() else [entry.name for entry in results.iterdir()]
        others = [name for name in others if not name.startswith(".")]  # what another call is writing
        if set(others) - {"probe", "probe.json"}:  # probe_evidence.py may have been here first
            raise ValueError(f"{results} exists and holds no {RESULTS}: choose another --output")
        return None
    content = read_json_object(path, "choose another --output")
    try:
        if not isinstance(content["suites"], dict):
            raise TypeError("suites is no object")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): choose another --output") from error
    return content


def require_same(results: Path, name: str, before: Any, now: Any) -> None:
    """Raise ValueError, naming the first difference, unless a folder was made with what holds now."""
    if before != now:
        raise ValueError(
            f"{results} was made with another {name}: {_difference(before, now)}; "
            "choose another --output, or repeat the options"
        )


def _difference(before: Any, now: Any) -> str:
    """The first thing that differs, short."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                return f"{name} {_difference(before.get(name), now.get(name))}"
    return f"{str(before)[:SHOWN_CHARACTERS]!r} there, {str(now)[:SHOWN_CHARACTERS]!r} now"
